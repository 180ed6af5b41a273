"""Reading single records of the log, each read bounded, without any consumer group."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import click
from confluent_kafka import OFFSET_BEGINNING, KafkaError, TopicPartition

from celery_kafka_backend import past
from celery_kafka_backend.cli.output import when
from celery_kafka_backend.errors import NotAcknowledged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

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
    # librdkafka's embedded broker keeps no times.
    starts = {at: low for at, (low, _) in ends.items()} if broker.embedded else _at_time(broker, ends, at_ms)
    yield from _read(broker.reader(), starts, {at: high for at, (_, high) in ends.items()}, quiet_s)


def spans(broker: Broker, topic: str, since_ms: int | None, until_ms: int | None) -> dict[At, tuple[int, int]]:
    """Return from which offset to before which one the records lie that Kafka wrote at some time, by its time index.

    Args:
        broker: Kafka.
        topic: The topic.
        since_ms: Not before, ms since 1970; None: from the start.
        until_ms: Before; None: to the end as it is now.
    """
    marks = {(topic, n): ends for n, ends in broker.ends(topic).items()}
    if broker.embedded:  # it keeps no times
        return marks
    starts = {at: low for at, (low, _) in marks.items()} if since_ms is None else _at_time(broker, marks, since_ms)
    ends = {at: high for at, (_, high) in marks.items()} if until_ms is None else _at_time(broker, marks, until_ms)
    return {at: (starts[at], ends[at]) for at in marks}


def _at_time(broker: Broker, marks: Mapping[At, tuple[int, int]], at_ms: int) -> dict[At, int]:
    found = broker.ask(
        "asking where the log was at that time",
        lambda: past.offsets_at(broker.consumer, marks, at_ms, broker.timeout_s),
    )
    return {at: found.get(at, high) for at, (_, high) in marks.items()}


def batches(broker: Broker, parts: Mapping[At, tuple[int, int]]) -> Iterator[list[Message]]:
    """Yield the records of some spans, as `spans` has them, by `past.batches`.

    Raises:
        Stop: Kafka refused, or gave nothing for long although there is more.
    """
    consumer = broker.reader()
    try:
        yield from past.batches(consumer, parts)
    except NotAcknowledged as exc:
        raise broker.unreachable(str(exc)) from exc
    finally:
        consumer.close()


def following(broker: Broker, topic: str, partition: int, offset: int) -> Iterator[Message]:
    """Yield every record of a partition from an offset on, for ever: those that come, too."""
    consumer = broker.reader()
    try:
        consumer.assign([TopicPartition(topic, partition, offset)])
        while True:
            yield from (message for message in consumer.consume(past.BATCH, SLICE_S) if message.error() is None)
    finally:
        consumer.close()


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


def saying(messages: Iterable[Message], place: str) -> Iterator[Message]:
    """Pass messages on, and say on stderr now and then how far that is; nothing in the first two seconds."""
    for batch in saying_batches(([message] for message in messages), place):
        yield from batch


def saying_batches(found: Iterable[list[Message]], place: str) -> Iterator[list[Message]]:
    """Likewise, of batches."""
    read, say_at = 0, time.monotonic() + SAY_FIRST_S
    for batch in found:
        read += len(batch)
        if time.monotonic() >= say_at:
            say_at = time.monotonic() + SAY_EVERY_S
            click.echo(f"reading {place}: {read} records, at {when(batch[-1].timestamp()[1])}", err=True)
        yield batch


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
