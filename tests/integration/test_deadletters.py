"""Dead letters against librdkafka's mock broker: their format, and that none is lost on the way."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, Producer

from celery_kafka_backend.errors import NotAcknowledged, PublishError
from celery_kafka_backend.processors.deadletters import CUT_BYTES, REASON_LIMIT, DeadLetters
from tests.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

TOPIC = "p.dead-letters"


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[str]:
    handle = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "unused", "log_level": 3})
    (broker,) = handle.list_topics(TOPIC, timeout=PATIENCE_S).brokers.values()
    yield f"{broker.host}:{broker.port}"
    del handle


def config(bootstrap: str, **more: Any) -> dict[str, Any]:
    return {"bootstrap.servers": bootstrap, "acks": "all", "log_level": 3, **more}


def read(bootstrap: str, topic: str, count: int) -> list[Any]:
    consumer = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": os.urandom(4).hex(), "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([topic])
    found: list[Any] = []
    for _ in range(100):
        message = consumer.poll(0.2)
        if message is not None and message.error() is None:
            found.append(message)
        if len(found) == count:
            break
    consumer.close()
    return found


def test_a_letter_says_what_it_was_and_where_it_came_from(bootstrap: str) -> None:
    letters = DeadLetters(config(bootstrap), "format", by="p.redis-1", wall_ms=lambda: 1700000000000)
    letters.put("p.task-events", 3, 42, b"task", b"\x00not json", [("e", b"success"), ("x", None)], "Unreadable: no")
    letters.flush(10)
    (message,) = read(bootstrap, "format", 1)
    assert message.key() == b"task"
    assert message.value() == b"\x00not json"
    assert message.headers() == [
        ("e", b"success"),
        ("x", None),
        ("reason", b"Unreadable: no"),
        ("topic", b"p.task-events"),
        ("partition", b"3"),
        ("offset", b"42"),
        ("at", b"1700000000000"),
        ("by", b"p.redis-1"),
    ]


def test_a_tombstone_and_a_long_reason_are_kept_too(bootstrap: str) -> None:
    letters = DeadLetters(config(bootstrap), "tombstone")
    letters.put("t", 0, 0, None, None, None, "ä\ud800" * REASON_LIMIT)
    letters.flush(10)
    (message,) = read(bootstrap, "tombstone", 1)
    assert message.key() is None
    assert message.value() is None
    assert dict(message.headers())["reason"].decode().startswith("ä?ä?")


def test_a_letter_over_the_limit_is_cut_and_says_so(bootstrap: str) -> None:
    letters = DeadLetters(config(bootstrap, **{"message.max.bytes": 100_000}), "large")
    letters.put("t", 0, 7, b"k", b"x" * 100_000, None, "why")
    with pytest.raises(PublishError):
        letters.flush(10)
    letters.flush(10)
    (message,) = read(bootstrap, "large", 1)
    assert message.value() == b"x" * CUT_BYTES
    assert dict(message.headers())["size"] == b"100000"


def test_flush_raises_until_every_letter_is_acknowledged_and_sends_none_twice(bootstrap: str) -> None:
    letters = DeadLetters(config(bootstrap), "patience")
    for offset in range(50):
        letters.put("t", 0, offset, None, b"v", None, "why")
    attempts = 0
    while True:
        try:
            letters.flush(0.0001)
        except NotAcknowledged:
            attempts += 1
        else:
            break
    assert attempts > 0
    assert sorted(int(dict(m.headers())["offset"]) for m in read(bootstrap, "patience", 51)) == list(range(50))


def test_without_letters_flush_needs_no_broker() -> None:
    DeadLetters({"bootstrap.servers": "127.0.0.1:1"}, TOPIC).flush()


def test_without_a_broker_flush_says_so_in_bounded_time() -> None:
    letters = DeadLetters({"bootstrap.servers": "127.0.0.1:1", "log_level": 2}, TOPIC)
    letters.put("t", 0, 0, None, b"v", None, "why")
    with pytest.raises(NotAcknowledged):
        letters.flush(0.1)
