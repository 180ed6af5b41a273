"""What a batch of events does to a view, as data: the narrow waist between fold and sinks.

Every operation here is a maximum, a minimum or a union, hence commutative, associative and
idempotent: any order, duplication, batching or number of replays gives the same view.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from celery_kafka_backend import events

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from celery_kafka_backend.events import Event

TASK = "task"
GROUP = "group"


class Side(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Single facts that readers want beside a task's document, merged field by field.

    Attributes:
        run: Greatest run seen, 0 if none is known.
        seen: Greatest HLC seen, ms since 1970.
        sent: Earliest time it was sent, ms since 1970; 0 if unknown. Likewise the next two.
        received: Earliest time a worker got it.
        started: Earliest time it started.
        attempts: Greatest attempt number seen.
        workers: Node names of the workers that had it.
        expires_at: When to drop all this, ms since 1970; 0: never.
    """

    run: int = 0
    seen: int = 0
    sent: int = 0
    received: int = 0
    started: int = 0
    attempts: int = 0
    workers: tuple[str, ...] = ()
    expires_at: int = 0


def _worker(event: Event) -> str | None:
    # A broadcast revoke makes every worker of the fleet write REVOKED without a request: they did not have the task.
    if event.kind == events.REVOKED and event.received_at is None and event.started_at is None:
        return None
    return event.worker


def side_of(event: Event) -> Side:
    """Return what one event adds to its task's side record."""
    worker = _worker(event)
    return Side(
        run=event.run or 0,
        seen=event.hlc,
        sent=event.sent_at or 0,
        received=event.received_at or 0,
        started=event.started_at or 0,
        attempts=event.attempt,
        workers=(worker,) if worker else (),
        expires_at=event.expires_at or 0,
    )


def _earliest(a: int, b: int) -> int:
    return min(a, b) if a and b else a or b


def later_expiry(a: int, b: int) -> int:
    """Return the later of two expiries, ms since 1970, where 0 is never."""
    return max(a, b) if a and b else 0


def merge_sides(a: Side, b: Side) -> Side:
    """Return both records in one."""
    workers = a.workers
    if workers != b.workers:
        workers = tuple(sorted({*workers, *b.workers}))
    return Side(
        run=max(a.run, b.run),
        seen=max(a.seen, b.seen),
        sent=_earliest(a.sent, b.sent),
        received=_earliest(a.received, b.received),
        started=_earliest(a.started, b.started),
        attempts=max(a.attempts, b.attempts),
        workers=workers,
        expires_at=later_expiry(a.expires_at, b.expires_at),
    )


def side_of_all(story: Sequence[Logged]) -> Side:
    """Return what some events, at least one, add to their task's side record: all of `side_of` merged, in a third of the time."""
    first = side_of(story[0].event)
    if len(story) == 1:
        return first
    run, seen, attempts, workers, expires_at = first.run, first.seen, first.attempts, first.workers, first.expires_at
    sent, received, started = first.sent, first.received, first.started
    for event, _ in story[1:]:
        if event.hlc > seen:  # noqa: PLR1730 - a call of max takes longer than all else here; below, too
            seen = event.hlc
        if event.run is not None and event.run > run:
            run = event.run
        if event.attempt > attempts:  # noqa: PLR1730
            attempts = event.attempt
        if (at := event.sent_at) and (at < sent or not sent):
            sent = at
        if (at := event.received_at) and (at < received or not received):
            received = at
        if (at := event.started_at) and (at < started or not started):
            started = at
        if expires_at and (not (at := event.expires_at) or at > expires_at):
            expires_at = at or 0
        if (worker := _worker(event)) and worker not in workers:
            workers = tuple(sorted((*workers, worker)))
    return Side(run, seen, sent, received, started, attempts, workers, expires_at)


def history_expiry(event: Event, retention_ms: int | None) -> int:
    """Return until when an event stays in a history, ms since 1970; 0: for ever.

    By its hybrid logical clock, the time by which a history is in order: the rows that go first are the first ones.

    Args:
        event: The event.
        retention_ms: As ``history_retention_ms`` says: so long after it happened; 0: for ever; None: as long as the
            result that it shows, or would.
    """
    if retention_ms is None:
        return event.expires_at or 0
    return event.hlc + retention_ms if retention_ms else 0


def beats(a: Event, b: Event) -> bool:
    """Return whether ``a`` rather than ``b`` is shown. Both must have a key."""
    return (a.key, a.id) > (b.key, b.id)


class Logged(NamedTuple):
    """An event with the bytes it was read from."""

    event: Event
    value: bytes


class Change(msgspec.Struct, gc=False):
    """Everything one batch says about one task or one saved group.

    Attributes:
        subject: `TASK` or `GROUP`.
        id: The task's or group's id.
        winner: The event that the document shows, if any event of the batch may be shown. Its
            ``key`` guards the write; a tombstone kind means: show nothing.
        side: Merged side record (tasks; None for groups).
        history: Every event of the batch for this subject, in the order read.
        only_history: Nothing but this history is to be written: all else that its events say is over, and leaves no trace.
            Then there is no winner and no side record.
    """

    subject: str
    id: str
    winner: Event | None
    side: Side | None
    history: list[Logged]
    only_history: bool = False

    @property
    def document(self) -> bytes | None:
        """The document to show, or None to show nothing."""
        if self.winner is None or self.winner.kind in events.TOMBSTONES:
            return None
        return self.winner.document

    @property
    def expires_at(self) -> int:
        """Until when the guard must be remembered: as long as any event asks; 0: for ever."""
        if self.side is not None:
            return self.side.expires_at
        spoken = [logged.event for logged in self.history]
        if self.winner is not None:
            spoken.append(self.winner)
        return reduce(later_expiry, (event.expires_at or 0 for event in spoken)) if spoken else 0


class ChordFact(NamedTuple):
    """One fact about a chord, for showing it; of two with one name the greater order stays.

    Attributes:
        group: The chord's group id.
        name: Unique per fact: the record key of ``<prefix>.chords`` without the group.
        order: Non-negative, below 2**63.
        value: A small JSON object, without any task's result.
        expires_at: ms since 1970; 0: never.
    """

    group: str
    name: str
    order: int
    value: bytes
    expires_at: int


class Partition(NamedTuple):
    """A partition of a topic."""

    topic: str
    partition: int


class Batch(msgspec.Struct, gc=False):
    """What a sink writes in one go.

    Attributes:
        changes: At most one per subject and id.
        chords: Facts to show about chords.
        positions: The next offset to read of each partition in the batch. To be stored, never
            backwards, after everything else is durable: readers wait on them.
    """

    changes: Sequence[Change]
    chords: Sequence[ChordFact] = ()
    positions: Mapping[Partition, int] = msgspec.field(default_factory=dict)
