"""From the spool into Kafka: in order, removed when acknowledged, by one process of the host at a time."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from celery_kafka_backend import threads
from celery_kafka_backend.codec import HEADER_GROUP
from celery_kafka_backend.errors import NotAcknowledged, PublishError, SpoolError, TooLarge
from celery_kafka_backend.producer.courier import VERDICT_S
from celery_kafka_backend.producer.salvage import adopt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from celery_kafka_backend.producer.detour import Detour
    from celery_kafka_backend.producer.publisher import Delivery, Publisher
    from celery_kafka_backend.producer.spool import Spool, Spooled

logger = logging.getLogger(__name__)

BATCH_S: Final = 30.0
"""What a batch waits for its acknowledgements: one partition without a leader must not hold up the others for longer."""
LOOK_EVERY_S: Final = 1.0
"""How often a worker looks whether one of its children has spooled something."""
COMPLAIN_EVERY_S: Final = 60.0


class Drained(NamedTuple):
    """What a pass over the spool did.

    Attributes:
        sent: Records acknowledged, and removed from the spool.
        aside: Records set aside: Kafka will never take them.
        why: Why others are still there; None if there are none.
    """

    sent: int
    aside: int
    why: PublishError | None


def drain(
    spool: Spool,
    publisher: Publisher,
    wait_s: float,
    answered: Callable[[PublishError | None], None] | None = None,
) -> Drained:
    """Publish what is in the spool, oldest first, and remove what is acknowledged; for whoever holds `Spool.claim`.

    A crash in between publishes some records twice, as the same events. A record whose partition does not answer does
    not hold up the others; a batch of which nothing is acknowledged ends the pass.

    Args:
        spool: From where.
        publisher: Where to.
        wait_s: What a batch waits for its acknowledgements.
        answered: Told of each answer.

    Raises:
        SpoolError: The spool cannot be used.
    """
    for file in spool.retired():
        count, whole = adopt(spool, file)
        logger.warning("%d records taken over from %s%s", count, file, "" if whole else "; the rest cannot be read")
    sent = aside = after = 0
    why: PublishError | None = None
    while batch := spool.oldest(after):
        outcome = _publish(batch, publisher, wait_s, answered)
        done = [seq for seq, error in outcome.items() if error is None]
        spool.remove(done)
        for seq, error in outcome.items():
            if isinstance(error, TooLarge):
                spool.set_aside(seq, str(error))
                aside += 1
            elif error is not None:
                why = error
        sent += len(done)
        after = batch[-1].seq
        if why is not None and not done:
            break
    return Drained(sent, aside, why)


def _publish(
    batch: Sequence[Spooled],
    publisher: Publisher,
    wait_s: float,
    answered: Callable[[PublishError | None], None] | None,
) -> dict[int, PublishError | None]:
    """Publish the chords' parts, then the events: none overtakes the part of its task."""
    outcome = _acknowledged([one for one in batch if one.record.group], publisher, wait_s, answered)
    late = {one.record.group.encode(): error for one in batch if (error := outcome.get(one.seq)) is not None}
    events = []
    for one in batch:
        if not one.record.group:
            error = late.get(dict(one.record.headers).get(HEADER_GROUP, b""))
            if error is None:
                events.append(one)
            else:
                outcome[one.seq] = NotAcknowledged(str(error))  # not this one's fault, even if that was too large
    return outcome | _acknowledged(events, publisher, wait_s, answered)


def _acknowledged(
    rows: Sequence[Spooled], publisher: Publisher, wait_s: float, answered: Callable[[PublishError | None], None] | None
) -> dict[int, PublishError | None]:
    deadline = time.monotonic() + wait_s
    outcome: dict[int, PublishError | None] = {}
    deliveries: list[tuple[int, Delivery]] = []
    for one in rows:
        try:
            left_s = max(deadline - time.monotonic(), 0)
            deliveries.append((one.seq, publisher.publish(one.record, wait_s=left_s, then=answered)))
        except PublishError as exc:
            outcome[one.seq] = exc
            if isinstance(exc, NotAcknowledged):
                break  # no room, or no answer at all: the rest waits for the next pass
    for seq, delivery in deliveries:
        try:
            delivery.wait(max(deadline - time.monotonic(), 0))
        except PublishError as exc:
            outcome[seq] = exc
        else:
            outcome[seq] = None
    return outcome


class Drainer:
    """Drains the host's spool from a thread of a worker's main process, which outlives its children.

    Args:
        detour: The process's.
        publisher: The process's.
    """

    def __init__(self, detour: Detour, publisher: Publisher) -> None:
        self._detour = detour
        self._publisher = publisher
        self._complained_at = 0.0

    def start(self) -> None:
        """Start; it ends with the process."""
        threads.start(self._run, "celery-kafka-drain")

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_EVERY_S)
            try:
                self._look()
            except SpoolError as exc:
                self._complain("%s", exc)
            except Exception:  # noqa: BLE001 - said in the log; nobody else drains while this worker lives
                self._complain("draining %s failed; it is tried again", self._detour.spool.path, exc_info=True)

    def _look(self) -> None:
        spool = self._detour.spool
        if spool.empty():
            return
        with spool.claim() as mine:
            if not mine:
                return
            # What librdkafka has it sends the moment that Kafka is back; what is published again meanwhile arrives twice,
            # as the same event.
            wait_s = min(self._publisher.settings.delivery_timeout_s, BATCH_S) + VERDICT_S
            found = drain(spool, self._publisher, wait_s, self._detour.answered)
        if found.sent:
            logger.warning("%d records drained from %s", found.sent, spool.path)
        if found.aside:
            logger.error("%d records of %s set aside, Kafka will never take them: `celery -A proj pipeline spool status`",
                         found.aside, spool.path)  # fmt: skip
        if found.why is not None:
            self._complain("the spool %s cannot be drained yet: %s", spool.path, found.why)

    def _complain(self, text: str, *arguments: object, exc_info: bool = False) -> None:
        now = time.monotonic()
        if now >= self._complained_at:
            self._complained_at = now + COMPLAIN_EVERY_S
            logger.warning(text, *arguments, exc_info=exc_info)
