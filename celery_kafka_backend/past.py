"""Reading back in the log, without any consumer group: a task's events, by its id and perhaps a time.

Where no view keeps history, this is an audit's only source. Knows no view and no Celery. Rights: Describe and Read on the log.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from celery_kafka_backend import topics
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import NotAcknowledged
from celery_kafka_backend.kafka import consumer_config, translate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from confluent_kafka import Message

    from celery_kafka_backend.settings import Settings

BATCH: Final = 1_000
SLICE_S: Final = 0.2
QUIET_S: Final = 30.0
EMBEDDED: Final = "mockCluster"
"""How the in-process broker of librdkafka names its cluster; it keeps no times."""

At = tuple[str, int]
"""Topic and partition."""
Span = tuple[int, int]
"""From which offset to before which one."""


def batches(
    consumer: Consumer, parts: Mapping[At, Span], count: int = BATCH, quiet_s: float = QUIET_S
) -> Iterator[list[Message]]:
    """Yield the records of some spans in batches: to look at a message costs more than to get it in a batch.

    The consumer must say when a partition ends, and is to be closed by whoever made it. There may be messages among
    them that are ends of partitions or passing errors: these have no key. The last batch of a partition may reach
    beyond its span.

    Raises:
        PublishError: Kafka refused, or gave nothing for ``quiet_s`` although there is more.
    """
    left = {at: end for at, (start, end) in parts.items() if start < end}
    if not left:
        return
    consumer.assign([TopicPartition(*at, parts[at][0]) for at in left])
    deadline = time.monotonic() + quiet_s
    while left:
        found = consumer.consume(count, SLICE_S)
        if found:
            deadline = time.monotonic() + quiet_s
            yield found
            if (ended := _ended(found[-1])) is not None:
                left.pop(ended, None)
        # Not the last record's offset: what stands at the end may be a control record, or have been compacted away.
        for at in consumer.position([TopicPartition(*each) for each in left]) if left else ():
            if at.offset >= left[at.topic, at.partition]:
                del left[at.topic, at.partition]
                consumer.pause([TopicPartition(at.topic, at.partition)])
        if time.monotonic() > deadline:
            raise NotAcknowledged(f"no record of {', '.join(f'{t}/{n}' for t, n in left)} for {quiet_s:g} s")


def _ended(message: Message) -> At | None:
    """Return the partition that a message says has ended; what cannot pass is raised."""
    error = message.error()
    if error is None:
        return None
    if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - confluent-kafka's name for it
        return message.topic() or "", message.partition() or 0
    if error.code() in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.UNKNOWN_TOPIC_OR_PART) or error.fatal():
        raise translate(error, "reading the log")
    return None


def of_task(
    settings: Settings, task_id: str, since_ms: int | None = None, until_ms: int | None = None, timeout_s: float = 10.0
) -> list[bytes]:
    """Return the record values of a task's events in the order of the log, from its partition.

    Args:
        settings: The user's.
        task_id: The task.
        since_ms: Only what Kafka wrote since then, ms since 1970, by its time index; None: all that it has.
        until_ms: … and before then; None: up to now.
        timeout_s: Bound on each question to Kafka.

    Raises:
        PublishError: Kafka does not answer, or refuses; there is no such topic.
    """
    consumer = Complaints(settings).handle(Consumer, {**consumer_config(settings, None), "enable.partition.eof": True})
    topic, key = topics.task_events(settings.topic_prefix), task_id.encode()
    try:
        known = consumer.list_topics(topic, timeout=timeout_s)
        found = known.topics[topic]
        if found.error is not None:
            raise translate(found.error, topic)
        at = (topic, topics.partition_of(task_id, len(found.partitions)))
        low, high = consumer.get_watermark_offsets(TopicPartition(*at), timeout=timeout_s)
        if not str(known.cluster_id or "").startswith(EMBEDDED):
            if since_ms is not None:
                low = offsets_at(consumer, [at], since_ms, timeout_s).get(at, high)
            if until_ms is not None:
                high = offsets_at(consumer, [at], until_ms, timeout_s).get(at, high)
        return [
            message.value() or b""
            for batch in batches(consumer, {at: (low, high)})
            for message in batch
            if message.key() == key
        ]
    except KafkaException as exc:
        raise translate(exc, f"reading {topic}") from exc
    finally:
        consumer.close()


def offsets_at(consumer: Consumer, parts: Iterable[At], at_ms: int, timeout_s: float) -> dict[At, int]:
    """Return the first offset of each partition that Kafka wrote not before a time; absent if there is none."""
    asked = [TopicPartition(*at, max(at_ms, 0)) for at in parts]
    answers = consumer.offsets_for_times(asked, timeout=timeout_s) if asked else []
    return {(answer.topic, answer.partition): answer.offset for answer in answers if answer.offset >= 0}
