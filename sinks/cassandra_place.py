"""Where a Cassandra view lives, as Celery's settings and the view's URL say it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import cassandra
from cassandra import auth, policies
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile

from celery_kafka_backend.errors import SettingsError
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.cassandra_schema import NATIVE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from celery_kafka_backend.sinks.contract import StoreOptions

PORT: Final = 9042
PROTOCOL: Final = 5
"""Of Cassandra 4.0 and newer; the driver would start with one that nobody speaks, and complain."""
CONSISTENCY: Final = "LOCAL_QUORUM"
"""As Celery's backend has it."""
READS: Final = ("ONE", "TWO", "THREE", "QUORUM", "ALL", "LOCAL_QUORUM", "LOCAL_ONE", "SERIAL", "LOCAL_SERIAL")
WRITES: Final = ("ANY", "ONE", "TWO", "THREE", "QUORUM", "ALL", "LOCAL_QUORUM", "EACH_QUORUM", "LOCAL_ONE")
REQUEST_TIMEOUT_S: Final = 10.0
CONNECT_TIMEOUT_S: Final = 5.0
RECONNECT_S: Final = (0.2, 2.0)
"""The driver's own goes up to ten minutes, in which a server that is back would not be seen."""

_OURS: Final = frozenset(
    {"servers", "bundle_path", "secure_bundle_path", "port", "keyspace", "table", "read_consistency"}
    | {"write_consistency", "auth_provider", "auth_kwargs", "entry_ttl"}
)


class Place:
    """Where a view lives: servers, keyspace, Celery's own table, and how to connect.

    Args:
        url: ``cassandra://[user:password@][host[,host…][:port]][/keyspace][?table=…]``; what it leaves out is taken from
            the options.
        options: Its ``options`` are Celery's settings without their prefix, and the driver's own for its ``Cluster``.

    Raises:
        SettingsError: Something is missing, contradictory or unknown.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = mask(url)
        given = dict(options.options)
        try:
            parts = urlsplit(url)
            query = dict(parse_qsl(parts.query))
            login, _, hosts = parts.netloc.rpartition("@")
            servers, port = _hosts(hosts)
        except ValueError as exc:
            raise SettingsError("view", f"{self.url}: {exc}", "cassandra://host,host:9042/keyspace") from None
        if unknown := query.keys() - {"table"}:
            raise SettingsError("view", f"{self.url}: nobody knows {', '.join(sorted(unknown))}", "?table=… is known")
        self._bundle = None if servers else given.get("secure_bundle_path") or given.get("bundle_path")
        self._servers = servers or _listed(given.get("servers"))
        self._port = int(port or given.get("port") or PORT)
        self.keyspace = unquote(parts.path.strip("/")) or given.get("keyspace") or ""
        self.table = query.get("table") or given.get("table") or NATIVE
        self.entry_ttl_ms = int(float(given.get("entry_ttl") or 0) * 1000)
        self.read_level = _level("cassandra_read_consistency", given.get("read_consistency"), READS)
        self.write_level = _level("cassandra_write_consistency", given.get("write_consistency"), WRITES)
        self._driver = {name: value for name, value in given.items() if name not in _OURS}
        self._auth = _login(login) if login else _provider(given.get("auth_provider"), given.get("auth_kwargs"))
        if bool(self._servers) == bool(self._bundle):
            problem = "servers and a bundle" if self._bundle else "neither servers nor a bundle"
            raise SettingsError(
                "view", f"{self.url}: {problem}", "give cassandra_servers or cassandra_secure_bundle_path"
            )
        if not self.keyspace:
            raise SettingsError(
                "view", f"{self.url} names no keyspace", "cassandra://host/keyspace or cassandra_keyspace"
            )
        self.connect_timeout_s = float(self._driver.get("connect_timeout", CONNECT_TIMEOUT_S))
        # Whoever would connect in the same way shares the connection.
        self.identity = repr((url, sorted((name, repr(value)) for name, value in given.items())))

    def cluster(self, connect_timeout_s: float) -> Any:
        """Return the driver's cluster, not connected yet; whoever connects has at most so long for each server."""
        given = dict(self._driver)
        if "execution_profiles" not in given:
            balancing = given.pop("load_balancing_policy", None)
            profile = ExecutionProfile(
                load_balancing_policy=balancing or policies.TokenAwarePolicy(policies.DCAwareRoundRobinPolicy()),
                request_timeout=REQUEST_TIMEOUT_S,
            )
            given["execution_profiles"] = {EXEC_PROFILE_DEFAULT: profile}
        given.setdefault("protocol_version", PROTOCOL)
        given["connect_timeout"] = connect_timeout_s
        given.setdefault("reconnection_policy", policies.ExponentialReconnectionPolicy(*RECONNECT_S))
        if self._auth is not None:
            given["auth_provider"] = self._auth
        where: dict[str, Any] = {"contact_points": self._servers, "port": self._port}
        if self._bundle:
            where = {"cloud": {"secure_connect_bundle": self._bundle}}
        try:
            return Cluster(**where, **given)
        except (TypeError, ValueError, OSError) as exc:
            problem = f"{self.url}: the driver does not take this: {exc}"
            raise SettingsError("cassandra_options", problem, "see the options of cassandra.cluster.Cluster") from exc


def _hosts(netloc: str) -> tuple[list[str], str]:
    """Return servers and port of ``host,host:port``; one port serves all, as in Celery."""
    hosts, colon, port = netloc.rpartition(":")
    if not colon or netloc.endswith("]"):
        hosts, port = netloc, ""
    elif not port.isdecimal():
        raise ValueError(f"{port!r} is no port")
    found = [host.strip("[]") for host in hosts.split(",") if host]
    if any(":" in host for host in hosts.split(",") if not host.startswith("[")):
        raise ValueError("one port, behind the last host, serves all")
    return found, port


def _listed(servers: Any) -> list[str]:
    if not servers:
        return []
    return [servers] if isinstance(servers, str) else list(servers)


def _level(setting: str, name: str | None, known: Sequence[str]) -> int:
    if (name or CONSISTENCY) not in known:
        raise SettingsError(setting, f"{name!r} is no consistency level for this", f"one of {', '.join(known)}")
    level: int = cassandra.ConsistencyLevel.name_to_value[name or CONSISTENCY]
    return level


def _login(login: str) -> Any:
    user, _, password = login.partition(":")
    return auth.PlainTextAuthProvider(unquote(user), unquote(password))


def _provider(name: str | None, kwargs: Any) -> Any:
    if not name or not kwargs:  # as Celery's backend
        return None
    kind = getattr(auth, name, None)
    if not isinstance(kind, type):
        raise SettingsError("cassandra_auth_provider", f"cassandra.auth has no {name!r}", "PlainTextAuthProvider, …")
    try:
        return kind(**kwargs)
    except TypeError as exc:
        raise SettingsError("cassandra_auth_kwargs", f"{name} does not take them: {exc}") from exc
