"""Replay: the log, from the start to the end as it was, into a store. Nothing is run again.

For a store that is new, lost, or to be compared. It reads without a consumer group, beside
whatever else runs, and folds as the materializer does: the same events give the same rows, in any
batches. Of the chords it reads facts to show; it fires none.

What has expired meanwhile is left out, and nothing lives longer than it would have, for expiry is
absolute. A task is left out only if everything a batch says about it has expired, for an expired
SUCCESS still hides a late STARTED. What remains: a duplicate that came much later than the
SUCCESS, in another batch, can be shown until it expires too.
"""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from celery_kafka_backend import topics as names
from celery_kafka_backend.changes import Batch, Partition
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import Rejected, Unavailable
from celery_kafka_backend.kafka import consumer_config, translate
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.processors import intake
from celery_kafka_backend.processors.backoff import backoff_s
from celery_kafka_backend.processors.fold import fold

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from confluent_kafka import Message

    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import Sink

logger = logging.getLogger(__name__)

BATCH: Final = 10_000
"""Records per batch: twice the materializer's, for nobody waits for one of them."""
FILL_S: Final = 0.2
ANSWER_S: Final = 10.0
"""Bound on each question to Kafka."""

EARLIEST: Final = "earliest"


class Replayed(msgspec.Struct):
    """What a replay has done so far.

    Attributes:
        records: Records read.
        total: Records to read, by offsets (control records and compacted ones included).
        read: Of that total, what is behind us.
        events: Events folded.
        facts: Facts about chords written.
        changes: Tasks and groups written, once per batch.
        expired: Tasks, groups and facts left out because they have expired, once per batch.
        poison: Records that nobody can read.
        rejected: Tasks and groups that the store refused.
        deleted: Records that Kafka had deleted before the replay began.
    """

    records: int = 0
    total: int = 0
    read: int = 0
    events: int = 0
    facts: int = 0
    changes: int = 0
    expired: int = 0
    poison: int = 0
    rejected: int = 0
    deleted: int = 0


def replay(
    settings: Settings,
    sink: Sink,
    *,
    from_: str | int | Mapping[Partition, int] = EARLIEST,
    until: int | None = None,
    partitions: Collection[Partition] | None = None,
    on_progress: Callable[[Replayed], None] | None = None,
    patience_s: float = 60.0,
    wall_ms: Callable[[], int] = system_wall_ms,
) -> Replayed:
    """Feed the log into a store that is not yet opened; it is closed afterwards.

    The position is kept in the store with each batch, as the materializer keeps it, so that
    a replay can go on (``from_=view.positions()``) and readers can wait for it. Not after a start
    by time: that leaves out what came before, and a position would promise it.

    Args:
        settings: The user's.
        sink: The target.
        from_: `EARLIEST`; a time, ms since 1970; or the next offset of each partition (others:
            earliest).
        until: A time, ms since 1970, by the clock of the log; None: the end as it is now.
        partitions: Read only these.
        on_progress: Called after each batch.
        patience_s: How long to try again when the store is away.
        wall_ms: The wall clock, ms since 1970.

    Raises:
        Unavailable: The store was away for longer than ``patience_s``.
        SettingsError: The store refuses us.
        PublishError: Kafka does not answer, or a topic is missing.
    """
    done = Replayed()
    target = _Target(sink, patience_s)
    consumer = Complaints(settings).handle(Consumer, {**consumer_config(settings, None), "enable.partition.eof": True})
    try:
        target.open()
        spans = _spans(consumer, settings, from_, until, partitions, done)
        keep = not isinstance(from_, int)
        for messages, positions in _batches(consumer, spans):
            found = intake.read(messages, names.chords(settings.topic_prefix), settings.retention_ms)
            for message, reason in found.poison:
                logger.warning("unreadable: %s/%s@%s: %s", *_where(message), reason)
            now = wall_ms()
            changes = fold(found.logged)
            living = [change for change in changes if not 0 < change.expires_at <= now]
            facts = [fact for fact in found.facts if not 0 < fact.expires_at <= now]
            done.rejected += target.write(Batch(living, facts, positions if keep else {}))
            done.records += len(messages)
            done.read += sum(position - spans[at][0] for at, position in positions.items())
            for at, position in positions.items():
                spans[at] = (position, spans[at][1])
            done.events += len(found.logged)
            done.facts += len(facts)
            done.changes += len(living)
            done.expired += len(changes) - len(living) + len(found.facts) - len(facts)
            done.poison += len(found.poison)
            if on_progress is not None:
                on_progress(done)
    except KafkaException as exc:
        raise translate(exc, "replay") from exc
    finally:
        consumer.close()
        sink.close()
    return done


class _Target:
    """A sink, with patience."""

    def __init__(self, sink: Sink, patience_s: float) -> None:
        self._sink = sink
        self._patience_s = patience_s

    def open(self) -> None:
        self._insist(self._sink.open)

    def write(self, batch: Batch) -> int:
        """Write a batch; return how many changes the store refused."""
        try:
            self._insist(lambda: self._sink.write(batch))
        except Rejected as exc:
            for subject, why in exc.reasons:
                logger.warning("refused by the store: %s: %s", subject, why)
            return len(exc.reasons)
        return 0

    def _insist(self, action: Callable[[], None]) -> None:
        since = time.monotonic()
        failures = 0
        while True:
            try:
                return action()
            except Unavailable as exc:
                failures += 1
                if time.monotonic() - since > self._patience_s:
                    raise
                logger.warning("the store is away, attempt %d: %s", failures, exc)
                time.sleep(backoff_s(failures, random.random))


def _spans(
    consumer: Consumer,
    settings: Settings,
    from_: str | int | Mapping[Partition, int],
    until: int | None,
    wanted: Collection[Partition] | None,
    done: Replayed,
) -> dict[Partition, tuple[int, int]]:
    """Return from where to where each partition is to be read; empty ones are absent."""
    every = [
        at for topic in (names.task_events, names.chords) for at in _partitions(consumer, topic(settings.topic_prefix))
    ]
    chosen = [at for at in every if wanted is None or at in wanted]
    starts = _offsets_at(consumer, chosen, from_) if isinstance(from_, int) else {}
    ends = _offsets_at(consumer, chosen, until) if until is not None else {}
    spans = {}
    for at in chosen:
        low, high = consumer.get_watermark_offsets(TopicPartition(*at), timeout=ANSWER_S)
        done.deleted += low
        if isinstance(from_, int):
            start = starts.get(at, high)
        elif isinstance(from_, str):
            start = low
        else:
            start = max(from_.get(at, low), low)
        end = min(ends.get(at, high), high)
        if start < end:
            spans[at] = (start, end)
            done.total += end - start
    return spans


def _partitions(consumer: Consumer, topic: str) -> list[Partition]:
    found = consumer.list_topics(topic, timeout=ANSWER_S).topics[topic]
    if found.error is not None:
        raise translate(found.error, topic)
    return [Partition(topic, number) for number in sorted(found.partitions)]


def _offsets_at(consumer: Consumer, partitions: list[Partition], at_ms: int) -> dict[Partition, int]:
    """Return the first offset of each partition that is not before a time; absent if there is none."""
    asked = [TopicPartition(*at, at_ms) for at in partitions]
    answers = consumer.offsets_for_times(asked, timeout=ANSWER_S)
    return {Partition(answer.topic, answer.partition): answer.offset for answer in answers if answer.offset >= 0}


def _batches(
    consumer: Consumer, spans: Mapping[Partition, tuple[int, int]]
) -> Iterator[tuple[list[Message], dict[Partition, int]]]:
    """Yield batches of messages, with the next offset of each partition in it."""
    ends = {at: end for at, (_, end) in spans.items()}
    left = dict(ends)
    before: dict[Partition, int] = {}
    consumer.assign([TopicPartition(*at, start) for at, (start, _) in spans.items()])
    while left:
        messages = consumer.consume(BATCH, FILL_S)
        good = []
        for message in messages:
            error = message.error()
            topic, partition, offset = _where(message)
            if error is None:
                if offset < ends[Partition(topic, partition)]:
                    good.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - confluent-kafka's name for it
                # Compaction and control records: the last record may be well before the end.
                left.pop(Partition(topic, partition), None)
            elif error.retriable() or error.code() in _PASSING:
                logger.warning("%s", translate(error))
            else:
                raise translate(error, "replay")
        moved = {}
        for at in consumer.position([TopicPartition(*at) for at in ends]):
            partition_at = Partition(at.topic, at.partition)
            position = min(at.offset, ends[partition_at])
            if position >= 0 and before.get(partition_at) != position:
                moved[partition_at] = before[partition_at] = position
                if position >= ends[partition_at] and left.pop(partition_at, None) is not None:
                    consumer.pause([TopicPartition(*partition_at)])
        if good or moved:
            yield good, moved


_PASSING: Final = {
    KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
    KafkaError._TRANSPORT,  # noqa: SLF001
    KafkaError._RESOLVE,  # noqa: SLF001
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
}


def _where(message: Message) -> tuple[str, int, int]:
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    return topic or "", -1 if partition is None else partition, -1 if offset is None else offset
