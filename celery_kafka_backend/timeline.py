"""What a task's events say together: their causal order, run by run, its state at any moment, and its workflow. Pure.

**Causal order.** Every event carries a hybrid logical clock (`order.Clock`), which is never behind what its process had
seen: sorted by it, causes come before effects. But a reading that is over ten minutes ahead is not believed, so one
host with a wrong clock can date its events after their effects. So what must come first does, whatever the
clocks say: of one attempt, sent before received before started before what came of it (a rejection, revocation or
expiry may come of what was received alone); and a retry before the attempt that it announces. Everything else is by
clock.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from sys import intern
from typing import TYPE_CHECKING, Final, NamedTuple

from celery_kafka_backend import events, order

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from celery_kafka_backend.events import Event

UNKNOWN: Final = "unknown"

_SAID: Final = {
    events.WORKER_LOST: events.FAILURE,
    events.EXPIRED: events.REVOKED,
    events.UNKNOWN_TASK: events.REJECTED,
}
_STAGES: Final = {events.SENT: 0, events.RECEIVED: 1, events.STARTED: 2, events.STATE: 3}
_LAST_STAGE: Final = 4
_OF_RECEIVED: Final = frozenset({events.REJECTED, events.UNKNOWN_TASK, events.REVOKED, events.EXPIRED})
"""What a worker may say of a message that it has not started; another worker may start it later."""
_ENDS: Final = frozenset({events.SUCCESS, events.FAILURE, events.WORKER_LOST, events.REVOKED, events.EXPIRED})


class Run(NamedTuple):
    """One incarnation of a task id.

    Attributes:
        number: Its number, or None if nobody knew one.
        events: Its events, in causal order.
    """

    number: int | None
    events: tuple[Event, ...]


def causal(found: Iterable[Event]) -> list[Event]:
    """Return the events of one task, each once, in causal order, run by run."""
    return [event for run in runs(found) for event in run.events]


def runs(found: Iterable[Event]) -> list[Run]:
    """Return the runs of one task in their order; an event of an unknown run is with the one that it fell into.

    What was imported was before all of them.
    """
    unique = {event.id: event for event in found}.values()
    numbers = sorted({event.run for event in unique if event.run is not None})
    members: dict[int | None, list[Event]] = defaultdict(list)
    for event in unique:
        members[event.run if event.run is not None else _fell_into(event, numbers)].append(event)
    return [Run(number, tuple(_ordered(members[number]))) for number in sorted(members, key=lambda n: n or 0)]


def _fell_into(event: Event, numbers: Sequence[int]) -> int | None:
    if event.imported is not None:
        return None
    begun = [number for number in numbers if order.run_start_ms(number) <= event.hlc]
    return begun[-1] if begun else next(iter(numbers), None)


def _clock(event: Event) -> tuple[int, int, int, str]:
    return (event.hlc, event.attempt, _STAGES.get(event.kind, _LAST_STAGE), event.id)


def _ordered(found: Sequence[Event]) -> Iterator[Event]:
    """Yield a run's events by clock, except where that would put an effect before its cause."""
    by_clock = sorted(found, key=_clock)
    first: dict[tuple[int, int], Event] = {}
    retries: dict[int, list[Event]] = defaultdict(list)
    for event in by_clock:
        if (stage := _STAGES.get(event.kind, _LAST_STAGE)) < _STAGES[events.STATE] and _leads_on(event):
            first.setdefault((event.attempt, stage), event)
        if event.kind == events.RETRY:
            # Its message was the attempt that failed; what it announces is the next one.
            retries[event.attempt + 1].append(event)
    waits: dict[str, int] = {}
    effects: dict[str, list[Event]] = defaultdict(list)
    for event in by_clock:
        causes = _causes(event, first, retries)
        waits[event.id] = len(causes)
        for cause in causes:
            effects[cause.id].append(event)
    ready = [(_clock(event), event) for event in by_clock if not waits[event.id]]
    heapq.heapify(ready)
    while ready:
        _, event = heapq.heappop(ready)
        yield event
        for effect in effects[event.id]:
            waits[effect.id] -= 1
            if not waits[effect.id]:
                heapq.heappush(ready, (_clock(effect), effect))


def _leads_on(event: Event) -> bool:
    """Whether an event can be what an attempt's next stage waits for: not one that may stand anywhere itself."""
    return event.run is not None and (event.kind == events.SENT or event.role in (events.PARENT, events.CHILD))


def _causes(event: Event, first: dict[tuple[int, int], Event], retries: dict[int, list[Event]]) -> list[Event]:
    """Return what must have happened before an event; always of an earlier attempt or stage, so never in a circle."""
    if event.role not in (events.CLIENT, events.PARENT, events.CHILD) or event.run is None:
        return []  # an operator, or a worker without the message: at any time
    if event.kind == events.SENT:
        return [retry for retry in retries[event.attempt] if retry.id != event.id] if event.attempt else []
    if event.kind in (events.FORGOTTEN, *events.GROUP_KINDS) or event.role == events.CLIENT:
        return []
    unstarted = event.kind in _OF_RECEIVED and not event.terminated
    stage = _STAGES[events.STARTED] if unstarted else _STAGES.get(event.kind, _LAST_STAGE)
    # A worker without recorded "received" events has none.
    return [cause for before in range(stage) if (cause := first.get((event.attempt, before))) and cause is not event]


# -- what they say ------------------------------------------------------------------------------


def latest_run(found: Sequence[Event]) -> list[Event]:
    """Return the events of the greatest run, and those that nobody could tell a run of, in the order given.

    What was imported says something only where nothing happened since.
    """
    found = [event for event in found if event.imported is None] or found
    latest = max((event.run for event in found if event.run), default=None)
    return [event for event in found if event.run in (None, latest)]


def winner(run: Sequence[Event]) -> Event | None:
    """Return the event that ended a run: one that its document shows, unless that is an unready one."""
    shown = [event for event in run if event.shows and order.rank_of_key(event.key) is not order.Rank.UNREADY]
    return max(shown, key=lambda event: (event.key, event.id), default=None)


def deciding(found: Sequence[Event]) -> Event | None:
    """Return the event that says how far a task is: the one that ended its latest run, else the last; by `causal`."""
    run = latest_run(found)
    ended = winner(run)
    return ended if ended is not None else run[-1] if run else None


def state(found: Sequence[Event]) -> str:
    """Return how far a task is, in a word: ``unknown``, a kind of event, or a state of the task's own.

    Args:
        found: Its events, by `causal`.
    """
    said = deciding(found)
    if said is None:
        return UNKNOWN
    return (said.state or said.kind) if said.kind == events.STATE else _SAID.get(said.kind, said.kind)


def ended(found: Sequence[Event]) -> bool:
    """Return whether a task's latest run is over."""
    said = deciding(found)
    return said is not None and (said.kind in _ENDS or said.kind in events.TOMBSTONES or said.kind == events.REJECTED)


def as_of(found: Iterable[Event], at_ms: int) -> list[Event]:
    """Return what had happened by a moment, ms since 1970: by the clock that orders events."""
    return [event for event in found if event.hlc <= at_ms]


def wait_s(event: Event) -> float | None:
    """Return how long a task that starts was in the queue: not before its eta, and not before it was sent."""
    started = event.started_at if event.kind == events.STARTED else None
    if started is None or event.sent_at is None:
        return None
    return max(started - max(event.sent_at, event.eta or 0), 0) / 1000


def cause(event: Event) -> str:
    """Return what brought an event about, as far as it says so, in a few words."""
    said = []
    if event.kind == events.SENT:
        if event.attempt:
            said.append(f"retry {event.attempt}")
        if event.beat:
            said.append(f"schedule {event.beat}")
        if event.parent and event.parent != event.task:  # a retry is sent by the attempt before it
            said.append(f"parent {event.parent}")
        if event.root and event.root not in (event.task, event.parent):
            said.append(f"root {event.root}")
        if event.chord:
            said.append(f"member of the chord of {event.chord}")
        elif event.group:
            said.append(f"group {event.group}")
    if event.by:
        said.append(f"by {event.by}")
    if event.kind == events.SENT and event.role == events.OPERATOR:
        said.append("run again")
    if event.signum:
        said.append(f"signal {event.signum}")
    if event.due is not None:
        said.append("again later")
    return ", ".join(said)


# -- a workflow ---------------------------------------------------------------------------------


class Node(NamedTuple):
    """A task within its workflow.

    Attributes:
        task: Its id.
        depth: How far below the first.
        events: Its events, by `causal`.
    """

    task: str
    depth: int
    events: list[Event]


def tree(found: Iterable[Event], top: str) -> list[Node]:
    """Return a task and everything below it, depth first, siblings by when they were first heard of.

    A task whose parent left no event stands right below the first.

    Args:
        found: Events of the workflow's tasks.
        top: Id of the task to begin with.
    """
    lives: dict[str, list[Event]] = defaultdict(list)
    for event in found:
        if event.kind not in events.GROUP_KINDS:
            lives[event.task].append(event)
    below: dict[str, list[str]] = defaultdict(list)
    is_root = any(event.root == top for event in lives[top]) or not lives[top]
    for task in sorted(lives, key=lambda each: min((_clock(one) for one in lives[each]), default=(0, 0, 0, ""))):
        parent = next((event.parent for event in lives[task] if event.parent not in (None, task)), None)
        if task != top and (parent in lives or is_root):
            below[parent if parent is not None and parent in lives else top].append(task)
    return list(_walk(top, 0, below, lives, set()))


def _walk(
    task: str, depth: int, below: dict[str, list[str]], lives: dict[str, list[Event]], seen: set[str]
) -> Iterator[Node]:
    stack = [(task, depth)]
    while stack:
        each, level = stack.pop()
        if each in seen:
            continue
        seen.add(each)
        yield Node(each, level, causal(lives[each]))
        stack += [(child, level + 1) for child in reversed(below[each])]


# -- many tasks ---------------------------------------------------------------------------------


_IMPORTED: Final = -1
"""In place of a run."""


class _Slot:
    """What counts of one run: how it ended, and what was last."""

    __slots__ = ("ended", "last", "name")

    def __init__(self) -> None:
        self.name = ""
        self.ended: tuple[int, str, str] = (0, "", "")
        """Order key, event id, state."""
        self.last: tuple[tuple[int, int, int, str], str] = ((0, 0, 0, ""), UNKNOWN)


class Tally:
    """How many tasks are in which state, as `state` has it, fed with events in any order. Keeps some 1,200 bytes per task."""

    def __init__(self) -> None:
        self._tasks: dict[str, dict[int | None, _Slot]] = {}

    def take(self, event: Event) -> None:
        """Take note of an event."""
        if event.kind in events.GROUP_KINDS:
            return
        slots = self._tasks.setdefault(event.task, {})
        run = event.run if event.imported is None else _IMPORTED
        slot = slots.get(run)
        if slot is None:
            slot = slots[run] = _Slot()
        word = intern(state([event]))
        slot.name = slot.name or intern(event.name or "")
        slot.last = max(slot.last, (_clock(event), word))
        if event.shows and order.rank_of_key(event.key) is not order.Rank.UNREADY:
            slot.ended = max(slot.ended, (event.key, event.id, word))

    def counts(self) -> Counter[tuple[str, str]]:
        """Return the number of tasks by name ("" if unknown) and state."""
        return Counter(_counted(slots) for slots in self._tasks.values())


def _counted(slots: dict[int | None, _Slot]) -> tuple[str, str]:
    happened = [run for run in slots if run != _IMPORTED] or [_IMPORTED]
    latest = max((run for run in happened if run is not None), default=None)
    current = [slots[run] for run in happened if run in (None, latest)]
    name = next((slot.name for slot in slots.values() if slot.name), "")
    key, _, word = max(slot.ended for slot in current)
    return name, word if key else max(slot.last for slot in current)[1]
