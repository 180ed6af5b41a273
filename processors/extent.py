"""Which part of the log: from where to where each partition is to be read, and reading just that.

Without a consumer group, beside whatever else runs. Knows no store.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from confluent_kafka import Consumer, KafkaError, TopicPartition

from celery_kafka_backend import past
from celery_kafka_backend import topics as names
from celery_kafka_backend.changes import Partition
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import NotAcknowledged
from celery_kafka_backend.kafka import consumer_config, translate

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from confluent_kafka import Message

    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

BATCH: Final = 10_000
"""Records per batch: twice the materializer's, for nobody waits for one of them."""
BATCH_BYTES: Final = 16 << 20
"""… and bytes; overshot by a chunk at most."""
CHUNK: Final = 1_000
FILL_S: Final = 0.2
ANSWER_S: Final = 10.0
"""Bound on each question to Kafka."""
SILENCE_S: Final = 60.0
"""How long Kafka may give nothing although there is more."""

_PASSING: Final = {
    KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001 - confluent-kafka's names for client-side codes
    KafkaError._TRANSPORT,  # noqa: SLF001
    KafkaError._RESOLVE,  # noqa: SLF001
    KafkaError._TIMED_OUT,  # noqa: SLF001
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
}

Edge: TypeAlias = "int | Mapping[Partition, int] | None"
"""A time, ms since 1970, by the clock of the log; the next offset of some partitions; None: as far as there is."""


class Extent(NamedTuple):
    """A part of the log.

    Attributes:
        bounds: From which offset to before which one each partition is to be read.
        kept: The first offset that Kafka still has of each partition, and the next one it will give.
    """

    bounds: dict[Partition, past.Span]
    kept: dict[Partition, past.Span]

    @property
    def spans(self) -> dict[Partition, past.Span]:
        """Those of the bounds with something between them."""
        return {at: (start, end) for at, (start, end) in self.bounds.items() if start < end}

    @property
    def deleted(self) -> int:
        """How many records Kafka has deleted."""
        return sum(low for low, _ in self.kept.values())


def reader(settings: Settings) -> Consumer:
    """Return a consumer without a group, which says where partitions end."""
    made: Consumer = Complaints(settings).handle(
        Consumer, {**consumer_config(settings, None), "enable.partition.eof": True}
    )
    return made


def extent(
    consumer: Consumer, settings: Settings, from_: Edge, until: Edge, wanted: Collection[Partition] | None = None
) -> Extent:
    """Ask Kafka for a part of the log.

    Args:
        consumer: Of `reader`.
        settings: The user's.
        from_: Where to begin; partitions without an offset of their own: at the first record that Kafka has.
        until: Where to end; without an offset of their own: at the end as it is now.
        wanted: Only these partitions.

    Raises:
        PublishError: Kafka refused, or there is no such topic.
        KafkaException: It did not answer.
    """
    kept = {}
    for topic in (names.task_events(settings.topic_prefix), names.chords(settings.topic_prefix)):
        for at in _partitions(consumer, topic):
            if wanted is None or at in wanted:
                kept[at] = consumer.get_watermark_offsets(TopicPartition(*at), timeout=ANSWER_S)
    starts, ends = _offsets(consumer, kept, from_, 0), _offsets(consumer, kept, until, 1)
    return Extent({at: (max(starts[at], low), min(ends[at], high)) for at, (low, high) in kept.items()}, kept)


def _partitions(consumer: Consumer, topic: str) -> list[Partition]:
    found = consumer.list_topics(topic, timeout=ANSWER_S).topics[topic]
    if found.error is not None:
        raise translate(found.error, topic)
    return [Partition(topic, number) for number in sorted(found.partitions)]


def _offsets(consumer: Consumer, kept: Mapping[Partition, past.Span], edge: Edge, side: int) -> Mapping[Partition, int]:
    """Return the offset that an edge means in each partition; ``side``: 0 for the start, 1 for the end."""
    if isinstance(edge, int):
        found = past.offsets_at(consumer, kept, edge, ANSWER_S)
        return {at: found.get(at, high) for at, (_, high) in kept.items()}
    given = edge or {}
    return {at: given.get(at, ends[side]) for at, ends in kept.items()}


def batches(
    consumer: Consumer, spans: Mapping[Partition, past.Span], count: int = BATCH, silence_s: float = SILENCE_S
) -> Iterator[tuple[list[Message], dict[Partition, int]]]:
    """Yield the records of some spans in batches, each with the next offset of the partitions that moved.

    Args:
        consumer: Of `reader`; to be closed by whoever made it.
        spans: As `extent` has them.
        count: At most so many records in a batch.
        silence_s: How long Kafka may give nothing although there is more.

    Raises:
        PublishError: Kafka refused, or was silent for too long.
    """
    ends = {at: end for at, (_, end) in spans.items()}
    left = dict(ends)
    before = {at: start for at, (start, _) in spans.items()}
    consumer.assign([TopicPartition(*at, start) for at, start in before.items()])
    heard = time.monotonic()
    while left:
        good = []
        for message in _gathered(consumer, count):
            error = message.error()
            at = _partition(message)
            if error is None:
                offset = message.offset()
                if offset is not None and offset < ends[at]:
                    good.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
                # Compaction and control records: the last record may be well before the end.
                left.pop(at, None)
            elif error.retriable() or error.code() in _PASSING:
                logger.warning("%s", translate(error))
            else:
                raise translate(error, "reading the log")
        moved = {}
        for each in consumer.position([TopicPartition(*at) for at in ends]):
            at = Partition(each.topic, each.partition)
            position = min(each.offset, ends[at])
            if position > before[at]:
                moved[at] = before[at] = position
                if position >= ends[at] and left.pop(at, None) is not None:
                    consumer.pause([TopicPartition(*at)])
        if good or moved:
            yield good, moved
            heard = time.monotonic()  # whoever takes them may take long
        elif time.monotonic() - heard > silence_s:
            where = ", ".join(f"{topic}/{number}@{before[topic, number]}" for topic, number in left)  # type: ignore[index]
            raise NotAcknowledged(f"Kafka gave nothing for {silence_s:g} s, although there is more: {where}")


def _gathered(consumer: Consumer, count: int) -> list[Message]:
    """Return what there is, up to a bound in records and bytes: ten thousand records of a megabyte are too many."""
    found: list[Message] = []
    size = 0
    while len(found) < count and size < BATCH_BYTES:
        asked = min(CHUNK, count - len(found))
        more = consumer.consume(asked, FILL_S)
        found += more
        size += sum(map(len, more))
        if len(more) < asked:
            break
    return found


def _partition(message: Message) -> Partition:
    topic, number = message.topic(), message.partition()
    return Partition(topic or "", -1 if number is None else number)
