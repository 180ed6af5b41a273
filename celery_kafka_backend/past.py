"""Reading back in the log, without any consumer group: all of some spans. Where an id's events are, `places` knows.

Where no view keeps history, this is an audit's only source. Knows no view and no Celery. Rights: Describe and Read on the log.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import NotAcknowledged
from celery_kafka_backend.kafka import MOVING, consumer_config, translate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from confluent_kafka import Message

    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

BATCH: Final = 10_000
"""Records per batch: twice the materializer's, for nobody waits for one of them."""
BATCH_BYTES: Final = 16 << 20
"""… and bytes; overshot by a chunk at most."""
CHUNK: Final = 1_000
SLICE_S: Final = 0.2
SILENCE_S: Final = 60.0
"""How long Kafka may give nothing although there is more."""
EMBEDDED: Final = "mockCluster"
"""How the in-process broker of librdkafka names its cluster; it keeps no times."""

At = tuple[str, int]
"""Topic and partition."""
Span = tuple[int, int]
"""From which offset to before which one."""
_At = TypeVar("_At", bound=At)

_PASSING: Final = MOVING | {
    KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001 - confluent-kafka's names for client-side codes
    KafkaError._TRANSPORT,  # noqa: SLF001
    KafkaError._RESOLVE,  # noqa: SLF001
    KafkaError._TIMED_OUT,  # noqa: SLF001
    # Of the group that Kafka wants named, and that nobody joins: see `consumer_config`.
    KafkaError.GROUP_AUTHORIZATION_FAILED,
}


def reader(settings: Settings) -> Consumer:
    """Return a consumer without a group, which says where partitions end."""
    made: Consumer = Complaints(settings).handle(
        Consumer, {**consumer_config(settings, None), "enable.partition.eof": True}
    )
    return made


def batches(
    consumer: Consumer, spans: Mapping[_At, Span], count: int = BATCH, silence_s: float = SILENCE_S
) -> Iterator[tuple[list[Message], dict[_At, int]]]:
    """Yield all records of some spans in batches, each with the next offset of the partitions that moved.

    Args:
        consumer: Of `reader`, or another that says where partitions end; to be closed by whoever made it.
        spans: What to read; nothing beyond it is given.
        count: At most so many records in a batch. A batch may be empty.
        silence_s: How long Kafka may give nothing although there is more.

    Raises:
        PublishError: Kafka refused, or was silent for too long: not all was read.
        KafkaException: It did not answer.
    """
    reached = {at: start for at, (start, end) in spans.items() if start < end}
    ends: dict[At, int] = {at: spans[at][1] for at in reached}
    left = list(reached)
    consumer.assign([TopicPartition(topic, number, start) for (topic, number), start in reached.items()])
    heard = time.monotonic()
    while left:
        found = _gathered(consumer, count)
        good = [message for message in found if message.error() is None]
        over = {_place(message) for message in found if _is_end(message, ends)} if len(good) < len(found) else ()
        moved = {}
        # Not the last record's offset: what stands before the end may be a control record, or have been compacted away.
        for at, there in zip(left, consumer.position([TopicPartition(*each) for each in left]), strict=True):
            if there.offset > ends[at]:
                good = [message for message in good if _place(message) != at or (message.offset() or 0) < ends[at]]
            now = ends[at] if at in over else min(there.offset, ends[at])
            if now > reached[at]:
                moved[at] = reached[at] = now
        done = [at for at in left if reached[at] == ends[at]]
        if done:
            left = [at for at in left if at not in done]
            consumer.pause([TopicPartition(*at) for at in done])
        if good or moved:
            yield good, moved
            heard = time.monotonic()  # whoever takes them may take long
        elif time.monotonic() - heard > silence_s:
            where = ", ".join(f"{at[0]}/{at[1]}@{reached[at]}" for at in left)
            raise NotAcknowledged(f"Kafka gave nothing for {silence_s:g} s, although there is more: {where}")


def _gathered(consumer: Consumer, count: int) -> list[Message]:
    """Return what there is, up to a bound in records and bytes: ten thousand records of a megabyte are too many."""
    found: list[Message] = []
    size = 0
    while len(found) < count and size < BATCH_BYTES:
        asked = min(CHUNK, count - len(found))
        more = consumer.consume(asked, SLICE_S)
        found += more
        size += sum(map(len, more))
        if len(more) < asked:
            break
    return found


def _place(message: Message) -> At:
    topic, number = message.topic(), message.partition()
    return topic or "", -1 if number is None else number


def _is_end(message: Message, ends: Mapping[At, int]) -> bool:
    """Return whether a message says that there is no more before the end of its span; what cannot pass is raised.

    An end before that is one of a transaction that was open, or of what the consumer read before.
    """
    error = message.error()
    if error is None:
        return False
    if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
        at = _place(message)
        return at in ends and (message.offset() or 0) >= ends[at]
    if not (error.retriable() or error.code() in _PASSING):
        raise translate(error, "reading the log")
    logger.warning("%s", translate(error))
    return False


def offsets_at(consumer: Consumer, parts: Iterable[At], at_ms: int, timeout_s: float) -> dict[At, int]:
    """Return the first offset of each partition that Kafka wrote not before a time; absent if there is none.

    Raises:
        KafkaException: It did not answer, for one of them at least.
    """
    asked = [TopicPartition(*at, max(at_ms, 0)) for at in parts]
    answers = consumer.offsets_for_times(asked, timeout=timeout_s) if asked else []
    if failed := next((answer.error for answer in answers if answer.error is not None), None):
        raise KafkaException(failed)
    return {(answer.topic, answer.partition): answer.offset for answer in answers if answer.offset >= 0}
