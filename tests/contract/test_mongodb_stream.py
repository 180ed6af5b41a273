"""Waiting on MongoDB: a change stream where it is a replica set, batched polling where it is not."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from celery import Celery
from celery.exceptions import TimeoutError as NotInTime

from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.reader import Ear, Reader
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import batch, json_document, stated
from tests.contract.test_ear import heard
from tests.patience import PATIENCE_S
from tests.services import mongodb as service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pymongo = pytest.importorskip("pymongo")
monitoring = pytest.importorskip("pymongo.monitoring")
pytestmark = pytest.mark.mongodb

MANY = 1_000
THAW_S = 12.0
UNAUTHORIZED = {"failCommands": ["aggregate"], "errorCode": 13}


class Asked(monitoring.CommandListener):  # type: ignore[misc,name-defined]
    """Counts what a client asks the server for."""

    def __init__(self) -> None:
        self.commands: Counter[str] = Counter()

    def started(self, event: Any) -> None:
        self.commands[event.command_name] += 1

    def succeeded(self, event: Any) -> None: ...

    def failed(self, event: Any) -> None: ...


@pytest.fixture(scope="module")
def replica() -> Iterator[service.MongoServer]:
    """A replica set of one that a test may kill, freeze and make fail; it must leave it running."""
    (found,) = service.start_replica_set(1, "--setParameter", "enableTestCommands=1")
    yield found
    found.stop()


@pytest.fixture
def url(replica: service.MongoServer) -> str:
    return f"{replica.clean_database()}?replicaSet={service.REPLICA_SET}"


@pytest.fixture
def sink(url: str) -> Iterator[Any]:
    found = registry.open_sink(url, StoreOptions())
    found.open()
    yield found
    found.close()


@pytest.fixture
def listening() -> Iterator[Callable[[str], tuple[Ear, Asked]]]:
    """Makes ears, each with the count of what it asks."""
    opened: list[Any] = []

    def make(at: str) -> tuple[Ear, Asked]:
        asked = Asked()
        reader = Reader(at, StoreOptions(options={"event_listeners": [asked], "serverSelectionTimeoutMS": 2_000}))
        ear = Ear(reader, poll_interval_s=0.05)
        opened.extend((reader, ear))
        return ear, asked

    yield make
    for each in reversed(opened):
        each.close()


def settle(ear: Ear, asked: Asked) -> None:
    """Hear until a change stream is open and has read what was there."""
    streams = asked.commands["aggregate"]
    deadline = time.monotonic() + PATIENCE_S
    while not (ear._watched and ear._watched.issuperset(ear._ids) and asked.commands["aggregate"] > streams):
        assert time.monotonic() < deadline
        assert ear.hear(0.05) == {}
    ear.hear(0.05)


def settled(listening: Callable[[str], tuple[Ear, Asked]], url: str, *tasks: str) -> tuple[Ear, Asked]:
    """Return an ear that hears of some tasks, of "t" if none is named, by a change stream."""
    ear, asked = listening(url)
    for each in tasks or ("t",):
        ear.add(each)
    settle(ear, asked)
    return ear, asked


def test_a_thousand_waiters_on_a_replica_set_are_one_stream_and_ask_nothing(
    url: str, sink: Any, listening: Callable[[str], tuple[Ear, Asked]]
) -> None:
    ids = [uuid.uuid4().hex for _ in range(MANY)]
    ear, asked = settled(listening, url, *ids)
    asked.commands.clear()
    assert [ear.hear(0.06) for _ in range(5)] == [{}] * 5
    assert set(asked.commands) == {"getMore"}
    sink.write(batch(*(stated("SUCCESS", 10, task=each) for each in ids)))
    found: dict[str, bytes] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < MANY and time.monotonic() < deadline:
        found |= ear.hear(0.1)
    assert found == {each: json_document(each, "SUCCESS") for each in ids}
    assert asked.commands["find"] <= MANY // 20, "what changed together is read together"
    assert not asked.commands["aggregate"]


def test_a_thousand_waiters_on_a_standalone_server_cost_one_query_per_tick(
    mongodb_url: str, listening: Callable[[str], tuple[Ear, Asked]]
) -> None:
    ear, asked = listening(mongodb_url)
    for _ in range(MANY):
        ear.add(uuid.uuid4().hex)
    ticks = 20
    for _ in range(ticks):
        assert ear.hear(0.05) == {}
    assert asked.commands["find"] == ticks
    assert asked.commands["aggregate"] <= 1, "it says once that it has no change streams"
    sink = registry.open_sink(mongodb_url, StoreOptions())
    ear.add("t")
    sink.write(batch(stated("SUCCESS", 10)))
    assert heard(ear, "t") == json_document("t", "SUCCESS")
    sink.close()


def test_who_comes_later_is_heard_of_too_and_each_change_is_told(
    url: str, sink: Any, listening: Callable[[str], tuple[Ear, Asked]]
) -> None:
    ear, asked = settled(listening, url)
    sink.write(batch(stated("STARTED", 10)))
    assert heard(ear, "t") == json_document("t", "STARTED")
    ear.add("u")
    settle(ear, asked)
    sink.write(batch(stated("SUCCESS", 20), stated("SUCCESS", 20, task="u")))
    assert heard(ear, "t") == json_document("t", "SUCCESS")


def test_who_was_waited_for_before_is_looked_at_anew(
    url: str, sink: Any, listening: Callable[[str], tuple[Ear, Asked]]
) -> None:
    ear, _ = settled(listening, url, "t", "u")
    ear.drop("t")
    sink.write(batch(stated("SUCCESS", 20)))
    assert ear.hear(0.2) == {}
    ear.add("t")
    assert ear.hear(0.1) == {"t": json_document("t", "SUCCESS")}


@pytest.mark.parametrize(
    "code", [286, 43, 189], ids=["ChangeStreamHistoryLost", "CursorNotFound", "PrimarySteppedDown"]
)
def test_a_stream_that_the_server_ends_is_opened_anew(
    code: int, replica: service.MongoServer, url: str, sink: Any, listening: Callable[[str], tuple[Ear, Asked]]
) -> None:
    ear, _ = settled(listening, url)
    failing = {"failCommands": ["getMore"], "errorCode": code}
    with pymongo.MongoClient(replica.url, directConnection=True) as client:
        client.admin.command({"configureFailPoint": "failCommand", "mode": {"times": 1}, "data": failing})
    deadline = time.monotonic() + PATIENCE_S
    while ear._watched:
        assert time.monotonic() < deadline
        ear.hear(0.05)
    sink.write(batch(stated("SUCCESS", 20)))
    assert heard(ear, "t") == json_document("t", "SUCCESS")


def test_a_collection_that_is_dropped_ends_the_stream_and_not_the_waiting(
    url: str, sink: Any, listening: Callable[[str], tuple[Ear, Asked]]
) -> None:
    ear, _ = settled(listening, url)
    with pymongo.MongoClient(url) as client:
        client.get_default_database().celery_taskmeta.drop()
    sink.write(batch(stated("SUCCESS", 20)))
    assert heard(ear, "t") == json_document("t", "SUCCESS")


def test_who_may_not_open_a_stream_is_polled(
    replica: service.MongoServer, url: str, sink: Any, listening: Callable[[str], tuple[Ear, Asked]]
) -> None:
    ear, asked = listening(url)
    ear.add("t")
    with pymongo.MongoClient(replica.url, directConnection=True) as client:
        client.admin.command({"configureFailPoint": "failCommand", "mode": {"times": 1}, "data": UNAUTHORIZED})
    while not asked.commands["aggregate"]:
        assert ear.hear(0.05) == {}
    sink.write(batch(stated("SUCCESS", 20)))
    assert heard(ear, "t") == json_document("t", "SUCCESS")
    assert asked.commands["aggregate"] == 1
    assert not ear._watched


def test_a_failover_is_survived(listening: Callable[[str], tuple[Ear, Asked]]) -> None:
    """Three members; the primary, with the stream, is killed; what its successor takes is heard."""
    members = service.start_replica_set(3)
    try:
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in members)
        url = f"mongodb://{hosts}/t?replicaSet={service.REPLICA_SET}&serverSelectionTimeoutMS=2000"
        sink = registry.open_sink(url, StoreOptions())
        sink.open()
        ear, _ = settled(listening, url)
        with pymongo.MongoClient(url) as client:
            client.admin.command("ping")  # it looks for the primary first
            _, port = client.primary
        next(each for each in members if each.port == port).kill()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            ear.hear(0.05)
            try:
                sink.write(batch(stated("SUCCESS", 20)))
            except Unavailable:
                assert time.monotonic() < deadline
            else:
                break
        assert heard(ear, "t") == json_document("t", "SUCCESS")
        sink.close()
        fresh = registry.open_view(url, StoreOptions())
        assert fresh.documents(["t"]), "who connects now finds one host of three dead"
        fresh.close()
    finally:
        for each in members:
            each.stop()


def test_a_fork_has_a_stream_of_its_own_and_leaves_its_parent_the_other(
    url: str, sink: Any, listening: Callable[[str], tuple[Ear, Asked]]
) -> None:
    ear, asked = settled(listening, url)
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException):
            ear.add("u")
            status = 0 if heard(ear, "u") == json_document("u", "SUCCESS") else 1
        os._exit(status)
    streams = asked.commands["aggregate"]
    time.sleep(0.5)  # it waits by now, mostly
    sink.write(batch(stated("SUCCESS", 10, task="u")))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    sink.write(batch(stated("SUCCESS", 10)))
    assert heard(ear, "t") == json_document("t", "SUCCESS")
    assert asked.commands["aggregate"] == streams


def test_a_closed_ear_leaves_no_cursor(
    replica: service.MongoServer, url: str, sink: Any, listening: Callable[[str], tuple[Ear, Asked]]
) -> None:
    sink.write(batch(stated("STARTED", 10, task="u")))
    ear, _ = settled(listening, url)
    with pymongo.MongoClient(replica.url, directConnection=True) as client:

        def cursors() -> list[Any]:
            everything = client.admin.aggregate([{"$currentOp": {"idleCursors": True}}])
            namespace = f"{pymongo.uri_parser.parse_uri(url)['database']}.celery_taskmeta"
            return [each for each in everything if each["ns"] == namespace and "$changeStream" in str(each)]

        assert cursors()
        ear.close()
        assert not cursors()


# -- get() -------------------------------------------------------------------------------------


@pytest.fixture
def app(url: str) -> Iterator[Celery]:
    made = Celery("waiting", backend=f"kafka://127.0.0.1:1/?view={quote(url, safe='')}", set_as_current=False)
    yield made
    made.backend.result_consumer.stop()


def test_get_is_woken_by_the_stream(app: Celery, sink: Any) -> None:
    task = uuid.uuid4().hex
    result = app.AsyncResult(task)
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(result.get(timeout=PATIENCE_S)))
    waiting.start()
    deadline = time.monotonic() + PATIENCE_S
    while not result.backend.result_consumer.ear._watched:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    sink.write(batch(stated("SUCCESS", 10, task=task, value=42)))
    waiting.join(PATIENCE_S)
    assert got == [42]


@pytest.mark.parametrize("met", [False, True], ids=["before it first asked", "while the stream is open"])
def test_get_ends_by_its_timeout_though_the_server_is_frozen(
    met: bool, replica: service.MongoServer, app: Celery
) -> None:
    if met:
        with pytest.raises(NotInTime):
            app.AsyncResult(uuid.uuid4().hex).get(timeout=1)
    gave_up = threading.Event()
    watchdog = threading.Timer(THAW_S, lambda: (gave_up.set(), replica.thaw()))
    replica.freeze()
    watchdog.start()
    try:
        for _ in range(2):
            with pytest.raises(NotInTime):
                app.AsyncResult(uuid.uuid4().hex).get(timeout=0.5)
        assert not gave_up.is_set()
    finally:
        watchdog.cancel()
        replica.thaw()
