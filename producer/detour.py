"""Around a Kafka that does not answer: into the spool of this host, and back as soon as it does.

One record waits in vain for `Detour.after_s`; from then on records go straight to the spool. One of them at a time is
queued for Kafka as well: the first acknowledgement ends the detour. So that record, and whatever was in librdkafka's
queue, may be in the log twice, as the same event.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Protocol

from celery_kafka_backend.errors import PipelineError, PublishError, SettingsError, SpoolError, TooLarge

if TYPE_CHECKING:
    from celery_kafka_backend.producer.publisher import Publisher, Record
    from celery_kafka_backend.producer.spool import Spool

logger = logging.getLogger(__name__)


class Sent(Protocol):
    """A record on its way to Kafka."""

    @property
    def done(self) -> bool:
        """Whether Kafka has answered."""
        ...


class Detour:
    """Decides, for one process, between Kafka and the spool.

    Args:
        publisher: The process's.
        spool: The host's.
    """

    def __init__(self, publisher: Publisher, spool: Spool) -> None:
        self.spool = spool
        self.after_s = publisher.settings.spool_after_s
        self.spooled = 0
        """Records that this process has spooled."""
        self._publisher = publisher
        self._pid = 0
        self._away = False
        self._probe: Sent | None = None

    @property
    def away(self) -> bool:
        """Whether Kafka is known not to answer."""
        if self._pid != os.getpid():
            self._pid, self._probe, self.spooled = os.getpid(), None, 0
            # A new child need not find out by itself: somebody here has spooled, and nobody could drain it yet.
            self._away = self._others_spool()
        return self._away

    def _others_spool(self) -> bool:
        try:
            return not self.spool.empty()
        except SpoolError:
            return False  # it says so when it is needed

    def carry(self, record: Record) -> None:
        """Return once a record is acknowledged, or on this host's disk.

        Raises:
            TooLarge: Final.
            SpoolError: Kafka did not acknowledge it in time, and the spool cannot take it.
        """
        delivery = None
        why: PipelineError | None = None
        if not self.away:
            until = time.monotonic() + self.after_s
            try:
                delivery = self._publisher.publish(record, wait_s=self.after_s, then=self.answered)
                delivery.wait(max(until - time.monotonic(), 0))
            except TooLarge:
                raise
            except (PublishError, SettingsError) as exc:  # a handle that is to be replaced, and its key file is gone
                why = exc
            else:
                return
        self.take(record, why, delivery)

    def take(self, record: Record, why: PipelineError | None = None, delivery: Sent | None = None) -> None:
        """Spool a record.

        Args:
            record: What.
            why: Kafka did not take it; None if nobody tried, since it is away.
            delivery: It may still take it.

        Raises:
            SpoolError: The spool cannot take it.
        """
        if why is not None and not self.away:
            self._away = True
            logger.warning("%s; results go to the spool %s until Kafka answers", why, self.spool.path)
        if delivery is not None:
            self._probe = delivery
        self.spool.append(record)
        self.spooled += 1
        if self._probe is None or self._probe.done:
            try:
                self._probe = self._publisher.publish(record, then=self.answered)
            except (PublishError, SettingsError):
                self._probe = None  # no room in the queue: the next one

    def answered(self, error: PublishError | None) -> None:
        """Hear what became of a record; called by whichever thread polls."""
        if error is None and self._away:
            self._away = False
            logger.warning("Kafka at %s answers again", self._publisher.settings.bootstrap_servers)
