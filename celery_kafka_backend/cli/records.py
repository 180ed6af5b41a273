"""Reading records of the log for a command, each read bounded, without any consumer group."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import click
from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, TopicPartition

from celery_kafka_backend import past, places, topics
from celery_kafka_backend.cli.output import when
from celery_kafka_backend.errors import NotAcknowledged

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from confluent_kafka import Consumer, Message

    from celery_kafka_backend.cli.broker import Broker
    from celery_kafka_backend.past import At, Span

SAY_FIRST_S: Final = 2.0
SAY_EVERY_S: Final = 1.0
ASK_EVERY_S: Final = 5.0
"""How often whoever follows a task asks whether partitions were added."""


def spans(broker: Broker, topic: str, since_ms: int | None, until_ms: int | None) -> dict[At, Span]:
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


def _at_time(broker: Broker, marks: Mapping[At, Span], at_ms: int) -> dict[At, int]:
    found = broker.ask(
        "asking where the log was at that time",
        lambda: past.offsets_at(broker.consumer, marks, at_ms, broker.timeout_s),
    )
    return {at: found.get(at, high) for at, (_, high) in marks.items()}


def batches(broker: Broker, parts: Mapping[At, Span]) -> Iterator[list[Message]]:
    """Yield all records of some spans, as `spans` has them, by `past.batches`.

    Raises:
        Stop: Kafka gave nothing for long, although there is more.
        PublishError: It refused.
    """
    consumer = broker.reader()
    try:
        yield from (found for found, _ in past.batches(consumer, parts) if found)
    except NotAcknowledged as exc:
        raise broker.unreachable(str(exc)) from exc
    finally:
        consumer.close()


def messages(broker: Broker, parts: Mapping[At, Span], place: str) -> Iterator[Message]:
    """Likewise, one by one; and say on stderr now and then how far that is: nothing in the first two seconds."""
    read, say_at = 0, time.monotonic() + SAY_FIRST_S
    for batch in batches(broker, parts):
        read += len(batch)
        if time.monotonic() >= say_at:
            say_at = time.monotonic() + SAY_EVERY_S
            click.echo(f"reading {place}: {read} records, at {when(batch[-1].timestamp()[1])}", err=True)
        yield from batch


def elsewhere(
    broker: Broker, topic: str, key: str, marks: Mapping[int, Span], held: Collection[int]
) -> list[tuple[At, Span]]:
    """Return where else events of a key may be, as `places.elsewhere` has it.

    Raises:
        Stop: Kafka did not answer.
    """
    return broker.ask(
        f"asking where {key} was in {topic}",
        lambda: places.elsewhere(broker.reader, topic, key, marks, held, broker.timeout_s),
    )


def following(broker: Broker, topic: str, key: str, starts: Mapping[int, int]) -> Iterator[Message]:
    """Yield every record of a key from an offset of each partition on, for ever: those that come, too.

    Also where partitions were added a moment ago, or are while it reads.
    """
    there = {topics.partition_of(key, len(starts))}
    if not broker.embedded:  # it adds none
        there |= places.oldest(topic, key, broker.ends(topic)).moved(broker.reader)
    wanted = key.encode()
    consumer = broker.reader()
    ask_at = time.monotonic() + ASK_EVERY_S
    try:
        consumer.assign([TopicPartition(topic, number, starts[number]) for number in there])
        while True:
            for message in consumer.consume(past.CHUNK, past.SLICE_S):
                if message.error() is None and message.key() == wanted:
                    yield message
            if time.monotonic() >= ask_at:
                ask_at = time.monotonic() + ASK_EVERY_S
                home = _home(broker, consumer, topic, key)
                if home is not None and home not in there:
                    there.add(home)
                    consumer.incremental_assign([TopicPartition(topic, home, starts.get(home, 0))])
    finally:
        consumer.close()


def _home(broker: Broker, consumer: Consumer, topic: str, key: str) -> int | None:
    """Return where a key belongs as of now; None if Kafka does not say."""
    with suppress(KafkaException):
        return topics.partition_of(
            key, len(consumer.list_topics(topic, timeout=broker.timeout_s).topics[topic].partitions)
        )
    return None


def tail(broker: Broker, topic: str, partition: int, timeout_s: float) -> Iterator[Message | None]:
    """Yield every record of a partition, then those that come, for so long; None at each end."""
    consumer = broker.reader()
    consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING)])
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            for message in consumer.consume(past.CHUNK, past.SLICE_S):
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
                    yield None
    finally:
        consumer.close()


def last_records(broker: Broker, topic: str, count: int) -> list[Message]:
    """Return the last few records of each of a topic's partitions."""
    parts = {at: (max(low, high - count), high) for at, (low, high) in spans(broker, topic, None, None).items()}
    return [message for batch in batches(broker, parts) for message in batch]


def firsts(broker: Broker, parts: Mapping[At, Span]) -> dict[At, Message]:
    """Return the first record of each span, or after it; what is not there, or late, is absent."""
    found: dict[At, Message] = {}
    left = {at for at, (start, end) in parts.items() if start < end}
    if not left:
        return {}
    consumer = broker.reader()
    consumer.assign([TopicPartition(*at, parts[at][0]) for at in left])
    deadline = time.monotonic() + broker.timeout_s
    try:
        while left and time.monotonic() < deadline:
            for message in consumer.consume(100, past.SLICE_S):
                at = (message.topic() or "", message.partition() or 0)
                if at in left:
                    left.discard(at)
                    consumer.pause([TopicPartition(*at)])
                    if message.error() is None:
                        found[at] = message
    finally:
        consumer.close()
    return found
