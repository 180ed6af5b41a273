"""The materializer: keeps one view up to date with the log, for ever.

A batch loop on Kafka's own consumer groups, one group per view, any number of processes::

    consume ─▶ read ─▶ fold ─▶ sink.write ─▶ dead letters acknowledged ─▶ commit
       ▲                          │ Unavailable, or dead letters not acknowledged
       └── paused, still polled ◀─┘ back off, then the same batch again

**Guarantee.** At least once into the sink, whose writes are idempotent: effectively once. An offset
is committed only after everything below it is in the view, or acknowledged in the dead letters. A
crash at any point repeats at most the batches since the last commit; a stop by `Materializer.stop`
repeats nothing. A zombie may write late; the guards in the sink make that harmless.

The loop, retry, pause and positions live here; what a batch means is `fold`, what is in a record is
`intake`, how it gets into a store is a sink. docs/adr/0005 has the reasons and figures.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import random
import signal
import threading
import time
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from celery_kafka_backend import topics as names
from celery_kafka_backend.changes import Batch, Partition
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import PublishError, Rejected, Unavailable
from celery_kafka_backend.kafka import consumer_config, producer_config, refusal, translate
from celery_kafka_backend.processors import intake
from celery_kafka_backend.processors.backoff import backoff_s
from celery_kafka_backend.processors.deadletters import DeadLetters
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.rights import PROCESSOR, Right
from celery_kafka_backend.sinks.registry import open_sink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from confluent_kafka import Message

    from celery_kafka_backend.processors.metering import Place, ViewMeter
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import Sink, StoreOptions

logger = logging.getLogger(__name__)

MAX_RECORDS: Final = 5_000
"""Records per batch and topic. Beyond it a store's round trip no longer matters, only memory and latency do."""
MAX_BYTES: Final = 8 << 20
"""Bytes per batch and topic; overshot by at most one chunk, of which librdkafka holds 32 MB at most."""
CHUNK: Final = 1_000

COMMIT_EVERY_S: Final = 0.1
"""A commit per lone result cost a sixth of Kafka's CPU at 200 tasks/s."""

IDLE_S: Final = 0.2
"""Longest wait in librdkafka, where Python's signal handlers do not run."""
FINISH_S: Final = 10.0
"""Bound on the last commit, and on leaving the group after it."""
REPORT_S: Final = 30.0
LOGGED_LETTERS: Final = 10
"""Dead letters per batch that get a line in the log; a batch can hold thousands."""

_PORTS: Final = {"redis": ":6379", "rediss": ":6379"}


def view_name(url: str) -> str:
    """Return the stable name of a view, for its consumer group: ``redis-1a2b3c4d``.

    Made from scheme, host, port and path (Redis: also ``db=``), so that a changed password or
    timeout is the same view. Two SQLite paths that are spelt differently are two views.
    """
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2].lower()
    path = parts.path
    if parts.scheme in _PORTS:
        host = host if ":" in host.rpartition("]")[2] else (host or "localhost") + _PORTS[parts.scheme]
        path = path.strip("/") or dict(parse_qsl(parts.query)).get("db", "0")
    digest = hashlib.sha256(f"{parts.scheme}://{host}/{path}".encode()).hexdigest()
    return f"{parts.scheme}-{digest[:8]}"


class Statistics(msgspec.Struct):
    """What a materializer has done since it was made.

    Attributes:
        events: Events folded.
        facts: Facts about chords shown.
        changes: Tasks and groups written, once per batch.
        batches: Batches written.
        dead_letters: Records given up, and acknowledged as such.
        retries: Failed attempts to write, because the store or the dead letters were away.
        missed: Records that Kafka had deleted before they were read.
        assigned: Times that we got partitions.
        revoked: … gave some away.
        lost: … had lost some.
        lag: Records in the assigned partitions behind what was written, as last asked.
    """

    events: int = 0
    facts: int = 0
    changes: int = 0
    batches: int = 0
    dead_letters: int = 0
    retries: int = 0
    missed: int = 0
    assigned: int = 0
    revoked: int = 0
    lost: int = 0
    lag: int = 0


class Materializer:
    """Folds the log into one view.

    Args:
        settings: The user's.
        sink: The view's write side, not yet opened.
        group: Consumer group; the same for every process that feeds this view.
        dead_letters: For what cannot be folded or written.
        topics: What to read, the one that must not wait first; the log and the chords by default.
        clock: Seconds, monotonic.
        jitter: A random number from 0 to 1.
    """

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        *,
        group: str,
        dead_letters: DeadLetters,
        topics: Sequence[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        prefix = settings.topic_prefix
        self.group = group
        self.statistics = Statistics()
        self._settings = settings
        self._sink = sink
        self._dead_letters = dead_letters
        self._events_topic = names.task_events(prefix)
        self._chords_topic = names.chords(prefix)
        self._topics = list(topics or (self._events_topic, self._chords_topic))
        self._clock = clock
        self._jitter = jitter
        self._stopping = False
        self.meter: ViewMeter | None = None
        """Who is told what happens; set before `run`."""
        self.paused = ""
        """What we wait for, and why; "" if we do not."""
        # librdkafka keeps a pause beyond the assignment: a partition that leaves and comes back is paused still.
        self._still: set[Partition] = set()
        # One per topic, in the one group: with both topics in one subscription, the assignor balances
        # their sum, and gave the first of two processes all events and the second all chords (seen).
        self._consumers: dict[str, Consumer] = {}
        self._held: set[Partition] = set()
        # Next offset of each of them: up to here everything is in the view. Absent until known.
        self._done: dict[Partition, int] = {}
        # What the batch in hand, or a commit that failed, still has to commit. A revoked partition
        # leaves both: its new owner reads on from what is committed.
        self._moved: dict[Partition, int] = {}
        self._uncommitted: dict[Partition, int] = {}
        self._committing: set[str] = set()
        self._committed_at = clock() - COMMIT_EVERY_S
        # Where partitions end, as far as asked for while paused.
        self._ends: dict[Partition, int] = {}
        self._stray: list[Message] = []
        self._asked_at = clock()
        self._reported = (clock(), 0)
        self._complained: dict[str, float] = {}

    def stop(self) -> None:
        """Ask `run` to finish the batch in hand, commit, leave the group and return.

        Safe from a signal handler: it takes no lock.
        """
        self._stopping = True

    def run(self) -> None:
        """Work until `stop`.

        A store that is away is waited for. Anything but `Unavailable` and `Rejected` from the
        sink, and a fatal error of librdkafka, ends it: nothing of that batch is committed.

        Raises:
            SettingsError: The store refuses us.
        """
        try:
            if not self._insist(self._sink.open, "opening the view"):
                return
            try:
                for topic in self._topics:
                    self._join(topic)
                logger.info("%s: reading %s into %s", self.group, ", ".join(self._topics), self._sink.url)
                self._loop()
            finally:
                self._leave()
        finally:
            self._sink.close()
        logger.info("%s: stopped", self.group)

    def _join(self, topic: str) -> None:
        config = consumer_config(self._settings, self.group)
        config["on_commit"] = lambda error, results: self._on_commit(topic, error, results)
        consumer = self._consumers[topic] = Complaints(self._settings).handle(Consumer, config)
        consumer.subscribe([topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def _loop(self) -> None:
        while not self._stopping:
            messages = self._gather()
            if not self._process(messages):
                break
            self._report()
            if self.meter is not None:
                self.meter.turned(self)
        self._finish()
        if self.meter is not None:
            self.meter.turned(self)

    # -- one batch ---------------------------------------------------------------------------

    def _gather(self) -> list[Message]:
        """Wait for the first message, then take what is there already."""
        messages, self._stray = self._stray, []
        # Only the first topic, the log, is waited for: the others are looked at five times a second.
        wait_s = 0 if messages else IDLE_S
        for consumer in self._consumers.values():
            first = consumer.poll(wait_s)
            if first is not None:
                messages.append(first)
            wait_s = 0
        if not messages:
            return []
        for consumer in self._consumers.values():
            # Each topic has its own share, so that a log far behind does not starve the chords.
            records = size = 0
            # Not consume(MAX_RECORDS, timeout): it waits for all of them, and a lone result with it.
            while records < MAX_RECORDS and size < MAX_BYTES and (more := consumer.consume(CHUNK, 0)):
                messages += more
                records += len(more)
                size += sum(map(len, more))
        return self._without_errors(messages)

    def _without_errors(self, messages: list[Message]) -> list[Message]:
        good = [message for message in messages if message.error() is None]
        if len(good) < len(messages):
            for message in messages:
                error = message.error()
                if error is not None:
                    self._complain(error)
        return good

    def _process(self, messages: list[Message]) -> bool:
        """Write a batch and commit it; return False if stopped before it was written.

        A batch without messages is written too if positions have moved (past control records):
        readers wait on positions.
        """
        self._moved = self._progress(messages)
        if not messages and not self._moved:
            self._commit_now_and_then()
            return True
        found = intake.read(messages, self._chords_topic, self._settings.retention_ms)
        batch = Batch(fold(found.logged), found.facts, self._moved)
        self._give_up(found.poison)
        if not self._insist(lambda: self._write(batch, messages), "writing to the view"):
            return False
        if not self._insist(self._dead_letters.flush, "dead letters"):
            return False
        counts = self.statistics
        counts.events += len(found.logged)
        counts.facts += len(found.facts)
        counts.changes += len(batch.changes)
        counts.batches += 1
        self._done.update(self._moved)
        self._uncommitted.update(self._moved)
        self._moved = {}
        self._commit_now_and_then()
        return True

    def _write(self, batch: Batch, messages: list[Message]) -> None:
        try:
            with nullcontext() if self.meter is None else self.meter.writing(len(messages)):
                self._sink.write(batch)
        except Rejected as exc:
            reasons = dict(exc.reasons)
            refused = intake.about(messages, reasons, self._chords_topic)
            self._give_up([(message, f"Rejected: {reasons[subject]}") for message, subject in refused])

    def _give_up(self, poison: Sequence[intake.Poison]) -> None:
        for number, (message, reason) in enumerate(poison):
            topic, partition, offset = message.topic(), message.partition(), message.offset()
            assert topic is not None
            assert partition is not None
            assert offset is not None
            if number < LOGGED_LETTERS:
                logger.error("%s: dead letter: %s/%d@%d: %s", self.group, topic, partition, offset, reason)
            headers: Any = message.headers()  # of a consumed message a list, never the dict of the stubs
            self._dead_letters.put(topic, partition, offset, message.key(), message.value(), headers, reason)
            self.statistics.dead_letters += 1
        if len(poison) > LOGGED_LETTERS:
            logger.error("%s: and %d more dead letters in this batch", self.group, len(poison) - LOGGED_LETTERS)

    # -- positions ---------------------------------------------------------------------------

    def _progress(self, messages: list[Message]) -> dict[Partition, int]:
        """Return the consumer's positions that are beyond what is done.

        ``position()``, not last offset + 1: after control records that is less than the end that
        readers wait for.
        """
        moved = {}
        steps = 0
        unknown = False
        for at in self._positions(messages):
            if at.offset < 0:
                continue
            partition = Partition(at.topic, at.partition)
            done = self._done.get(partition)
            if done != at.offset:
                moved[partition] = at.offset
                if done is None:
                    unknown = True
                else:
                    steps += at.offset - done
        if not unknown and steps != len(messages):
            self._look_for_gaps(moved)
        return moved

    def _positions(self, messages: list[Message]) -> list[TopicPartition]:
        """Ask about the partitions that were read, and now and then about all: asking took 0.15 ms of each batch."""
        now = self._clock()
        if not messages or now - self._asked_at >= IDLE_S:
            self._asked_at = now
            return [at for consumer in self._consumers.values() for at in consumer.position(consumer.assignment())]
        read = {Partition(message.topic() or "", message.partition() or 0) for message in messages}
        found = []
        for topic, consumer in self._consumers.items():
            # Not what was revoked after it was read: that is the next owner's.
            asked = [TopicPartition(*each) for each in read & self._held if each.topic == topic]
            if asked:
                found += consumer.position(asked)
        return found

    def _look_for_gaps(self, moved: dict[Partition, int]) -> None:
        """Say so if Kafka deleted records before we came.

        Only asked where offsets were skipped: by control records, a compacted topic, or retention.
        """
        for partition, position in moved.items():
            done = self._done.get(partition)
            if done is None or partition.topic == self._chords_topic:
                continue
            try:
                consumer = self._consumers[partition.topic]
                low, _ = consumer.get_watermark_offsets(TopicPartition(*partition), timeout=2.0)
            except KafkaException as exc:
                logger.warning("%s: cannot tell whether records are missing: %s", self.group, exc)
                continue
            missed = min(low, position) - done
            if missed > 0:
                self.statistics.missed += missed
                logger.error(
                    "%s: %d records of %s/%d are gone, offsets %d to %d: Kafka deleted them before they were"
                    " read. What they said is not in the view. Raise retention, or run more materializers.",
                    self.group, missed, *partition, done, done + missed - 1,
                )  # fmt: skip

    def _commit_now_and_then(self) -> None:
        """Commit what is done, if the last time was a while ago: a crash repeats that much, harmlessly."""
        if self._uncommitted and self._clock() - self._committed_at >= COMMIT_EVERY_S:
            self._commit()

    def _commit(self, *, wait: bool = False) -> None:
        """Commit what is done; where a commit is under way, the next one takes it along.

        Its result comes with a later poll. A commit that waits would sit in librdkafka, where no
        signal is heard, for as long as the group's coordinator is frozen: more than 4 minutes (seen).
        """
        self._committed_at = self._clock()
        for topic, consumer in self._consumers.items():
            if topic in self._committing and not wait:
                continue
            offsets = [TopicPartition(*at, offset) for at, offset in self._uncommitted.items() if at.topic == topic]
            if not offsets:
                continue
            try:
                if wait:
                    self._on_commit(topic, None, consumer.commit(offsets=offsets, asynchronous=False) or [])
                else:
                    self._committing.add(topic)
                    consumer.commit(offsets=offsets, asynchronous=True)
            except KafkaException as exc:
                self._on_commit(topic, exc.args[0], [])

    def _on_commit(self, topic: str, error: KafkaError | None, results: list[TopicPartition]) -> None:
        """Learn the result; what failed is committed with the next batch, or with its next owner's."""
        self._committing.discard(topic)
        if error is not None:
            # During a rebalance Kafka refuses it; the positions stay ours, or leave with the partition.
            # A fatal error comes with the messages too: raised in a callback it would lose its type.
            logger.info("%s: commit postponed: %s", self.group, error.str())
            return
        for result in results:
            partition = Partition(result.topic, result.partition)
            if result.error is None and self._uncommitted.get(partition) == result.offset:
                del self._uncommitted[partition]

    def _finish(self) -> None:
        """Commit the rest before leaving the group; what cannot be committed in time is repeated by others."""
        end = self._clock() + FINISH_S
        while self._uncommitted and self._clock() < end:
            self._commit()
            for consumer in self._consumers.values():
                consumer.poll(0.05)  # what comes is not ours any more: nothing of it is committed
        if self._uncommitted:
            logger.warning("%s: %d partitions could not be committed", self.group, len(self._uncommitted))
            self._uncommitted.clear()  # or leaving the group would wait for them

    def _leave(self) -> None:
        """Leave the group, in bounded time: a frozen coordinator held close() for over 2 minutes (seen)."""
        consumers = list(self._consumers.values())
        self._consumers.clear()

        def close() -> None:
            for consumer in consumers:
                consumer.close()

        closing = threading.Thread(target=close, name="leave", daemon=True)
        closing.start()
        closing.join(FINISH_S)
        if closing.is_alive():
            logger.warning("%s: Kafka does not answer; it will notice by itself that we left", self.group)

    # -- rebalancing, called from within poll() and consume() ----------------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Learn where we start, to notice what is missing. librdkafka assigns after this."""
        self._held.update(Partition(at.topic, at.partition) for at in partitions)
        try:
            for at in consumer.committed(partitions, timeout=5.0):
                if at.offset >= 0:
                    self._done[Partition(at.topic, at.partition)] = at.offset
        except KafkaException as exc:
            logger.warning("%s: cannot read the committed offsets now: %s", self.group, exc)
        self.statistics.assigned += bool(partitions)
        self._log_partitions("assigned", partitions)

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Give partitions away: what is written gets committed, what is in hand is the next owner's."""
        # Kafka has just told us to: the coordinator answers, so this wait is short.
        self._commit(wait=True)
        self._forget(partitions)
        self.statistics.revoked += bool(partitions)
        self._log_partitions("revoked", partitions)

    def _on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Somebody else has them already; a commit would be refused."""
        self._forget(partitions)
        self.statistics.lost += bool(partitions)
        self._log_partitions("lost", partitions)

    def _forget(self, partitions: list[TopicPartition]) -> None:
        for at in partitions:
            partition = Partition(at.topic, at.partition)
            self._held.discard(partition)
            for positions in (self._done, self._moved, self._uncommitted):
                positions.pop(partition, None)

    def _log_partitions(self, what: str, partitions: list[TopicPartition]) -> None:
        if partitions:
            listed = ", ".join(sorted(f"{at.topic}/{at.partition}" for at in partitions))
            logger.info("%s: %s %s", self.group, what, listed)

    # -- trouble -----------------------------------------------------------------------------

    def _insist(self, action: Callable[[], None], what: str) -> bool:
        """Do it until it works; return False if stopped before it did."""
        failures = 0
        while True:
            try:
                action()
            except (Unavailable, PublishError) as exc:
                failures += 1
                self.statistics.retries += 1
                if not self.paused:
                    logger.warning("%s: paused, %s: %s", self.group, what, exc)
                else:
                    logger.info("%s: still paused, %s, attempt %d: %s", self.group, what, failures, exc)
                self.paused = f"{what}: {exc}"
                self._wait(backoff_s(failures, self._jitter))
                if self._stopping:
                    return False
            else:
                if failures:
                    self._resume()
                    logger.info("%s: resumed after %d failed attempts, %s", self.group, failures, what)
                return True

    def _wait(self, delay_s: float) -> None:
        """Keep the group membership while no message is wanted: poll, on paused partitions."""
        end = self._clock() + delay_s
        while not self._stopping and (left := end - self._clock()) > 0:
            slice_s = min(left, IDLE_S)
            if self.meter is not None:
                self._ask_an_end(slice_s)
                self.meter.turned(self)
            if not self._consumers:
                time.sleep(slice_s)
            for consumer in self._consumers.values():
                # Each time anew: a rebalance may have brought partitions.
                assigned = consumer.assignment()
                consumer.pause(assigned)
                self._still.update(Partition(at.topic, at.partition) for at in assigned)
                message = consumer.poll(slice_s / len(self._consumers))
                if message is not None:
                    # Of a partition that came with this very poll: it is ahead of the batch in hand.
                    self._stray.append(message)

    def _resume(self) -> None:
        self.paused = ""
        self._ends.clear()
        for topic, consumer in self._consumers.items():
            consumer.resume([TopicPartition(*at) for at in self._still if at.topic == topic])
        self._still.clear()

    def _complain(self, error: KafkaError) -> None:
        """Log what librdkafka tells us, each thing once per report interval; it retries by itself."""
        if error.fatal():
            raise translate(error, "consume")
        text = error.str()
        now = self._clock()
        if now - self._complained.get(text, -REPORT_S) >= REPORT_S:
            self._complained[text] = now
            logger.warning("%s", refusal(self._settings, error, self.group, self._needed(error)))

    def _needed(self, error: KafkaError) -> list[Right]:
        if error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            return [Right(PROCESSOR, "group", self.group, "Read")]
        return [Right(PROCESSOR, "topic", topic, "Read") for topic in self._topics]

    def _report(self) -> None:
        then, before = self._reported
        now = self._clock()
        if now - then < REPORT_S:
            return
        self._reported = (now, self.statistics.events)
        if self.statistics.events > before:
            s = self.statistics
            s.lag = self.lag()
            logger.info(
                "%s: %d events/s; in all %d events, %d facts, %d changes, %d batches, %d dead letters, %d retries;"
                " %d behind",
                self.group, (s.events - before) / (now - then), s.events, s.facts, s.changes, s.batches,
                s.dead_letters, s.retries, s.lag,
            )  # fmt: skip

    def lag(self) -> int:
        """Return how many records of our partitions are not in the view, by what the last fetches said.

        To be called in the thread of `run`; elsewhere read ``statistics.lag``.
        """
        return sum(self.behind().values())

    def behind(self) -> dict[Partition, int]:
        """Return likewise how many of each partition, as far as known."""
        behind = {}
        for partition, done in self._done.items():
            consumer = self._consumers.get(partition.topic)
            marks: object = consumer and consumer.get_watermark_offsets(TopicPartition(*partition), cached=True)
            # None if nothing is cached yet, whatever the stubs say.
            if isinstance(marks, tuple):
                behind[partition] = max(marks[1] - done, self._ends.get(partition, 0) - done, 0)
        return behind

    def _ask_an_end(self, timeout_s: float) -> None:
        """Learn where the next partition ends: while paused nothing is fetched, which would tell."""
        if not self._done:
            return
        partition = min(self._done, key=lambda one: (one in self._ends, one))
        if partition in self._ends:  # all are known: once more from the start
            self._ends.clear()
            return
        try:
            marks = self._consumers[partition.topic].get_watermark_offsets(TopicPartition(*partition), timeout_s)
        except KafkaException as exc:
            logger.debug("%s: cannot ask where %s/%d ends: %s", self.group, *partition, exc)
            return
        self._ends[partition] = marks[1]

    def partitions(self) -> int:
        """Return how many partitions we have."""
        return sum(len(consumer.assignment()) for consumer in self._consumers.values())

    def wrong(self) -> list[str]:
        """Return why nothing can be written now; [] if it can, or if there is nothing for us to do."""
        outside = [topic for topic, consumer in self._consumers.items() if not consumer.memberid()]
        found = [f"paused, {self.paused}"] if self.paused else []
        return found + [f"not in its consumer group for {topic} (yet)" for topic in outside]


def materializer(settings: Settings, url: str, options: StoreOptions) -> Materializer:
    """Return the materializer of a configured view."""
    group = names.group_id(settings.topic_prefix, view_name(url))
    # A record as large as the log allows must fit with its reason and position beside it.
    roomy = {**producer_config(settings), "message.max.bytes": settings.max_message_bytes + names.DEAD_LETTER_ROOM}
    make = partial(Complaints(settings).handle, Producer)
    letters = DeadLetters(roomy, names.dead_letters(settings.topic_prefix), by=group, make=make)
    return Materializer(settings, open_sink(url, options), group=group, dead_letters=letters)


def materialize(settings: Settings, url: str, options: StoreOptions, place: Place | None = None) -> None:
    """Feed a view until SIGTERM or SIGINT: the body of a process.

    Args:
        settings: The user's.
        url: The view.
        options: What its store needs beside it.
        place: Where to write metrics, if anywhere.
    """
    work = materializer(settings, url, options)
    if place is not None:
        from celery_kafka_backend.processors.metering import ViewMeter  # noqa: PLC0415 - only where metrics are wanted

        work.meter = ViewMeter(place)
    # A batch is thousands of tuples and messages without a cycle among them. Python's default, a
    # collection every 700, took a fifth of the time (measured: fold 103 k/s, with this 180 k/s).
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: work.stop())
    work.run()
