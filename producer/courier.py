"""The way of a record that must not be lost into Kafka: waited for or queued, sent again as the same event, given up.

Ready states and chords' parts pass here. What Kafka does not acknowledge takes the detour over the spool of this
host, if there is one; else it is counted and named in the log.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from celery.utils.time import get_exponential_backoff_interval

from celery_kafka_backend.errors import NoSuchTopic, NotAcknowledged, PublishError, Refused, SpoolError, TooLarge

if TYPE_CHECKING:
    from celery_kafka_backend.producer.detour import Detour
    from celery_kafka_backend.producer.publisher import Delivery, Publisher, Record

logger = logging.getLogger(__name__)

VERDICT_S: Final = 1.5
"""librdkafka gives a record up within a second after its time is over; until then it may still send it."""
AGAIN_S: Final = 0.2
"""Pause before a record is sent again within the same wait: a new handle, a broker that has just started."""
KEPT: Final = 10_000
"""Queued records that Kafka did not take, to be sent again; beyond, the next is given up."""


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


class _Queued:
    """A record that nobody waits for yet, until it is stored or given up."""

    __slots__ = ("attempt", "delivery", "record", "retries", "settled", "what")

    def __init__(self, record: Record, what: str, retries: Retries) -> None:
        self.record = record
        self.what = what
        self.retries = retries
        self.attempt = 0
        self.delivery: Delivery | None = None
        self.settled = threading.Event()


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
        self._guard = threading.Lock()
        self._pid = 0
        self._sending = False
        self._here = threading.local()

        self.detour: Detour | None = None
        """Over the spool; only a worker that is told to has one."""
        self._unsettled: set[_Queued] = set()
        """With a detour: what is queued, and neither stored nor given up."""

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
            Refused: Kafka will not take it, and it is nowhere else.
            NotAcknowledged: It is in nobody's hands: librdkafka has given it up too, unless ``wait_s`` is shorter than
                ``delivery_timeout_s``. A broker that was frozen with it in its socket may still append it.
        """
        return self._insist(record, what, wait_s, retries, 0)

    def store(self, record: Record, what: str, wait_s: float, retries: Retries = ONCE) -> None:
        """Return once a record is acknowledged, or on this host's disk where there is a detour.

        Arguments and errors are those of `carry`; a spool that cannot take the record is as none.
        """
        if self.detour is not None:
            try:
                self.detour.carry(record)
            except SpoolError as exc:
                logger.error("%s: %s; waiting for Kafka", what, exc)  # noqa: TRY400 - no bug of ours
            else:
                return
        self._insist(record, what, wait_s, retries, 0)

    def _insist(self, record: Record, what: str, wait_s: float, retries: Retries, attempt: int) -> Delivery:
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

    def _within(self, record: Record, wait_s: float) -> Delivery:
        """Send a record until it is acknowledged or the time is over, again after errors that pass."""
        deadline = time.monotonic() + wait_s
        grace_s = VERDICT_S if wait_s >= self._timeout_s else 0.0
        left_s = wait_s
        while True:
            try:
                delivery = self._publisher.publish(record, wait_s=left_s)
                delivery.wait(left_s + grace_s)
            except PublishError as exc:
                left_s = deadline - time.monotonic() - AGAIN_S
                if _final(exc) or left_s <= 0:
                    raise
                self.sent_again += 1
                time.sleep(AGAIN_S)
            else:
                return delivery

    # -- nobody waits ----------------------------------------------------------------------------

    def queue(self, record: Record, what: str, retries: Retries = ONCE, *, remember: bool = False) -> None:
        """Queue a record and return at once; if Kafka does not take it, go on in the background.

        Args:
            record: What.
            what: Its name in the log.
            retries: How often, and how soon, to try again.
            remember: `settle` on this thread waits for it.

        Raises:
            TooLarge: Final.
        """
        queued = _Queued(record, what, retries)
        if self.detour is not None:
            queued.retries = ONCE  # what the spool cannot take is retried in vain as well
            if self.detour.away and self._spool(queued, None):
                return
            self._unsettled.add(queued)
        try:
            queued.delivery = self._publisher.publish(record, then=partial(self._answered, queued))
        except TooLarge:
            raise
        except PublishError as exc:
            self._refuse(queued, exc, 0)
        if remember:
            self._mine.append(queued)

    def settle(self) -> None:
        """Wait until what this thread queued, and wanted remembered, is stored, or given up and said so."""
        mine = self._mine
        while mine:
            queued = mine.popleft()
            if queued.delivery is not None:
                with suppress(PublishError):  # then the background has it, or has said so
                    queued.delivery.wait(self._timeout_s + VERDICT_S if self.detour is None else self.detour.after_s)
                if not queued.delivery.done and self._spool(queued, NotAcknowledged(f"{queued.what}: no answer")):
                    continue
            queued.settled.wait()

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
            if not (left or behind) or time.monotonic() >= deadline:
                return left + (len(self._refused) + 1 if behind else 0)
            time.sleep(AGAIN_S / 10)

    @property
    def _mine(self) -> deque[_Queued]:
        here = self._here
        if getattr(here, "pid", 0) != os.getpid():
            here.pid = os.getpid()
            here.queued = deque()
        found: deque[_Queued] = here.queued
        return found

    def _answered(self, queued: _Queued, error: PublishError | None) -> None:
        if self.detour is not None:
            self.detour.answered(error)
        if error is None:
            self._settle(queued)
        elif not queued.settled.is_set():  # else it is in the spool
            self._refuse(queued, error, 1)

    def _settle(self, queued: _Queued) -> None:
        self._unsettled.discard(queued)
        queued.settled.set()

    def _spool(self, queued: _Queued, why: PublishError | None) -> bool:
        """Have this host keep a record that Kafka has not acknowledged; whether it does."""
        if self.detour is None or isinstance(why, TooLarge):
            return False
        try:
            self.detour.take(queued.record, why, queued.delivery)
        except SpoolError as exc:
            logger.error("%s: %s", queued.what, exc)  # noqa: TRY400 - no bug of ours
            return False
        self._settle(queued)
        return True

    def _refuse(self, queued: _Queued, error: PublishError, attempt: int) -> None:
        """Have a thread of our own send it again, one for all, so that they keep their order; or give it up."""
        if _final(error) or attempt > queued.retries.most or not self._keep(queued, attempt):
            if not self._spool(queued, error):
                self._give_up(queued, error)
            self._settle(queued)

    def _keep(self, queued: _Queued, attempt: int) -> bool:
        if self._pid != os.getpid():  # what is there belongs to the process that forked us: it sends it itself
            self._guard, self._sending, self._pid = threading.Lock(), False, os.getpid()
            self._refused.clear()
        with self._guard:
            if len(self._refused) >= KEPT:
                return False
            queued.attempt = attempt
            self._refused.append(queued)
            if not self._sending:
                self._sending = True
                threading.Thread(target=self._send_again, name="celery-kafka-again", daemon=True).start()
        return True

    def _send_again(self) -> None:
        while True:
            with self._guard:
                if not self._refused:
                    self._sending = False
                    return
                queued = self._refused.popleft()
            try:
                self._insist(queued.record, queued.what, self._timeout_s, queued.retries, queued.attempt)
            except PublishError as exc:
                self._give_up(queued, exc)
            finally:
                self._settle(queued)

    def _give_up(self, queued: _Queued, error: PublishError) -> None:
        self.lost += 1
        logger.error("%s is lost: %s", queued.what, error)


def _final(error: PublishError) -> bool:
    """Whether trying again is in vain. An unknown topic may be one that a broker in its first seconds has not read of."""
    return isinstance(error, (TooLarge, Refused)) and not isinstance(error, NoSuchTopic)
