"""What a user configures, checked and frozen. Reading it from a Celery app is the backend's work.

``result_backend = "kafka://b1:9092,b2:9092/?view=redis://…"`` is enough; ``kafka_backend_settings``
is a dictionary with the rest, its keys the attributes of `Settings`. A key that is unknown, or
contradicts another, is a `SettingsError` at start that names it.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn
from urllib.parse import quote, unquote, urlsplit

import msgspec

from celery_kafka_backend import events
from celery_kafka_backend.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

DAY_MS: Final = 86_400_000
SETTING: Final = "kafka_backend_settings"

Delivery = Literal["acknowledged", "pipelined", "buffered"]
Chords = Literal["kafka", "view"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a user may set.

    Attributes:
        bootstrap_servers: ``host:port,host:port``; from the URL unless given here.
        views: URLs of the views, the primary (which ``AsyncResult`` reads) first; from the URL's
            ``view=`` parameters unless given here.
        topic_prefix: Names topics and consumer groups; one prefix serves one app.
        delivery: When a stored result counts as stored: ``acknowledged`` (seen before the task is
            done), ``pipelined`` (before the next task starts) or ``buffered`` (nobody looks).
        delivery_timeout_s: Bound on the wait for an acknowledgement.
        publish_timeout_s: Bound on what ``delay()`` of a chord waits for its declaration.
        spool: Folder on this host where a worker keeps results while Kafka does not take them; "": there is none.
        spool_after_s: With a spool: how long a result waits for Kafka before it goes there.
        spool_max_bytes: How large the spool's file may become.
        barrier_timeout_s: Bound on a read that a lagging view must not fool, and on how long ``forget``,
            ``save`` and ``delete`` wait to be shown; at most 2 s of it in a worker's main process.
        record: Kinds of events to record; results are always recorded.
        record_ignored: Record the states of tasks with ``ignore_result`` (without payload).
        exclude: Names of tasks (``*`` at the end allowed) of which only results are recorded.
        sample: Share of task ids, by task name, whose other events are recorded: ``{name: 0.01}``.
        record_messages: Names of tasks (``*`` for any text) whose messages are recorded, so that ``pipeline rerun`` can
            send them again.
        record_messages_bytes: Largest body of a message that is recorded.
        redact: Dotted path of ``f(task_name, args, kwargs) -> (args, kwargs)`` for the recorded
            arguments, or ``"all"`` to leave them out.
        max_message_bytes: Largest record, for client and topics.
        claim_check: URL, as fsspec takes it, of where larger documents of results are stored; "": nowhere.
        claim_check_bytes: … and from which size on.
        claim_check_options: Options for that store's driver, under fsspec's names.
        chords: Where a chord that this process begins is counted: in ``kafka``, or, while a fleet is being switched, in
            the primary ``view``, as Celery's own backend for that store does. Either kind is finished wherever it is met.
        partitions: Partitions of the log.
        chord_partitions: Partitions of the chords' topic; may never change.
        replication_factor: Copies of each partition.
        min_insync_replicas: Copies that must have a record before it is acknowledged.
        retention_ms: How long the log keeps events.
        insight: Whether the materializers of the primary view tell statistics, for ``pipeline run --insight``.
        insight_partitions: Partitions of their topic, so the most processes that can share the work; may never change.
        chord_key: Secret for an HMAC over chord declarations; "" for none.
        chord_deadline_s: How long after its declaration a chord that is not complete fails; 0: it waits. A signature's
            option of the same name goes before it.
        chord_max_bytes: Largest sum of members' encoded results that a chord's body is sent; above it the chord fails.
        history: Which views keep every event, by URL scheme; default: each store's own.
        history_limit: Events kept per task where history is bounded (Redis).
        history_retention_ms: How long views keep an event in their history, from when it happened; 0: for ever; None: as
            long as the result that it shows, or would.
        poll_interval_s: Longest pause between two reads of a waiter on a view without push.
        metrics_port: Where a worker serves its metrics and health; 0: any free port; None: not at all.
        metrics_address: Likewise, the address to listen on.
        health_timeout_s: How long the loop of a processor may stand still before /healthz says so.
        client: librdkafka options under their own names, for every connection.
        producer: … for producers only.
        consumer: … for consumers only.
        view_options: Options for a view's own driver, by URL scheme.
    """

    bootstrap_servers: str = ""
    views: tuple[str, ...] = ()
    topic_prefix: str = "celery"
    delivery: Delivery = "acknowledged"
    delivery_timeout_s: float = 120.0
    publish_timeout_s: float = 10.0
    barrier_timeout_s: float = 2.0
    spool: str = ""
    spool_after_s: float = 1.0
    spool_max_bytes: int = 1 << 30
    record: frozenset[str] = events.KINDS
    record_ignored: bool = True
    exclude: tuple[str, ...] = ()
    sample: dict[str, float] = {}
    record_messages: tuple[str, ...] = ()
    record_messages_bytes: int = 32_768
    redact: str = ""
    max_message_bytes: int = 1_048_576
    claim_check: str = ""
    claim_check_bytes: int = 262_144
    claim_check_options: dict[str, Any] = {}
    chords: Chords = "kafka"
    partitions: int = 12
    chord_partitions: int = 12
    replication_factor: int = 3
    min_insync_replicas: int = 2
    retention_ms: int = 7 * DAY_MS
    insight: bool = True
    insight_partitions: int = 4
    chord_key: str = ""
    chord_deadline_s: float = 0.0
    chord_max_bytes: int = 64 << 20
    history: dict[str, bool] = {}
    history_limit: int = 200
    history_retention_ms: int | None = None
    poll_interval_s: float = 0.5
    metrics_port: int | None = None
    metrics_address: str = "127.0.0.1"
    health_timeout_s: float = 60.0
    client: dict[str, Any] = {}
    producer: dict[str, Any] = {}
    consumer: dict[str, Any] = {}
    view_options: dict[str, dict[str, Any]] = {}

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        # msgspec's own would hand every secret to whoever prints with rich.
        return [
            ("bootstrap_servers", mask(self.bootstrap_servers)),
            ("topic_prefix", self.topic_prefix),
            ("views", [mask(view) for view in self.views]),
        ]

    def __repr__(self) -> str:
        return f"<Settings {mask(self.bootstrap_servers)} prefix={self.topic_prefix!r} views={[mask(v) for v in self.views]}>"


# msgspec looks at the types of a class when it is first used. Two threads that do so at once crash the process, and the
# first two requests of a server are two threads; who imports is one.
msgspec.convert({}, Settings)

# What the backend itself relies on; another value breaks a promise, so it is refused. librdkafka knows some options
# under two names.
_ALL: Final = ("all", "-1", -1)
_FIXED_PRODUCER: Final[dict[str, tuple[object, ...]]] = {
    "acks": _ALL,
    "request.required.acks": _ALL,
    "enable.idempotence": (True, "true", "True", "1", "t"),
    # Two would let librdkafka report a record as stored that the broker refused (ADR 29).
    "max.in.flight": (1, "1"),
    "max.in.flight.requests.per.connection": (1, "1"),
    # Whoever reads one task's part of the log must find it where every producer puts it.
    "partitioner": ("murmur2_random", "murmur2"),
}
_FIXED_CONSUMER: Final[dict[str, tuple[object, ...]]] = {
    "enable.auto.commit": (False, "false", "False", "0", "f"),
    "auto.offset.reset": ("earliest", "smallest", "beginning"),
}
_OWN: Final = {
    "bootstrap.servers": f"set {SETTING}['bootstrap_servers'] or result_backend",
    "metadata.broker.list": f"set {SETTING}['bootstrap_servers'] or result_backend",
    "group.id": f"set {SETTING}['topic_prefix']: it names the groups too",
    "transactional.id": "leave it out: this backend needs no transactions",
    "message.max.bytes": f"set {SETTING}['max_message_bytes']",
    # One bound for both, or a result that was said not to be stored would arrive minutes later.
    "delivery.timeout.ms": f"set {SETTING}['delivery_timeout_s']",
    "message.timeout.ms": f"set {SETTING}['delivery_timeout_s']",
}

_REMEDIES: Final = {
    "delivery": "one of acknowledged, pipelined, buffered",
    "chords": "one of kafka, view",
    "views": "a list of URLs, the primary view's first",
    "exclude": "a list of task names",
    "record_messages": "a list of task names, ['*'] for all",
    "record": "a list of kinds of events",
    "sample": "a dictionary {task name: share between 0 and 1}",
    "history": "a dictionary {URL scheme: True or False}",
    "history_retention_ms": "milliseconds as a whole number, 0 for ever, or None for as long as results",
    "view_options": "a dictionary {URL scheme: {option: value}}",
    "metrics_port": "a port from 1 to 65535, 0 for any that is free, or None for no metrics",
}
UNSHOWN: Final = frozenset({"client", "producer", "consumer", "view_options", "chord_key", "claim_check_options"})
"""Settings whose values hold secrets: no message ever shows them."""


def parse(url: str, given: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of a backend URL and the dictionary beside it.

    Raises:
        SettingsError: Something is unknown, contradictory or missing.
    """
    try:
        values = dict(given or {})
    except (TypeError, ValueError):
        raise SettingsError(SETTING, f"a {type(given).__name__} is not a dictionary", "{'setting': value}") from None
    servers, from_url = _split(url)
    known = set(Settings.__struct_fields__)
    for name in values:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise SettingsError(f"{SETTING}[{name!r}]", "no such setting", remedy)
    if isinstance(values.get("views"), str):
        values["views"] = (values["views"],)
    if servers:
        _same("bootstrap_servers", values.get("bootstrap_servers") or servers, servers)
        values["bootstrap_servers"] = servers
    if from_url:
        given_views = values.get("views") or from_url
        _same("views", tuple(given_views) if isinstance(given_views, (list, tuple)) else given_views, from_url)
        values["views"] = from_url
    try:
        settings = msgspec.convert(values, Settings, strict=True)
    except msgspec.ValidationError as exc:
        raise _translated(exc, values) from None
    _check(settings)
    return settings


def _same(name: str, given: object, from_url: object) -> None:
    if given != from_url:
        raise SettingsError(
            f"{SETTING}[{name!r}]",
            f"{_shown(name, given)} differs from result_backend, which says {_shown(name, from_url)}",
            "give one of them only",
        )


def _shown(name: str, value: object) -> str:
    if name in UNSHOWN:
        return "the value (not shown)"
    if isinstance(value, str):
        return repr(mask(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_shown(name, item) for item in value)}]"
    return repr(value) if isinstance(value, (int, float, dict)) and name != "views" else f"a {type(value).__name__}"


def _translated(exc: msgspec.ValidationError, values: Mapping[str, Any]) -> SettingsError:
    problem, _, where = str(exc).partition(" - at `")
    found = re.search(r"\$\.(\w+)", where)
    if found is None:
        return SettingsError(SETTING, problem, "a dictionary {'setting': value}")
    name = found[1]
    expected = re.search(r"Expected `([^`]*)`", problem)
    remedy = _REMEDIES.get(name) or (f"give {_article(expected[1])}" if expected else "see its documentation")
    return SettingsError(f"{SETTING}[{name!r}]", f"{_shown(name, values[name])}: {problem}", remedy)


def _article(type_name: str) -> str:
    words = {"object": "a dictionary", "array": "a list", "str": "text", "int": "a whole number", "float": "a number"}
    return words.get(type_name, f"a {type_name}")


def _split(url: str) -> tuple[str, tuple[str, ...]]:
    try:
        parts = urlsplit(url)
    except ValueError:  # its text quotes the host part, credentials included
        raise SettingsError("result_backend", f"{mask(url)} is not a URL", _EXAMPLE) from None
    if parts.scheme != "kafka":
        raise SettingsError("result_backend", f"{mask(url)} is not a kafka:// URL", _EXAMPLE)
    if "@" in parts.netloc:
        raise SettingsError(
            "result_backend", "credentials in the URL are not used", f"set {SETTING}['client'] = {{'sasl.username': …}}"
        )
    if parts.path.strip("/"):
        raise SettingsError(
            "result_backend", f"a path ({mask(parts.path)}) means nothing in a kafka:// URL", f"use {_EXAMPLE}"
        )
    if parts.fragment:
        raise SettingsError("result_backend", "a '#' ends the URL too early", "write it as %23")
    views = []
    for pair in filter(None, parts.query.split("&")):
        name, _, value = pair.partition("=")
        if name != "view":
            shown = repr(name) if re.fullmatch(r"[\w.-]+", name) else "(not shown)"
            raise SettingsError(
                "result_backend",
                f"unknown parameter {shown} in the URL",
                f"only view= is known, the rest goes to {SETTING}; an '&' inside a view's URL is written %26, "
                "and then all of that URL percent-encoded",
            )
        # A view's URL as people write it stays as it is ('+' and %40 are the driver's to read); one that is wholly
        # percent-encoded is decoded, once.
        views.append(value if "://" in value else unquote(value))
    return unquote(parts.netloc), tuple(views)


_EXAMPLE: Final = "kafka://host:9092/?view=redis://host:6379/0"


def _check(settings: Settings) -> None:
    if not settings.bootstrap_servers:
        raise SettingsError("result_backend", "no Kafka servers", f"use {_EXAMPLE}")
    if "@" in settings.bootstrap_servers:
        _refuse("bootstrap_servers", "credentials beside servers are not used", "set 'client': {'sasl.username': …}")
    if not settings.views:
        raise SettingsError(
            "result_backend", "no view to read results from", "add ?view=redis://host/0 or ?view=sqlite:///path"
        )
    for view in settings.views:
        if not re.match(r"[A-Za-z][\w+.-]*://", view):
            _refuse("views", f"{mask(view)!r} is not a URL", "redis://host:6379/0, sqlite:///path, …")
    if len(set(settings.views)) != len(settings.views):
        _refuse("views", f"the same view twice in {_shown('views', settings.views)}", "give each once")
    _check_names(settings)
    _check_numbers(settings)
    for where, fixed in (
        ("client", _FIXED_PRODUCER | _FIXED_CONSUMER),
        ("producer", _FIXED_PRODUCER),
        ("consumer", _FIXED_CONSUMER),
    ):
        _check_options(where, getattr(settings, where), fixed)


def _refuse(name: str, problem: str, remedy: str) -> NoReturn:
    raise SettingsError(f"{SETTING}[{name!r}]", problem, remedy)


def _check_names(settings: Settings) -> None:
    prefix = settings.topic_prefix
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", prefix) or not re.search(r"[A-Za-z0-9]", prefix):
        _refuse("topic_prefix", f"{prefix!r} cannot name topics", "letters, digits, '.', '-' and '_', at most 200")
    unknown = settings.record - events.KINDS
    if unknown:
        _refuse(
            "record",
            f"no such kind of event: {', '.join(sorted(unknown))}",
            f"known: {', '.join(sorted(events.KINDS))}",
        )
    for name in settings.exclude:
        if not name or "*" in name[:-1]:
            _refuse(
                "exclude", f"{name!r} would match no task", "a task's name, or its beginning and one '*' at the end"
            )
    if settings.redact not in ("", "all") and not re.fullmatch(r"\w+(\.\w+)*[.:]\w+", settings.redact):
        _refuse("redact", f"{settings.redact!r} is no dotted path", "'package.module.function', 'all' or ''")


def _check_numbers(settings: Settings) -> None:
    for name in (
        "delivery_timeout_s",
        "publish_timeout_s",
        "barrier_timeout_s",
        "poll_interval_s",
        "spool_after_s",
        "health_timeout_s",
    ):
        if not 0 < getattr(settings, name) < 86_400:
            _refuse(name, f"{getattr(settings, name)} is no sensible time", "more than 0 and less than 86400 seconds")
    if not 0 <= settings.chord_deadline_s < MOST_S:
        _refuse("chord_deadline_s", f"{settings.chord_deadline_s} is no sensible time", "seconds; 0 for no deadline")
    for name, least, most in (
        ("chord_max_bytes", 1024, _INT32),
        ("max_message_bytes", 1024, _MOST_BYTES),
        ("claim_check_bytes", 1024, _INT32),
        ("record_messages_bytes", 0, _INT32),
        ("partitions", 1, _INT32),
        ("chord_partitions", 1, _INT32),
        ("insight_partitions", 1, _INT32),
        ("replication_factor", 1, 32_767),
        ("min_insync_replicas", 1, 32_767),
        ("retention_ms", 1, 1 << 52),
        ("history_limit", 0, _INT32),
        ("spool_max_bytes", 1 << 20, 1 << 53),
    ):
        if not least <= getattr(settings, name) <= most:
            _refuse(name, f"{getattr(settings, name)} is out of range", f"from {least} to {most}")
    kept = settings.history_retention_ms
    if kept is not None and not 0 <= kept <= MOST_HISTORY_MS:
        _refuse("history_retention_ms", f"{kept} is out of range", f"from 1 to {MOST_HISTORY_MS} ms, or 0 for ever")
    if not settings.metrics_address:
        _refuse("metrics_address", "no address", "127.0.0.1, or 0.0.0.0 for every interface")
    if settings.metrics_port is not None and not 0 <= settings.metrics_port <= 65_535:
        _refuse("metrics_port", f"{settings.metrics_port} is out of range", _REMEDIES["metrics_port"])
    if settings.min_insync_replicas > settings.replication_factor:
        _refuse(
            "min_insync_replicas",
            f"{settings.min_insync_replicas} copies can never be in sync with replication_factor {settings.replication_factor}",
            "lower it, or raise replication_factor",
        )
    if settings.claim_check and settings.claim_check_bytes + EVENT_ROOM > settings.max_message_bytes:
        _refuse(
            "claim_check_bytes",
            f"{settings.claim_check_bytes}: smaller documents would not fit max_message_bytes = {settings.max_message_bytes}",
            f"lower it by {settings.claim_check_bytes + EVENT_ROOM - settings.max_message_bytes} or more",
        )
    for name, share in settings.sample.items():
        if not 0 <= share <= 1:
            _refuse("sample", f"{share} for {name!r} is not a share", "between 0 and 1")


def _check_options(where: str, options: Mapping[str, Any], fixed: Mapping[str, tuple[object, ...]]) -> None:
    for option, value in options.items():
        if option in _OWN:
            _refuse(where, f"{option!r} is ours to set", _OWN[option])
        if option in fixed and value not in fixed[option]:
            _refuse(
                where,
                f"{option} = {value!r} would break what this backend promises",
                f"leave it at {fixed[option][0]!r}",
            )


MOST_S: Final = 10 * 366 * 86_400
"""A longer time is a mistake."""
MOST_HISTORY_MS: Final = 36_525 * DAY_MS
"""A hundred years: what is to stay for longer is to stay for ever."""
_INT32: Final = (1 << 31) - 1
_MOST_BYTES: Final = 1_000_000_000
"""librdkafka's own limit for a record."""
EVENT_ROOM: Final = 32_768
"""What an event may hold beside its document."""

_SECRET: Final = re.compile(r"pass|pwd|secret|token|credential|apikey|api_key", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether an option or a parameter of this name may hold a secret."""
    return _SECRET.search(name) is not None or name.endswith((".pem", ".key", "oauthbearer.config"))


_HOST: Final = re.compile(r"(?:[^:,;\[\]]*|\[[^\]]*\])(?::\d*)?")


def mask(url: str) -> str:
    """Return a URL with every password in it replaced by ``**``, also in the URLs inside it.

    Where a URL is malformed (a raw ``/``, ``?`` or ``#`` in a password) it hides too much rather than too little.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    well_formed = "@" in authority or all(_HOST.fullmatch(host) for host in re.split("[,;]", authority))
    base, question, query = rest.partition("?") if well_formed else (rest, "", "")
    return (
        scheme
        + separator
        + (_masked_userinfo(base) if well_formed else _hidden(base))
        + question
        + "&".join(map(_masked_pair, query.split("&")))
    )


def _masked_userinfo(base: str) -> str:
    userinfo, at, host = base.rpartition("@")
    user, colon, _ = userinfo.partition(":")
    return f"{user}:**@{host}" if at and colon else base


def _hidden(base: str) -> str:
    user, _, _ = base.partition(":")
    _, at, host = base.rpartition("@")
    return f"{user}:**{at}{host if at else ''}"


def _masked_pair(pair: str) -> str:
    name, equals, value = pair.partition("=")
    if equals and _SECRET.search(unquote(name)):
        return f"{name}=**"
    if not equals and "@" in name:
        return f"**@{name.rpartition('@')[2]}"
    plain = value
    while "://" not in plain and (once := unquote(plain)) != plain:  # a URL inside a URL inside a URL
        plain = once
    if "://" not in plain:
        return f"{name}=**@{plain.rpartition('@')[2]}" if "@" in plain else pair
    masked = mask(plain)
    bare = masked
    while (once := unquote(bare)) != bare:
        bare = once
    if bare != masked and mask(bare) != bare:  # partly encoded: it hides something yet
        return f"{name}=**"
    return pair if masked == plain else name + equals + quote(masked, safe="*:/?@,;=+[]")
