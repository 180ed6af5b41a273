"""One `Place` per store: where a case puts its view, and what only that store's test needs to do behind its back."""

from __future__ import annotations

import sqlite3
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from celery_kafka_backend.sinks import memory, registry
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import json_document

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from celery_kafka_backend.sinks.contract import Row, Sink, View
    from tests.services.cassandra import CassandraServer
    from tests.services.elasticsearch import ElasticServer


def _stock(url: str) -> str:
    """Return the URL of a store as Celery's own backend for it takes it."""
    if url.startswith("sqlite"):
        return f"db+{url}"
    return url.replace("postgresql://", "db+postgresql+psycopg://")


class Place:
    """A store with nothing in it, and the sinks and views that a case opens, which are closed behind it.

    Attributes:
        url: The view's.
        celery: What Celery's own backend for it is told: ``backend``, and settings; {} if there is none.
        extended: It keeps extended fields.
        groups: … and saved groups.
        dated: … and says when a task got into a state that is not its last.
        soon_ms: It has written and read a row by then.
    """

    extended = True
    groups = True
    dated = False
    soon_ms = 1_500

    def __init__(self, url: str) -> None:
        self.url = url
        self.celery: dict[str, Any] = {"backend": _stock(url)}
        self._open: list[Any] = []

    def sink(self, **options: Any) -> Sink:
        """An opened sink; history is kept unless the case says otherwise."""
        found = registry.open_sink(self.url, StoreOptions(**{"history": True, "history_limit": 0, **options}))
        self._open.append(found)
        found.open()
        return found

    def view(self, **options: Any) -> View:
        """A view."""
        found = registry.open_view(self.url, StoreOptions(**options))
        self._open.append(found)
        return found

    def dump(self, **options: Any) -> list[Row]:
        """Every row, in a stable order."""
        view = registry.open_view(self.url, StoreOptions(**options))
        try:
            return sorted(view.rows(), key=lambda row: (row.table, row.key))
        finally:
            view.close()

    def close(self) -> None:
        """Close what the case left open."""
        for each in self._open:
            each.close()

    def empty(self) -> None:
        """Take everything out."""
        raise NotImplementedError

    def stock(self, task: str, state: str) -> None:
        """Write as Celery's own backend for this store does."""
        raise NotImplementedError

    def poison(self, sink: Sink) -> int:
        """Make the sink refuse large documents; return a size that it refuses."""
        raise NotImplementedError


class _Memory(Place):
    soon_ms = 700

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.celery = {}

    def empty(self) -> None:
        memory.discard(self.url)

    def stock(self, task: str, state: str) -> None:
        cell = memory.Cell(document=json_document(task, state, "stock"))
        memory.space(self.url).cells["task", task] = memory._encode(cell)

    def poison(self, sink: Sink) -> int:
        sink._limit = 1000
        return 1001


class _Sqlite(Place):
    soon_ms = 700

    def _run(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        connection = sqlite3.connect(self.url.removeprefix("sqlite:///"))
        with connection:
            for statement, values in statements:
                connection.execute(statement, values)
        connection.close()

    def empty(self) -> None:
        tables = ("celery_taskmeta", "celery_tasksetmeta", "ckb_task", "ckb_group", "ckb_history")
        tables += ("ckb_chord", "ckb_chord_expiry", "ckb_position")
        self._run(*((f"DELETE FROM {table}", ()) for table in tables))

    def stock(self, task: str, state: str) -> None:
        columns = "(task_id, status, result, date_done)"
        values = (task, state, b'"stock"', "2025-01-01 00:00:00.000000")
        self._run((f"INSERT INTO celery_taskmeta {columns} VALUES (?, ?, ?, ?)", values))

    def poison(self, sink: Sink) -> int:
        sink._limit = 1000
        return 1001


class _Redis(Place):
    def _client(self) -> Any:
        import redis  # noqa: PLC0415 - the cases of the other stores run without it

        return redis.Redis.from_url(self.url)

    def empty(self) -> None:
        with self._client() as client:
            client.flushdb()

    def stock(self, task: str, state: str) -> None:
        with self._client() as client:
            client.set(f"celery-task-meta-{task}", json_document(task, state, "stock"))

    def poison(self, sink: Sink) -> int:
        sink._calls.limit = 1000
        return 1001


class _Mongo(Place):
    def _database(self) -> Any:
        import pymongo  # noqa: PLC0415 - the cases of the other stores run without it

        client = pymongo.MongoClient(self.url)
        return client, client.get_default_database()

    def empty(self) -> None:
        client, database = self._database()
        with client:
            for name in database.list_collection_names():
                database[name].delete_many({})

    def stock(self, task: str, state: str) -> None:
        client, database = self._database()
        document = {"_id": task, "status": state, "result": '"stock"', "traceback": None, "children": []}
        with client:
            database.celery_taskmeta.replace_one({"_id": task}, {**document, "date_done": None}, upsert=True)

    def poison(self, sink: Sink) -> int:
        sink._limit = 1000
        return 1001


class _Elastic(Place):
    """One index for all cases: to make one takes longer than most of them."""

    def __init__(self, server: ElasticServer, url: str) -> None:
        super().__init__(url)
        self._server = server

    def empty(self) -> None:
        self._server.empty(self.url)

    def stock(self, task: str, state: str) -> None:
        from celery import Celery  # noqa: PLC0415 - the cases of the other stores run without it

        backend = Celery("stock", backend=self.url, set_as_current=False).backend
        backend._set_with_state(f"celery-task-meta-{task}", json_document(task, state, "stock").decode(), state)
        backend.server.close()

    def poison(self, sink: Sink) -> int:
        sink._limit = 1000
        return 1001


class _Cassandra(Place):
    dated = True
    extended = False
    groups = False

    def __init__(self, url: str, session: Any) -> None:
        super().__init__(url)
        self._session = session
        self._keyspace = url.rpartition("/")[2]
        host, _, port = url.split("/")[2].partition(":")
        conf = {"servers": [host], "port": port, "keyspace": self._keyspace, "table": "tasks"}
        self.celery = {"backend": "cassandra://", **{f"cassandra_{name}": value for name, value in conf.items()}}

    def empty(self) -> None:
        query = "SELECT table_name FROM system_schema.tables WHERE keyspace_name = %s"
        for (table,) in self._session.execute(query, [self._keyspace]):
            if self._session.execute(f"SELECT * FROM {self._keyspace}.{table} LIMIT 1").one():
                self._session.execute(f"TRUNCATE {self._keyspace}.{table}")

    def stock(self, task: str, state: str) -> None:
        self._session.execute(
            f"INSERT INTO {self._keyspace}.tasks (task_id, status, result, date_done, traceback, children)"
            " VALUES (%s, %s, %s, toTimestamp(now()), %s, %s)",
            (task, state, b'"stock"', b"null", b"[]"),
        )

    def poison(self, sink: Sink) -> int:
        sink._limit = 1000
        return 1001


class _Postgres(Place):
    def _run(self, statement: str, *values: Any) -> None:
        import psycopg  # noqa: PLC0415 - the cases of the other stores run without it

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement, values)

    def empty(self) -> None:
        self._run(
            "TRUNCATE celery_taskmeta, celery_tasksetmeta, ckb_task, ckb_history, ckb_chord, ckb_chord_expiry, ckb_position"
        )

    def stock(self, task: str, state: str) -> None:
        columns = "(id, task_id, status, result, date_done)"
        row = "(nextval('task_id_sequence'), %s, %s, '\"stock\"', '2025-01-01')"
        self._run(f"INSERT INTO celery_taskmeta {columns} VALUES {row}", task, state)

    def poison(self, sink: Sink) -> int:
        sink._limit = 1000
        return 1001


@pytest.fixture(scope="session")
def elastic(elasticsearch: ElasticServer) -> tuple[ElasticServer, str]:
    return elasticsearch, elasticsearch.clean_index()


@pytest.fixture(scope="session")
def cassandra_session(cassandra: CassandraServer) -> Iterator[Any]:
    """A session of the driver's, for what a case does behind the store's back."""
    with cassandra.session() as session:
        yield session


@pytest.fixture(scope="session")
def cassandra_tables(cassandra: CassandraServer, cassandra_session: Any) -> Iterator[str]:
    """The URL of a view with all its tables, connected for the whole run: each of them costs 0.1 s to make."""
    url = cassandra.url(cassandra.new_keyspace(durable=False))
    sink = registry.open_sink(url, StoreOptions())
    sink.open()
    yield url
    sink.close()


@pytest.fixture
def cassandra_place(cassandra_tables: str, cassandra_session: Any) -> Place:
    """That view, empty."""
    found = _Cassandra(cassandra_tables, cassandra_session)
    found.empty()
    return found


REAL = [
    pytest.param(name, marks=getattr(pytest.mark, name))
    for name in ("redis", "mongodb", "elasticsearch", "cassandra", "postgresql")
]


@pytest.fixture(params=["memory", "sqlite", *REAL])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each store in turn."""
    found: Place
    if request.param == "memory":
        found = _Memory(f"memory://{uuid.uuid4().hex}")
    elif request.param == "sqlite":
        found = _Sqlite(f"sqlite:///{tmp_path / 'view.db'}")
    elif request.param == "postgresql":
        found = _Postgres(request.getfixturevalue("postgresql_url"))
    elif request.param == "cassandra":
        found = request.getfixturevalue("cassandra_place")
    elif request.param == "mongodb":
        found = _Mongo(request.getfixturevalue("mongodb_url"))
    elif request.param == "elasticsearch":
        found = _Elastic(*request.getfixturevalue("elastic"))
    else:
        found = _Redis(request.getfixturevalue("redis_url"))
    yield found
    found.close()
    if isinstance(found, (_Memory, _Elastic)):
        found.empty()


@pytest.fixture
def push_place(place: Place) -> Place:
    """Each store whose view can push."""
    if not place.view().push:
        pytest.skip("this store has no push")
    return place
