"""A materializer's consumers, one per topic and all in one group, and how far each partition is.

The Kafka side of the loop: read, know what is done, commit it, pause, read again from an earlier place.
Nothing here knows what a record means.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from celery_kafka_backend.changes import Partition
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.kafka import consumer_config, refusal, translate
from celery_kafka_backend.rights import PROCESSOR, Right

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from confluent_kafka import Message

    from celery_kafka_backend.settings import Settings

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
COMPLAIN_S: Final = 30.0


class Counts(msgspec.Struct):
    """What has happened to the partitions.

    Attributes:
        assigned: Times that we got some.
        revoked: … gave some away.
        lost: … had lost some.
        missed: Records that Kafka had deleted before they were read.
        rewound: Partitions read again from an earlier offset.
    """

    assigned: int = 0
    revoked: int = 0
    lost: int = 0
    missed: int = 0
    rewound: int = 0


class Consumers:
    """The consumers of one process. For one thread.

    Args:
        settings: The user's.
        group: Their consumer group.
        topics: What to read, the one that must not wait first.
        contiguous: Those of them of which no record is missing unless Kafka deleted it: not compacted.
        counts: Counted up.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        settings: Settings,
        group: str,
        topics: Sequence[str],
        contiguous: Sequence[str],
        counts: Counts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._group = group
        self._topics = list(topics)
        self._contiguous = contiguous
        self._counts = counts
        self._clock = clock
        # One per topic, in the one group: with both topics in one subscription, the assignor balances
        # their sum, and gave the first of two processes all events and the second all chords (seen).
        self._consumers: dict[str, Consumer] = {}
        self._held: set[Partition] = set()
        self.done: dict[Partition, int] = {}
        """Next offset of each of our partitions: up to here everything is in the view. Absent until known."""
        self.moved: dict[Partition, int] = {}
        """Where the batch in hand ends. A partition that is revoked leaves it: its new owner reads on from what is
        committed."""
        self.newly_assigned = False
        """Whether partitions came since this was last set back."""
        self._uncommitted: dict[Partition, int] = {}
        self._committing: set[str] = set()
        self._committed_at = clock() - COMMIT_EVERY_S
        # librdkafka keeps a pause beyond the assignment: a partition that leaves and comes back is paused still.
        self._still: set[Partition] = set()
        # Read from an earlier place, of which no record has come yet: librdkafka still tells the old position.
        self._rewound: set[Partition] = set()
        # Where partitions end, as far as asked for while paused.
        self._ends: dict[Partition, int] = {}
        self._stray: list[Message] = []
        self._asked_at = clock()
        self._complained: dict[str, float] = {}

    def join(self) -> None:
        """Join the group."""
        for topic in self._topics:
            self._join(topic)

    def _join(self, topic: str) -> None:
        config = consumer_config(self._settings, self._group)
        config["on_commit"] = lambda error, results: self._on_commit(topic, error, results)
        consumer = self._consumers[topic] = Complaints(self._settings).handle(Consumer, config)
        consumer.subscribe([topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    # -- reading -----------------------------------------------------------------------------

    def gather(self) -> list[Message]:
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

    def progress(self, messages: list[Message]) -> dict[Partition, int]:
        """Return the positions that are beyond what is done, in `moved`.

        ``position()``, not last offset + 1: after control records that is less than the end that
        readers wait for.
        """
        self._rewound -= {place(message) for message in messages} if self._rewound else set()
        moved = {}
        steps = 0
        unknown = False
        for at in self._positions(messages):
            partition = Partition(at.topic, at.partition)
            if at.offset < 0 or partition in self._rewound:
                continue
            done = self.done.get(partition)
            if done != at.offset:
                moved[partition] = at.offset
                if done is None:
                    unknown = True
                else:
                    steps += at.offset - done
        if not unknown and steps != len(messages):
            self._look_for_gaps(moved)
        self.moved = moved
        return moved

    def _positions(self, messages: list[Message]) -> list[TopicPartition]:
        """Ask about the partitions that were read, and now and then about all: asking took 0.15 ms of each batch."""
        now = self._clock()
        if not messages or now - self._asked_at >= IDLE_S:
            self._asked_at = now
            return [at for consumer in self._consumers.values() for at in consumer.position(consumer.assignment())]
        read = {place(message) for message in messages}
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
            done = self.done.get(partition)
            if done is None or partition.topic not in self._contiguous:
                continue
            try:
                consumer = self._consumers[partition.topic]
                low, _ = consumer.get_watermark_offsets(TopicPartition(*partition), timeout=2.0)
            except KafkaException as exc:
                logger.warning("%s: cannot tell whether records are missing: %s", self._group, exc)
                continue
            missed = min(low, position) - done
            if missed > 0:
                self._counts.missed += missed
                logger.error(
                    "%s: %d records of %s/%d are gone, offsets %d to %d: Kafka deleted them before they were"
                    " read. What they said is not in the view. Raise retention, or run more materializers.",
                    self._group, missed, *partition, done, done + missed - 1,
                )  # fmt: skip

    def written(self) -> None:
        """Take note that the batch in hand is in the view."""
        self.done.update(self.moved)
        self._uncommitted.update(self.moved)
        self.moved = {}

    def rewind(self, to: Mapping[Partition, int]) -> None:
        """Read partitions again from an earlier offset; what was read of them and is in hand is to be dropped.

        Raises:
            NotAcknowledged: Not now: one of them is not being read yet.
        """
        self._stray = [message for message in self._stray if place(message) not in to]
        for partition, offset in to.items():
            try:
                self._consumers[partition.topic].seek(TopicPartition(*partition, offset))
            except KafkaException as exc:
                raise translate(exc, f"reading {partition.topic}/{partition.partition} again from {offset}") from exc
            self._counts.rewound += 1
            self._rewound.add(partition)
            self.done[partition] = offset
            self.moved.pop(partition, None)
            self._uncommitted.pop(partition, None)

    # -- committing --------------------------------------------------------------------------

    def commit_now_and_then(self) -> None:
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
            logger.info("%s: commit postponed: %s", self._group, error.str())
            return
        for result in results:
            partition = Partition(result.topic, result.partition)
            if result.error is None and self._uncommitted.get(partition) == result.offset:
                del self._uncommitted[partition]

    def finish(self) -> None:
        """Commit the rest before leaving the group; what cannot be committed in time is repeated by others."""
        end = self._clock() + FINISH_S
        while self._uncommitted and self._clock() < end:
            self._commit()
            for consumer in self._consumers.values():
                consumer.poll(0.05)  # what comes is not ours any more: nothing of it is committed
        if self._uncommitted:
            logger.warning("%s: %d partitions could not be committed", self._group, len(self._uncommitted))
            self._uncommitted.clear()  # or leaving the group would wait for them

    def leave(self) -> None:
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
            logger.warning("%s: Kafka does not answer; it will notice by itself that we left", self._group)

    # -- rebalancing, called from within poll() and consume() ----------------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Learn where we start, to notice what is missing. librdkafka assigns after this."""
        self._held.update(Partition(at.topic, at.partition) for at in partitions)
        try:
            for at in consumer.committed(partitions, timeout=5.0):
                if at.offset >= 0:
                    self.done[Partition(at.topic, at.partition)] = at.offset
        except KafkaException as exc:
            logger.warning("%s: cannot read the committed offsets now: %s", self._group, exc)
        self.newly_assigned = self.newly_assigned or bool(partitions)
        self._counts.assigned += bool(partitions)
        self._log_partitions("assigned", partitions)

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Give partitions away: what is written gets committed, what is in hand is the next owner's."""
        # Kafka has just told us to: the coordinator answers, so this wait is short.
        self._commit(wait=True)
        self._forget(partitions)
        self._counts.revoked += bool(partitions)
        self._log_partitions("revoked", partitions)

    def _on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Somebody else has them already; a commit would be refused."""
        self._forget(partitions)
        self._counts.lost += bool(partitions)
        self._log_partitions("lost", partitions)

    def _forget(self, partitions: list[TopicPartition]) -> None:
        for at in partitions:
            partition = Partition(at.topic, at.partition)
            self._held.discard(partition)
            self._rewound.discard(partition)
            for positions in (self.done, self.moved, self._uncommitted):
                positions.pop(partition, None)

    def _log_partitions(self, what: str, partitions: list[TopicPartition]) -> None:
        if partitions:
            listed = ", ".join(sorted(f"{at.topic}/{at.partition}" for at in partitions))
            logger.info("%s: %s %s", self._group, what, listed)

    # -- pausing -----------------------------------------------------------------------------

    def wait(self, slice_s: float) -> None:
        """Keep the group membership while no message is wanted: poll, on paused partitions."""
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

    def resume(self) -> None:
        """Read on."""
        self._ends.clear()
        for topic, consumer in self._consumers.items():
            consumer.resume([TopicPartition(*at) for at in self._still if at.topic == topic])
        self._still.clear()

    # -- how far -----------------------------------------------------------------------------

    def behind(self) -> dict[Partition, int]:
        """Return how many records of each of our partitions are not in the view, as far as known: by the last fetches."""
        behind = {}
        for partition, done in self.done.items():
            consumer = self._consumers.get(partition.topic)
            marks: object = consumer and consumer.get_watermark_offsets(TopicPartition(*partition), cached=True)
            # None if nothing is cached yet, whatever the stubs say.
            if isinstance(marks, tuple):
                behind[partition] = max(marks[1] - done, self._ends.get(partition, 0) - done, 0)
        return behind

    def ask_an_end(self, timeout_s: float) -> None:
        """Learn where the next partition ends: while paused nothing is fetched, which would tell."""
        if not self.done:
            return
        partition = min(self.done, key=lambda one: (one in self._ends, one))
        if partition in self._ends:  # all are known: once more from the start
            self._ends.clear()
            return
        try:
            marks = self._consumers[partition.topic].get_watermark_offsets(TopicPartition(*partition), timeout_s)
        except KafkaException as exc:
            logger.debug("%s: cannot ask where %s/%d ends: %s", self._group, *partition, exc)
            return
        self._ends[partition] = marks[1]

    def partitions(self) -> int:
        """Return how many partitions we have."""
        return sum(len(consumer.assignment()) for consumer in self._consumers.values())

    def _complain(self, error: KafkaError) -> None:
        """Log what librdkafka tells us, each thing once per report interval; it retries by itself."""
        if error.fatal():
            raise translate(error, "consume")
        text = error.str()
        now = self._clock()
        if now - self._complained.get(text, -COMPLAIN_S) >= COMPLAIN_S:
            self._complained[text] = now
            logger.warning("%s", refusal(self._settings, error, self._group, self._needed(error)))

    def _needed(self, error: KafkaError) -> list[Right]:
        if error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            return [Right(PROCESSOR, "group", self._group, "Read")]
        return [Right(PROCESSOR, "topic", topic, "Read") for topic in self._topics]

    def outside(self) -> list[str]:
        """Return the topics for which we are not in the group (yet)."""
        return [topic for topic, consumer in self._consumers.items() if not consumer.memberid()]


def place(message: Message) -> Partition:
    """Return where a message is from."""
    return Partition(message.topic() or "", message.partition() or 0)
