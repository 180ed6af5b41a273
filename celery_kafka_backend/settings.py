"""What a user configures, checked and frozen. Reading it from a Celery app is the backend's work.

``result_backend = "kafka://b1:9092,b2:9092/?view=redis://…"`` is enough; ``kafka_backend_settings``
is a dictionary with the rest, its keys the attributes of `Settings`. A key that is unknown, or
contradicts another, is a `SettingsError` at start that names it.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from celery_kafka_backend import events
from celery_kafka_backend.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

DAY_MS: Final = 86_400_000
SETTING: Final = "kafka_backend_settings"

Delivery = Literal["acknowledged", "pipelined", "buffered"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a user may set.

    Attributes:
        bootstrap_servers: ``host:port,host:port``; from the URL unless given here.
        views: URLs of the views, the primary (which ``AsyncResult`` reads) first; from the URL's
            ``view=`` parameters unless given here.
        topic_prefix: Names topics and consumer groups; one prefix serves one app.
        delivery: When a stored result counts as stored: ``acknowledged`` (seen before the task is
            done), ``pipelined`` (before the next one is), ``buffered`` (nobody looks).
        delivery_timeout_s: Bound on the wait for an acknowledgement.
        publish_timeout_s: Bound on what ``delay()`` of a chord waits for its declaration.
        barrier_timeout_s: Bound on a read inside the worker that waits for the view.
        record: Kinds of events to record; results are always recorded.
        record_ignored: Record the states of tasks with ``ignore_result`` (without payload).
        exclude: Names of tasks (``*`` at the end allowed) of which only results are recorded.
        sample: Share of task ids, by task name, whose other events are recorded: ``{name: 0.01}``.
        redact: Dotted path of ``f(task_name, args, kwargs) -> (args, kwargs)`` for the recorded
            arguments, or ``"all"`` to leave them out.
        max_message_bytes: Largest record, for client and topics.
        partitions: Partitions of the log.
        chord_partitions: Partitions of the chords' topic; may never change.
        replication_factor: Copies of each partition.
        min_insync_replicas: Copies that must have a record before it is acknowledged.
        retention_ms: How long the log keeps events.
        chord_key: Secret for an HMAC over chord declarations; "" for none.
        history: Which views keep every event, by URL scheme; default: each store's own.
        history_limit: Events kept per task where history is bounded (Redis).
        poll_interval_s: Longest pause between two reads of a waiter on a view without push.
        client: librdkafka options under their own names, for every connection.
        producer: … for producers only.
        consumer: … for consumers only.
        view_options: Options for a view's own driver, by URL scheme.
    """

    bootstrap_servers: str = ""
    views: tuple[str, ...] = ()
    topic_prefix: str = "celery"
    delivery: Delivery = "acknowledged"
    delivery_timeout_s: float = 30.0
    publish_timeout_s: float = 10.0
    barrier_timeout_s: float = 2.0
    record: frozenset[str] = events.KINDS
    record_ignored: bool = True
    exclude: tuple[str, ...] = ()
    sample: dict[str, float] = {}
    redact: str = ""
    max_message_bytes: int = 1_048_576
    partitions: int = 12
    chord_partitions: int = 12
    replication_factor: int = 3
    min_insync_replicas: int = 2
    retention_ms: int = 7 * DAY_MS
    chord_key: str = ""
    history: dict[str, bool] = {}
    history_limit: int = 200
    poll_interval_s: float = 0.5
    client: dict[str, Any] = {}
    producer: dict[str, Any] = {}
    consumer: dict[str, Any] = {}
    view_options: dict[str, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"<Settings {mask(self.bootstrap_servers)} prefix={self.topic_prefix!r} views={[mask(v) for v in self.views]}>"


# What the producer itself relies on; another value breaks a promise, so it is refused.
_FIXED_PRODUCER: Final = {"acks": {"all", "-1", -1}, "enable.idempotence": {True, "true", "True", 1}}
_FIXED_CONSUMER: Final = {"enable.auto.commit": {False, "false", "False", 0}, "auto.offset.reset": {"earliest"}}
_OWN: Final = frozenset({"bootstrap.servers", "group.id"})


def parse(url: str, given: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of a backend URL and the dictionary beside it.

    Raises:
        SettingsError: Something is unknown, contradictory or missing.
    """
    values = dict(given or {})
    servers, from_url = _split(url)
    known = set(Settings.__struct_fields__)
    for name in values:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            raise SettingsError(
                f"{SETTING}[{name!r}]", "no such setting", f"did you mean {close[0]!r}?" if close else ""
            )
    if servers:
        if values.get("bootstrap_servers", servers) != servers:
            raise SettingsError(
                f"{SETTING}['bootstrap_servers']", "differs from the servers in result_backend", "give one"
            )
        values["bootstrap_servers"] = servers
    if from_url:
        if tuple(values.get("views", from_url)) != from_url:
            raise SettingsError(f"{SETTING}['views']", "differs from the view= in result_backend", "give one")
        values["views"] = from_url
    if isinstance(values.get("views"), str):
        values["views"] = (values["views"],)
    try:
        settings = msgspec.convert(values, Settings, strict=True)
    except msgspec.ValidationError as exc:
        raise _translated(exc) from exc
    _check(settings)
    return settings


def _translated(exc: msgspec.ValidationError) -> SettingsError:
    problem, _, where = str(exc).partition(" - at `$.")
    name = where.rstrip("`").partition("[")[0].partition(".")[0]
    return SettingsError(f"{SETTING}[{name!r}]" if name else SETTING, problem)


def _split(url: str) -> tuple[str, tuple[str, ...]]:
    parts = urlsplit(url)
    if parts.scheme != "kafka":
        raise SettingsError("result_backend", f"{mask(url)} is not a kafka:// URL")
    if parts.path.strip("/"):
        raise SettingsError(
            "result_backend", f"a path ({parts.path}) means nothing in a kafka:// URL", "use kafka://host:port/?view=…"
        )
    if "@" in parts.netloc:
        raise SettingsError(
            "result_backend", "credentials in the URL are not used", f"set {SETTING}['client'] = {{'sasl.username': …}}"
        )
    views = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name != "view":
            raise SettingsError(
                "result_backend",
                f"unknown parameter {name!r} in the URL",
                f"only view= is known; the rest goes to {SETTING}",
            )
        views.append(value)
    return unquote(parts.netloc), tuple(views)


def _check(settings: Settings) -> None:
    def refuse(name: str, problem: str, remedy: str = "") -> None:
        raise SettingsError(f"{SETTING}[{name!r}]", problem, remedy)

    if not settings.bootstrap_servers:
        raise SettingsError("result_backend", "no Kafka servers", "kafka://host:9092/?view=redis://host/0")
    if not settings.views:
        raise SettingsError(
            "result_backend", "no view to read results from", "add ?view=redis://host/0 or ?view=sqlite:///path"
        )
    for view in settings.views:
        if "://" not in view:
            refuse("views", f"{view!r} is not a URL")
    if len(set(settings.views)) != len(settings.views):
        refuse("views", "the same view twice")
    prefix = settings.topic_prefix
    if not prefix or not prefix.replace(".", "").replace("-", "").replace("_", "").isalnum() or not prefix.isascii():
        refuse("topic_prefix", f"{prefix!r} cannot name topics", "letters, digits, '.', '-' and '_'")
    for name in ("delivery_timeout_s", "publish_timeout_s", "barrier_timeout_s", "poll_interval_s"):
        if not 0 < getattr(settings, name) < 86_400:
            refuse(name, f"{getattr(settings, name)} is not a sensible number of seconds")
    for name in (
        "max_message_bytes",
        "partitions",
        "chord_partitions",
        "replication_factor",
        "min_insync_replicas",
        "retention_ms",
    ):
        if getattr(settings, name) < 1:
            refuse(name, f"{getattr(settings, name)} is below 1")
    if settings.min_insync_replicas > settings.replication_factor:
        refuse(
            "min_insync_replicas",
            f"{settings.min_insync_replicas} copies can never be in sync with replication_factor {settings.replication_factor}",
        )
    unknown = settings.record - events.KINDS
    if unknown:
        refuse(
            "record",
            f"no such kind of event: {', '.join(sorted(unknown))}",
            f"known: {', '.join(sorted(events.KINDS))}",
        )
    for name, share in settings.sample.items():
        if not 0 <= share <= 1:
            refuse("sample", f"{share} for {name!r} is not between 0 and 1")
    for where in ("client", "producer", "consumer"):
        for option, value in getattr(settings, where).items():
            if option in _OWN:
                refuse(where, f"{option!r} is ours to set")
            allowed = (_FIXED_PRODUCER if where != "consumer" else {}).get(option) or (
                _FIXED_CONSUMER if where != "producer" else {}
            ).get(option)
            if allowed is not None and value not in allowed:
                refuse(
                    where,
                    f"{option} = {value!r} would break what this backend promises",
                    f"leave it at {next(iter(allowed))!r}",
                )


_CREDENTIALS: Final = re.compile(r"(://[^/@:?&#]*:)[^@/?&#]*@")
_SECRET: Final = re.compile(r"([?&][^=&]*(?:pass|secret|token)[^=&]*=)[^&]*", re.IGNORECASE)


def mask(url: str) -> str:
    """Return a URL with every password in it replaced by ``**``, also in the URLs inside it."""
    return _SECRET.sub(r"\1**", _CREDENTIALS.sub(r"\1**@", url))
