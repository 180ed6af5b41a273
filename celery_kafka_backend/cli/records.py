"""Reading single records of the log, each read bounded, without any consumer group."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import click
from confluent_kafka import OFFSET_BEGINNING, KafkaError, TopicPartition

from celery_kafka_backend.cli.output import when

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from confluent_kafka import Consumer, Message

    from celery_kafka_backend.cli.broker import Broker

SLICE_S: Final = 0.2
SAY_FIRST_S: Final = 2.0
SAY_EVERY_S: Final = 1.0

At = tuple[str, int]
"""Topic and partition."""


def _read(consumer: Consumer, starts: Mapping[At, int], ends: Mapping[At, int], quiet_s: float) -> Iterator[Message]:
    """Yield records from the starts up to the ends; end early after ``quiet_s`` without any."""
    left = {at for at, start in starts.items() if start < ends[at]}
    if not left:
        consumer.close()
        return
    consumer.assign([TopicPartition(*at, starts[at]) for at in left])
    deadline = time.monotonic() + quiet_s
    try:
        while left and time.monotonic() < deadline:
            for message in consumer.consume(1000, SLICE_S):
                error = message.error()
                if error is not None:
                    if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - confluent-kafka's name for it
                        left.discard((message.topic() or "", message.partition() or 0))
                    continue
                deadline = time.monotonic() + quiet_s
                at, offset = (message.topic() or "", message.partition() or 0), message.offset() or 0
                if offset < ends[at]:
                    yield message
                if offset + 1 >= ends[at]:
                    left.discard(at)
                    consumer.pause([TopicPartition(*at)])
    finally:
        consumer.close()


def scan(broker: Broker, topic: str, partition: int, quiet_s: float = 30.0) -> Iterator[Message]:
    """Yield every record of a partition, up to its end as it is now."""
    at = (topic, partition)
    low, high = broker.ask(
        f"asking for the end of {topic}",
        lambda: broker.consumer.get_watermark_offsets(TopicPartition(*at), timeout=broker.timeout_s),
    )
    yield from _read(broker.reader(), {at: low}, {at: high}, quiet_s)


def since(broker: Broker, topic: str, at_ms: int, quiet_s: float = 30.0) -> Iterator[Message]:
    """Yield every record of a topic that Kafka wrote at ``at_ms`` or later, up to its end as it is now."""
    ends = {(topic, n): marks for n, marks in broker.ends(topic).items()}
    asked = [TopicPartition(*at, at_ms) for at in ends]
    found = broker.ask(
        f"asking where {topic} was at that time",
        lambda: broker.consumer.offsets_for_times(asked, timeout=broker.timeout_s),
    )
    # Kafka says -1 where there is nothing so late; librdkafka's embedded broker, which keeps no times, always does.
    starts = {(one.topic, one.partition): one.offset for one in found}
    if broker.embedded:
        starts = {at: low for at, (low, _) in ends.items()}
    starts = {at: start if start >= 0 else ends[at][1] for at, start in starts.items()}
    yield from _read(broker.reader(), starts, {at: high for at, (_, high) in ends.items()}, quiet_s)


def tail(broker: Broker, topic: str, partition: int, timeout_s: float) -> Iterator[Message | None]:
    """Yield every record of a partition, then those that come, for so long; None at each end."""
    consumer = broker.reader()
    consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING)])
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            for message in consumer.consume(1000, SLICE_S):
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
                    yield None
    finally:
        consumer.close()


def saying(messages: Iterator[Message], place: str) -> Iterator[Message]:
    """Pass messages on, and say on stderr now and then how far that is; nothing in the first two seconds."""
    say_at = time.monotonic() + SAY_FIRST_S
    for read, message in enumerate(messages, 1):
        if time.monotonic() >= say_at:
            say_at = time.monotonic() + SAY_EVERY_S
            click.echo(f"reading {place}: {read} records, at {when(message.timestamp()[1])}", err=True)
        yield message


def last_records(broker: Broker, topic: str, count: int) -> list[Message]:
    """Return the last few records of each of a topic's partitions; what does not come in time is absent."""
    ends = {(topic, n): marks for n, marks in broker.ends(topic).items()}
    starts = {at: max(low, high - count) for at, (low, high) in ends.items()}
    return list(_read(broker.reader(), starts, {at: high for at, (_, high) in ends.items()}, broker.timeout_s))


def first_at(broker: Broker, offsets: Mapping[At, int], ends: Mapping[At, int]) -> dict[At, Message]:
    """Return the first record at or after an offset of each partition; what is not there, or late, is absent."""
    found: dict[At, Message] = {}
    left = {at for at, offset in offsets.items() if offset < ends[at]}
    if not left:
        return {}
    consumer = broker.reader()
    consumer.assign([TopicPartition(*at, offsets[at]) for at in left])
    deadline = time.monotonic() + broker.timeout_s
    try:
        while left and time.monotonic() < deadline:
            for message in consumer.consume(100, SLICE_S):
                at = (message.topic() or "", message.partition() or 0)
                if at in left:
                    left.discard(at)
                    consumer.pause([TopicPartition(*at)])
                    if message.error() is None:
                        found[at] = message
    finally:
        consumer.close()
    return found
