"""Which part of the log: from where to where each partition is to be read. Knows no store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from confluent_kafka import TopicPartition

from celery_kafka_backend import past
from celery_kafka_backend import topics as names
from celery_kafka_backend.changes import Partition
from celery_kafka_backend.kafka import translate

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from confluent_kafka import Consumer

    from celery_kafka_backend.settings import Settings

ANSWER_S: Final = 10.0
"""Bound on each question to Kafka."""
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


def extent(
    consumer: Consumer, settings: Settings, from_: Edge, until: Edge, wanted: Collection[Partition] | None = None
) -> Extent:
    """Ask Kafka for a part of the log.

    Args:
        consumer: Of `past.reader`.
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
