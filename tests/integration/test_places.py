"""A task's history from the log after partitions were added to it, by `pipeline init --grow`."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner
from confluent_kafka import Producer

from celery_kafka_backend import codec, events, order, places, topics
from celery_kafka_backend.cli import pipeline, records
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.events import Event
from celery_kafka_backend.result import KafkaResult
from tests.integration.kafka_topics import must_arrive
from tests.patience import PATIENCE_S, until

pytestmark = pytest.mark.kafka

COUNTS = (4, 6, 12)
MOVED = next(
    key
    for key in (f"moved-{n}" for n in range(1000))
    if len({topics.partition_of(key, count) for count in COUNTS}) == len(COUNTS)
)
"""Of a task that belonged to another partition whenever some were added."""


class Grown:
    """An app whose log has events of many tasks, and got more partitions between them."""

    def __init__(self, bootstrap, prefix):
        self.bootstrap = bootstrap
        self.topic = topics.task_events(prefix)
        self.app = Celery(
            "proj",
            broker="memory://",
            backend=f"kafka://{bootstrap}/?view=memory://nothing",
            set_as_current=False,
        )
        self.settings = {
            "topic_prefix": prefix,
            "replication_factor": 1,
            "min_insync_replicas": 1,
            "chord_partitions": 2,
        }
        self.now = order.system_wall_ms()
        self.count = 0

    def told(self, *arguments):
        done = CliRunner().invoke(pipeline, arguments, obj=CLIContext(self.app, no_color=True, workdir=None))
        assert "Traceback (most" not in done.stderr, done.stderr
        return done

    def grow(self, partitions):
        self.app.conf.kafka_backend_settings = {**self.settings, "partitions": partitions}
        self.app.__dict__.pop("backend", None)
        assert self.told("init", "--grow").exit_code == Exit.OK
        until(lambda: len(self.metadata().partitions) == partitions)

    def metadata(self):
        producer = Producer({"bootstrap.servers": self.bootstrap})
        return producer.list_topics(self.topic, timeout=PATIENCE_S).topics[self.topic]

    def event(self, kind, task):
        self.count += 1
        at = self.now + self.count
        return Event(id=f"{self.count:08x}", kind=kind, task=task, at=at, hlc=at, run=order.run_at(self.now))

    def append(self, *events_of_tasks):
        """Append by a producer that knows today's partitions; return what was appended, by id of the event."""
        producer = Producer(
            {"bootstrap.servers": self.bootstrap, "partitioner": "murmur2_random", "on_delivery": must_arrive}
        )
        for event in events_of_tasks:
            producer.produce(self.topic, codec.encode(event), event.task)
        assert producer.flush(PATIENCE_S) == 0

    def others(self, count):
        return [self.event(events.SENT, f"other-{self.count}") for _ in range(count)]


@pytest.fixture
def grown(kafka, topic_prefix):
    made = Grown(kafka.bootstrap, topic_prefix)
    for partitions, kind in zip(COUNTS, (events.SENT, events.RECEIVED, events.STARTED), strict=True):
        made.grow(partitions)
        made.append(*made.others(100), made.event(kind, MOVED), *made.others(100))
    return made


LIFE = [events.SENT, events.RECEIVED, events.STARTED]


def test_a_task_has_its_whole_history_wherever_its_partition_was(grown):
    done = grown.told("history", MOVED, "--log", "--json")
    assert [each["kind"] for each in json.loads(done.stdout)] == LIFE
    assert "partitions were added" in done.stderr
    around = grown.told("history", MOVED, "--log", "--json", "--around", "0s")
    assert [each["kind"] for each in json.loads(around.stdout)] == LIFE
    result = KafkaResult.of(grown.app.AsyncResult(MOVED))
    assert [event.kind for event in result.history(log=True)] == LIFE
    assert [event.kind for event in result.history(around=datetime.now(timezone.utc))] == LIFE
    long_ago = datetime(2024, 1, 1, tzinfo=timezone.utc)
    assert result.history(around=long_ago) == []


def test_where_no_partitions_were_added_only_the_tasks_own_is_read(kafka, topic_prefix, monkeypatch):
    made = Grown(kafka.bootstrap, topic_prefix)
    made.grow(12)
    made.append(*made.others(2_000), made.event(events.SENT, MOVED), *made.others(2_000))
    read = []
    batches = records.batches
    monkeypatch.setattr(records, "batches", lambda broker, parts: read.append(parts) or batches(broker, parts))
    done = made.told("history", MOVED, "--log", "--json")
    assert [each["kind"] for each in json.loads(done.stdout)] == [events.SENT]
    assert done.stderr == ""
    (parts,) = read
    whole = [number for (_, number), (start, end) in parts.items() if end - start > places.SAMPLE]
    assert whole == [topics.partition_of(MOVED, 12)]


def test_a_task_is_followed_to_where_it_belongs_when_partitions_are_added(kafka, topic_prefix, monkeypatch):
    monkeypatch.setattr(records, "ASK_EVERY_S", 0.1)
    made = Grown(kafka.bootstrap, topic_prefix)
    made.grow(4)
    made.append(made.event(events.SENT, MOVED), *made.others(50))
    broker = Broker(made.app.backend.settings, PATIENCE_S)
    said = records.following(broker, made.topic, MOVED, dict.fromkeys(range(4), 0))
    try:
        assert codec.decode(next(said).value()).kind == events.SENT
        for partitions, kind in ((6, events.RECEIVED), (12, events.SUCCESS)):
            made.grow(partitions)
            made.append(made.event(kind, MOVED), *made.others(50))
            assert codec.decode(next(said).value()).kind == kind
    finally:
        said.close()
        broker.close()


def test_a_task_that_ended_elsewhere_than_it_began_is_no_finding(grown):
    grown.append(grown.event(events.SUCCESS, MOVED))
    done = grown.told("findings", "--bound", "0s", "--gone-after", "0s", "--kind", "unfinished", "--json")
    unfinished = {json.loads(line)["task"] for line in done.stdout.splitlines()}
    assert len(unfinished) == grown.count - len(LIFE) - 1  # the others, which were only sent
    assert MOVED not in unfinished
    assert "partitions were added" in done.stderr
