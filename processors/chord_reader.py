"""Reads records by where they are, beside the chord processor's own consumer. Decides nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from celery_kafka_backend import chord_records
from celery_kafka_backend.chord_records import Part
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import PipelineError
from celery_kafka_backend.kafka import consumer_config
from celery_kafka_backend.past import offsets_at
from celery_kafka_backend.places import HEARD_MS
from celery_kafka_backend.settings import SETTING
from celery_kafka_backend.topics import partition_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from confluent_kafka import Message

    from celery_kafka_backend.settings import Settings

READ_S: Final = 30.0
SLICE_S: Final = 0.05
"""Longest wait in librdkafka, where Python's signal handlers do not run."""
BATCH: Final = 2_000
GAP: Final = 5_000
"""Of more records that are not wanted, it is quicker to seek than to read on."""

_NO_TOPIC: Final = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC}  # noqa: SLF001


class KafkaAway(PipelineError):  # noqa: N818 - named as in `errors`
    """Raised when Kafka does not answer; the same call again may succeed."""


class TooMuch(PipelineError):  # noqa: N818 - named as in `errors`
    """Raised when the results of a chord's members are more than its body may be handed."""

    @classmethod
    def check(cls, count: int, limit: int) -> None:
        """Raise if so many bytes are too many."""
        if count > limit:
            raise cls(
                f"the members' results are more than {limit} bytes "
                f"({SETTING}['chord_max_bytes']): let members return keys of a store instead, "
                "or let the body take no results (an immutable signature)"
            )


class ChordReader:
    """Reads records, for one thread. In no consumer group."""

    def __init__(self, settings: Settings) -> None:
        self._consumer = Complaints(settings).handle(
            Consumer, consumer_config(settings, None) | {"enable.partition.eof": True}
        )
        self.end = 0
        """Where the partition ended when something was not found."""
        self._ends: dict[int, int] = {}

    def close(self) -> None:
        """Let go of the consumer."""
        self._consumer.close()

    def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has; 0 if there is no such topic."""
        found = self._consumer.list_topics(topic, timeout=READ_S).topics[topic]
        if found.error is not None and found.error.code() not in _NO_TOPIC:
            raise KafkaException(found.error)
        return len(found.partitions)

    def homes(self, topic: str, ids: Collection[str], since_ms: int) -> list[int]:
        """Return the partitions in which may be what was written of some ids at ``since_ms`` or later.

        Wherever an id may have belonged, if partitions were added at that time, as far as anybody can tell.
        """
        count = self.partitions(topic)
        if not count:
            return []
        last = (topic, count - 1)
        before = offsets_at(self._consumer, [last], since_ms - HEARD_MS, READ_S)
        # It had something by then, so every producer had heard of it.
        whole = (
            before[last] if before else self._consumer.get_watermark_offsets(TopicPartition(*last), timeout=READ_S)[1]
        )
        counts = [count] if whole else range(1, count + 1)
        return sorted({partition_of(one, each) for one in ids for each in counts})

    def read(
        self, topic: str, partition: int, wanted: Mapping[bytes, int], limit: int | None = None
    ) -> dict[bytes, Any]:
        """Return the records with these keys.

        Args:
            topic: The chords' topic.
            partition: All are in this one.
            wanted: Key to the offset where it was seen. A record that is no longer there has
                moved towards the end (sent again, then compacted), or is gone.
            limit: How many bytes of results to hold at most.

        Raises:
            KafkaAway: The broker that was asked does not have all that was read from the log before: it was the
                leader, was frozen or cut off, and has not heard yet that it is no more.
            TooMuch: There are more.
        """
        found: dict[bytes, Any] = {}
        held = 0
        ahead = sorted(set(wanted.values()), reverse=True)
        if not ahead:
            return found
        sought = ahead[-1]
        for message in self._from(topic, {partition: sought}):
            if message is None:
                self.end = self._ends[partition]
                if self.end <= max(wanted.values()):
                    raise KafkaAway(
                        f"{topic}/{partition} ends at {self.end}, before what was read there: a stale leader?"
                    )
                break
            key, offset = message.key(), message.offset()
            assert offset is not None
            if key is not None and key in wanted:
                if message.value() is None:
                    found.pop(key, None)
                else:
                    record = found[key] = chord_records.decode(key, message.value())
                    if limit is not None and isinstance(record, Part):
                        held += len(record.result)
                        TooMuch.check(held, limit)
                if len(found) == len(wanted):
                    break
            while ahead and ahead[-1] <= offset:
                ahead.pop()
            if ahead and ahead[-1] - offset > GAP and ahead[-1] != sought:
                sought = ahead[-1]
                self._consumer.seek(TopicPartition(topic, partition, sought))
        return found

    def since(self, topic: str, partitions: list[int], at_ms: int) -> Iterator[tuple[bytes | None, bytes | None]]:
        """Yield keys and values of what was written at ``at_ms`` or later, up to the end of each partition."""
        found = offsets_at(self._consumer, [(topic, partition) for partition in partitions], at_ms, READ_S)
        starts = {partition: offset for (_, partition), offset in found.items()}
        for partition in partitions:
            if partition not in starts:
                # Nothing so late, says Kafka. librdkafka's embedded broker always says so: it keeps
                # no times. A look at the last records costs little.
                low, high = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=READ_S)
                starts[partition] = max(low, high - GAP)
        for message in self._from(topic, starts):
            if message is not None:
                yield message.key(), message.value()

    def _from(self, topic: str, starts: dict[int, int]) -> Iterator[Message | None]:
        """Yield messages from these offsets on, and None (last) when every partition is at its end."""
        self._consumer.assign([TopicPartition(topic, partition, offset) for partition, offset in starts.items()])
        unfinished = set(starts)
        heard = time.monotonic()
        try:
            while unfinished:
                first = self._consumer.poll(SLICE_S)
                # Not consume(BATCH, timeout): it waits for all of them, and the body with it.
                messages = [first, *self._consumer.consume(BATCH, 0)] if first is not None else []
                if messages:
                    heard = time.monotonic()
                elif time.monotonic() - heard > READ_S:
                    raise KafkaAway(f"{topic}: nothing read within {READ_S:g} s")
                for message in messages:
                    error = message.error()
                    if error is None:
                        yield message
                    elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
                        at = message.partition() or 0
                        unfinished.discard(at)
                        self._ends[at] = message.offset() or 0
                    elif not error.retriable():
                        raise KafkaException(error)
            yield None
        finally:
            self._consumer.unassign()
