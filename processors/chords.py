"""The chord processor: one owner per partition of the chords' topic, Kafka's own consumer group.

What is decided, and why it is safe, is `decision`; how it is carried out, `sending`; what is done with a body,
`body`. Here is the process around them::

    poll ─▶ Ledger.apply ─▶ Ledger.due ─┬▶ append decided, tombstones
      ▲                                 └▶ Sender: read the parts, send the body ─▶ append fired
      └─────────── the log ◀────────────────────────────────────────────────────────┘

**Guarantee.** Every complete chord is decided once; its body is sent at least once, always with the
same task id, run and results. It can be sent twice only if an owner dies, or is overtaken after a
pause, between sending it and having ``fired`` in the log, and the first message left no event in
the log of the tasks. docs/adr/0004.

An assigned partition is always read from its start; the committed offsets are for ``status`` only.
Nothing is kept outside Kafka.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final
from uuid import uuid4

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition

from celery_kafka_backend import chord_records, topics
from celery_kafka_backend.chord_records import Cancelled, Decided, Declared, Part, Resent
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import CodecError, PublishError, UnknownVersion
from celery_kafka_backend.kafka import consumer_config, producer_config, translate
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.processors.deadletters import DeadLetters
from celery_kafka_backend.processors.decision import Append, Fire, Forget, Ledger, Resend
from celery_kafka_backend.processors.held import Held, Recent, Statistics
from celery_kafka_backend.processors.sending import Sender

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from celery import Celery
    from confluent_kafka import Message

    from celery_kafka_backend.chord_records import Fired, Gone, Record
    from celery_kafka_backend.processors.decision import Action
    from celery_kafka_backend.processors.metering import ChordMeter
    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

IDLE_S: Final = 0.05
"""Longest wait in librdkafka, where Python's signal handlers do not run."""
BATCH: Final = 2_000
LETTERS_AGAIN_S: Final = 5.0
COMMIT_S: Final = 5.0
SWEEP_S: Final = 60.0
HAND_OVER_S: Final = 10.0
"""How long a partition's bodies in hand may take before it is given away."""
CHOICE_BYTES: Final = 256
"""Generous for a member in a decision: two UUIDs and an offset are 100."""
RECENT_BYTES: Final = 16 << 20
"""Of declarations and parts that need not be read from Kafka again before their body is sent."""


class ChordProcessor:
    """Decides chords and sends their bodies.

    Args:
        app: The user's app: routing, serializers and errbacks are its.
        settings: The user's.
        owner: Names this process in decisions; must be unique, also over restarts.
        clock: The wall clock, ms since 1970.
    """

    make_sender: ClassVar = Sender

    def __init__(
        self, app: Celery, settings: Settings, *, owner: str | None = None, clock: Callable[[], int] = system_wall_ms
    ) -> None:
        self.app = app
        self.settings = settings
        self.owner = owner or f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self.group = topics.group_id(settings.topic_prefix, "chords")
        self.statistics = Statistics()
        self._new = Complaints(settings).handle
        self._clock = clock
        self._topic = topics.chords(settings.topic_prefix)
        self._stopping = False
        self.meter: ChordMeter | None = None
        """Who is told what happens; set before `run`."""
        self._held: dict[int, Held] = {}
        self._assignments = 0
        self._slice = max(1, min(chord_records.CHUNK, settings.max_message_bytes // (2 * CHOICE_BYTES)))
        self._letters = DeadLetters(
            producer_config(settings), topics.dead_letters(settings.topic_prefix), by=self.group, wall_ms=clock,
            make=partial(self._new, Producer),
        )  # fmt: skip
        self._given_up: list[tuple[Held, bytes]] = []
        self._letters_wait = False
        self._unsure: list[tuple[float, Held, Fired | Resent]] = []
        self._fatal: PublishError | None = None
        self._commit_at = self._sweep_at = self._letters_at = 0.0
        self._recent = Recent(RECENT_BYTES)
        self.sender = self.make_sender(app, settings, self.statistics, self._recent, clock, self._append_done)
        self._consumer: Consumer
        self._producer: Producer

    # -- life --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask `run` to finish the bodies in hand, leave the group and return.

        Safe from a signal handler and from any thread: it takes no lock.
        """
        self._stopping = self.sender.stopping = True

    def run(self) -> None:
        """Work until `stop`.

        Raises:
            PublishError: librdkafka's producer gave up for good; start again as a new process.
            KafkaException: Likewise its consumer.
        """
        self._producer = self._new(Producer, producer_config(self.settings))
        self.sender.meter = self.meter
        self._consumer = self._new(
            Consumer,
            consumer_config(self.settings, self.group)
            | {"enable.partition.eof": True, "partition.assignment.strategy": "cooperative-sticky"},
        )
        try:
            self._consumer.subscribe(
                [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            logger.info("%s: deciding chords of %s as %s", self.group, self._topic, self.owner)
            while not self._stopping:
                self._turn()
                if self.meter is not None:
                    self.meter.turned(self)
        finally:
            self._close()
        logger.info("%s: stopped", self.group)

    def _close(self) -> None:
        self._stopping = True
        for held in self._held.values():
            held.open = False
        self.sender.close()
        self._producer.flush(HAND_OVER_S)
        self._commit(wait=True)
        self._consumer.close()

    def _turn(self) -> None:
        for message in self._gather():
            self._take(message)
        self._producer.poll(0)
        if self._fatal is not None:
            raise self._fatal
        for held in list(self._held.values()):
            if held.broken:
                self._start_again(held)
                continue
            for action in held.ledger.due(self._clock()):
                self._do(held, action)
            if held.caught_up and held.unsigned:
                self._refuse_unsigned(held)
            held.jobs = {job for job in held.jobs if not job.done()}
        self.sender.go_on()
        self._now_and_then()

    def _gather(self) -> list[Message]:
        """Wait for the first message, then take what is there already."""
        first = self._consumer.poll(IDLE_S)
        if first is None:
            return []
        # Not consume(BATCH, timeout): it waits for all of them, and a lone chord with it.
        return [first, *self._consumer.consume(BATCH, 0)]

    def _now_and_then(self) -> None:
        now = time.monotonic()
        if now >= self._commit_at:
            self._commit_at = now + COMMIT_S
            self._commit()
            self.statistics.chords = sum(len(held.ledger) for held in self._held.values())
            self.statistics.open = sum(held.ledger.undecided() for held in self._held.values())
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_S
            for held in self._held.values():
                for action in held.ledger.sweep(self._clock()):
                    self._do(held, action)
        if self._letters_wait and now >= self._letters_at:
            self._send_letters(now)
        due = [entry for entry in self._unsure if entry[0] <= now]
        if due:
            self._unsure = [entry for entry in self._unsure if entry[0] > now]
            for _, held, done in due:
                self._append_done(held, done)

    # -- reading -----------------------------------------------------------------------------

    def _take(self, message: Message) -> None:
        error, partition = message.error(), message.partition()
        held = self._held.get(-1 if partition is None else partition)
        if error is not None:
            if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - how the client names it
                if held is not None:
                    held.mark_caught_up()
            elif error.fatal():
                raise KafkaException(error)
            else:
                logger.warning("%s: %s", self.group, error.str())
            return
        if held is None or held.broken:
            return
        offset = message.offset()
        assert offset is not None
        self._apply(held, message, offset)
        held.position = offset + 1
        if held.end is not None and held.position >= held.end:
            held.mark_caught_up()

    def _apply(self, held: Held, message: Message, offset: int) -> None:
        try:
            record = chord_records.decode(message.key(), message.value())
        except UnknownVersion as exc:
            # It stays in the topic, and is read again by the software that can.
            logger.warning("%s: %s/%d@%d: %s", self.group, self._topic, held.partition, offset, exc)
            return
        except CodecError as exc:
            self._give_up(held, message, offset, f"{type(exc).__name__}: {exc}")
            key = message.key()
            if key:  # so that the next rebuild does not give it up again
                self._given_up.append((held, key))
            return
        if isinstance(record, Declared | Cancelled | Resent) and not chord_records.verify(
            record, self.settings.chord_key
        ):
            # Not tombstoned: if it is the secret that is wrong, this is somebody's chord.
            if isinstance(record, Declared):
                held.unsigned.append((record, message))
            else:
                self._give_up(held, message, offset, f"{type(record).__name__.lower()} without our chord_key")
            return
        _, written = message.timestamp()
        held.ledger.apply(record, offset, written if written > 0 else self._clock())
        self._remember(message, record)
        if isinstance(record, Decided):
            self._count_decided(held, record)

    def _refuse_unsigned(self, held: Held) -> None:
        for declared, message in held.unsigned:
            if not held.ledger.has_fired(declared.group, declared.generation):
                why = "declared without our chord_key"
                self._give_up(held, message, message.offset() or 0, why)
                self.sender.refuse(held, declared, why)
        held.unsigned.clear()

    def _remember(self, message: Message, record: Record | Gone) -> None:
        key, value = message.key(), message.value()
        assert key is not None
        if value is None:
            self._recent.drop(key)
        elif isinstance(record, Declared | Part):
            self._recent.put(key, record, len(key) + len(value))

    def _count_decided(self, held: Held, decided: Decided) -> None:
        if decided.owner == held.ledger.owner:
            self.statistics.decided += 1
            if not held.ledger.is_open(decided):
                self.statistics.lost += 1
                logger.info("chord %s: another owner's decision came first; it sends the body", decided.group)

    def _give_up(self, held: Held, message: Message, offset: int, reason: str) -> None:
        logger.warning("%s: dead letter: %s/%d@%d: %s", self.group, self._topic, held.partition, offset, reason)
        self.statistics.dead_letters += 1
        headers: Any = message.headers()
        self._letters.put(self._topic, held.partition, offset, message.key(), message.value(), headers, reason)
        self._letters_wait = True

    def _send_letters(self, now: float) -> None:
        try:
            self._letters.flush()
        except PublishError as exc:
            self._letters_at = now + LETTERS_AGAIN_S
            logger.warning("%s: dead letters are waiting: %s", self.group, exc)
            return
        for held, key in self._given_up:
            if held.open:
                self._produce(held.partition, key, None)
        self._given_up.clear()
        self._letters_wait = False

    # -- doing -------------------------------------------------------------------------------

    def _do(self, held: Held, action: Action) -> None:
        match action:
            case Append(records):
                self._append(held, records)
            case Fire() | Resend():
                self.sender.submit(held, action)
            case Forget(keys):
                for key in keys:
                    # One that gets lost is repeated by the next sweep or rebuild.
                    self._produce(held.partition, key, None)

    def _append(self, held: Held, records: tuple[Record, ...]) -> None:
        """Append slices, and the decision when all of them are acknowledged."""
        *slices, decided = records
        missing = len(slices)

        def delivered(error: KafkaError | None, _message: Message) -> None:
            nonlocal missing
            if error is not None:
                self._break(held, translate(error, "appending a decision"))
                return
            missing -= 1
            if missing == 0 and held.open:
                append(decided, acknowledged)

        def acknowledged(error: KafkaError | None, _message: Message) -> None:
            if error is not None:
                self._break(held, translate(error, "appending a decision"))

        def append(record: Record, callback: Callable[[KafkaError | None, Message], None]) -> None:
            try:
                self._produce(held.partition, *chord_records.encode(record), callback)
            except KafkaException as exc:
                self._break(held, translate(exc, "appending a decision"))

        for record in slices:
            append(record, delivered)
        if not slices:
            append(decided, acknowledged)

    def _break(self, held: Held, error: PublishError) -> None:
        """Start again as another owner: the record may be in the log or not, and must not be there twice."""
        held.broken = str(error)

    def _produce(
        self,
        partition: int,
        key: bytes,
        value: bytes | None,
        callback: Callable[[KafkaError | None, Message], None] | None = None,
    ) -> None:
        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is not None and error.fatal():
                self._fatal = translate(error, "the chord processor's producer")
            if callback is not None:
                callback(error, message)

        while True:
            try:
                self._producer.produce(self._topic, value=value, key=key, partition=partition, on_delivery=delivered)
            except BufferError:  # librdkafka's queue is full
                self._producer.poll(IDLE_S)
            else:
                return

    def _append_done(self, held: Held, done: Fired | Resent) -> None:
        """Append until acknowledged: until then a new owner would have to look for the body."""

        def delivered(error: KafkaError | None, _message: Message) -> None:
            if error is not None and not self._stopping:
                logger.warning("chord %s: its body is sent, but that is not yet in Kafka: %s", done.group, error.str())
                self._unsure.append((time.monotonic() + 1.0, held, done))

        self._produce(held.partition, *chord_records.encode(done), delivered)

    # -- saying how it is --------------------------------------------------------------------------

    def partitions(self) -> int:
        """Return how many partitions we have."""
        return len(self._held)

    def wrong(self) -> list[str]:
        """Return why chords cannot be decided or sent now; [] if they can, or if there is nothing for us to do."""
        found = [] if self._consumer.memberid() else [f"not in its consumer group for {self._topic} (yet)"]
        for held in self._held.values():
            if held.broken:
                found.append(f"partition {held.partition} is read again: {held.broken}")
            elif not held.caught_up:
                found.append(f"partition {held.partition} is being read: {held.position} of {held.end}")
        waiting = list(self.sender.waiting.items())
        if waiting:
            found.append(f"{len(waiting)} bodies wait, that of chord {waiting[0][0]}: {waiting[0][1]}")
        return found

    # -- rebalancing, called from within poll() and consume() ------------------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Read new partitions from their start, whatever was committed."""
        for at in partitions:
            self._hold(at.partition)
            at.offset = OFFSET_BEGINNING
        consumer.incremental_assign(partitions)
        if partitions:
            logger.info("%s: assigned %s", self.group, sorted(at.partition for at in partitions))

    def _hold(self, partition: int) -> None:
        self._assignments += 1
        owner = f"{self.owner}.{self._assignments}"
        ledger = Ledger(owner, self.settings.retention_ms, self._slice)
        held = self._held[partition] = Held(partition, ledger, self._end(partition))
        self.statistics.rebuilt += 1
        if held.end == 0:
            held.mark_caught_up()

    def _end(self, partition: int) -> int | None:
        try:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), timeout=5.0)
        except KafkaException as exc:
            logger.info("%s: no answer yet where partition %d ends: %s", self.group, partition, exc)
            return None
        return 0 if low == high else int(high)

    def _start_again(self, held: Held) -> None:
        if held.open:
            logger.warning("%s: partition %d is read again: %s", self.group, held.partition, held.broken)
        held.open = False
        try:
            self._consumer.seek(TopicPartition(self._topic, held.partition, OFFSET_BEGINNING))
        except KafkaException as exc:
            # Not fetching yet, or Kafka is away: it stays broken, and the next turn tries again.
            logger.debug("%s: cannot seek: %s", self.group, exc)
            return
        self._hold(held.partition)

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Finish what is being sent: the next owner then finds it done, and need not look for it."""
        self._let_go(partitions, HAND_OVER_S)
        self._producer.flush(HAND_OVER_S)

    def _on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Somebody else has them already."""
        self._let_go(partitions, 0.0)

    def _let_go(self, partitions: list[TopicPartition], patience_s: float) -> None:
        jobs: set[Future[None]] = set()
        for at in partitions:
            held = self._held.pop(at.partition, None)
            if held is not None:
                held.open = False
                jobs |= held.jobs
        for job in jobs:
            job.cancel()
        wait(jobs, timeout=patience_s)
        if partitions:
            logger.info("%s: gave away %s", self.group, sorted(at.partition for at in partitions))

    def _commit(self, *, wait: bool = False) -> None:
        offsets = [
            TopicPartition(self._topic, held.partition, held.position) for held in self._held.values() if held.position
        ]
        if not offsets:
            return
        try:
            if wait:
                self._consumer.commit(offsets=offsets, asynchronous=False)
            else:
                self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as exc:
            logger.debug("%s: commit: %s", self.group, exc)
