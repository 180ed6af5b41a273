"""What a store will never take, sent through the real materializer: a dead letter with the reason, and all the rest is there."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from celery_kafka_backend import codec, topics
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.changes import Partition
from celery_kafka_backend.processors.materializer import materializer
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_view
from tests.contract.factories import json_document, stated
from tests.integration.kafka_topics import create, must_arrive
from tests.patience import PATIENCE_S, until
from tests.services import elasticsearch as elastic_service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from celery_kafka_backend.events import Event
    from tests.services.kafka import KafkaCluster

pytestmark = pytest.mark.kafka
LARGE = 21_000_000
"""Bytes: more than Elasticsearch (20 MB), MongoDB (16 MB) and Cassandra (15 MB) take, and less than this Kafka."""
ROOMY = 30_000_000


class World(NamedTuple):
    """A store, what it cannot take, each with words of the reason, and what its sink is told."""

    url: str
    refused: list[tuple[Event, str]]
    options: Mapping[str, Any] = MappingProxyType({})


def done(task: str, value: Any = None) -> Event:
    return stated("SUCCESS", 10, task=task, value=value)


def in_redis(request: pytest.FixtureRequest) -> World:
    """Where somebody else has a list under the name of a result."""
    import redis  # noqa: PLC0415 - the other stores run without it

    url = request.getfixturevalue("redis_url")
    with redis.Redis.from_url(url) as client:
        client.rpush("celery-task-meta-list", "somebody's")
    return World(url, [(done("list"), "WRONGTYPE")])


def in_mongodb(request: pytest.FixtureRequest) -> World:
    """Where somebody has put a validator on Celery's collection."""
    import pymongo  # noqa: PLC0415 - the other stores run without it

    url = request.getfixturevalue("mongodb_url")
    with pymongo.MongoClient(url) as client:
        client.get_default_database().create_collection("celery_taskmeta", validator={"result": {"$ne": '"no"'}})
    return World(url, [(done("invalid", "no"), "failed validation"), (done("large", "x" * LARGE), "a document of")])


def in_elasticsearch(request: pytest.FixtureRequest) -> World:
    """Where a dynamic mapping has learnt that results are numbers."""
    url = request.getfixturevalue("elasticsearch_url")
    port, index = int(url.rpartition(":")[2].partition("/")[0]), url.rpartition("/")[2]
    made = {"mappings": {"properties": {"result": {"properties": {"result": {"type": "long"}}}}}}
    assert elastic_service.ask(port, "PUT", f"/{index}", made)[0] == 200
    refused = [
        (done("conflict", "no number"), "failed to parse field [result.result]"),
        (done("x" * 600), "an id of 617 bytes"),
        (done("large", "x" * LARGE), "a document of"),
    ]
    return World(url, refused, {"save_meta_as_text": False})


def in_cassandra(request: pytest.FixtureRequest) -> World:
    cassandra = request.getfixturevalue("cassandra")
    refused = [(done("x" * 66_000), "an id of 66000 bytes"), (done("large", "x" * LARGE), "a document of")]
    return World(cassandra.url(cassandra.new_keyspace(durable=False)), refused)


def in_postgresql(request: pytest.FixtureRequest) -> World:
    """The store in `examples/`, where somebody has put a constraint on Celery's table."""
    pytest.importorskip("ckb_postgresql")
    import psycopg  # noqa: PLC0415 - the other stores run without it
    from ckb_postgresql_statements import TABLES  # noqa: PLC0415

    url = request.getfixturevalue("postgresql_url")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(TABLES)
        connection.execute("ALTER TABLE celery_taskmeta ADD CHECK (result <> '\"no\"')")
    odd = msgspec.structs.replace(done("odd"), worker="celery@nul\0")
    refused = [(done("nul\0"), "NUL"), (done("x" * 156), "156 characters"), (done("against", "no"), "check constraint")]
    return World(url, [*refused, (odd, "NUL")])


@contextmanager
def running(bootstrap: str, prefix: str, world: World) -> Iterator[threading.Thread]:
    """A view's own materializer, as `pipeline run` makes it, in a thread."""
    given = {"topic_prefix": prefix, "max_message_bytes": ROOMY}
    settings = settings_module.parse(f"kafka://{bootstrap}/?view={world.url}", given)
    work = materializer(settings, world.url, StoreOptions(namespace=prefix, history=True, options=world.options))
    thread = threading.Thread(target=work.run)
    thread.start()
    try:
        yield thread
    finally:
        work.stop()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def letters(bootstrap: str, prefix: str, count: int, working: threading.Thread) -> dict[str, str]:
    """Return whom the dead letters are about, and why."""
    consumer = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": prefix, "auto.offset.reset": "earliest", "log_level": 3}
    )
    consumer.subscribe([topics.dead_letters(prefix)])
    found: dict[str, str] = {}

    def come() -> bool:
        assert working.is_alive()
        message = consumer.poll(0.2)
        if message is not None and message.error() is None:
            value, headers = message.value(), dict(message.headers() or ())
            assert value is not None
            found[codec.decode(value).task] = bytes(headers["reason"] or b"").decode()
        return len(found) >= count

    until(come)
    consumer.close()
    return found


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=getattr(pytest.mark, name))
        for name, make in {
            "redis": in_redis,
            "mongodb": in_mongodb,
            "elasticsearch": in_elasticsearch,
            "cassandra": in_cassandra,
            "postgresql": in_postgresql,
        }.items()
    ],
)
def test_what_a_store_refuses_is_a_dead_letter_with_its_reason_and_the_rest_is_written(
    kafka: KafkaCluster, topic_prefix: str, request: pytest.FixtureRequest, make: Callable[[Any], World]
) -> None:
    world = make(request)
    log = topics.task_events(topic_prefix)
    names = (log, topics.chords(topic_prefix), topics.dead_letters(topic_prefix))
    config = {"max.message.bytes": str(ROOMY + topics.DEAD_LETTER_ROOM)}
    create(
        AdminClient({"bootstrap.servers": kafka.bootstrap}), *(NewTopic(name, 1, 1, config=config) for name in names)
    )
    good = [done(f"good-{n}", n) for n in range(200)]
    bad = [event for event, _ in world.refused]
    producer = Producer(
        {
            "bootstrap.servers": kafka.bootstrap,
            "message.max.bytes": ROOMY,
            "compression.type": "lz4",
            "on_delivery": must_arrive,
        }
    )
    for event in [*good[:100], *bad, *good[100:]]:
        producer.produce(log, codec.encode(event), event.task.encode(), headers=codec.headers(event))
    assert producer.flush(PATIENCE_S) == 0
    view = open_view(world.url, StoreOptions(namespace=topic_prefix))
    with running(kafka.bootstrap, topic_prefix, world) as working:
        found = letters(kafka.bootstrap, topic_prefix, len(bad), working)
        until(lambda: view.positions().get(Partition(log, 0)) == len(good) + len(bad))
    assert {task: why for task, why in found.items() if not why.startswith("Rejected: ")} == {}
    assert found.keys() == {event.task for event in bad}
    assert all(words in found[event.task] for event, words in world.refused), found
    shown = view.documents([event.task for event in [*good, *bad]])
    assert shown == {event.task: json_document(event.task, "SUCCESS", n) for n, event in enumerate(good)}
    view.close()
