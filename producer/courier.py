"""The way of a record that must not be lost into Kafka: waited for or queued, sent again as the same event, given up.

Ready states and chords' parts pass here. What Kafka does not acknowledge takes the detour over the spool of this
host, if there is one; else who waits is told, and where nobody waits it is sent again as long as the process lives.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from celery.utils.time import get_exponential_backoff_interval

from celery_kafka_backend import threads
from celery_kafka_backend.errors import (
    NoSuchTopic,
    NotAcknowledged,
    PipelineError,
    PublishError,
    Refused,
    SettingsError,
    SpoolError,
    TooLarge,
)

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Message

    from celery_kafka_backend.producer.detour import Detour
    from celery_kafka_backend.producer.publisher import Delivery, Publisher, Record

logger = logging.getLogger(__name__)

VERDICT_S: Final = 1.5
"""librdkafka gives a record up within a second after its time is over; until then it may still send it."""
AGAIN_S: Final = 0.2
"""Pause before a record is sent again within the same wait: a new handle, a broker that has just started."""
KEPT_BYTES: Final = 64 << 20
"""Queued records that Kafka did not take, kept to be sent again; beyond, the next is given up."""


class Retries(NamedTuple):
    """``result_backend_always_retry`` and its bounds.

    Attributes:
        most: How many more attempts after the first; 0 without ``result_backend_always_retry``.
        base_ms: First pause between two.
        longest_ms: Longest pause.
    """

    most: float = 0
    base_ms: int = 10
    longest_ms: int = 10_000


ONCE: Final = Retries()
_MANY: Final = 100_000  # no clock takes infinity
FOREVER: Final = Retries(float("inf"), 100)
"""Where nobody waits there is no reason to give up while the process lives."""


class _Queued:
    """A record that nobody waits for, or not yet, until it is stored or given up."""

    __slots__ = ("_courier", "done", "record", "settled", "spooled", "what")

    def __init__(self, courier: Courier, record: Record, what: str) -> None:
        self._courier = courier
        self.record = record
        self.what = what
        self.done = False
        """Whether Kafka has answered."""
        self.spooled = False
        self.settled: threading.Event | None = None

    def answered(self, error: KafkaError | None, _: Message) -> None:
        self.done = True
        publisher = self._courier._publisher  # noqa: SLF001 - the same module
        self._courier.answered(self, None if error is None else publisher.explained(self.record.topic, error))


class Courier:
    """Sees records of one process into Kafka.

    Args:
        publisher: The process's.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._timeout_s = publisher.settings.delivery_timeout_s
        self.lost = 0
        """Records given up though nobody was there to be told."""
        self.sent_again = 0
        """Records sent again after Kafka did not acknowledge them."""
        self._refused: deque[_Queued] = deque()
        self._kept_bytes = 0
        self._guard = threading.Lock()
        self._pid = 0
        self._sending = False
        self._here = threading.local()
        self.detour: Detour | None = None
        """Over the spool; only a worker that is told to has one."""
        self._unsettled: set[_Queued] = set()
        """With a detour: what is queued, and neither stored nor given up."""

    def use(self, detour: Detour) -> None:
        """Go round a Kafka that does not answer. What a parent has queued is not this process's to spool."""
        self.detour = detour
        self._unsettled = set()

    # -- somebody waits --------------------------------------------------------------------------

    def carry(self, record: Record, what: str, wait_s: float, retries: Retries = ONCE) -> Delivery:
        """Return once a record is acknowledged: its delivery.

        Args:
            record: What.
            what: Its name in the log, such as ``SUCCESS of <task id>``.
            wait_s: How long one attempt may take.
            retries: How often, and how soon, to try again.

        Raises:
            TooLarge: Final.
            Refused: Kafka will not take it.
            NotAcknowledged: It is in nobody's hands: librdkafka has given it up too, unless ``wait_s`` is shorter than
                ``delivery_timeout_s``. A broker that was frozen with it in its socket may still append it.
        """
        attempt = 0
        while True:
            try:
                return self._within(record, wait_s)
            except TooLarge:
                raise
            except PublishError as exc:
                if _final(exc) or attempt >= retries.most:
                    raise
                attempt += 1
                self.sent_again += 1
                logger.warning("%s: %s; trying again", what, exc)
            pause_ms = get_exponential_backoff_interval(retries.base_ms, attempt, retries.longest_ms, full_jitter=True)
            time.sleep(pause_ms / 1000)

    def store(self, record: Record, what: str, wait_s: float, retries: Retries = ONCE) -> Delivery | None:
        """Return once a record is acknowledged: its delivery; None once it is on this host's disk, where there is a detour.

        Arguments and errors are those of `carry`; a spool that cannot take the record is as none.
        """
        if self.detour is not None:
            try:
                self.detour.carry(record)
            except SpoolError as exc:
                logger.error("%s: %s; waiting for Kafka", what, exc)  # noqa: TRY400 - no bug of ours
            else:
                return None
        delivery = self.carry(record, what, wait_s, retries)
        if self.detour is not None:
            self.detour.answered(None)
        return delivery

    def _within(self, record: Record, wait_s: float) -> Delivery:
        """Send a record until it is acknowledged or the time is over, again after errors that pass."""
        deadline = time.monotonic() + wait_s
        grace_s = VERDICT_S if wait_s >= self._timeout_s else 0.0
        left_s = wait_s
        missing: NoSuchTopic | None = None
        while True:
            try:
                delivery = self._publisher.publish(record, wait_s=left_s)
                delivery.wait(left_s + grace_s)
            except PublishError as exc:
                missing = exc if isinstance(exc, NoSuchTopic) else missing
                left_s = deadline - time.monotonic() - AGAIN_S
                if _final(exc) or left_s <= 0:
                    raise (missing or exc) from None  # the last try may have been too short to be told so again
                self.sent_again += 1
                time.sleep(AGAIN_S)
            else:
                return delivery

    # -- nobody waits ----------------------------------------------------------------------------

    def queue(self, record: Record, what: str, *, remember: bool = False) -> None:
        """Queue a record and return at once; if Kafka does not take it, send it again in the background.

        Args:
            record: What.
            what: Its name in the log.
            remember: `settle` on this thread waits for it.

        Raises:
            TooLarge: Final.
        """
        queued = _Queued(self, record, what)
        if self.detour is not None:
            if self.detour.away and self._spool(queued, None):
                return
            self._unsettled.add(queued)
        if remember:
            queued.settled = threading.Event()
            self._mine.append(queued)
        try:
            self._publisher.send(record, queued.answered)
        except TooLarge:
            self._end(queued)
            raise
        except (PublishError, SettingsError) as exc:
            self._refuse(queued, exc)
            return
        self._publisher.take_answers()

    def settle(self, retries: Retries = ONCE) -> None:
        """Wait until what this thread queued, and wanted remembered, is stored or given up; as long as `carry` would."""
        mine = self._mine
        bound_s = (1 + min(retries.most, _MANY)) * (self._timeout_s + VERDICT_S)
        if self.detour is not None:
            bound_s = self.detour.after_s
        while mine:
            queued = mine.popleft()
            assert queued.settled is not None
            self._publisher.serve(queued.settled, bound_s)
            if not queued.settled.is_set() and not self._spool(queued, NotAcknowledged(f"{queued.what}: no answer")):
                logger.error("%s is not in Kafka yet, and the next task starts; it is sent again", queued.what)

    def finish(self, timeout_s: float) -> int:
        """Wait until everything queued is answered, spooled or given up; return how many records are not."""
        if self.detour is not None:
            self._publisher.flush(0 if self.detour.away else min(timeout_s, self.detour.after_s))
            why = NotAcknowledged("this process ends")
            return sum(not self._spool(queued, why) for queued in tuple(self._unsettled))
        deadline = time.monotonic() + timeout_s
        while True:
            left = self._publisher.flush(max(deadline - time.monotonic(), 0))
            behind = self._sending and self._pid == os.getpid()
            if not (left or behind):
                return 0
            if time.monotonic() >= deadline:
                for queued in list(self._refused) if behind else ():
                    logger.error("%s is lost: this process ends before Kafka has it", queued.what)
                return left + (len(self._refused) if behind else 0)
            time.sleep(AGAIN_S / 10)

    @property
    def _mine(self) -> deque[_Queued]:
        here = self._here
        if getattr(here, "pid", 0) != os.getpid():
            here.pid = os.getpid()
            here.queued = deque()
        found: deque[_Queued] = here.queued
        return found

    def answered(self, queued: _Queued, error: PublishError | None) -> None:
        """Hear what became of a queued record, from whichever thread polls."""
        if self.detour is not None:
            self.detour.answered(error)
        if error is None:
            self._end(queued)
        elif not queued.spooled:
            self._refuse(queued, error)

    def _refuse(self, queued: _Queued, error: PipelineError) -> None:
        """Spool it; or have a thread of our own send it again, one for all, so that they keep their order; or give up."""
        if self._spool(queued, error):
            return
        if _final(error) or not self._keep(queued):
            self._give_up(queued, error)

    def _spool(self, queued: _Queued, why: PipelineError | None) -> bool:
        """Have this host keep a record that Kafka has not acknowledged; whether it does."""
        if self.detour is None or isinstance(why, TooLarge):
            return False
        try:
            self.detour.take(queued.record, why, None if why is None else queued)
        except SpoolError as exc:
            logger.error("%s: %s", queued.what, exc)  # noqa: TRY400 - no bug of ours
            return False
        queued.spooled = True
        self._end(queued)
        return True

    def _end(self, queued: _Queued) -> None:
        self._unsettled.discard(queued)
        if queued.settled is not None:
            queued.settled.set()

    def _keep(self, queued: _Queued) -> bool:
        if self._pid != os.getpid():  # what is there belongs to the process that forked us: it sends it itself
            self._guard, self._sending, self._pid = threading.Lock(), False, os.getpid()
            self._refused.clear()
            self._kept_bytes = 0
        size = len(queued.record.value or b"")
        with self._guard:
            if self._kept_bytes + size > KEPT_BYTES:
                return False
            self._kept_bytes += size
            self._refused.append(queued)
            if not self._sending:
                self._sending = True
                threads.start(self._send_again, "celery-kafka-again")
        return True

    def _send_again(self) -> None:
        while True:
            with self._guard:
                if not self._refused:
                    self._sending = False
                    return
                queued = self._refused[0]
            try:
                self.carry(queued.record, queued.what, self._timeout_s, FOREVER)
            except Exception as exc:  # noqa: BLE001 - said in the log; the records behind this one wait for this thread
                self._give_up(queued, exc)
            finally:
                self._end(queued)
                with self._guard:
                    self._refused.popleft()
                    self._kept_bytes -= len(queued.record.value or b"")

    def _give_up(self, queued: _Queued, error: Exception) -> None:
        self.lost += 1
        logger.error("%s is lost: %s", queued.what, error)
        self._end(queued)


def _final(error: PipelineError) -> bool:
    """Whether trying again is in vain. An unknown topic may be one that a broker in its first seconds has not read of."""
    return isinstance(error, (TooLarge, Refused)) and not isinstance(error, NoSuchTopic)
