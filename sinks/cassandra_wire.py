"""How the Cassandra store talks: one session per process, requests, and what the driver's errors mean."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import cassandra
from cassandra import protocol
from cassandra.cluster import EXEC_PROFILE_DEFAULT, NoHostAvailable
from cassandra.connection import ConnectionBusy, ConnectionException
from cassandra.pool import NoConnectionsAvailable

from celery_kafka_backend.errors import SettingsError, Unavailable
from celery_kafka_backend.sinks import cassandra_schema as schema
from celery_kafka_backend.sinks.patience import at_most

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from celery_kafka_backend.sinks.cassandra_place import Place

What = TypeVar("What")

IN_FLIGHT: Final = 32
"""Requests under way at once: enough to keep a small cluster busy, and a bound on what it must hold."""
BUSY_PAUSE_S: Final = 0.005

SETTINGS: Final = "SELECT name, value FROM system_views.settings"
WARN_BYTES: Final = "batch_size_warn_threshold"
WARN_BYTES_4_0: Final = "batch_size_warn_threshold_in_kb"
WARN_PARTITIONS: Final = "unlogged_batch_across_partitions_warn_threshold"
UNITS: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

AWAY: Final = (
    NoHostAvailable, cassandra.OperationTimedOut, cassandra.RequestExecutionException, ConnectionException,
    protocol.RequestExecutionException, protocol.ServerError,
)  # fmt: skip


class Connection:
    """A session, and the statements prepared in it. Thread-safe, of one process."""

    def __init__(self, place: Place, cluster: Any, session: Any) -> None:
        self._place = place
        self._cluster = cluster
        self._session = session
        self._prepared: dict[str, Any] = {}

    def make_tables(self) -> None:
        """Make what is missing."""
        place = self._place
        self._cluster.refresh_keyspace_metadata(place.keyspace)
        present = self._cluster.metadata.keyspaces[place.keyspace].tables
        schema.make(self._session.execute, place.keyspace, place.table, present)

    def batch_limits(self) -> tuple[int, int]:
        """Return how many bytes and partitions the servers take in a batch without a warning, in their log and ours."""
        try:
            found = dict(self._session.execute(SETTINGS))
        except (cassandra.Unauthorized, cassandra.InvalidRequest):  # before 4.0 there is no such table
            found = {}
        size = found.get(WARN_BYTES) or f"{found.get(WARN_BYTES_4_0) or 5}KiB"
        amount, unit = re.match(r"(\d+)(\w*)", size).groups()  # type: ignore[union-attr]
        return int(amount) * UNITS.get(unit, 1), int(found.get(WARN_PARTITIONS) or 10)

    def statement(self, text: str, *, reads: bool = False) -> Any:
        """Return a prepared statement; ``{view}``, ``{native}`` … in its text are the tables."""
        found = self._prepared.get(text)
        if found is None:
            place = self._place
            names = {"view": schema.VIEW, "history": schema.HISTORY, "position": schema.POSITION, "native": place.table}
            tables = {name: f"{schema.quoted(place.keyspace)}.{schema.quoted(table)}" for name, table in names.items()}
            found = self._session.prepare(text.format(**tables))
            found.consistency_level = place.read_level if reads else place.write_level
            self._prepared[text] = found
        return found

    def read(self, text: str, *values: Any) -> Iterator[Any]:
        """Run a query and return its rows, page by page."""
        return iter(self._ask(text, values).rows())

    def read_all(self, queries: Iterable[tuple[str, tuple[Any, ...]]]) -> list[list[Any]]:
        """Run queries at once and return their rows, query by query."""
        return [list(asked.rows()) for asked in [self._ask(text, values) for text, values in queries]]

    def _ask(self, text: str, values: tuple[Any, ...]) -> _Request:
        bound = self.statement(text, reads=True).bind(values)
        bound.fetch_size = PAGE
        return _Request(self._session, bound)

    def write(self, statements: Iterable[tuple[What, Any]]) -> Iterator[tuple[What, Exception | None]]:
        """Send statements, a bounded number at once; yield what each is, and why the servers will never take it."""
        under_way: deque[tuple[What, _Request]] = deque()
        for what, statement in statements:
            under_way.append((what, _Request(self._session, statement)))
            if len(under_way) >= IN_FLIGHT:
                yield _outcome(*under_way.popleft())
        while under_way:
            yield _outcome(*under_way.popleft())

    def owner(self, statement: Any) -> Any:
        """Return the server that holds a statement's partition, to group by; None if there is but one."""
        metadata = self._cluster.metadata
        if len(metadata.all_hosts()) < 2:
            return None
        replicas = metadata.get_replicas(self._place.keyspace, statement.routing_key)
        return replicas[0].host_id if replicas else None

    def close(self) -> None:
        """Disconnect."""
        self._cluster.shutdown()


PAGE: Final = 200
"""Rows per page of a read: a row may hold a megabyte."""


_GONE: Final = re.compile(r"unconfigured table|(table|keyspace) \S+ (does not|doesn't) exist", re.IGNORECASE)


class TablesGone(Unavailable):
    """Raised when somebody has dropped the tables: no record's fault."""


class _Request:
    """A statement under way."""

    def __init__(self, session: Any, statement: Any) -> None:
        self._session = session
        self._statement = statement
        self._timeout_s = at_most(session.get_execution_profile(EXEC_PROFILE_DEFAULT).request_timeout)
        self._until = time.monotonic() + self._timeout_s
        self._future = session.execute_async(statement, timeout=self._timeout_s)

    def rows(self) -> Any:
        """Wait for the answer. A connection whose buffers are full is no server that is away: it is asked again."""
        while True:
            try:
                return self._future.result()
            except NoHostAvailable as exc:
                if not _is_busy(exc) or time.monotonic() >= self._until:
                    raise
            time.sleep(BUSY_PAUSE_S)
            self._future = self._session.execute_async(self._statement, timeout=self._timeout_s)


def _is_busy(exc: NoHostAvailable) -> bool:
    errors = list(exc.errors.values()) if isinstance(exc.errors, dict) else []
    return bool(errors) and all(isinstance(each, (ConnectionBusy, NoConnectionsAvailable)) for each in errors)


def _outcome(what: What, request: _Request) -> tuple[What, Exception | None]:
    try:
        request.rows()
    except cassandra.InvalidRequest as exc:
        if _GONE.search(str(exc)):
            raise TablesGone(str(exc)) from exc
        return what, exc
    return what, None


# -- one connection per process ------------------------------------------------------------------


def connect(place: Place) -> Connection:
    """Return a new connection to a cluster.

    Raises:
        Unavailable: No server answers.
        SettingsError: One does, and refuses us, or has no such keyspace.
    """
    with translated(place.url):
        cluster = place.cluster(at_most(place.connect_timeout_s))
        try:
            session = cluster.connect()
            cluster.connect_timeout = place.connect_timeout_s
            found = cluster.metadata.keyspaces.get(place.keyspace)
        except BaseException:
            cluster.shutdown()
            raise
    if found is None:
        cluster.shutdown()
        name = schema.quoted(place.keyspace)
        remedy = f"CREATE KEYSPACE {name} WITH replication = {{'class': 'NetworkTopologyStrategy', …}}"
        raise SettingsError("view", f"{place.url}: there is no keyspace {place.keyspace!r}", remedy)
    return Connection(place, cluster, session)


class _Shared:
    """A connection, and by how many it is used."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.users = 1


_shared: dict[str, _Shared] = {}
_parked: list[dict[str, _Shared]] = []
_lock = threading.Lock()


def acquire(place: Place) -> Connection:
    """Return this process' connection to a place, made if need be; to be given back by `release`."""
    with _lock:
        found = _shared.get(place.identity)
        if found is not None:
            found.users += 1
            return found.connection
        connection = connect(place)
        _shared[place.identity] = _Shared(connection)
        return connection


def release(connection: Connection) -> None:
    """Give a connection back; the last one closes it."""
    with _lock:
        for identity, shared in _shared.items():
            if shared.connection is connection:
                shared.users -= 1
                if shared.users == 0:
                    del _shared[identity]
                    connection.close()
                return


def _after_fork() -> None:
    """Park what the parent uses: the threads that serve it are not here."""
    global _shared, _lock  # noqa: PLW0603
    _parked.append(_shared)
    _shared = {}
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


# -- errors --------------------------------------------------------------------------------------


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn the driver's errors into ours."""
    try:
        yield
    except NoHostAvailable as exc:
        found = list(exc.errors.values()) if isinstance(exc.errors, dict) else []
        if any(isinstance(each, cassandra.AuthenticationFailed) for each in found):
            raise _refused(url, found[0]) from exc
        if found and all(_speaks_otherwise(each) for each in found):
            raise SettingsError("view", f"{url}: {found[0]}", "Cassandra 4.0 or newer must answer here") from exc
        raise Unavailable(f"{url}: {exc}") from exc
    except (cassandra.AuthenticationFailed, cassandra.Unauthorized) as exc:
        raise _refused(url, exc) from exc
    except cassandra.UnresolvableContactPoints as exc:
        raise Unavailable(f"{url}: no server's name can be resolved") from exc
    except AWAY as exc:
        raise Unavailable(f"{url}: {exc}") from exc


def _speaks_otherwise(exc: BaseException) -> bool:
    """Whether a server does not know the protocol's version: the driver has no class of its own for that."""
    return type(exc) is cassandra.DriverException and "protocol_version" in str(exc)


def _refused(url: str, exc: BaseException) -> SettingsError:
    remedy = (
        "check cassandra_auth_provider, cassandra_auth_kwargs and the role's rights (SELECT, MODIFY; CREATE for tables)"
    )
    return SettingsError("view", f"{url} refuses us: {exc}", remedy)
