"""Statistics told by materializers on a real Kafka: the same totals after kill -9, and no harm where they cannot be told."""

from __future__ import annotations

import random
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from celery_kafka_backend import codec, events, partials, topics
from celery_kafka_backend.events import Event
from celery_kafka_backend.processors.emitting import STATS
from celery_kafka_backend.sinks.registry import open_view
from tests.integration.kafka_topics import create, must_arrive
from tests.integration.materializing import options
from tests.patience import PATIENCE_S, until
from tests.services import native

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.services.kafka import KafkaCluster

pytestmark = pytest.mark.kafka

PARTITIONS = 4
ROOT = Path(__file__).parents[2]
MINUTE = 60_000


class World:
    """Topics of one pipeline, events in its log, and materializers of a view."""

    def __init__(self, kafka: str, prefix: str, view: str, folder: Path) -> None:
        self.kafka, self.prefix, self.view, self.folder = kafka, prefix, view, folder
        self.expected: dict[tuple[str, str], int] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self._producer = Producer(
            {"bootstrap.servers": kafka, "linger.ms": 5, "log_level": 3, "on_delivery": must_arrive}
        )
        self._random = random.Random(prefix)

    def create(self, *names: str) -> None:
        create(AdminClient({"bootstrap.servers": self.kafka}), *(NewTopic(name, PARTITIONS, 1) for name in names))

    def put(self, count: int, partition: int = -1) -> None:
        """So many events of some tasks, by their ids or into one partition."""
        for _ in range(count):
            kind = self._random.choice([events.SENT, events.STARTED, events.SUCCESS, events.FAILURE])
            self._put(partition, kind=kind, name=self._random.choice("abc"))
        assert self._producer.flush(PATIENCE_S) == 0

    def put_one(self, **fields: Any) -> None:
        """One SUCCESS with these fields."""
        self._put(-1, **{"kind": events.SUCCESS, "name": "a", **fields})
        assert self._producer.flush(PATIENCE_S) == 0

    def _put(self, partition: int, **fields: Any) -> None:
        at, task = time.time_ns() // 1_000_000 - self._random.randrange(2 * MINUTE), str(uuid.uuid4())
        event = Event(id=task, task=task, at=at, hlc=at, queue="q", started_at=at - 5, **fields)
        self._producer.produce(topics.task_events(self.prefix), codec.encode(event), task.encode(), partition)
        where = fields["name"], fields["kind"]
        self.expected[where] = self.expected.get(where, 0) + 1
        self._producer.poll(0)

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.integration.telling", self.kafka, self.prefix, self.view]
        with (self.folder / "log").open("ab") as output:
            self.processes.append(native.popen(command, output=output, cwd=ROOT))
        return self.processes[-1]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def folded(self) -> int:
        """How many records are in the view."""
        try:
            there = open_view(self.view, options(self.prefix)).positions()
        except Exception:  # noqa: BLE001 - it is not there yet
            return 0
        return sum(offset for at, offset in there.items() if at.topic == topics.task_events(self.prefix))

    def committed(self) -> int:
        """How many records the materializers need not read again."""
        return sum(self._committed(topics.view_name(self.view)))

    def settled(self) -> list[int]:
        """From where on the statistics of each partition would be counted again."""
        return self._committed(STATS)

    def _committed(self, role: str) -> list[int]:
        group = topics.group_id(self.prefix, role)
        consumer = Consumer({"bootstrap.servers": self.kafka, "group.id": group, "log_level": 3})
        log = topics.task_events(self.prefix)
        found = consumer.committed([TopicPartition(log, n) for n in range(PARTITIONS)], timeout=PATIENCE_S)
        consumer.close()
        return [max(at.offset, 0) for at in found]

    def told(self) -> dict[tuple[str, str], int]:
        """Kinds per name, of each bucket by its fullest partial."""
        consumer = Consumer({"bootstrap.servers": self.kafka, "group.id": uuid.uuid4().hex, "log_level": 3})
        topic = topics.task_stats(self.prefix)
        try:
            marks = [
                consumer.get_watermark_offsets(TopicPartition(topic, n), timeout=PATIENCE_S) for n in range(PARTITIONS)
            ]
        except KafkaException:  # it has just been made
            return {}
        consumer.assign([TopicPartition(topic, n, 0) for n in range(PARTITIONS)])
        fullest: dict[Any, partials.Partial] = {}
        left = sum(high for _, high in marks)
        while left > 0:  # more may have come since
            for message in consumer.consume(500, 1.0):
                partial = partials.decode(message.value())
                assert message.key() == partial.task.encode()
                where = (partial.partition, partial.bucket, partial.minute, partial.task)
                fullest[where] = max(partial, fullest.get(where, partial), key=lambda one: one.upto)
                left -= 1
        consumer.close()
        found: dict[tuple[str, str], int] = {}
        for partial in fullest.values():
            for cell in partial.cells:
                for kind, count in cell.kinds.items():
                    found[partial.task, kind] = found.get((partial.task, kind), 0) + count
        return found


@pytest.fixture(params=["sqlite", "redis"])
def world(kafka: KafkaCluster, redis_url: str, topic_prefix: str, tmp_path: Path, request: Any) -> Iterator[World]:
    """Waiting for Redis, materializers count; with SQLite a thread of theirs does."""
    view = redis_url if request.param == "redis" else f"sqlite:///{tmp_path}/view.db"
    made = World(kafka.bootstrap, topic_prefix, view, tmp_path)
    made.create(topics.task_events(topic_prefix), topics.chords(topic_prefix), topics.dead_letters(topic_prefix))
    yield made
    for process in made.processes:
        native.end(process)
    print(made.log[-5000:])


def test_kill_9_and_a_rebalance_change_no_total(world: World):
    """Two materializers, killed in turn while they work, a third one, and a stop by SIGTERM."""
    world.create(topics.task_stats(world.prefix))
    first, second = world.start(), world.start()
    put = 0
    for victim in (first, second):
        put += 6_000
        world.put(6_000)
        until(lambda put=put: world.folded() > put - 5_000)
        native.end(victim)  # SIGKILL
        world.start()
    world.put(1_500)
    until(lambda: world.folded() == put + 1_500)
    until(lambda: world.told() == world.expected)
    for process in world.processes[2:]:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    assert world.told() == world.expected


@pytest.mark.parametrize("world", ["sqlite"], indirect=True)
def test_a_log_that_falls_silent_with_its_materializer_killed_is_told_to_its_end(world: World):
    """No record comes after the crash that would show what is missing; an event with an impossible run time is counted."""
    world.put(2_500)
    world.put_one(runtime_s=1e308)
    victim = world.start()
    until(lambda: world.committed() == 2_501)
    native.end(victim)  # SIGKILL: nothing was told yet, for there is no topic
    world.create(topics.task_stats(world.prefix))
    world.start()
    until(lambda: world.told() == world.expected)


@pytest.mark.parametrize("world", ["sqlite"], indirect=True)
def test_what_is_too_large_to_be_told_holds_up_nothing(world: World):
    """A task name of nearly a record's size does not fit beside itself as a key."""
    world.create(topics.task_stats(world.prefix))
    world.put_one(name="x" * 900_000)
    del world.expected["x" * 900_000, events.SUCCESS]
    for partition in range(PARTITIONS):  # so many that the first bucket is whole
        world.put(1_100, partition)
    world.start()
    until(lambda: "max_message_bytes" in world.log)
    until(lambda: world.told() == world.expected)
    until(lambda: world.settled() == [1_000] * PARTITIONS)


@pytest.mark.parametrize("world", ["sqlite"], indirect=True)
def test_where_statistics_cannot_be_told_results_go_on_and_all_is_told_later(world: World):
    """Their topic is missing; then somebody makes it."""
    world.put(2_500)
    world.start()
    until(lambda: world.folded() == 2_500)
    until(lambda: "statistics: " in world.log and "pipeline init" in world.log)
    assert "results are not touched" in world.log
    world.create(topics.task_stats(world.prefix))
    until(lambda: world.told() == world.expected)
