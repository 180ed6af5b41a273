"""Telling statistics: beside the materializer of the primary view, and never in its way.

The materializer hands over each batch that it has read, and goes on. It is counted (`tally`) a little at a time,
where the materializer would do nothing but wait for its store: two threads that compute share one interpreter, and
whoever is woken by a store's answer waits for it. What does not fit in there, or where a store does not say that it is
waited for, is counted by a thread of ours. That one also sends what has changed to ``<prefix>.task-stats``, twice a
second. Whatever fails here is logged, and tried again; results and their commits know nothing of it.

**No bucket is told by half.** How far partials are acknowledged is committed under a consumer group of its own,
``<prefix>.stats``, always at the start of a bucket. Whoever gets a partition, after a crash, a rebalance or trouble of
any kind, reads it again from there up to where the materializer's batch begins, with a consumer of its own, and so
counts every bucket from its first record. What that tells a second time replaces what was told before.
If that stretch is longer than `CATCH_UP` records, only its end is read: so much the windows of a fleet in trouble lack.
No record has to come for that: what the materializer has done is looked at, too, so that a log that falls silent after
a crash or trouble is told to its end.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from itertools import count, groupby
from math import inf
from operator import methodcaller, sub
from typing import TYPE_CHECKING, Final, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from celery_kafka_backend import partials, topics
from celery_kafka_backend.changes import Logged
from celery_kafka_backend.codec import decode
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import CodecError, PublishError
from celery_kafka_backend.kafka import consumer_config, producer_config, refusal, translate
from celery_kafka_backend.partials import BUCKET
from celery_kafka_backend.past import batches
from celery_kafka_backend.processors.tally import Tally
from celery_kafka_backend.rights import PROCESSOR, Right

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from confluent_kafka import Message

    from celery_kafka_backend.changes import Partition
    from celery_kafka_backend.partials import Partial
    from celery_kafka_backend.processors.intake import Intake
    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

TELL_S: Final = 0.5
SETTLE_S: Final = 1.0
"""How often positions are committed."""
CATCH_UP: Final = 20_000
"""Records of a partition that are read again at most."""
SLICE: Final = 100
"""Records that are counted in one go, 0.2 ms: for so long an answer of the store may lie there."""
IDLE_S: Final = 0.1
BEHIND: Final = 2
"""Batches that may wait until the materializer has to wait again; with more of them our thread steps in."""
WAITING: Final = 8
"""Batches that may wait for us. More are let go, and read again from the log."""
UNSETTLED: Final = 2_000
"""Buckets that a partition may hold while they cannot be told; then its oldest are let go."""
ANSWER_S: Final = 5.0
RETRY_S: Final = 2.0
COMPLAIN_S: Final = 60.0
STATS: Final = "stats"
"""Names the group under which we keep our own positions."""


class _Batch(NamedTuple):
    messages: Sequence[Message]
    intake: Intake


class _Slice(NamedTuple):
    """Records one after the other: of which partition, from which offset on, and what they say."""

    partition: int
    first: int
    logged: Sequence[Logged | None]


class Emitter:
    """Counts what it is handed, and tells it. To be used by one thread, beside its own.

    Args:
        settings: The user's.
        clock: Seconds, monotonic.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._log = topics.task_events(settings.topic_prefix)
        self._topic = topics.task_stats(settings.topic_prefix)
        self._batches: queue.Queue[_Batch] = queue.Queue(WAITING)
        self._done: Mapping[Partition, int] = {}
        self._stopping = threading.Event()
        self._wanted = threading.Event()  # our thread is to count
        self._helped = False  # the materializer has done so since it handed over its last batch
        self._taken_at = clock()
        # Held by whoever counts or tells.
        self._lock = threading.Lock()
        self._slices = self._cut()
        self._slice: _Slice | None = None
        self._tallies: dict[int, Tally] = {}
        self._settled: dict[int, int] = {}
        self._retry_at: dict[int, float] = {}
        self._complained: dict[str, float] = {}
        self._complaints = Complaints(settings)
        self._producer: Producer | None = None
        self._reader: Consumer | None = None
        self._thread = threading.Thread(target=self._run, name="statistics", daemon=True)

    def start(self, done: Mapping[Partition, int]) -> None:
        """Begin.

        Args:
            done: Next offset of each partition that the materializer has; it keeps that up to date.
        """
        self._done = done
        self._thread.start()

    def take(self, messages: Sequence[Message], intake: Intake) -> None:
        """Take a batch that was read; never blocks, never fails."""
        if intake.logged or intake.poison:
            self._taken_at = self._clock()
            try:
                self._batches.put_nowait(_Batch(messages, intake))
            except queue.Full:  # whoever finds the gap reads it again
                self._complain("the statistics are behind: what they miss is read again")
            if not self._helped or self._batches.qsize() > BEHIND:
                self._wanted.set()
            self._helped = False

    def count_some(self) -> bool:
        """Count a little, for the caller has nothing to do for the moment; return whether there is more.

        Takes 0.2 ms, never blocks, never fails.
        """
        self._helped = True
        if not self._lock.acquire(blocking=False):
            return False
        try:
            found = self._waiting()
            if found is None:
                return False
            if not self._follows(found):
                self._wanted.set()
                return False
            self._slice = None
            self._tallies[found.partition].add(found.first, found.logged)
        except Exception:
            logger.exception("statistics: counting again")
            self._start_again()
            return False
        else:
            return True
        finally:
            self._lock.release()

    def stop(self) -> None:
        """Tell the rest, commit and end; in bounded time."""
        self._stopping.set()
        self._wanted.set()
        self._thread.join(2 * ANSWER_S)

    # -- what waits --------------------------------------------------------------------------

    def _waiting(self) -> _Slice | None:
        if self._slice is None:
            self._slice = next(self._slices)
        return self._slice

    def _cut(self) -> Iterator[_Slice | None]:
        """Yield what waits to be counted, for ever; None where nothing does."""
        while True:
            try:
                batch = self._batches.get_nowait()
            except queue.Empty:
                yield None
                continue
            for partition, first, logged in _stretches(batch.messages, batch.intake, self._log):
                for start in range(0, len(logged), SLICE):
                    yield _Slice(partition, first + start, logged[start : start + SLICE])

    def _follows(self, found: _Slice) -> bool:
        """Return whether it can be counted without reading the log before."""
        tally = self._tallies.get(found.partition)
        return tally is not None and found.first <= tally.next and len(tally) <= UNSETTLED

    def _start_again(self) -> None:
        """What is counted may be wrong: all of it is counted again."""
        self._tallies.clear()
        self._slices, self._slice = self._cut(), None

    # -- in our own thread -------------------------------------------------------------------

    def _run(self) -> None:
        tell_at = settle_at = self._clock()
        while not self._stopping.is_set():
            wanted = self._wanted.wait(IDLE_S)
            self._wanted.clear()
            try:
                if wanted or self._clock() - self._taken_at >= IDLE_S:
                    self._count(TELL_S)
                now = self._clock()
                if now >= tell_at:
                    tell_at = now + TELL_S
                    self._tell()
                    self._make_up()
                if now >= settle_at:
                    settle_at = now + SETTLE_S
                    self._settle()
            except (PublishError, KafkaException) as exc:
                self._complain(str(exc))
            except Exception:
                logger.exception("statistics: counting again")
                with self._lock:
                    self._start_again()
        self._end()

    def _end(self) -> None:
        try:
            self._count()
            self._tell()
            if self._producer is not None:
                self._producer.flush(ANSWER_S)
            self._settle()
        except (PublishError, KafkaException) as exc:
            self._complain(str(exc))
        if self._reader is not None:
            self._reader.close()

    def _count(self, most_s: float = inf) -> None:
        """Count what waits, for so long."""
        end = self._clock() + most_s
        while self._clock() < end:
            with self._lock:
                found = self._waiting()
                if found is None:
                    return
                self._slice = None
                self._add(*found)
            time.sleep(0)  # else the materializer would wait 5 ms for the interpreter, each time it needs it
        self._wanted.set()

    def _add(self, partition: int, first: int, logged: Sequence[Logged | None]) -> None:
        tally = self._tallies.get(partition)
        if tally is None or first > tally.next:
            if self._clock() < self._retry_at.get(partition, 0.0):
                return
            self._tallies.pop(partition, None)
            self._retry_at[partition] = self._clock() + RETRY_S
            tally = self._tallies[partition] = self._caught_up(partition, first)
            del self._retry_at[partition]
        tally.add(first, logged)
        if len(tally) > UNSETTLED:
            del self._tallies[partition]
            self._complain(f"{self._topic} takes nothing: statistics of partition {partition} are let go")

    def _make_up(self) -> None:
        """Read what was let go or never handed over, where no record comes that would show the gap."""
        for (topic, partition), done in list(self._done.items()):
            with self._lock:
                if topic != self._log or self._waiting() is not None:
                    continue
                tally = self._tallies.get(partition)
                if tally is None or tally.next < done:
                    self._add(partition, done, [])

    # -- from where on -----------------------------------------------------------------------

    def _caught_up(self, partition: int, upto: int) -> Tally:
        """Return a tally that has counted all up to an offset, from where all before is told.

        Raises:
            PublishError: Kafka does not answer, or refuses.
        """
        start = self._start(partition, upto)
        tally = Tally(partition, start)
        if start >= upto:
            return tally
        try:
            for messages, _ in batches(self._own_reader(), {(self._log, partition): (start, upto)}, silence_s=ANSWER_S):
                for message in messages:
                    tally.add(message.offset() or 0, [_logged(message)])
        except KafkaException as exc:
            raise self._refused(exc, "reading the log again", self._log, "Read") from exc
        finally:
            self._own_reader().unassign()
        tally.add(upto, [])
        return tally

    def _start(self, partition: int, upto: int) -> int:
        at = TopicPartition(self._log, partition)
        reader = self._own_reader()
        try:
            (committed,) = reader.committed([at], timeout=ANSWER_S)
            low, high = reader.get_watermark_offsets(at, timeout=ANSWER_S)
        except KafkaException as exc:
            raise self._refused(exc, "asking where the statistics are", self._log, "Read") from exc
        # None yet, or of a log that was deleted: whoever had the partition before us may have died before it could say.
        settled = committed.offset if 0 <= committed.offset <= high else low
        if settled < upto - CATCH_UP:
            logger.warning(
                "statistics: records %d to %d of %s/%d are left out: too many to count again",
                settled, upto - CATCH_UP - 1, self._log, partition,
            )  # fmt: skip
            settled = upto - CATCH_UP
        return max(settled, low) // BUCKET * BUCKET

    def _own_reader(self) -> Consumer:
        if self._reader is None:
            group = topics.group_id(self._settings.topic_prefix, STATS)
            config = {**consumer_config(self._settings, group), "enable.partition.eof": True}
            self._reader = self._complaints.handle(Consumer, config)
        return self._reader

    def _settle(self) -> None:
        """Commit how far all is told."""
        with self._lock:
            settled = {at: tally.settled for at, tally in self._tallies.items()}
        moved = {at: offset for at, offset in settled.items() if self._settled.get(at) != offset}
        if moved:
            offsets = [TopicPartition(self._log, at, offset) for at, offset in moved.items()]
            try:
                self._own_reader().commit(offsets=offsets, asynchronous=False)
            except KafkaException as exc:
                raise translate(exc, "keeping where the statistics are") from exc
            self._settled.update(moved)

    # -- telling -----------------------------------------------------------------------------

    def _tell(self) -> None:
        problem: KafkaException | None = None
        with self._lock:
            if self._producer is not None:
                self._producer.poll(0)
            for tally in self._tallies.values():
                for partial in list(tally.partials()):
                    try:
                        self._send(tally, partial)
                    except BufferError:
                        tally.delivered(partial, arrived=False)
                    except KafkaException as exc:
                        given_up = self._is_too_large(partial, exc.args[0])
                        tally.delivered(partial, arrived=given_up)
                        problem = problem if given_up else exc
        if problem is not None:
            raise self._refused(problem, self._topic, self._topic, "Write")

    def _send(self, tally: Tally, partial: Partial) -> None:
        def delivered(error: KafkaError | None, _message: Message) -> None:
            given_up = error is not None and self._is_too_large(partial, error)
            tally.delivered(partial, arrived=error is None or given_up)
            if error is not None and not given_up:
                self._complain(str(self._refused(KafkaException(error), self._topic, self._topic, "Write")))

        if self._producer is None:
            config = {**producer_config(self._settings), "linger.ms": 50}
            self._producer = self._complaints.handle(Producer, config)
        key = partial.task.encode(errors="replace")
        self._producer.produce(self._topic, partials.encode(partial), key, on_delivery=delivered)

    def _is_too_large(self, partial: Partial, error: KafkaError) -> bool:
        """Return whether a partial will never arrive: then it is left out, for no other may wait for it."""
        if error.code() != KafkaError.MSG_SIZE_TOO_LARGE:
            return False
        self._complain(f"{partial.task[:100]!r} is left out for a minute: a partial of over max_message_bytes")
        return True

    # -- trouble -----------------------------------------------------------------------------

    def _refused(self, exc: KafkaException, what: str, topic: str, operation: str) -> PublishError:
        return refusal(self._settings, exc, what, [Right(PROCESSOR, "topic", topic, operation)])

    def _complain(self, text: str) -> None:
        now = self._clock()
        if now - self._complained.get(text, -COMPLAIN_S) >= COMPLAIN_S:
            if len(self._complained) > 100:
                self._complained.clear()
            self._complained[text] = now
            logger.warning("statistics: %s (results are not touched by this)", text)


def _logged(message: Message) -> Logged | None:
    value = message.value()
    try:
        return Logged(decode(value), value or b"")
    except CodecError:
        return None


_offset, _partition = methodcaller("offset"), methodcaller("partition")


def _stretches(messages: Sequence[Message], intake: Intake, log: str) -> Iterator[tuple[int, int, list[Logged | None]]]:
    """Yield what a batch says, in stretches without a gap: partition, first offset, one item per record."""
    items: list[Logged | None] = list(intake.logged)
    if len(items) < len(messages):  # there are records of chords among them, or some that nobody can read
        poison = {id(message) for message, _ in intake.poison}
        messages = [message for message in messages if message.topic() == log]
        logged = iter(intake.logged)
        items = [None if id(message) in poison else next(logged) for message in messages]
    # Offset less place is the same all through a stretch.
    shifts = map(sub, map(_offset, messages), count())
    start = 0
    for (partition, shift), stretch in groupby(zip(map(_partition, messages), shifts, strict=True)):
        end = start + len(list(stretch))
        yield partition, shift + start, items[start:end]
        start = end
