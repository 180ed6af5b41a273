"""The chord processor: one owner per partition of the chords' topic, Kafka's own consumer group.

What is decided, and why it is safe, is `decision`; what is done with a body is `body`. Here is the
process around them::

    poll ─▶ Ledger.apply ─▶ Ledger.due ─┬▶ append decided, tombstones
      ▲                                 └▶ a thread: read the parts, send the body ─▶ append fired
      └─────────── the log ◀────────────────────────────────────────────────────────────┘

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
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition

from celery_kafka_backend import chord_records, codec, events, topics
from celery_kafka_backend.chord_records import FAILURE, Decided, Declared, Fired, Part
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import CodecError, PipelineError, PublishError, UnknownVersion
from celery_kafka_backend.kafka import consumer_config, producer_config, translate
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.processors import body
from celery_kafka_backend.processors.deadletters import DeadLetters
from celery_kafka_backend.processors.decision import Append, Fire, Forget, Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from celery import Celery
    from confluent_kafka import Message

    from celery_kafka_backend.chord_records import Record
    from celery_kafka_backend.processors.decision import Action
    from celery_kafka_backend.processors.metering import ChordMeter
    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

IDLE_S: Final = 0.05
"""Longest wait in librdkafka, where Python's signal handlers do not run."""
BATCH: Final = 2_000
SENDERS: Final = 4
"""Threads that send bodies. They wait for the broker; deciding does not wait for them."""
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
COMMIT_S: Final = 5.0
SWEEP_S: Final = 60.0
HAND_OVER_S: Final = 10.0
"""How long a partition's bodies in hand may take before it is given away."""
READ_S: Final = 30.0
GAP: Final = 5_000
"""Of more records that are not wanted, it is quicker to seek than to read on."""
CLOCKS_MS: Final = 60_000
"""Brokers' clocks may differ by so much."""
CHOICE_BYTES: Final = 256
"""Generous for a member in a decision: two UUIDs and an offset are 100."""

_OUR_FAULT_S: Final = 30.0
_NO_TOPIC: Final = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC}  # noqa: SLF001


class KafkaAway(PipelineError):  # noqa: N818 - named as in `errors`
    """Raised when Kafka does not answer; the same call again may succeed."""


class PartsMissing(PipelineError):  # noqa: N818 - named as in `errors`
    """Raised when records that a decision names are not in the log up to ``end``."""

    def __init__(self, missing: int, end: int) -> None:
        self.end = end
        super().__init__(f"{missing} records are not in the log")


class Statistics(msgspec.Struct):
    """What a processor has done since it was made.

    Attributes:
        decided: Decisions appended.
        lost: … of which another owner's was first.
        sent: Bodies sent.
        failed: Bodies failed, as a member had failed or the results could not be joined.
        found: Bodies of another owner that had been sent already.
        retries: Attempts to send that failed, because the broker or Kafka was away.
        dead_letters: Records given up.
        rebuilt: Times that a partition was read from its start.
        chords: Chords held, finished ones included.
        open: … of which so many are declared and not decided.
    """

    decided: int = 0
    lost: int = 0
    sent: int = 0
    failed: int = 0
    found: int = 0
    retries: int = 0
    dead_letters: int = 0
    rebuilt: int = 0
    chords: int = 0
    open: int = 0


class _Held:
    """One partition in one assignment: one owner, in the protocol's words."""

    def __init__(self, partition: int, ledger: Ledger, end: int | None) -> None:
        self.partition = partition
        self.ledger = ledger
        self.end = end
        """Read up to here before acting; None: Kafka did not say, so wait for the end itself."""
        self.position = 0
        self.open = True
        self.broken = ""
        """Why this owner must start again as another."""
        self.jobs: set[Future[None]] = set()
        self.caught_up = False

    def mark_caught_up(self) -> None:
        if not self.caught_up:
            self.caught_up = True
            self.ledger.caught_up()


class ChordProcessor:
    """Decides chords and sends their bodies.

    Args:
        app: The user's app: routing, serializers and errbacks are its.
        settings: The user's.
        owner: Names this process in decisions; must be unique, also over restarts.
        clock: The wall clock, ms since 1970.
    """

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
        self._events_topic = topics.task_events(settings.topic_prefix)
        self._stopping = False
        self.meter: ChordMeter | None = None
        """Who is told what happens; set before `run`."""
        self._held_up: dict[str, str] = {}
        self._held: dict[int, _Held] = {}
        self._assignments = 0
        self._slice = max(1, min(chord_records.CHUNK, settings.max_message_bytes // (2 * CHOICE_BYTES)))
        self._letters = DeadLetters(
            producer_config(settings), topics.dead_letters(settings.topic_prefix), by=self.group, wall_ms=clock,
            make=partial(self._new, Producer),
        )  # fmt: skip
        self._given_up: list[tuple[_Held, bytes]] = []
        self._letters_wait = False
        self._unsure: list[tuple[float, _Held, Fired]] = []
        self._fatal: PublishError | None = None
        self._commit_at = self._sweep_at = self._letters_at = 0.0
        self._thread = threading.local()
        self._readers: list[_Reader] = []
        self._consumer: Consumer
        self._producer: Producer
        self._senders: ThreadPoolExecutor

    # -- life --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask `run` to finish the bodies in hand, leave the group and return.

        Safe from a signal handler and from any thread: it takes no lock.
        """
        self._stopping = True

    def run(self) -> None:
        """Work until `stop`.

        Raises:
            PublishError: librdkafka's producer gave up for good; start again as a new process.
            KafkaException: Likewise its consumer.
        """
        self._producer = self._new(Producer, producer_config(self.settings))
        self._senders = ThreadPoolExecutor(SENDERS, "chord-body", initializer=self.app.set_current)
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
        self._senders.shutdown(wait=True, cancel_futures=True)
        self._producer.flush(HAND_OVER_S)
        self._commit(wait=True)
        self._consumer.close()
        for reader in self._readers:
            reader.close()

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
            held.jobs = {job for job in held.jobs if not job.done()}
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
            for _, held, fired in due:
                self._append_fired(held, fired)

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

    def _apply(self, held: _Held, message: Message, offset: int) -> None:
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
        if isinstance(record, Declared) and not chord_records.verify(record, self.settings.chord_key):
            # Not tombstoned: if it is the secret that is wrong, this is somebody's chord.
            self._give_up(held, message, offset, "a chord declared without our chord_key")
            return
        _, written = message.timestamp()
        held.ledger.apply(record, offset, written if written > 0 else self._clock())
        if isinstance(record, Decided):
            self._count_decided(held, record)

    def _count_decided(self, held: _Held, decided: Decided) -> None:
        if decided.owner == held.ledger.owner:
            self.statistics.decided += 1
            if not held.ledger.is_open(decided):
                self.statistics.lost += 1
                logger.info("chord %s: another owner's decision came first; it sends the body", decided.group)

    def _give_up(self, held: _Held, message: Message, offset: int, reason: str) -> None:
        logger.warning("%s: dead letter: %s/%d@%d: %s", self.group, self._topic, held.partition, offset, reason)
        self.statistics.dead_letters += 1
        headers: Any = message.headers()
        self._letters.put(self._topic, held.partition, offset, message.key(), message.value(), headers, reason)
        self._letters_wait = True

    def _send_letters(self, now: float) -> None:
        try:
            self._letters.flush()
        except PublishError as exc:
            self._letters_at = now + BACKOFF_MAX_S
            logger.warning("%s: dead letters are waiting: %s", self.group, exc)
            return
        for held, key in self._given_up:
            if held.open:
                self._produce(held.partition, key, None)
        self._given_up.clear()
        self._letters_wait = False

    # -- doing -------------------------------------------------------------------------------

    def _do(self, held: _Held, action: Action) -> None:
        match action:
            case Append(records):
                self._append(held, records)
            case Fire():
                held.jobs.add(self._senders.submit(self._carry_out, held, action))
            case Forget(keys):
                for key in keys:
                    # One that gets lost is repeated by the next sweep or rebuild.
                    self._produce(held.partition, key, None)

    def _append(self, held: _Held, records: tuple[Record, ...]) -> None:
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

    def _break(self, held: _Held, error: PublishError) -> None:
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

    def _append_fired(self, held: _Held, fired: Fired) -> None:
        """Append until acknowledged: until then a new owner would have to look for the body."""

        def delivered(error: KafkaError | None, _message: Message) -> None:
            if error is not None and not self._stopping:
                logger.warning("chord %s: its body is sent, but that is not yet in Kafka: %s", fired.group, error.str())
                self._unsure.append((time.monotonic() + 1.0, held, fired))

        self._produce(held.partition, *chord_records.encode(fired), delivered)

    # -- sending, in a thread --------------------------------------------------------------------

    def _carry_out(self, held: _Held, fire: Fire) -> None:
        try:
            self._insist(held, fire)
        finally:
            self._held_up.pop(fire.decided.group, None)

    def _insist(self, held: _Held, fire: Fire) -> None:
        """Try until it is done or is no longer ours to do."""
        attempt = 0
        decided = fire.decided
        lost_at: PartsMissing | None = None
        while self._is_wanted(held, decided):
            try:
                fired = self._once(held, fire, lost_at)
            except PartsMissing as exc:
                # Finished by another owner, most likely: read on to there, then look again.
                lost_at = exc
                while self._is_wanted(held, decided) and held.position < exc.end:
                    time.sleep(IDLE_S)
            except (*body.TRANSIENT, KafkaAway, KafkaException) as exc:
                attempt += 1
                self.statistics.retries += 1
                self._held_up[decided.group] = str(exc)
                level = logging.WARNING if attempt in (1, 10) or attempt % 100 == 0 else logging.DEBUG
                logger.log(level, "chord %s: its body waits, attempt %d: %r", decided.group, attempt, exc)
                self._pause(held, min(BACKOFF_FIRST_S * 2 ** min(attempt - 1, 10), BACKOFF_MAX_S))
            except Exception:
                logger.exception("chord %s: cannot send its body; tried again in %g s", decided.group, _OUR_FAULT_S)
                self._pause(held, _OUR_FAULT_S)
            else:
                if fired is not None:
                    self._append_fired(held, fired)
                return

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
        waiting = list(self._held_up.items())
        if waiting:
            found.append(f"{len(waiting)} bodies wait, that of chord {waiting[0][0]}: {waiting[0][1]}")
        return found

    def _is_wanted(self, held: _Held, decided: Decided) -> bool:
        return held.open and not self._stopping and not held.broken and held.ledger.is_open(decided)

    def _pause(self, held: _Held, delay_s: float) -> None:
        end = time.monotonic() + delay_s
        while held.open and not self._stopping and time.monotonic() < end:
            time.sleep(IDLE_S)

    def _once(self, held: _Held, fire: Fire, lost_at: PartsMissing | None) -> Fired | None:
        decided = fire.decided
        with self._reading() as reader:
            declared, parts = self._read(reader, held, fire, needed=lost_at is None)
            found = fire.look_first and self._was_sent(reader, declared, decided, fire.since_ms)
        if not self._is_wanted(held, decided):
            return None
        if found:
            outcome = decided.outcome
            self.statistics.found += 1
        elif parts is None:
            logger.error("chord %s: the results of some members are gone from %s", decided.group, self._topic)
            outcome = self.give_up(declared, decided, str(lost_at))
        else:
            outcome = self.send(declared, decided, parts)
            last = parts[decided.last] if parts else None
            if self.meter is not None and last is not None:
                self.meter.sent((self._clock() - last.at) / 1000)
        if not found:
            self.statistics.failed += outcome == FAILURE
            self.statistics.sent += outcome != FAILURE
        return Fired(
            group=decided.group,
            generation=decided.generation,
            owner=held.ledger.owner,
            outcome=outcome,
            body_task_id=decided.body_task_id,
            found=found,
            at=self._clock(),
        )

    def send(self, declared: Declared, decided: Decided, parts: list[Part | None]) -> str:
        """Send a body, or fail it; return the outcome. `Fired` is appended after this returns."""
        return body.carry_out(self.app, declared, decided, parts)

    def give_up(self, declared: Declared, decided: Decided, why: str) -> str:
        """Fail a body whose results are lost; return the outcome."""
        return body.give_up(self.app, declared, decided, why)

    def _read(
        self, reader: _Reader, held: _Held, fire: Fire, *, needed: bool
    ) -> tuple[Declared, list[Part | None] | None]:
        """Return the declaration and the parts; no parts if some are missing that are not `needed`."""
        decided = fire.decided
        id_ = (decided.group, decided.generation)
        declared_key = chord_records.make_key(*id_, chord_records.DECLARED)
        keys = [chord_records.part_key(*id_, part.task, part.index, part.id) for part in fire.parts]
        at = dict(zip(keys, (part.offset for part in fire.parts), strict=True))
        # First the declaration: a body without results, or that fails, needs two parts at most.
        found = reader.read(self._topic, held.partition, {declared_key: fire.declared})
        declared = found.get(declared_key)
        if not isinstance(declared, Declared):
            raise PartsMissing(1, reader.end)
        wanted = at
        if declared.immutable or decided.outcome == FAILURE:
            few = {decided.last} if keys else set()
            few |= {n for n, part in enumerate(fire.parts) if part.task == decided.failed}
            wanted = {keys[n]: at[keys[n]] for n in few}
        found = reader.read(self._topic, held.partition, wanted)
        missing = len(wanted) - len(found)
        if missing and needed:
            raise PartsMissing(missing, reader.end)
        parts = [part if isinstance(part := found.get(key), Part) else None for key in keys]
        return declared, None if missing else parts

    def _was_sent(self, reader: _Reader, declared: Declared, decided: Decided, since_ms: int) -> bool:
        """Look for events of the body's first messages in that run."""
        if decided.outcome == FAILURE:
            failed = body.innermost(body.signature(self.app, declared)).id
            ids, kinds = [failed] if failed else [], frozenset({events.FAILURE})
        else:
            # Every kind counts: what is said of a task before it is sent is of another run.
            ids, kinds = body.first_ids(body.signature(self.app, declared)), events.KINDS
        left = {one.encode() for one in ids}
        partitions = self._partitions_of(reader, ids) if ids else []
        if not partitions:
            return False
        for key, value in reader.since(self._events_topic, partitions, since_ms - CLOCKS_MS):
            if key in left and value is not None:
                try:
                    event = codec.decode(value)
                except CodecError:
                    continue
                if event.run == decided.body_run and event.kind in kinds:
                    left.discard(key)
                    if not left:
                        return True
        return False

    def _partitions_of(self, reader: _Reader, ids: Iterable[str]) -> list[int]:
        count = reader.partitions(self._events_topic)
        if not count or not str(self.settings.producer.get("partitioner", "murmur2_random")).startswith("murmur2"):
            return list(range(count))
        return sorted({topics.chord_partition(one, count) for one in ids})

    @contextmanager
    def _reading(self) -> Iterator[_Reader]:
        reader: _Reader | None = getattr(self._thread, "reader", None)
        if reader is None:
            reader = self._thread.reader = _Reader(self.settings)
            self._readers.append(reader)
        yield reader

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
        held = self._held[partition] = _Held(partition, ledger, self._end(partition))
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

    def _start_again(self, held: _Held) -> None:
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


class _Reader:
    """Reads records by where they are, for one thread. In no consumer group."""

    def __init__(self, settings: Settings) -> None:
        self._consumer = Complaints(settings).handle(
            Consumer, consumer_config(settings, None) | {"enable.partition.eof": True}
        )
        self.end = 0
        """Where the partition ended when something was not found."""

    def close(self) -> None:
        self._consumer.close()

    def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has; 0 if there is no such topic."""
        found = self._consumer.list_topics(topic, timeout=READ_S).topics[topic]
        if found.error is not None and found.error.code() not in _NO_TOPIC:
            raise KafkaException(found.error)
        return len(found.partitions)

    def read(self, topic: str, partition: int, wanted: Mapping[bytes, int]) -> dict[bytes, Any]:
        """Return the records with these keys.

        Args:
            topic: The chords' topic.
            partition: All are in this one.
            wanted: Key to the offset where it was seen. A record that is no longer there has
                moved towards the end (sent again, then compacted), or is gone.
        """
        found: dict[bytes, Any] = {}
        ahead = sorted(set(wanted.values()), reverse=True)
        if not ahead:
            return found
        sought = ahead[-1]
        for message in self._from(topic, {partition: sought}):
            if message is None:
                # The end, and something is missing.
                _, self.end = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=READ_S)
                break
            key, offset = message.key(), message.offset()
            assert offset is not None
            if key is not None and key in wanted:
                if message.value() is None:
                    found.pop(key, None)
                else:
                    found[key] = chord_records.decode(key, message.value())
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
        asked = [TopicPartition(topic, partition, at_ms) for partition in partitions]
        starts = {}
        for at in self._consumer.offsets_for_times(asked, timeout=READ_S):
            if at.error is not None:
                raise KafkaException(at.error)
            starts[at.partition] = at.offset
        for partition, offset in starts.items():
            if offset < 0:
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
                messages = self._consumer.consume(BATCH, IDLE_S)
                if messages:
                    heard = time.monotonic()
                elif time.monotonic() - heard > READ_S:
                    raise KafkaAway(f"{topic}: nothing read within {READ_S:g} s")
                for message in messages:
                    error = message.error()
                    if error is None:
                        yield message
                    elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
                        unfinished.discard(message.partition() or 0)
                    elif not error.retriable():
                        raise KafkaException(error)
            yield None
        finally:
            self._consumer.unassign()
