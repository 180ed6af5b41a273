"""The only user of a producer handle: one per process, never used across a fork.

An inherited handle silently loses messages, and destroying it costs a second; so on a changed pid
the old one is parked (kept, untouched) and a new one made. One thread at a time polls
it, the one that waits for an answer or else our own: without `poll`, ``produce()`` jams once
librdkafka's queue is full.

The interface is small on purpose: a publisher process per host could serve it as well.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from confluent_kafka import KafkaError, KafkaException, Producer

from celery_kafka_backend import kafka, threads, topics
from celery_kafka_backend.changes import Partition
from celery_kafka_backend.complaints import Complaints, NoToken
from celery_kafka_backend.errors import NotAcknowledged, PublishError, Refused, SettingsError
from celery_kafka_backend.producer import greenlets
from celery_kafka_backend.rights import WORKER, Right

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from confluent_kafka import Message

    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

EXIT_FLUSH_S: Final = 1.0
"""A short script waits at most this long at its end."""

WARM_UP_S: Final = 5.0
"""How long a process that starts waits for a sign of Kafka before it says in the log that there is none."""
CAST_S: Final = 0.05
"""How long a record that nobody waits for may wait for company."""
CROWD: Final = 5
CROWD_S: Final = 0.25
"""… and where so many come in that time: each partition's next request takes more of them along."""
LINGER_MS: Final = 1
"""A record that is waited for leaves when its waiter flushes, and what was produced just before it in the same request;
with no linger Kafka has two of them."""
FLUSH_S: Final = 0.002
FLUSHES_S: Final = 0.05
"""A wait flushes in such steps for so long; a Kafka that takes longer is away, and what lingered has left."""
PATCHED_S: Final = 0.005
"""Pause between two looks where a blocking call into librdkafka is not possible, or another thread's."""
CASTS: Final = 10_000
"""Such records that may wait; more are dropped and counted."""

NO_TOKEN_S: Final = 10.0
"""After an ``oauth_cb`` that gave no token it is not asked again for so long."""

_REPORT_EVERY_S: Final = 30.0
_OF_FATAL: Final = (KafkaError._FATAL, KafkaError._PURGE_QUEUE)  # noqa: SLF001 - the driver's names
"""What records end with that a handle had when it was finished for good; librdkafka tells why by a call of its own."""
_parked: Final[list[Any]] = []


class Record(NamedTuple):
    """What is to be appended.

    Attributes:
        topic: Where to.
        key: Record key.
        value: Record value.
        headers: Record headers.
        group: What the partition is computed from, for the chords' topic; "": the key's hash, by librdkafka.
    """

    topic: str
    key: bytes
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()
    group: str = ""


class Stored(NamedTuple):
    """Where a record is."""

    partition: Partition
    offset: int


class Delivery:
    """The fate of one record, known once Kafka has answered."""

    __slots__ = ("_done", "_error", "_explained", "_serve", "_then", "offset", "partition", "topic")

    def __init__(
        self,
        topic: str,
        serve: Callable[[threading.Event, float], None],
        explained: Callable[[KafkaError | None, float], PublishError],
        then: Callable[[PublishError | None], None] | None = None,
    ) -> None:
        self._serve = serve
        self._explained = explained
        self._then = then
        self.topic = topic
        self.partition = -1
        self.offset = -1
        self._error: KafkaError | None = None
        self._done = threading.Event()

    @property
    def stored(self) -> Stored:
        """Where the acknowledged record is."""
        return Stored(Partition(self.topic, self.partition), self.offset)

    @property
    def error(self) -> PublishError | None:
        """Why it is not stored, as far as that is known by now."""
        return None if self._error is None else self._explained(self._error, 0.0)

    @property
    def done(self) -> bool:
        """Whether Kafka has answered."""
        return self._done.is_set()

    def wait(self, timeout_s: float) -> None:
        """Return once the record is acknowledged.

        Raises:
            NotAcknowledged: No answer in time; the record may arrive yet.
            Refused: Kafka will not take it.
            TooLarge: Likewise, for its size.
        """
        self._serve(self._done, timeout_s)
        if not self._done.is_set():
            raise self._explained(None, timeout_s)
        error = self.error
        if error is not None:
            raise error

    def _answered(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self.partition, self.offset = message.partition() or 0, message.offset() or 0
        else:
            self._error = error
        self._done.set()
        if self._then is not None:
            self._then(self.error)


class Publisher:
    """Appends records to Kafka from one process and all its threads.

    Args:
        settings: The user's.
        make: What makes a producer handle; for tests, and for metrics, which count what it does.
    """

    def __init__(self, settings: Settings, make: Callable[[dict[str, Any]], Any] = Producer) -> None:
        self.settings = settings
        self.make = make
        self._locks: dict[int, threading.Lock] = {}
        self._polling = threading.RLock()  # whoever a time limit interrupts before he can let go takes it again
        self._pid = 0
        self._producer: Any = None
        self._maker: threading.Thread | None = None
        self._complaints = Complaints(settings)
        self._no_token_until = 0.0
        self._fatal: KafkaError | None = None
        self._patched = greenlets.patched()
        self._waiting = 0
        self._wanted = threading.Event()
        self._casts: deque[Record] = deque()
        self._casts_before = 0
        self._casts_at = 0.0
        self._counts: dict[str, int] = {}
        self.dropped = 0
        self.failed = 0
        self.latest: Stored | None = None
        self._failure = ""
        self._reported = (0, 0)
        self._report_at = 0.0

    def _handle(self) -> Any:
        """Return this process's handle, made on its first use here, or anew where librdkafka has given one up."""
        self._enter()
        if self._producer is None:
            with self._lock():
                if self._producer is None:
                    self._producer = self._new()
                    threads.start(self._poll, "celery-kafka-poll", self._producer, self._pid)
        return self._producer

    def _enter(self) -> None:
        """Begin anew in a process that was forked, or is the first: nothing inherited is used."""
        if self._pid == os.getpid():
            return
        with self._lock():
            if self._pid != os.getpid():
                if self._producer is not None:
                    _parked.append(self._producer)
                self._producer = self._maker = None
                self._casts.clear()  # the parent's: it sends them itself
                self._polling = threading.RLock()
                self._waiting, self._wanted = 0, threading.Event()
                self.dropped = self.failed = 0
                self._reported = (0, 0)
                self._pid = os.getpid()
                _at_end_of_process(self._at_exit)

    def _lock(self) -> threading.Lock:
        """Return this process's lock: the parent's may be held by a thread that did not survive the fork."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _new(self) -> Any:
        if time.monotonic() < self._no_token_until:
            raise NoToken(f"no token for Kafka at {self.settings.bootstrap_servers}: {self._complaints.token_error}")
        try:
            linger_ms = 0 if self._patched else LINGER_MS
            return self._complaints.handle(self.make, kafka.producer_config(self.settings, linger_ms))
        except NoToken:
            # The driver has just waited 10 s for it: not everybody who publishes is to wait as long.
            self._no_token_until = time.monotonic() + NO_TOKEN_S
            raise

    def explained(self, topic: str, error: KafkaError | KafkaException | None, waited_s: float = 0.0) -> PublishError:
        """Return what went wrong with a record: the missing right, or what librdkafka complained about last."""
        if error is None:
            found: PublishError = NotAcknowledged(
                f"Kafka did not acknowledge a record of {topic} within {waited_s:g} s"
            )
        else:
            if self._fatal is not None and _code(error) in _OF_FATAL:
                error = self._fatal
            needed = [Right(WORKER, "topic", topic, "Write")]
            found = kafka.refusal(self.settings, error, f"Kafka at {self.settings.bootstrap_servers}, {topic}", needed)
        if isinstance(found, NotAcknowledged) and self._complaints.latest:
            return NotAcknowledged(f"{found}; {self._complaints.latest}")
        return found

    def _poll(self, producer: Any, pid: int) -> None:
        while self._pid == pid and (self._producer is producer or len(producer)):  # a retired one has answers yet
            self._pause()
            try:
                if self._casts and self._producer is producer and self._casts_are_due():
                    self._send_casts(producer)
                self._take_answers(producer)
                self._report()
            except Exception:  # of whoever hears an answer; without this thread nobody would hear another
                logger.exception("hearing Kafka's answers failed; the next ones are heard")

    def _casts_are_due(self) -> bool:
        """Whether what is there has waited long enough; asked every `CAST_S`."""
        now, waiting = time.monotonic(), len(self._casts)
        crowded = waiting - self._casts_before >= CROWD
        if not self._casts_before:
            self._casts_at = now
        self._casts_before = waiting
        return not crowded or now - self._casts_at >= CROWD_S

    def _pause(self) -> None:
        if not self._patched:
            time.sleep(CAST_S)
        elif self._waiting:
            time.sleep(PATCHED_S)
        else:
            self._wanted.wait(CAST_S)
            self._wanted.clear()

    def serve(self, done: threading.Event, timeout_s: float) -> None:
        """Wait for an answer, or the time. One waiter at a time polls for all, itself: another thread's wake-up costs 0.2 ms."""
        if self._patched:  # a call that blocks in C would stop every greenlet: one greenlet polls for all
            self._waiting += 1
            self._wanted.set()
            try:
                done.wait(timeout_s)
            finally:
                self._waiting -= 1
            return
        producer = self._handle()
        deadline = time.monotonic() + timeout_s
        while not done.is_set() and (left := deadline - time.monotonic()) > 0:
            if not self._polling.acquire(blocking=False):
                done.wait(min(left, PATCHED_S))
                continue
            try:
                self._wait(producer, done, deadline)
            finally:
                self._polling.release()

    def _wait(self, producer: Any, done: threading.Event, deadline: float) -> None:
        began = now = time.monotonic()
        while not done.is_set() and now < deadline:
            # A flush alone sends what lingers; it ends when all is answered, another thread's records too.
            flushing = now - began < FLUSHES_S
            self._served(producer, min(deadline - now, FLUSH_S if flushing else CAST_S), flush=flushing)
            now = time.monotonic()

    def _served(self, producer: Any, wait_s: float, *, flush: bool = False) -> None:
        """Let librdkafka call us back. After a fatal error, which it raises here once, the next record has a new handle.

        An idempotent producer without any right to write is such an error: it would stay dead when the right is given.
        """
        try:
            if flush:
                producer.flush(wait_s)
            else:
                producer.poll(wait_s)
        except KafkaException as exc:
            self._fatal = exc.args[0]
            self._retire_if_fatal(producer, exc)

    def take_answers(self) -> None:
        """Let librdkafka call us back with what it knows by now.

        For whoever queues much and never waits: our polling thread would have to win the interpreter for each answer.
        """
        producer = self._producer
        if producer is not None:  # else it was retired a moment ago, and its own thread hears its answers
            self._take_answers(producer)

    def _take_answers(self, producer: Any) -> None:
        if self._polling.acquire(blocking=False):
            try:
                self._served(producer, 0)
            finally:
                self._polling.release()

    def _report(self) -> None:
        now = time.monotonic()
        if (self.dropped, self.failed) == self._reported or now < self._report_at:
            return
        dropped, failed = self.dropped - self._reported[0], self.failed - self._reported[1]
        self._reported = (self.dropped, self.failed)
        self._report_at = now + _REPORT_EVERY_S
        logger.warning(
            "Kafka at %s: %d events dropped (queue full), %d not delivered, that nobody waited for%s%s",
            self.settings.bootstrap_servers, dropped, failed, ": " * bool(self._failure), self._failure,
        )  # fmt: skip

    def waiting(self) -> int:
        """Return how many records are taken that are not yet librdkafka's."""
        return len(self._casts)

    def open(self) -> None:
        """Make the handle, so that a wrong option is said now.

        Raises:
            SettingsError: librdkafka does not know an option, or cannot use a file that it names.
            NoToken: The user's ``oauth_cb`` gave none within 10 s; it is asked again later.
        """
        self._handle()

    def warm_up(self) -> None:
        """Make the handle ready before it is needed: a new one's first answer takes 60 ms, more from a cold broker."""
        self._handle()
        threads.start(self._connect, "celery-kafka-warm-up")

    def _connect(self) -> None:
        prefix = self.settings.topic_prefix
        try:
            for topic in (topics.task_events(prefix), topics.chords(prefix)):
                self._counts[topic] = self.partitions(topic, WARM_UP_S)
        except Refused as exc:
            logger.error("no result can be stored: %s", exc)  # noqa: TRY400 - no traceback to a user
        except PublishError as exc:
            if not self._complaints.latest:  # else it is in the log already
                logger.warning("%s: check the address in result_backend, and kafka_backend_settings['client']", exc)

    def partitions(self, topic: str, timeout_s: float) -> int:
        """Return how many partitions a topic has.

        Raises:
            PublishError: Kafka did not say, or there is no such topic.
        """
        try:
            ask = partial(self._handle().list_topics, topic, timeout=timeout_s)
            found = greenlets.aside(ask).topics[topic]
        except KafkaException as exc:
            raise self.explained(topic, exc) from exc
        if found.error is not None:
            raise self.explained(topic, found.error)
        return len(found.partitions)

    def publish(
        self, record: Record, *, wait_s: float = 0.0, then: Callable[[PublishError | None], None] | None = None
    ) -> Delivery:
        """Queue a record and return its delivery, which the caller may wait for.

        Args:
            record: What, and where to.
            wait_s: How long to wait for room if librdkafka's queue is full, and for what must be known first.
            then: Called once with the outcome, from whichever thread polls; must not block.

        Raises:
            TooLarge: Over ``max_message_bytes``.
            NotAcknowledged: The queue stayed full, or Kafka did not say how many partitions there are.
            Refused: There is no such topic, or no right to see it.
        """
        delivery = Delivery(record.topic, self.serve, partial(self.explained, record.topic), then)
        self.send(record, delivery._answered, wait_s)  # noqa: SLF001 - the same module
        return delivery

    def send(self, record: Record, answered: Callable[[KafkaError | None, Message], None], wait_s: float = 0.0) -> None:
        """Queue a record; ``answered`` is called with its fate by whichever thread polls, and must not block.

        Raises:
            PublishError: As `publish`.
        """
        producer = self._handle()
        partition = self._partition(record, wait_s) if record.group else -1
        if self._casts and not record.group:  # a chord's part goes before the state, and what was cast goes with that
            self._send_casts(producer)
        deadline = time.monotonic() + wait_s if wait_s else 0.0
        while True:
            try:
                producer.produce(
                    record.topic, value=record.value, key=record.key, partition=partition,
                    headers=list(record.headers), on_delivery=answered,
                )  # fmt: skip
            except BufferError:
                if time.monotonic() >= deadline:
                    raise NotAcknowledged(f"the queue to Kafka at {self.settings.bootstrap_servers} is full") from None
                time.sleep(0.01)
            except KafkaException as exc:
                self._retire_if_fatal(producer, exc)
                raise self.explained(record.topic, exc) from exc
            else:
                return

    def _retire_if_fatal(self, producer: Any, exc: KafkaException) -> None:
        """Let go of a handle that takes nothing any more, so that the next record gets a new one.

        librdkafka calls an idempotent producer's error fatal when it can no longer promise the order, or was refused
        its producer id; it stays so, even after the right has been granted.
        """
        if (exc.args[0].fatal() or _code(exc) == KafkaError._FATAL) and self._producer is producer:  # noqa: SLF001
            logger.error("Kafka at %s: %s; starting anew", self.settings.bootstrap_servers, exc.args[0].str())
            self._producer = None

    def _partition(self, record: Record, wait_s: float) -> int:
        count = self._counts.get(record.topic)
        if count is None:
            if not wait_s:  # asking would block
                raise NotAcknowledged(f"Kafka has not said yet how many partitions {record.topic} has")
            count = self._counts[record.topic] = self.partitions(record.topic, wait_s)
        return topics.chord_partition(record.group, count)

    def cast(self, record: Record) -> bool:
        """Take a record that nobody waits for; return False if it was dropped. Never blocks.

        It leaves with the next record that somebody does wait for, or within `CAST_S`: a task's
        STARTED travels with its SUCCESS, for half the requests.

        Raises:
            SettingsError: librdkafka does not know an option; only on a process's first record.
        """
        self._enter()
        if len(self._casts) >= CASTS:
            self.dropped += 1
            return False
        if self._producer is None:
            if "oauth_cb" in self.settings.client or "oauth_cb" in self.settings.producer:
                self._make_aside()
            else:
                self._handle()
        self._casts.append(record)
        return True

    def _make_aside(self) -> None:
        """Make the handle in a thread of its own: the driver waits there for the user's token, up to 10 s."""
        if self._maker is None or not self._maker.is_alive():
            self._maker = threads.start(self._made_aside, "celery-kafka-token")

    def _made_aside(self) -> None:
        try:
            greenlets.aside(self._handle)
        except NoToken:  # said in the log when the callable failed; the next cast asks again
            self._report()
        except SettingsError as exc:
            logger.error("no event can be sent: %s", exc)  # noqa: TRY400 - no traceback to a user

    def send_casts(self) -> None:
        """Let what was cast leave now. Never blocks."""
        producer = self._producer
        if producer is not None and self._pid == os.getpid():
            self._send_casts(producer)

    def _send_casts(self, producer: Any) -> None:
        casts = self._casts
        self._casts_before = 0
        while casts:
            try:
                record = casts.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                producer.produce(
                    record.topic, value=record.value, key=record.key, headers=list(record.headers),
                    on_delivery=self._cast_answered,
                )  # fmt: skip
            except BufferError:
                self.dropped += 1
            except KafkaException as exc:
                self._retire_if_fatal(producer, exc)
                if self._producer is not producer:
                    casts.appendleft(record)  # its successor's
                    return
                self.failed += 1
                self._failure = str(self.explained(record.topic, exc))

    def _cast_answered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self.failed += 1
            self._failure = str(self.explained(message.topic() or "", error))
        else:
            self.latest = Stored(Partition(message.topic() or "", message.partition() or 0), message.offset() or 0)

    def flush(self, timeout_s: float) -> int:
        """Wait until everything queued is answered; return how many records are not."""
        if self._pid != os.getpid():
            return 0
        deadline = time.monotonic() + timeout_s
        if self._maker is not None:
            self._maker.join(timeout_s)
        producer = self._producer
        if producer is None:
            return len(self._casts)
        self._send_casts(producer)
        if self._patched:
            while len(producer) and time.monotonic() < deadline:
                self._served(producer, 0)
                time.sleep(PATCHED_S)
        else:
            self._served(producer, max(deadline - time.monotonic(), 0), flush=True)
        return len(producer) + len(self._casts)

    def _at_exit(self) -> None:
        left = self.flush(EXIT_FLUSH_S)
        if left:
            logger.warning(
                "%d events had not reached Kafka at %s when this process ended", left, self.settings.bootstrap_servers
            )

    def close(self) -> None:
        """Flush, bounded, and let go of the handle. Called any number of times; a later publish makes a new one."""
        self._at_exit()
        atexit.unregister(self._at_exit)
        self._producer, self._pid = None, 0


def _at_end_of_process(call: Callable[[], None]) -> None:
    atexit.register(call)
    # A child that multiprocessing forked leaves by os._exit, past atexit; it runs these instead.
    util = sys.modules.get("multiprocessing.util")
    if util is not None and util.process.parent_process() is not None:
        util.Finalize(None, call, exitpriority=0)


def _code(error: KafkaError | KafkaException) -> int:
    found: KafkaError = error.args[0] if isinstance(error, KafkaException) else error
    return found.code()


_publishers: Final[dict[str, Publisher]] = {}


def publisher_for(settings: Settings) -> Publisher:
    """Return this process's publisher for some settings (``app.backend`` is per thread; this is not)."""
    key = repr(msgspec.structs.asdict(settings))
    return _publishers.setdefault(key, Publisher(settings))
