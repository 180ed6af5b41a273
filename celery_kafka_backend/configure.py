"""From a Celery app to `Settings` and `StoreOptions`: the only place that reads ``app.conf`` for them."""

from __future__ import annotations

import ssl
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

from celery.app.defaults import DEFAULTS

from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.errors import SettingsError, SpoolError
from celery_kafka_backend.settings import SETTING, Settings
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import check_scheme, known, schemes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from celery import Celery
    from celery.exceptions import ImproperlyConfigured

SHADOW: Final = "kafka_shadow"
"""Celery's setting with the URL of a log that is written beside another result backend (`shadow`)."""

# Celery's name, redis-py's name. What the URL says counts more. What is as Celery has it by default is not passed: two
# minutes without an answer are too long for a processor.
_REDIS: Final = {
    "redis_host": "host",
    "redis_port": "port",
    "redis_db": "db",
    "redis_max_connections": "max_connections",
    "redis_username": "username",
    "redis_password": "password",
    "redis_socket_timeout": "socket_timeout",
    "redis_socket_connect_timeout": "socket_connect_timeout",
    "redis_socket_keepalive": "socket_keepalive",
    "redis_retry_on_timeout": "retry_on_timeout",
    "redis_backend_health_check_interval": "health_check_interval",
    "redis_client_name": "client_name",
}
# Celery's name within ``mongodb_backend_settings``, pymongo's name; all others are pymongo's own, or the store's.
_MONGODB: Final = {"user": "username", "max_pool_size": "maxPoolSize", "mongo_host": "host"}
# Celery's name, the driver's; the last one is the store's own.
_ELASTICSEARCH: Final = {
    "elasticsearch_timeout": "request_timeout",
    "elasticsearch_max_retries": "max_retries",
    "elasticsearch_retry_on_timeout": "retry_on_timeout",
    "elasticsearch_save_meta_as_text": "save_meta_as_text",
}
_INTERVALS: Final = {"start": 0.0, "step": 1.0, "max": 1.0}
MOST_RETRIES: Final = 1_000
"""Where Celery would try for ever."""
_SENTINEL: Final = ("master_name", "min_other_sentinels", "sentinel_kwargs")
# Celery's names without ``cassandra_``, which are the store's own; its backend reads the bundle's under both.
_CASSANDRA: Final = (
    "servers", "bundle_path", "secure_bundle_path", "port", "keyspace", "table", "read_consistency",
    "write_consistency", "auth_provider", "auth_kwargs", "entry_ttl",
)  # fmt: skip
_CERT: Final = {"CERT_REQUIRED": "required", "CERT_OPTIONAL": "optional", "CERT_NONE": "none"}


def settings_of(app: Celery, url: str | None = None) -> Settings:
    """Return the checked settings of an app.

    Args:
        app: The user's app.
        url: Its ``result_backend``, if the caller has it already; by default the URL of its shadow where it has one.

    Raises:
        ImproperlyConfigured: A setting is wrong; the message names it, its value and the remedy.
    """
    if url is None:
        url = app.conf.result_backend or ""
        if not url.startswith("kafka:"):
            url = app.conf.get(SHADOW) or url
    try:
        settings = settings_module.parse(url, app.conf.get(SETTING) or {})
        for view in settings.views:
            check_scheme(view)
        _check_keys("history", settings.history)
        _check_keys("view_options", settings.view_options)
        if settings.delivery == "pipelined" and app.conf.task_acks_late:
            raise _late("task_acks_late = True")
    except SettingsError as exc:
        raise improperly_configured(exc) from exc
    return settings


def _check_keys(name: str, given: Mapping[str, object]) -> None:
    """Refuse a key that is no view's scheme: nothing would ever look at it."""
    for key in given:
        if not known(key):
            close = get_close_matches(key, schemes(), 1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(schemes())}"
            raise SettingsError(f"{SETTING}[{name!r}]", f"{key!r} is no view's URL scheme", remedy)


def check_tasks(app: Celery, settings: Settings) -> None:
    """Check what only the tasks themselves say, once all are imported.

    Raises:
        ImproperlyConfigured: One acknowledges its message late, and ``delivery`` does not go with that.
    """
    if settings.delivery == "pipelined":
        late = sorted(name for name, task in app.tasks.items() if task.acks_late)
        if late:
            more = f" and {len(late) - 3} more" if len(late) > 3 else ""
            raise improperly_configured(_late(f"acks_late of {', '.join(late[:3])}{more}"))


def check_spool(settings: Settings) -> None:
    """Check that a worker on this host can spool.

    Raises:
        ImproperlyConfigured: It could not keep a record.
    """
    if settings.spool:
        from celery_kafka_backend.producer.spool import spool_for  # noqa: PLC0415 - sqlite3, for who needs it

        try:
            spool_for(settings).check()
        except SpoolError as exc:
            problem = SettingsError(f"{SETTING}['spool']", str(exc), "name a folder that this worker may write")
            raise improperly_configured(problem) from exc


def _late(what: str) -> SettingsError:
    return SettingsError(
        f"{SETTING}['delivery']",
        f"'pipelined' and {what}: the broker would be told that a task is done before Kafka has its result",
        "set 'acknowledged', or acks_late = False",
    )


def improperly_configured(exc: SettingsError) -> ImproperlyConfigured:
    """Return Celery's exception for one of ours."""
    from celery_kafka_backend.misconfigured import Misconfigured  # noqa: PLC0415 - see there

    return Misconfigured(str(exc))


def store_options(app: Celery, settings: Settings, url: str) -> StoreOptions:
    """Return what a view's store needs beside its URL, Celery's own settings for it included."""
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    transport: dict[str, Any] = app.conf.get("result_backend_transport_options") or {}
    if scheme in ("redis", "rediss", "sentinel"):
        options.update(_redis_options(app, scheme, transport))
    elif scheme in ("mongodb", "mongodb+srv"):
        options.update(_mongodb_options(app))
    elif scheme.startswith("elasticsearch"):
        options.update(_renamed(app, _ELASTICSEARCH))
        options.update(settings.view_options.get("elasticsearch", {}))
    elif scheme == "cassandra":
        options.update(_cassandra_options(app))
    options.update(settings.view_options.get(scheme, {}))
    prefix = transport.get("global_keyprefix") or ""
    if prefix and prefix[-1] not in ":_-.":
        prefix += "_"
    return StoreOptions(
        namespace=settings.topic_prefix,
        key_prefix=prefix,
        history=settings.history.get(scheme, settings.history.get(scheme.partition("+")[0])),
        history_limit=settings.history_limit,
        history_retention_ms=settings.history_retention_ms,
        serializer=app.conf.result_serializer,
        options=options,
        **_pauses(transport.get("retry_policy") or {}),
    )


def _renamed(app: Celery, names: dict[str, str]) -> dict[str, Any]:
    """Return Celery's settings under the driver's names; what is as Celery has it by default is not passed."""
    given = {driver: (app.conf.get(theirs), DEFAULTS.get(theirs)) for theirs, driver in names.items()}
    return {driver: value for driver, (value, default) in given.items() if value != default}


def _pauses(policy: dict[str, Any]) -> dict[str, Any]:
    """Return when a reader asks again, as Celery's ``retry_policy`` says; by default as `StoreOptions` says."""
    if not policy:
        return {}
    first, step, most = (policy.get(f"interval_{name}", default) for name, default in _INTERVALS.items())
    times = policy.get("max_retries", 20) or MOST_RETRIES
    return {"pauses_s": tuple(min(first + n * step, most) for n in range(min(times, MOST_RETRIES)))}


def _redis_options(app: Celery, scheme: str, transport: dict[str, Any]) -> dict[str, Any]:
    found = _renamed(app, _REDIS)
    tls = app.conf.get("redis_backend_use_ssl")
    if isinstance(tls, dict):
        found |= tls
        if scheme == "sentinel":  # its URL cannot say so
            found["ssl"] = True
    if scheme == "sentinel":
        found |= {name: transport[name] for name in _SENTINEL if name in transport}
        found = {name: value for name, value in found.items() if name not in ("host", "port")}
    requirement = found.get("ssl_cert_reqs")
    if isinstance(requirement, int):
        found["ssl_cert_reqs"] = ssl.VerifyMode(requirement).name.removeprefix("CERT_").lower()
    elif requirement in _CERT:
        found["ssl_cert_reqs"] = _CERT[requirement]
    return found


def _mongodb_options(app: Celery) -> dict[str, Any]:
    name = "mongodb_backend_settings"
    given = app.conf.get(name) or {}
    if not isinstance(given, dict):
        problem = SettingsError(name, f"a {type(given).__name__} is not a dictionary", "{'database': 'results'}")
        raise improperly_configured(problem)
    # Those of its ``options`` come first and the others over them, as in Celery's own backend.
    found = {**given.get("options", {}), **{key: value for key, value in given.items() if key != "options"}}
    return {_MONGODB.get(key, key): value for key, value in found.items()}


def _cassandra_options(app: Celery) -> dict[str, Any]:
    found = dict(app.conf.get("cassandra_options") or {})
    for name in _CASSANDRA:
        value = app.conf.get(f"cassandra_{name}")
        if value is not None:
            found[name] = value
    return found
