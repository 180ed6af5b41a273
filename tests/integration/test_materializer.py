"""The materializer against a broker: what a crash, a stop, a rebalance, poison and a store that is away do to a view."""

from __future__ import annotations

import signal
import sqlite3
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from celery_kafka_backend import chord_records, codec, events, order, topics
from celery_kafka_backend.changes import Batch, Logged, Partition
from celery_kafka_backend.errors import Rejected, Unavailable
from celery_kafka_backend.events import Event
from celery_kafka_backend.kafka import producer_config
from celery_kafka_backend.processors import marks
from celery_kafka_backend.processors.deadletters import DeadLetters
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.processors.materializer import Materializer
from celery_kafka_backend.processors.plan import Target
from celery_kafka_backend.processors.replay import replay
from celery_kafka_backend.processors.verify import compare
from celery_kafka_backend.sinks.contract import Sink, View
from celery_kafka_backend.sinks.registry import open_sink, open_view
from tests.integration.kafka_topics import create, must_arrive
from tests.integration.materializing import POINTS, options, settings
from tests.patience import PATIENCE_S, until
from tests.services import mock_kafka, native
from tests.services import redis as redis_service

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable, Iterator

    from tests.services.kafka import KafkaCluster

PARTITIONS = 4
ROOT = Path(__file__).parents[2]


# -- a log --------------------------------------------------------------------------------------------


class Log:
    """The topics of one pipeline, and what was put there."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        self.bootstrap = bootstrap
        self.prefix = prefix
        self.topic = topics.task_events(prefix)
        self.events: list[Event] = []
        self._producer = Producer(
            {"bootstrap.servers": bootstrap, "acks": "all", "linger.ms": 5, "log_level": 3, "on_delivery": must_arrive}
        )
        self._clock = order.Clock()

    def create(self) -> None:
        create(
            AdminClient({"bootstrap.servers": self.bootstrap}),
            NewTopic(self.topic, PARTITIONS, 1),
            NewTopic(topics.chords(self.prefix), PARTITIONS, 1, config={"cleanup.policy": "compact"}),
            NewTopic(topics.dead_letters(self.prefix), 1, 1),
        )

    def appear(self) -> None:
        """On the mock broker a topic appears when somebody asks for it."""
        for name in (self.topic, topics.chords(self.prefix), topics.dead_letters(self.prefix)):
            self._producer.list_topics(name, timeout=PATIENCE_S)

    def run_tasks(self, count: int, size: int = 0, expires_in_ms: int = 86_400_000) -> list[Event]:
        """Tasks that were sent, started and succeeded; returns their events."""
        made = []
        for _ in range(count):
            task = str(uuid.uuid4())
            run = order.run_at(self._clock.wall_ms())
            made += [
                self.event(task, events.SENT, None, run, expires_in_ms),
                self.event(task, events.STARTED, order.Rank.UNREADY, run, expires_in_ms),
                self.event(task, events.SUCCESS, order.Rank.SUCCEEDED, run, expires_in_ms, "x" * size),
            ]
        self.put(made)
        return made

    def event(
        self, task: str, kind: str, rank: order.Rank | None, run: int, expires_in_ms: int, result: Any = None
    ) -> Event:
        hlc = self._clock.tick()
        state = None if rank is None else kind.upper()
        document: dict[str, Any] = {}
        if state is not None:
            document["doc"] = msgspec.Raw(msgspec.json.encode({"status": state, "result": result, "task_id": task}))
        return Event(
            id=str(uuid.uuid4()),
            kind=kind,
            task=task,
            key=0 if rank is None else order.order_key(rank, hlc, run),
            at=hlc,
            hlc=hlc,
            run=run,
            state=state,
            worker="celery@a" if rank is not None else None,
            expires_at=hlc + expires_in_ms,
            **document,
        )

    def put(self, made: Iterable[Event]) -> None:
        for event in made:
            self.events.append(event)
            self._produce(self.topic, event.task.encode(), codec.encode(event), headers=codec.headers(event))
        assert self._producer.flush(PATIENCE_S) == 0

    def put_raw(self, value: bytes | None, partition: int, key: bytes = b"?", topic: str = "") -> None:
        self._produce(topic or self.topic, key, value, partition=partition)
        assert self._producer.flush(PATIENCE_S) == 0

    def _produce(self, topic: str, key: bytes, value: bytes | None, **more: Any) -> None:
        while True:
            try:
                self._producer.produce(topic, value, key, **more)
            except BufferError:
                self._producer.poll(0.1)
            else:
                return

    def ends(self, topic: str = "") -> dict[Partition, int]:
        """Next offset of each partition that has records."""
        return {at: high for at, high in self._ends(topic or self.topic) if high}

    def _ends(self, topic: str) -> Iterator[tuple[Partition, int]]:

        consumer = Consumer({"bootstrap.servers": self.bootstrap, "group.id": "ends", "log_level": 3})
        for number in consumer.list_topics(topic, timeout=PATIENCE_S).topics[topic].partitions:
            yield (
                Partition(topic, number),
                consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=PATIENCE_S)[1],
            )
        consumer.close()

    def letters(self, count: int) -> list[Any]:
        """The first dead letters; fails if there are fewer."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.bootstrap,
                "group.id": uuid.uuid4().hex,
                "auto.offset.reset": "earliest",
                "log_level": 3,
            }
        )
        consumer.subscribe([topics.dead_letters(self.prefix)])
        found: list[Any] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < count and time.monotonic() < deadline:
            message = consumer.poll(0.2)
            if message is not None and message.error() is None:
                found.append(message)
        consumer.close()
        assert len(found) == count
        return found

    def expected(self, without: Iterable[str] = ()) -> View:
        """A view with everything that was put, folded at once and in memory."""
        url = f"memory://{uuid.uuid4().hex}"
        sink = open_sink(url, options(self.prefix))
        sink.open()

        skip = set(without)
        sink.write(Batch(fold(Logged(event, codec.encode(event)) for event in self.events if event.task not in skip)))
        return open_view(url, options(self.prefix))


@pytest.fixture(scope="module")
def mock_bootstrap() -> Iterator[str]:
    with mock_kafka.running() as address:
        yield address


@pytest.fixture
def mock_log(mock_bootstrap: str, topic_prefix: str) -> Log:
    log = Log(mock_bootstrap, topic_prefix)
    log.appear()
    return log


@pytest.fixture
def log(kafka: KafkaCluster, topic_prefix: str) -> Log:
    log = Log(kafka.bootstrap, topic_prefix)
    log.create()
    return log


# -- materializers --------------------------------------------------------------------------------------


@contextmanager
def running(log: Log, sink: Sink, group: str = "") -> Iterator[Materializer]:
    """A materializer in a thread of this process."""
    config = settings(log.bootstrap, log.prefix)
    letters = DeadLetters(producer_config(config), topics.dead_letters(log.prefix), by="test")
    view = open_view(sink.url, options(log.prefix))
    work = Materializer(config, sink, view, group=group or f"{log.prefix}.test", dead_letters=letters)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work.run()
        except BaseException as exc:  # noqa: BLE001 - it is raised below
            failed.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield work
    finally:
        work.stop()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


class Process:
    """A materializer in a process of its own."""

    def __init__(self, log: Log, view: str, folder: Path, hang_at: str = "") -> None:
        self._out = folder / f"{uuid.uuid4().hex}.out"
        command = [sys.executable, "-m", "tests.integration.materializing", log.bootstrap, log.prefix, view, hang_at]
        with self._out.open("wb") as output:
            self.process: subprocess.Popen[bytes] = native.popen(command, output=output, cwd=ROOT)

    @property
    def said(self) -> str:
        return self._out.read_text(errors="replace")

    def until(self, text: str) -> None:
        def heard() -> bool:
            ended = self.process.poll()
            found = text in self.said
            assert found or ended is None, f"it ended with {ended}:\n{self.said[-3000:]}"
            return found

        until(heard, lambda: f"it says {text!r}:\n{self.said[-3000:]}")

    def wrote(self) -> list[str]:
        return [word for line in self.said.splitlines() if line.startswith("wrote ") for word in line.split()[1:]]

    def kill(self) -> None:
        native.end(self.process)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def rss_mb(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) // 1024
        raise AssertionError("no VmRSS")


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def make(log: Log, view: str, hang_at: str = "") -> Process:
        made.append(Process(log, view, tmp_path, hang_at))
        return made[-1]

    yield make
    for one in made:
        one.kill()
        print(one.said[-5000:])  # shown if the test fails


def caught_up(view: View, log: Log) -> bool:
    try:
        there = view.positions()
    except (Unavailable, sqlite3.OperationalError):
        return False
    ends = log.ends() | log.ends(topics.chords(log.prefix))
    return all(there.get(at, 0) >= end for at, end in ends.items())


def assert_same(view: View, other: View) -> None:
    result = compare(view, other)
    assert result.equal, result.differences[:5]
    assert sum(table.rows for table in result.a.values()) > 0


class Wrapped(Sink):
    """A sink with a fault."""

    def __init__(self, url: str, prefix: str, fault: Callable[[Batch], None]) -> None:
        self._inner = open_sink(url, options(prefix))
        self.url = self._inner.url
        self._fault = fault

    def open(self) -> None:
        self._inner.open()

    def write(self, batch: Batch) -> None:
        self._fault(batch)
        self._inner.write(batch)

    def close(self) -> None:
        """The memory view is looked at afterwards."""


# -- on the mock broker ---------------------------------------------------------------------------------


def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


def test_a_view_holds_what_the_log_says_and_where_it_is(mock_log: Log) -> None:
    mock_log.run_tasks(300)
    url = memory()
    view = open_view(url, options(mock_log.prefix))
    with running(mock_log, Wrapped(url, mock_log.prefix, lambda _: None)) as work:
        until(lambda: caught_up(view, mock_log))
        mock_log.run_tasks(100)
        until(lambda: caught_up(view, mock_log))
    assert work.statistics.events == 1200
    assert view.positions() == mock_log.ends()
    assert_same(view, mock_log.expected())


def test_a_lone_event_does_not_wait_for_company(mock_log: Log) -> None:
    url = memory()
    view = open_view(url, options(mock_log.prefix))
    with running(mock_log, Wrapped(url, mock_log.prefix, lambda _: None)):
        mock_log.run_tasks(1)
        until(lambda: caught_up(view, mock_log))
        took: list[float] = []

        def one_is_quick() -> bool:
            (_, _, success) = mock_log.run_tasks(1)
            put_at = time.monotonic()
            until(lambda: view.documents([success.task]), every_s=0.001)
            took.append(time.monotonic() - put_at)
            return took[-1] < 0.25

        # Of a materializer that waits for company none is; on a busy machine some are not.
        until(one_is_quick, lambda: took)


def test_poison_goes_to_the_dead_letters_and_blocks_nothing(mock_log: Log) -> None:
    mock_log.run_tasks(5)
    poison = [b"\xff\xfe", b"[]", b'{"v":1}', b'{"v":99,"id":"a"}', None]
    places = []
    for value in poison:
        places.append(mock_log.ends().get(Partition(mock_log.topic, 0), 0))
        mock_log.put_raw(value, partition=0)
    mock_log.put_raw(b"{}", 1, key=b"no key of a chord", topic=topics.chords(mock_log.prefix))
    mock_log.run_tasks(5)
    url = memory()
    view = open_view(url, options(mock_log.prefix))
    with running(mock_log, Wrapped(url, mock_log.prefix, lambda _: None)) as work:
        until(lambda: caught_up(view, mock_log) and work.statistics.dead_letters == 6)
    assert_same(view, mock_log.expected())
    letters = mock_log.letters(6)
    of_events = {
        int(dict(m.headers())["offset"]): m for m in letters if dict(m.headers())["topic"] == mock_log.topic.encode()
    }
    assert [of_events[place].value() for place in places] == poison
    assert all(dict(m.headers())["partition"] == b"0" for m in of_events.values())
    assert b"UnknownVersion" in dict(of_events[places[3]].headers())["reason"]
    assert b"Unreadable" in dict(of_events[places[0]].headers())["reason"]


def test_a_refused_task_goes_to_the_dead_letters_and_the_rest_is_written(mock_log: Log) -> None:
    mock_log.run_tasks(20)
    bad = mock_log.events[0].task
    url = memory()
    inner = open_sink(url, options(mock_log.prefix))

    class Refusing(Wrapped):
        def write(self, batch: Batch) -> None:
            changes = [change for change in batch.changes if change.id != bad]
            inner.write(msgspec.structs.replace(batch, changes=changes))
            if len(changes) < len(batch.changes):
                raise Rejected([(bad, "too odd")])

    view = open_view(url, options(mock_log.prefix))
    with running(mock_log, Refusing(url, mock_log.prefix, lambda _: None)) as work:
        until(lambda: caught_up(view, mock_log) and work.statistics.dead_letters == 3)
    assert_same(view, mock_log.expected(without=[bad]))
    letters = mock_log.letters(3)
    assert {msgspec.json.decode(m.value())["task"] for m in letters} == {bad}
    assert {dict(m.headers())["reason"] for m in letters} == {b"Rejected: too odd"}


def test_the_same_batch_is_written_again_when_the_store_is_back(mock_log: Log) -> None:
    mock_log.run_tasks(20)
    seen: list[list[str]] = []

    def away_three_times(batch: Batch) -> None:
        seen.append([change.id for change in batch.changes])
        if len(seen) <= 3:
            raise Unavailable("not now")

    url = memory()
    view = open_view(url, options(mock_log.prefix))
    with running(mock_log, Wrapped(url, mock_log.prefix, away_three_times)) as work:
        until(lambda: caught_up(view, mock_log))
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert work.statistics.retries == 3
    assert_same(view, mock_log.expected())


def test_what_a_view_lost_while_nobody_folded_is_read_again(mock_log: Log) -> None:
    mock_log.run_tasks(100)
    first, group = memory(), f"{mock_log.prefix}.same"
    with running(mock_log, Wrapped(first, mock_log.prefix, lambda _: None), group):
        until(lambda: caught_up(open_view(first, options(mock_log.prefix)), mock_log))
    mock_log.run_tasks(10)
    empty = memory()  # the same view to Kafka, and the store has nothing of it
    view = open_view(empty, options(mock_log.prefix))
    with running(mock_log, Wrapped(empty, mock_log.prefix, lambda _: None), group) as work:
        until(lambda: caught_up(view, mock_log))
    assert work.statistics.rewound == PARTITIONS
    assert work.statistics.missed == 0
    assert_same(view, mock_log.expected())


def test_a_bug_in_a_sink_ends_it_and_commits_nothing(mock_log: Log) -> None:
    mock_log.run_tasks(20)

    hit = threading.Event()

    def bug(_batch: Batch) -> None:
        hit.set()
        raise ZeroDivisionError

    url = memory()
    with pytest.raises(ZeroDivisionError), running(mock_log, Wrapped(url, mock_log.prefix, bug)):
        assert hit.wait(PATIENCE_S)
    view = open_view(url, options(mock_log.prefix))
    with running(mock_log, Wrapped(url, mock_log.prefix, lambda _: None)):
        until(lambda: caught_up(view, mock_log))
    assert_same(view, mock_log.expected())


def test_chord_facts_are_shown(mock_log: Log) -> None:
    record = chord_records.Sized(group="g", generation=1, size=3, at=5)
    key, value = chord_records.encode(record)
    mock_log.put_raw(value, 0, key=key, topic=topics.chords(mock_log.prefix))
    mock_log.put_raw(None, 0, key=key, topic=topics.chords(mock_log.prefix))
    url = memory()
    view = open_view(url, options(mock_log.prefix))
    with running(mock_log, Wrapped(url, mock_log.prefix, lambda _: None)):
        until(lambda: view.chord("g"))
    assert len(view.chord("g")) == 1


def test_replay_gives_the_same_view_and_revives_nothing(mock_log: Log) -> None:
    mock_log.run_tasks(50)
    gone = mock_log.run_tasks(5, expires_in_ms=-1000)
    mock_log.put_raw(b"poison", 0)
    live, copy = memory(), memory()
    view = open_view(live, options(mock_log.prefix))
    with running(mock_log, Wrapped(live, mock_log.prefix, lambda _: None)):
        until(lambda: caught_up(view, mock_log))
    config = settings(mock_log.bootstrap, mock_log.prefix)
    steps: list[int] = []
    target = Target(copy, options(mock_log.prefix))
    done = replay(config, target, on_progress=lambda d: steps.append(d.read))
    assert (done.events, done.poison, done.expired, done.read) == (165, 1, 5, done.total)
    assert steps[-1] == done.total
    other = open_view(copy, options(mock_log.prefix))
    assert_same(view, other)
    assert not other.shown([event.task for event in gone])
    told = marks.own(other.positions())
    assert told == view.positions()
    again = replay(config, target, from_=told)
    assert again.events == 0


def test_records_that_the_broker_dropped_are_reported(mock_log: Log, caplog: pytest.LogCaptureFixture) -> None:
    url = memory()
    view = open_view(url, options(mock_log.prefix))
    mock_log.run_tasks(20)
    with running(mock_log, Wrapped(url, mock_log.prefix, lambda _: None)):
        until(lambda: caught_up(view, mock_log))
    # The mock broker keeps 5 MB of each of its four partitions.
    mock_log.run_tasks(400, size=100_000)
    with running(mock_log, Wrapped(url, mock_log.prefix, lambda _: None)) as work:
        until(lambda: caught_up(view, mock_log))
    assert work.statistics.missed > 0
    assert work.statistics.missed + work.statistics.events == 1200
    assert "deleted them before they were read" in caplog.text


# -- on a real Kafka ------------------------------------------------------------------------------------


@pytest.mark.kafka
@pytest.mark.parametrize("store", ["sqlite", "redis"])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_loses_nothing(
    log: Log, process: Callable[..., Process], request: pytest.FixtureRequest, tmp_path: Path, point: str, store: str
) -> None:
    url = f"sqlite:///{tmp_path}/view.db" if store == "sqlite" else request.getfixturevalue("redis_url")
    log.run_tasks(200)
    first = process(log, url, point)
    first.until(f"{point} ")
    first.kill()
    assert "wrote " not in first.said
    log.run_tasks(50)
    second = process(log, url)
    view = open_view(url, options(log.prefix))
    until(lambda: caught_up(view, log))
    assert second.stop() == 0
    # Nothing was committed before the kill, so everything is written by the second.
    assert set(second.wrote()) == {event.id for event in log.events}
    assert_same(view, log.expected())
    assert {at: end for at, end in view.positions().items() if at.topic == log.topic} == log.ends()


@pytest.mark.kafka
def test_a_partition_that_leaves_during_a_pause_and_comes_back_after_it_is_read(log: Log) -> None:
    away = threading.Event()

    def fault(_batch: Batch) -> None:
        if away.is_set():
            raise Unavailable("not now")

    url, group = memory(), f"{log.prefix}.shared"
    view = open_view(url, options(log.prefix))
    with running(log, Wrapped(url, log.prefix, fault), group) as work:
        log.run_tasks(20)
        until(lambda: caught_up(view, log))
        away.set()
        log.run_tasks(20)
        until(lambda: work.statistics.retries)
        other = Consumer(
            {
                "bootstrap.servers": log.bootstrap,
                "group.id": group,
                "partition.assignment.strategy": "cooperative-sticky",
                "enable.auto.commit": False,
                "log_level": 3,
            }
        )
        other.subscribe([log.topic])
        until(lambda: other.poll(0.1) or other.assignment())
        before = work.statistics.batches
        away.clear()
        until(lambda: work.statistics.batches > before)
        other.close()
        log.run_tasks(20)
        until(lambda: caught_up(view, log))
    assert_same(view, log.expected())


@pytest.mark.kafka
def test_a_stop_repeats_nothing_and_loses_nothing(log: Log, process: Callable[..., Process], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/view.db"
    wrote: list[str] = []
    feeding = threading.Event()

    def feed() -> None:
        while not feeding.wait(0.02):  # as fast as it can, all of it would have to be folded and compared for a minute
            log.run_tasks(20)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        for _ in range(3):
            one = process(log, url)
            one.until("wrote ")
            time.sleep(0.5)
            assert one.stop() == 0, one.said[-2000:]
            wrote += one.wrote()
    finally:
        feeding.set()
        thread.join()
    last = process(log, url)
    view = open_view(url, options(log.prefix))
    until(lambda: caught_up(view, log))
    assert last.stop() == 0
    wrote += last.wrote()
    assert len(wrote) == len(set(wrote)), "something was written twice"
    assert set(wrote) == {event.id for event in log.events}
    assert_same(view, log.expected())


@pytest.mark.kafka
@pytest.mark.redis
def test_two_share_the_work_and_the_partitions_of_a_dead_one_are_taken(
    log: Log, process: Callable[..., Process], redis_url: str
) -> None:
    view = open_view(redis_url, options(log.prefix))
    first = process(log, redis_url)
    first.until("assigned")
    log.run_tasks(100)
    second = process(log, redis_url)
    second.until("assigned")
    first.until("revoked")
    log.run_tasks(200)
    until(lambda: caught_up(view, log))
    until(lambda: first.wrote() and second.wrote())
    assert_same(view, log.expected())
    second.kill()
    died = time.monotonic()
    log.run_tasks(200)
    until(lambda: caught_up(view, log))
    took = time.monotonic() - died
    print(f"taken over after {took:.1f} s")
    # Ten seconds of a machine that is not busy; with librdkafka's own session timeout of 45 s it would be more.
    assert took < 40
    assert first.stop() == 0
    assert_same(view, log.expected())


@pytest.mark.kafka
@pytest.mark.redis
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_store_that_is_away_is_waited_for_in_bounded_memory(
    log: Log, process: Callable[..., Process], how: str
) -> None:
    server = redis_service.start(appendonly=True)
    try:
        url = server.url + "?socket_timeout=1"
        view = open_view(server.url, options(log.prefix))
        log.run_tasks(50)
        one = process(log, url)
        until(lambda: caught_up(view, log))
        one.until("wrote ")
        getattr(server, how)()
        log.run_tasks(10)
        one.until("paused")
        before = one.rss_mb()
        log.run_tasks(4000, size=50_000)
        time.sleep(12)  # longer than the session timeout: it must stay in the group
        grown = one.rss_mb() - before
        print(f"200 MB behind: RSS grew by {grown} MB to {one.rss_mb()} MB")
        assert grown < 120
        assert "revoked" not in one.said
        assert "lost " not in one.said
        (server.restart if how == "kill" else server.thaw)()
        one.until("resumed")
        until(lambda: caught_up(view, log))
        assert one.stop() == 0
        assert_same(view, log.expected())
    finally:
        server.stop()


@pytest.mark.kafka
@pytest.mark.redis
def test_a_redis_that_comes_back_empty_is_filled_again_from_the_log(log: Log, process: Callable[..., Process]) -> None:
    """Killed while it is written to; killed while nothing is written; and emptied without a word."""
    server = redis_service.start()
    try:
        view = open_view(server.url, options(log.prefix))
        one, other = process(log, server.url), process(log, server.url)
        feeding = threading.Event()

        def feed() -> None:
            while not feeding.wait(0.1):
                log.run_tasks(10)

        thread = threading.Thread(target=feed)
        thread.start()
        try:
            for _ in range(2):
                ends = log.ends()
                until(lambda: all(view.positions().get(at, 0) >= end for at, end in ends.items()))  # noqa: B023 - called at once
                server.restart()
        finally:
            feeding.set()
            thread.join()
        until(lambda: caught_up(view, log))
        assert_same(view, log.expected())
        server.restart()
        until(lambda: caught_up(view, log))
        assert_same(view, log.expected())
        assert redis_service.ask(server.port, "FLUSHALL") == ["+OK"]
        until(lambda: caught_up(view, log))
        assert_same(view, log.expected())
        assert one.stop() == other.stop() == 0
        assert "the view has lost" in one.said + other.said
    finally:
        server.stop()


@pytest.mark.kafka
def test_positions_pass_control_records(log: Log) -> None:
    """A transaction's marker takes an offset: a reader that waits for the end must not wait for ever."""
    log.run_tasks(10)
    transactional = Producer({"bootstrap.servers": log.bootstrap, "transactional.id": uuid.uuid4().hex})
    transactional.init_transactions(20)
    transactional.begin_transaction()
    event = log.event(str(uuid.uuid4()), events.STARTED, order.Rank.UNREADY, 1, 86_400_000)
    log.events.append(event)
    transactional.produce(log.topic, codec.encode(event), event.task.encode())
    transactional.commit_transaction(20)
    url = memory()
    view = open_view(url, options(log.prefix))
    with running(log, Wrapped(url, log.prefix, lambda _: None)) as work:
        until(lambda: caught_up(view, log))
    assert work.statistics.missed == 0
    assert_same(view, log.expected())


@pytest.mark.kafka
def test_a_missing_dead_letter_topic_is_waited_for(kafka: KafkaCluster, topic_prefix: str) -> None:
    log = Log(kafka.bootstrap, topic_prefix)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    create(admin, NewTopic(log.topic, 1, 1), NewTopic(topics.chords(log.prefix), 1, 1))
    log.put_raw(b"poison", 0)
    log.run_tasks(5)
    url = memory()
    with running(log, Wrapped(url, log.prefix, lambda _: None)) as work:
        until(lambda: work.statistics.retries >= 2)
        assert work.statistics.batches == 0
        create(admin, NewTopic(topics.dead_letters(log.prefix), 1, 1))
        until(lambda: work.statistics.events == 15)
    assert log.letters(1)[0].value() == b"poison"
