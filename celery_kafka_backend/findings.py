"""What an audit finds by itself: tasks and chords whose events, taken together, cannot be all there was. Pure.

Fed with events in any order. What is known is what was recorded: where ``sent`` or ``received`` events are switched
off, or lie before the first event that was read, less is found, and nothing that is not so.
"""

from __future__ import annotations

from sys import intern
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from celery_kafka_backend import codec, events, order
from celery_kafka_backend.chord_records import Decided, Declared, Extended, Fired, Gone, Part, Sized
from celery_kafka_backend.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery_kafka_backend.chord_records import Record
    from celery_kafka_backend.events import Event

UNFINISHED: Final = "unfinished"
WORKER_GONE: Final = "worker-gone"
PURGED: Final = "purged"
TWO_RESULTS: Final = "two-results"
LATE_STATE: Final = "late-state"
STUCK_CHORD: Final = "stuck-chord"
CLOCK_SKEW: Final = "clock-skew"

KINDS: Final = {
    UNFINISHED: "sent, and within the bound neither ended nor heard of",
    WORKER_GONE: "started on a worker that restarted or fell silent, and never ended",
    PURGED: "sent and never received, though its queue went on: purged, or lost by the broker",
    TWO_RESULTS: "two successes of one run with different results",
    LATE_STATE: "a state after the end of its run",
    STUCK_CHORD: "a chord that was not fired, and of which nothing was heard within the bound",
    CLOCK_SKEW: "a host whose clock is wrong",
}
"""What each kind of finding means."""

SKEW_MS: Final = 2_000
"""A clock that differs by less is nothing to talk about."""
AHEAD_OF_QUEUE_MS: Final = 60_000
"""A queue has gone on if it delivered a task that was sent so much later."""

_ENDS: Final = frozenset(
    {events.SUCCESS, events.FAILURE, events.WORKER_LOST, events.REVOKED, events.EXPIRED, events.UNKNOWN_TASK}
)
_LATE: Final = frozenset(
    {events.STARTED, events.STATE, events.RETRY, events.FAILURE, events.WORKER_LOST, events.REVOKED, events.EXPIRED}
)
_STATES_THAT_END: Final = frozenset({"IGNORED", "REJECTED"})


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that somebody should look at.

    Attributes:
        kind: One of `KINDS`.
        at: When it happened, or was heard of last; ms since 1970.
        task: Id of the task (of a chord its body), "" where it is about a host.
        name: The task's name.
        detail: What is the matter, in words.
        events: Ids of the events that say so.
        group: Id of the chord's header.
        worker: Node name.
        host: Host name.
        queue: Queue.
    """

    kind: str
    at: int
    task: str = ""
    name: str = ""
    detail: str = ""
    events: tuple[str, ...] = ()
    group: str = ""
    worker: str = ""
    host: str = ""
    queue: str = ""


class _Said(NamedTuple):
    """An event, as far as it matters here."""

    hlc: int
    id: str
    what: str = ""
    worker: str = ""


class _Run:
    """What is known of one run of a task. Slots: there is one for every task of the time that is looked at."""

    __slots__ = (
        "due",
        "end",
        "last",
        "late",
        "name",
        "parent",
        "queue",
        "received",
        "sent",
        "started",
        "successes",
    )

    def __init__(self) -> None:
        self.name = self.queue = ""
        self.sent = 0
        self.received = False
        self.due = 0
        self.parent = (0, 0)
        """When its latest parent received it, and that one's pid."""
        self.started: _Said | None = None
        self.last: _Said = _Said(0, "")
        self.end: _Said | None = None
        self.late: _Said | None = None
        self.successes: tuple[tuple[_Said, int], ...] = ()
        """The first with each result, and a hash of that."""


class _Worker:
    """A node: when it was last heard of, and the latest process that received for it."""

    __slots__ = ("parent", "seen")

    def __init__(self) -> None:
        self.seen = 0
        self.parent = (0, 0)
        """When, and pid."""


class Tasks:
    """Looks at tasks. Keeps about 1,300 bytes for each that was heard of, until it is settled.

    Args:
        ignored_are_recorded: Whether tasks whose result is ignored say when they end.
    """

    def __init__(self, *, ignored_are_recorded: bool = True) -> None:
        self._ignored = ignored_are_recorded
        self._runs: dict[tuple[str, int | None], _Run] = {}
        self._open: list[tuple[str, _Run]] = []
        self._workers: dict[str, _Worker] = {}
        self._delivered: dict[str, int] = {}
        """By queue: when the latest task that a worker got from it had been sent."""

    def take(self, event: Event) -> None:
        """Take note of an event."""
        if event.kind in events.GROUP_KINDS or event.imported is not None:
            return  # an import tells of no time that was looked at
        if event.worker and event.role in (events.PARENT, events.CHILD):
            self._note_worker(event)
        if event.run is None and event.kind == events.REVOKED:
            return  # a worker that never had the task
        if event.ignored and not self._ignored:
            return
        run = self._runs.setdefault((event.task, event.run), _Run())
        run.name, run.queue = run.name or intern(event.name or ""), run.queue or intern(event.queue or "")
        sent = event.sent_at or (event.at if event.kind == events.SENT else 0)
        run.sent = min(run.sent or sent, sent or run.sent)
        run.due = max(run.due, event.eta or 0, event.due or 0)
        said = _Said(event.hlc, event.id, intern(event.state or event.kind), intern(event.worker or ""))
        run.last = max(run.last, said)
        if event.received_at or event.started_at or event.kind in (events.RECEIVED, events.STARTED):
            run.received = True
        if event.kind == events.RECEIVED and event.role == events.PARENT:
            run.parent = max(run.parent, (event.hlc, event.pid))
        if event.kind == events.STARTED:
            run.started = max(run.started or said, said)
        self._note_end(run, event, said)

    def _note_worker(self, event: Event) -> None:
        worker = self._workers.setdefault(event.worker or "", _Worker())
        worker.seen = max(worker.seen, event.hlc)
        if event.role == events.PARENT:
            worker.parent = max(worker.parent, (event.hlc, event.pid))

    def _note_end(self, run: _Run, event: Event, said: _Said) -> None:
        kind = event.kind
        if kind == events.SUCCESS:
            result = _result(event)
            known = next((other for other in run.successes if other[1] == result), None)
            if known is None:
                run.successes = (*run.successes, (said, result))
            elif said < known[0]:
                run.successes = tuple((said, result) if other is known else other for other in run.successes)
        ends = kind in _ENDS or (kind == events.REJECTED and not event.requeue) or kind == events.FORGOTTEN
        if ends or (kind == events.STATE and event.state in _STATES_THAT_END):
            # What counts is a success, whatever came before it; else the first end.
            if run.successes:
                run.end = min(run.successes)[0]
            elif run.end is None or said < run.end:
                run.end = said
        if kind in _LATE and order.rank_of_key(event.key) is not order.Rank.GUESSED_REVOKED:
            run.late = max(run.late or said, said)

    def settle(self) -> Iterator[Finding]:
        """Yield what needs no knowledge of other tasks, and forget every task that has ended.

        To be called when all events of these tasks have been taken, which are all of one partition: memory is for the
        tasks of one partition at a time, and for those that are open.
        """
        for (task, _), run in self._runs.items():
            if run.received and run.queue:
                self._delivered[run.queue] = max(self._delivered.get(run.queue, 0), run.sent)
            if len(run.successes) > 1:
                each = [said for said, _ in sorted(run.successes)]
                detail = "on " + ", and on ".join(said.worker or "?" for said in each)
                yield Finding(
                    TWO_RESULTS,
                    each[-1].hlc,
                    task,
                    run.name,
                    detail,
                    tuple(said.id for said in each),
                    worker=each[-1].worker,
                )
            if run.end is None:
                self._open.append((task, run))
            elif run.late is not None and run.late.hlc > run.end.hlc and run.late.id != run.end.id:
                detail = f"{run.late.what} {run.late.hlc - run.end.hlc} ms after {run.end.what}"
                yield Finding(
                    LATE_STATE, run.late.hlc, task, run.name, detail, (run.end.id, run.late.id), worker=run.late.worker
                )
        self._runs = {}

    def findings(self, now_ms: int, bound_ms: int, gone_ms: int) -> Iterator[Finding]:
        """Yield what there is to say of the tasks that are open, once all are settled.

        Args:
            now_ms: As of when, ms since 1970.
            bound_ms: A task may be silent for so long.
            gone_ms: A worker may be silent for so long.
        """
        yield from self.settle()
        for task, run in self._open:
            found = self._of_open(task, run, now_ms, bound_ms, gone_ms)
            if found is not None:
                yield found

    def _of_open(self, task: str, run: _Run, now_ms: int, bound_ms: int, gone_ms: int) -> Finding | None:
        last, started = run.last, run.started
        if max(last.hlc, run.due) > now_ms - gone_ms:
            return None
        if started is not None and last == started and (why := self._gone(run, started, now_ms, gone_ms)):
            return Finding(
                WORKER_GONE, last.hlc, task, run.name, why, (started.id,), worker=started.worker, queue=run.queue
            )
        if max(last.hlc, run.due) > now_ms - bound_ms:
            return None
        if not run.received and run.sent and self._delivered.get(run.queue, 0) > run.sent + AHEAD_OF_QUEUE_MS:
            detail = f"{run.queue} delivered what was sent {(self._delivered[run.queue] - run.sent) // 1000} s later"
            return Finding(PURGED, last.hlc, task, run.name, detail, (last.id,), queue=run.queue)
        detail = f"{last.what}, then nothing for {(now_ms - last.hlc) // 1000} s"
        return Finding(UNFINISHED, last.hlc, task, run.name, detail, (last.id,), worker=last.worker, queue=run.queue)

    def _gone(self, run: _Run, started: _Said, now_ms: int, gone_ms: int) -> str:
        worker = self._workers.get(started.worker)
        if worker is None:
            return ""
        (since, pid), (_, before) = worker.parent, run.parent
        if since > started.hlc and before and pid != before:
            return f"{started.worker} has restarted (pid {before}, now {pid})"
        if worker.seen <= now_ms - gone_ms and self._others_work(worker):
            return f"{started.worker} has been silent for {(now_ms - worker.seen) // 1000} s, while others were not"
        return ""

    def _others_work(self, worker: _Worker) -> bool:
        return any(other.seen > worker.seen + SKEW_MS for other in self._workers.values())


def _result(event: Event) -> int:
    """Return a hash of a success's result: equal for equal bytes, within one process."""
    if event.claim is not None:
        return hash(event.claim.sha256)
    if event.opaque is not None:
        return hash(event.opaque.result or event.opaque.meta)
    try:
        return hash(bytes(codec.native_parts(bytes(event.doc)).result)) if event.doc else 0
    except CodecError:
        return hash(bytes(event.doc))


class Clocks:
    """Looks at hosts' clocks, by when Kafka got what they say they wrote when. Keeps two numbers per host."""

    def __init__(self) -> None:
        self._delays: dict[str, tuple[int, str, int]] = {}

    def take(self, event: Event, written_ms: int) -> None:
        """Take note of an event and of the broker's time of it, ms since 1970."""
        if event.imported is not None or not event.host:
            return
        delay = (written_ms - event.at, event.id, event.at)
        known = self._delays.get(event.host)
        if known is None or delay[0] < known[0]:
            self._delays[event.host] = delay

    def findings(self) -> Iterator[Finding]:
        """Yield the hosts whose events came from the future, or took suspiciously long, every one of them."""
        for host, (delay, event_id, at) in sorted(self._delays.items()):
            if abs(delay) >= SKEW_MS:
                what = "ahead of" if delay < 0 else "behind"
                detail = f"at least {-delay} ms ahead of Kafka" if delay < 0 else f"up to {delay} ms {what} Kafka"
                yield Finding(CLOCK_SKEW, at, detail=detail, events=(event_id,), host=host)


class _Chord:
    __slots__ = ("body", "decided", "declared", "expected", "extended", "fired", "last", "name", "parts")

    def __init__(self) -> None:
        self.body = self.name = ""
        self.declared = self.last = self.extended = 0
        self.expected: int | None = None
        self.decided = self.fired = False
        self.parts: set[tuple[str, int | None]] = set()


class Chords:
    """Looks at chords, fed with the records of their topic. Keeps a set of members for each that is not decided."""

    def __init__(self) -> None:
        self._chords: dict[tuple[str, int], _Chord] = {}

    def take(self, record: Record | Gone, written_ms: int) -> None:
        """Take note of a record and of the broker's time of it, ms since 1970."""
        if isinstance(record, Gone):
            return
        chord = self._chords.setdefault((record.group, record.generation), _Chord())
        chord.last = max(chord.last, written_ms)
        if isinstance(record, Declared):
            chord.body, chord.name, chord.declared = record.body_task_id, record.body_name, written_ms
        elif isinstance(record, Sized):
            chord.expected = record.size
        elif isinstance(record, Extended):
            chord.extended += record.delta
        elif isinstance(record, Part):
            chord.parts.add((record.task, record.index))
        elif isinstance(record, Decided):
            chord.decided = True
            chord.parts.clear()
        elif isinstance(record, Fired):
            chord.fired = True
            chord.parts.clear()

    def findings(self, now_ms: int, bound_ms: int) -> Iterator[Finding]:
        """Yield those of which nothing was heard for so long, though they wait."""
        for (group, _), chord in self._chords.items():
            if chord.fired or not chord.declared or chord.last > now_ms - bound_ms:
                continue
            of = "an unknown number of" if chord.expected is None else str(chord.expected + chord.extended)
            detail = "decided, not fired" if chord.decided else f"{len(chord.parts)} of {of} members are in"
            yield Finding(STUCK_CHORD, chord.last, chord.body, chord.name, detail, group=group)
