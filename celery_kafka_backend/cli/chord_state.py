"""What `pipeline chord` knows of a chord: put together from facts and from the log, as plain data. Shown by `chord`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from celery_kafka_backend import chord_records, codec, events
from celery_kafka_backend.chord_records import (
    CANCELLED,
    DECIDED,
    DECLARED,
    EXTENDED,
    FIRED,
    PART,
    RESENT,
    SIZED,
    Chosen,
    Decided,
    Gone,
)
from celery_kafka_backend.errors import CodecError
from celery_kafka_backend.processors import progress
from celery_kafka_backend.processors.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from confluent_kafka import Message

    from celery_kafka_backend.changes import ChordFact
    from celery_kafka_backend.events import Event

WAITING, DECIDED_NOT_FIRED, SENT, FAILED = "waiting", "decided", "sent", "failed"
"""A chord waits for members; is decided, its body not yet sent; its body was sent; it failed, or its body could not be sent."""


class Member(msgspec.Struct, omit_defaults=True):
    """A member that is in.

    Attributes:
        task: Its task id.
        index: Its header index.
        state: Its state; "" where only the decision is left, which does not say.
        at: When it said so, ms since 1970.
        worker: Who had it.
        exception: Of a failed one.
        added_by: The task that added it to the chord.
    """

    task: str
    index: int | None = None
    state: str = ""
    at: int = 0
    worker: str = ""
    exception: str = ""
    added_by: str = ""


class Missing(msgspec.Struct, omit_defaults=True):
    """A member that is not in, as the log saw it last.

    Attributes:
        task: Its task id.
        name: Its task's name.
        index: Its header index.
        seen: What it did then: a kind of event, or a state of its own.
        at: When, ms since 1970.
        who: Where: role, node or host, pid.
        queue: Where it was sent.
        attempt: Retries before this attempt.
    """

    task: str
    name: str = ""
    index: int | None = None
    seen: str = ""
    at: int = 0
    who: str = ""
    queue: str = ""
    attempt: int = 0


class Request(msgspec.Struct, omit_defaults=True):
    """What an operator asked for.

    Attributes:
        what: ``fire``, ``fail`` or ``resend``.
        by: Who.
        reason: Why.
        at: When, ms since 1970.
        done: Of a resend: when it was carried out; 0: not yet.
        outcome: … with ``success`` or ``failure``.
        why: … of a failure.
    """

    what: str
    by: str = ""
    reason: str = ""
    at: int = 0
    done: int = 0
    outcome: str = ""
    why: str = ""


class ChordState(msgspec.Struct):
    """One generation of a chord.

    Attributes:
        group: The group id.
        generation: It.
        state: `WAITING`, `DECIDED_NOT_FIRED`, `SENT` or `FAILED`.
        body: The body's task id.
        body_name: Its task's name.
        declared_at: When it was declared, ms since 1970; 0: no declaration was found.
        declared_by: Where: host and pid.
        deadline: When it fails if it is not complete, ms since 1970.
        expected: How many members it has; None: not known.
        members: Those that are in.
        missing: Those that are not, as far as they left a trace in the log.
        untraced: How many more there are.
        decided_at: When its outcome was decided, ms since 1970.
        decided_by: By which owner.
        outcome: ``success`` or ``failure``.
        failed: Id of the first failed member.
        why: What ended it before it was complete.
        fired_at: When its body was sent or failed.
        fired_by: By which owner.
        found: … who found it sent already.
        requests: What operators asked for.
    """

    group: str
    generation: int
    state: str = WAITING
    body: str = ""
    body_name: str = ""
    declared_at: int = 0
    declared_by: str = ""
    deadline: int | None = None
    expected: int | None = None
    members: list[Member] = []
    missing: list[Missing] = []
    untraced: int = 0
    decided_at: int | None = None
    decided_by: str = ""
    outcome: str = ""
    failed: str | None = None
    why: str = ""
    fired_at: int | None = None
    fired_by: str = ""
    found: bool = False
    requests: list[Request] = []

    @property
    def lacks(self) -> bool:
        """Whether it waits for members."""
        return self.state == WAITING and (self.expected is None or len(self.members) < self.expected)


# -- from facts ------------------------------------------------------------------------------------


def from_facts(group: str, facts: Mapping[str, bytes]) -> list[ChordState]:
    """Return a chord's generations as a view shows them, the earliest first."""
    found: dict[int, list[Progress]] = {}
    for value in facts.values():
        fact = msgspec.json.decode(value, type=Progress)
        found.setdefault(fact.generation, []).append(fact)
    return [_state(group, generation, found[generation]) for generation in sorted(found)]


def _state(group: str, generation: int, facts: list[Progress]) -> ChordState:
    made = ChordState(group, generation)
    size, added = None, {}
    for fact in sorted(facts, key=lambda one: one.at):
        match fact.kind:
            case kind if kind == DECLARED:
                made.body, made.body_name, made.deadline = fact.body or "", fact.name or "", fact.deadline
                made.declared_at, made.declared_by = fact.at, f"{fact.host or '?'} [{fact.pid or '?'}]"
            case kind if kind == SIZED:
                size = fact.size
            case kind if kind == EXTENDED:
                added[fact.task or ""] = fact
            case kind if kind == PART:
                made.members.append(
                    Member(
                        fact.task or "", fact.index, fact.state or "", fact.at, fact.worker or "", fact.exception or ""
                    )
                )
            case kind if kind == DECIDED:
                made.decided_at, made.decided_by, made.outcome = fact.at, fact.owner or "", fact.outcome or ""
                made.failed, made.why, made.body = fact.failed, fact.why or "", fact.body or made.body
                size = size if size is not None or fact.why else fact.size
            case kind if kind == FIRED:
                made.fired_at, made.fired_by, made.found = fact.at, fact.owner or "", fact.found
                made.outcome, made.body = fact.outcome or "", fact.body or made.body
            case kind if kind in (CANCELLED, RESENT):
                made.requests.append(_request(fact))
    for member in made.members:
        if member.task in added:
            member.added_by = added[member.task].by or "?"
    made.expected = None if size is None else size + sum(fact.delta or 1 for fact in added.values())
    made.members.sort(key=lambda one: (one.index is None, one.index or 0, one.at))
    if made.fired_at is not None:
        made.state = SENT if made.outcome == chord_records.SUCCESS else FAILED
    elif made.decided_at is not None:
        made.state = DECIDED_NOT_FIRED
    return made


def _request(fact: Progress) -> Request:
    what = "resend" if fact.kind == RESENT else "fire" if fact.fire else "fail"
    return Request(
        what, fact.by or "", fact.reason or "", fact.at, fact.done or 0, fact.outcome or "", fact.why or ""
    )  # fmt: skip


# -- from the log ----------------------------------------------------------------------------------


class Records:
    """What the chords' topic still has of a chord, fed record by record.

    Args:
        group: The group id.
        as_of: Take no note of what was said later than this, ms since 1970; None: of all.
    """

    def __init__(self, group: str, as_of: int | None = None) -> None:
        self.group = group
        self._as_of = as_of
        self._begins = chord_records.make_key(group, 0, "").split(b"|")[0] + b"|"
        self._facts: dict[bytes, ChordFact] = {}
        self._decided: dict[int, Decided] = {}
        self._chosen: dict[tuple[int, str, int], Chosen] = {}

    def take(self, message: Message) -> bool:
        """Take note of a message; return whether it is about this chord."""
        key = message.key()
        if key is None or not key.startswith(self._begins):
            return False
        try:
            record = chord_records.decode(key, message.value())
        except CodecError:
            return False
        if isinstance(record, Gone):
            if self._as_of is None or message.timestamp()[1] <= self._as_of:
                self._facts.pop(key, None)
            return True
        if self._as_of is not None and not isinstance(record, Chosen) and record.at > self._as_of:
            return True
        if isinstance(record, Decided):
            self._decided.setdefault(record.generation, record)
        if isinstance(record, Chosen):
            self._chosen[record.generation, record.owner, record.n] = record
        for fact in progress.facts(record, message.offset() or 0, 0):
            self._facts[key] = fact
        return True

    def states(self) -> list[ChordState]:
        """Return the chord's generations, the earliest first."""
        best: dict[str, ChordFact] = {}
        for fact in self._facts.values():
            if fact.name not in best or fact.order > best[fact.name].order:
                best[fact.name] = fact
        found = from_facts(self.group, {name: fact.value for name, fact in best.items()})
        for state in found:
            if state.state in (SENT, FAILED):
                self._put_together(state)
        return found

    def _put_together(self, state: ChordState) -> None:
        """Of a finished chord the parts are gone; the decision names its members."""
        decided = self._decided.get(state.generation)
        if decided is None:
            return
        slices = [self._chosen.get((state.generation, decided.owner, n)) for n in range(decided.slices)]
        choices = [*decided.parts, *(choice for one in slices if one is not None for choice in one.parts)]
        known = {member.task for member in state.members}
        state.members += [Member(choice.task, choice.index) for choice in choices if choice.task not in known]


class Trace:
    """Where a chord's members were seen last, fed with records of the log.

    Args:
        group: The group id.
    """

    def __init__(self, group: str) -> None:
        self._group = group.encode()
        self._latest: dict[str, Event] = {}
        self._known: dict[str, tuple[str, int | None, str]] = {}

    def take(self, message: Message) -> None:
        """Take note of a record."""
        if (codec.HEADER_GROUP, self._group) not in (message.headers() or ()):
            return
        try:
            event = codec.decode(message.value())
        except CodecError:
            return
        if event.kind in (events.GROUP_SAVED, events.GROUP_DELETED):
            return
        name, index, queue = self._known.get(event.task, ("", None, ""))
        self._known[event.task] = (
            event.name or name,
            event.index if event.index is not None else index,
            event.queue or queue,
        )
        latest = self._latest.get(event.task)
        if latest is None or (event.hlc, event.id) > (latest.hlc, latest.id):
            self._latest[event.task] = event

    def missing(self, present: Iterable[str]) -> list[Missing]:
        """Return the members that left a trace, but no part."""
        there = set(present)
        found = []
        for task, event in self._latest.items():
            if task not in there:
                name, index, queue = self._known[task]
                what = event.state if event.kind == events.STATE and event.state else event.kind
                who = f"{event.role} {event.worker or event.host} [{event.pid}]"
                found.append(Missing(task, name, index, what, event.hlc, who, queue, event.attempt))
        return sorted(found, key=lambda one: (one.index is None, one.index or 0, one.at))
