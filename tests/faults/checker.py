"""What must be true after any faults, as functions of the evidence: no I/O, and nothing of the product's.

Every check has a mutation in `mutations` that it must notice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

READY = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
GET_MARGIN_S = 3.0
POPPED_S = 1.0
"""Beyond its timeout and the time for which its process did not run: what a busy machine may take to wake it."""
SEND_MARGIN_S = 5.0
"""Likewise for a ``delay()``; the queue of the tasks is never hurt."""
CHORD_SEND_S = 35.0
"""A chord's declaration and size are acknowledged: three records of ``publish_timeout_s`` at most."""
SAID_BY_CELERY = ("WorkerLostError: ", "ChordError: ", "Terminated: ")
"""Failures that no task raised, and that are true: its process died, a member failed.

Not among them is what becomes of a result that could not be stored (``BackendStoreError``; Celery's own backend shows
the driver's error): the task's success is lost, though the log of the worker says so.
"""


class Execution(NamedTuple):
    """One execution that came to its end.

    Attributes:
        task: Its id.
        state: SUCCESS or FAILURE.
        value: A short name of what it returned or raised; no two executions have the same.
        ignored: Nothing is to be stored.
        stored: Celery came back from storing it.
        survived: Its process did something else later, so it was not killed in between.
    """

    task: str
    state: str
    value: str
    ignored: bool
    stored: bool
    survived: bool


class Sending(NamedTuple):
    """A call of ``apply_async``."""

    kind: str
    tasks: tuple[str, ...]
    took_s: float
    stalled_s: float
    error: str


class Get(NamedTuple):
    """A call of ``get``; outcome is value, timeout or error."""

    tasks: tuple[str, ...]
    timeout_s: float
    took_s: float
    stalled_s: float
    outcome: str
    values: tuple[str, ...]
    error: str


class Chord(NamedTuple):
    """A chord: its members' ids, and the numbers that its body is to get; applied: the call came back."""

    body: str
    members: tuple[str, ...]
    values: tuple[int, ...]
    applied: bool


class Shown(NamedTuple):
    """A document, at the end or as seen at some time; state None: there is none."""

    state: str | None
    value: str
    key: int


class LogEvent(NamedTuple):
    """A record of the log; state None: it touches no document; ``at``: when it was written, by its producer's clock."""

    id: str
    task: str
    kind: str
    state: str | None
    value: str
    key: int
    partition: int
    offset: int
    at: float = 0.0


class Evidence(NamedTuple):
    """All that is known about a run when it is over.

    Attributes:
        executions: From the tasks' journal.
        began: How often a task began.
        bodies: Numbers that bodies got, by task id.
        sendings: From the clients' journal, as the next two.
        gets: …
        chords: …
        view: What it shows at the end.
        seen: What the watcher saw, in order.
        log: All records; None: this backend has none.
        history: Ids of the events in the view, by task.
        letters: Partition and offset of the dead letters that came from the log.
        exits: What was asked to end: its name, exit code (None: it did not end), seconds.
        stuck: What did not come to rest after everything was healed.
        calm: No fault hit a broker or a chord processor.
        deaths: When a worker's main process was killed.
    """

    executions: tuple[Execution, ...]
    began: Mapping[str, int]
    bodies: Mapping[str, tuple[tuple[int, ...], ...]]
    sendings: tuple[Sending, ...]
    gets: tuple[Get, ...]
    chords: tuple[Chord, ...]
    view: Mapping[str, Shown]
    seen: Mapping[str, tuple[Shown, ...]]
    log: tuple[LogEvent, ...] | None
    history: Mapping[str, frozenset[str]]
    letters: frozenset[tuple[int, int]]
    exits: tuple[tuple[str, int | None, float], ...]
    stuck: tuple[str, ...]
    calm: bool
    deaths: tuple[float, ...] = ()


class Violation(NamedTuple):
    """Something that must not be."""

    check: str
    subject: str
    text: str


def check(evidence: Evidence) -> list[Violation]:
    """Return everything that is wrong."""
    return [Violation(name, *found) for name, one in CHECKS.items() for found in one(evidence)]


NONE = Shown(None, "", 0)


def acknowledged(e: Evidence) -> Iterator[tuple[str, str]]:
    """A result whose storing came back is in the view, with its value."""
    values = _values(e)
    for task, executions in _by_task(e).items():
        stored = [one for one in executions if one.stored and not one.ignored]
        if not stored:
            continue
        shown = e.view.get(task, NONE)
        if shown.state not in READY:
            yield task, f"stored, and the view shows {shown.state}"
        elif any(one.state == "SUCCESS" for one in stored) and (
            shown.state != "SUCCESS" or shown.value not in values[task]
        ):
            yield task, f"a stored success, and the view shows {shown.state} {shown.value}"
    if e.log is not None:
        logged = {(event.task, event.value) for event in e.log if event.state in READY}
        for one in e.executions:
            if one.stored and not one.ignored and (one.task, one.value) not in logged:
                yield one.task, f"stored {one.value}, and no event of the log says so"


def completed(e: Evidence) -> Iterator[tuple[str, str]]:
    """A task that came to its end, in a process that went on, has a result: there was no kill to excuse it."""
    for task, executions in _by_task(e).items():
        if any(one.survived and not one.stored and not one.ignored for one in executions):
            shown = e.view.get(task, NONE)
            if shown.state not in READY:
                yield task, f"it ended in a process that went on, and the view shows {shown.state}"


def ignored(e: Evidence) -> Iterator[tuple[str, str]]:
    """A result that is to be ignored is not in the view."""
    for one in e.executions:
        if one.ignored and e.view.get(one.task, NONE).state in ("SUCCESS", "STARTED"):
            yield one.task, "its result is to be ignored, and the view shows it"


def truthful(e: Evidence) -> Iterator[tuple[str, str]]:
    """What a view shows, and what ``get`` gives, is what an execution of that task returned or raised."""
    values = _values(e)
    for task, shown in e.view.items():
        if shown.state in READY and shown.value not in values[task] and not shown.value.startswith(SAID_BY_CELERY):
            yield task, f"the view shows {shown.state} {shown.value}, which no execution returned"
    for get in e.gets:
        for task, value in zip(get.tasks, get.values, strict=False):
            if value not in values[task] and not value.startswith(SAID_BY_CELERY):
                yield task, f"get() gave {value}, which no execution returned"


def forwards(e: Evidence) -> Iterator[tuple[str, str]]:
    """No view goes backwards: not in the order of events, not from a result to none, not to another success.

    But for one case: of two executions' successes the first by their clocks is shown for good, and it may arrive second.
    """
    for task, states in e.seen.items():
        for before, after in pairwise(states):
            if (
                after.key < before.key
                or (before.state in READY and after.state not in READY)
                or (before.state == "SUCCESS" and after.state != "SUCCESS")
                or (before.state == "SUCCESS" and after.value != before.value and after.key == before.key)
                or (before.state is not None and after.state is None)
            ):
                yield task, f"the view went from {before} to {after}"


def in_time(e: Evidence) -> Iterator[tuple[str, str]]:
    """Every ``get`` ends by its timeout, with a value or a ``TimeoutError``; no ``delay`` is held up or refused."""
    for get in e.gets:
        over_s = get.took_s - get.stalled_s - get.timeout_s
        if over_s > GET_MARGIN_S:
            yield get.tasks[0], f"get(timeout={get.timeout_s:g}) ended {over_s:.1f} s late ({get.outcome})"
        if get.outcome == "error":
            yield get.tasks[0], f"get(timeout={get.timeout_s:g}) raised {get.error}"
    for sending in e.sendings:
        is_chord = sending.kind == "chord"
        took_s = sending.took_s - sending.stalled_s
        if took_s > (CHORD_SEND_S if is_chord else SEND_MARGIN_S):
            yield sending.tasks[0], f"sending a {sending.kind} took {took_s:.1f} s"
        if sending.error and not (is_chord and sending.error.startswith("OperationalError")):
            yield sending.tasks[0], f"sending a {sending.kind} raised {sending.error}"


def nothing_falls_out(e: Evidence) -> Iterator[tuple[str, str]]:
    """Every event of the log is in the view's history or in the dead letters, and the greatest is shown."""
    winners: dict[str, LogEvent] = {}
    for event in e.log or ():
        if (event.partition, event.offset) in e.letters:
            continue
        if event.id not in e.history.get(event.task, frozenset()):
            yield event.task, f"its event {event.kind} at {event.partition}@{event.offset} is nowhere in the view"
        best = winners.get(event.task)
        if event.key and (best is None or (event.key, event.id) > (best.key, best.id)):
            winners[event.task] = event
    for task, event in winners.items():
        shown = e.view.get(task, NONE)
        if (shown.state, shown.value) != (event.state, event.value):
            yield task, f"the view shows {shown}, and the log's greatest event is {event}"


def chords_fire(e: Evidence) -> Iterator[tuple[str, str]]:
    """A chord whose members' ends were all stored has sent its body, or failed it, with the members' values."""
    ends = _by_task(e)
    failures = {event.task for event in e.log or () if event.state == "FAILURE"}
    failures |= {one.task for one in e.executions if one.state == "FAILURE"}
    failures |= {task for task, shown in e.view.items() if shown.state == "FAILURE"}
    for chord in e.chords:
        for got in e.bodies.get(chord.body, ()):
            if got != chord.values:
                yield chord.body, f"its body got {got} instead of {chord.values}"
        complete = all(any(one.stored for one in ends.get(member, ())) for member in chord.members)
        if not (chord.applied and complete) or e.began.get(chord.body):
            continue
        failed = e.view.get(chord.body, NONE).state == "FAILURE" and any(one in failures for one in chord.members)
        if not failed and not _died_with_a_worker(e, chord.body):
            yield chord.body, f"all its members' ends are stored, and its body was not sent: {chord.members}"


def _died_with_a_worker(e: Evidence, task: str) -> bool:
    """Whether a message was sent while a worker's main process was killed.

    kombu takes a message from Redis first and notes that it has it afterwards: who is killed between takes it along.
    """
    sent = [event.at for event in e.log or () if event.task == task and event.kind == "sent"]
    return any(abs(death - at) < POPPED_S for at in sent for death in e.deaths)


def chords_fire_once(e: Evidence) -> Iterator[tuple[str, str]]:
    """A body is sent once, unless a chord processor or its Kafka was hurt."""
    for body, times in body_messages(e).items():
        if times > 1 and e.calm:
            yield body, f"its body was sent {times} times, and nothing had happened to its processor"


def at_rest(e: Evidence) -> Iterator[tuple[str, str]]:
    """When all is healed, all comes to rest; and what is told to end, ends."""
    for what in e.stuck:
        yield "after the faults", what
    for name, code, took_s in e.exits:
        if code is None:
            yield name, f"it did not end within {took_s:.0f} s"
        elif code != 0:
            yield name, f"it ended with exit code {code}"


CHECKS: dict[str, Callable[[Evidence], Iterator[tuple[str, str]]]] = {
    "acknowledged": acknowledged,
    "completed": completed,
    "ignored": ignored,
    "truthful": truthful,
    "forwards": forwards,
    "in time": in_time,
    "nothing falls out": nothing_falls_out,
    "chords fire": chords_fire,
    "chords fire once": chords_fire_once,
    "at rest": at_rest,
}


def body_messages(e: Evidence) -> Counter[str]:
    """How often each body was sent, by the log."""
    bodies = {chord.body for chord in e.chords}
    return Counter(event.task for event in e.log or () if event.kind == "sent" and event.task in bodies)


def figures(e: Evidence) -> dict[str, int]:
    """What was there to be checked, and what is allowed but worth knowing."""
    twice = sum(times > 1 for times in body_messages(e).values())
    ends = _by_task(e)
    return {
        "tasks sent": sum(len(one.tasks) for one in e.sendings),
        "executions": len(e.executions),
        "acknowledged": sum(one.stored and not one.ignored for one in e.executions),
        "executed twice": sum(len(executions) > 1 for executions in ends.values()),
        "not stored, and said so": sum(shown.value.startswith("BackendStoreError") for shown in e.view.values()),
        "chords applied": sum(chord.applied for chord in e.chords),
        "bodies run": sum(bool(e.began.get(chord.body)) for chord in e.chords),
        "bodies sent twice": twice,
        "get: value": sum(get.outcome == "value" for get in e.gets),
        "get: timeout": sum(get.outcome == "timeout" for get in e.gets),
        "changes seen": sum(len(states) for states in e.seen.values()),
        "an earlier success came later": sum(
            (before.state, after.state) == ("SUCCESS", "SUCCESS") and before.value != after.value
            for states in e.seen.values()
            for before, after in pairwise(states)
        ),
        "events": len(e.log or ()),
        "dead letters": len(e.letters),
    }


def _by_task(e: Evidence) -> dict[str, list[Execution]]:
    found: dict[str, list[Execution]] = defaultdict(list)
    for one in e.executions:
        found[one.task].append(one)
    return found


def _values(e: Evidence) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for one in e.executions:
        found[one.task].add(one.value)
    return found
