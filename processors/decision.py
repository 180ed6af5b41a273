"""How a chord is decided: a state machine over the records of one partition of the chords' topic.

Pure: records with their offsets go in (`Ledger.apply`), actions come out (`Ledger.due`). No I/O, no
clock. `chords` is the process around it; tests/property/test_chord_protocol.py is the proof.

**The protocol.** A partition is both input and state store. Kafka's consumer group gives it one
owner, mostly: after a pause or a partition of the network two processes may believe that they own
it. An *owner* here is one process in one assignment; a later assignment is another owner.

1. An owner reads its partition from the start, and acts on nothing before it has read up to the
   end as it was when it got the partition.
2. A chord is *complete* when it is declared and sized and has a part of every member: of ``size``
   plus every extension's delta distinct (task id, index). The set is counted, never the values.
   Of two parts of one member a success beats a failure, then the greater order key wins.
   A chord that is declared and not complete may be *ended*: by the first `Cancelled` that is read, or by its
   deadline. Complete beats ended: who was away looks at what came meanwhile first.
3. The owner of a complete or ended chord appends `Decided` (after its `Chosen` slices, if it is large): the
   outcome, the parts, and the run of the body. Then it reads on until it sees a `Decided`.
   **The first by offset is the decision, for everybody and for ever.** Nothing that comes later
   changes it.
4. Only the author of the first `Decided` sends the body: a zombie, or whoever it overtook, reads
   that it lost. It sends the parts that the decision names, with the task id and the run that the
   decision names.
5. Then it appends `Fired`, and when it reads that, tombstones for the parts and all else that has served.
   What stays is what it takes to explain the chord and to send its body again: the declaration, the first
   `Decided` (and its `Chosen`), `Fired`, and what operators asked. A part that comes later is tombstoned as well.
6. An owner that finds a decision of another owner and no `Fired` takes over: at once if it was
   there before it had the partition; after `TAKE_OVER_AFTER_MS` if it appeared later (a zombie's
   decision can be first, and the zombie die before it sends). It looks for the body's events of
   that run in the log of the tasks, sends if there are none, and goes on at 5.
7. The remaining records are tombstoned after the log's retention: `Fired` last, for it alone is harmless,
   and a decision without it means: send.
8. Of a fired chord every `Resent` that is not marked done is carried out by whoever owns the partition: the
   body is sent with what the decision names, unless its events of that run are in the log; then the same
   record is written once more, as done. The run follows from the broker's time of the request, so whoever
   carries it out sends the same.

**Invariants.**

* A body is not sent before its chord is complete, and is sent at least once after that.
* It is sent exactly once unless an owner dies or is overtaken between sending and `Fired`.
* Every sending of one chord has the same task id, run and parts.
* An owner never appends two decisions for one chord: if it cannot know whether its append
  arrived, it drops everything and starts again as a new owner. (Two under one key, and compaction
  would keep the second, behind somebody else's.)
* A record that a decision names is not tombstoned before `Fired` is in the log.
* When a finished chord's records have been compacted, no part is left; after the retention nothing.
* A chord that is decided hears no `Cancelled` and no deadline, in whatever order they came.

**Failure.** As in Celery, a chord with a failed member fails when *all* members are in, and says
so of the first failed one in header order. (Celery's Redis backend counts every part, then joins.)
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import msgspec

from celery_kafka_backend import chord_records as records
from celery_kafka_backend.chord_records import (
    Cancelled,
    Choice,
    Chosen,
    Decided,
    Declared,
    Extended,
    Fired,
    Gone,
    Part,
    Record,
    Resent,
    Sized,
)
from celery_kafka_backend.order import run_at
from celery_kafka_backend.processors.chord_state import (
    DONE,
    NO_EXTENSIONS,
    NO_KEYS,
    NO_MEMBERS,
    NO_SLICES,
    Candidate,
    Chord,
    Ended,
    Id,
    slices_of,
    stays,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

TAKE_OVER_AFTER_MS: Final = 30_000
"""Another owner's decision that stays without `Fired` for this long is carried out by us."""

ABANDON_FACTOR: Final = 4
"""A declared chord is given up after this many retention times without any record."""

# -- actions -----------------------------------------------------------------------------------


class Append(NamedTuple):
    """Append these, in this order. If it is not certain that all arrived, drop the ledger."""

    records: tuple[Record, ...]


class Fire(NamedTuple):
    """Carry a decision out: send the body (or fail it), then append `Fired`.

    Attributes:
        decided: The decision.
        parts: Its members, in the order in which the body gets them; `Choice.offset` is where the
            record is *now*.
        declared: Offset of the declaration.
        look_first: It is another owner's decision: it may have been carried out.
        since_ms: The broker's time of the decision: nothing was sent before.
    """

    decided: Decided
    parts: tuple[Choice, ...]
    declared: int
    look_first: bool
    since_ms: int


class Forget(NamedTuple):
    """Append tombstones for these record keys, in this order; losing some is harmless."""

    keys: tuple[bytes, ...]


class Resend(NamedTuple):
    """Send the body of a fired chord again, then append the request once more, as done.

    Attributes:
        request: What was asked.
        at_ms: The broker's time of it: its run, and since when to look for it.
        wanted: Record keys and offsets of declaration, decision and its slices, as far as they are there.
    """

    request: Resent
    at_ms: int
    wanted: dict[bytes, int]


Action: TypeAlias = Append | Fire | Forget | Resend


class Ledger:
    """One owner's state of one partition.

    The host applies every record in order of offset. After it has called `caught_up`, it asks for
    what is `due` after each batch, and now and then for what is to be `swept`.

    Args:
        owner: Unique per process *and* assignment.
        retention_ms: How long `Decided` and `Fired` stay.
        slice_size: A decision with more members than this is written in slices of so many.
    """

    def __init__(self, owner: str, retention_ms: int, slice_size: int = records.CHUNK) -> None:
        self.owner = owner
        self.slice_size = slice_size
        self.retention_ms = retention_ms
        self._chords: dict[Id, Chord] = {}
        self._touched: set[Id] = set()
        self._waiting: set[Id] = set()
        self._deadlines: list[tuple[int, Id]] = []
        """A heap, which may name chords that are decided by now."""
        self._asked: dict[bytes, tuple[Resent, int]] = {}
        """Requests to send a body again that are not done, with the broker's time, by record key."""
        self._resending: set[bytes] = set()
        self._live = False

    def __len__(self) -> int:
        return len(self._chords)

    def undecided(self) -> int:
        """Return how many chords are declared and not decided."""
        return sum(
            chord.body_task_id is not None and chord.first is None and chord.fired_at is None
            for chord in self._chords.values()
        )

    # -- what the log says -----------------------------------------------------------------------

    def apply(self, record: Record | Gone, offset: int, at_ms: int) -> None:
        """Take note of a record.

        Args:
            record: It, or what a tombstone removes.
            offset: Its offset; greater than every earlier one.
            at_ms: The broker's time of it, ms since 1970.
        """
        if isinstance(record, Gone):
            self._remove(record)
            return
        id_ = (record.group, record.generation)
        chord = self._chords.get(id_)
        if chord is None:
            chord = self._chords[id_] = Chord()
        chord.live[records.key_of(record)] = offset
        chord.seen_ms = max(chord.seen_ms, at_ms)
        self._touched.add(id_)
        if isinstance(record, Resent):
            self._ask(record, at_ms)
        elif chord.fired_at is None:  # else late: all there is to do is to forget it
            self._note(id_, chord, record, offset, at_ms)

    def _ask(self, request: Resent, at_ms: int) -> None:
        key = records.key_of(request)
        if request.done:
            self._asked.pop(key, None)
            self._resending.discard(key)
        else:
            self._asked[key] = request, at_ms

    def _note(self, id_: Id, chord: Chord, record: Record, offset: int, at_ms: int) -> None:
        match record:
            case Declared():
                chord.body_task_id, chord.deadline = record.body_task_id, record.deadline
                if record.deadline is not None:
                    heappush(self._deadlines, (record.deadline, id_))
            case Sized():
                chord.size = record.size
            case Extended():
                chord.extended[record.task] = (record.delta, offset)
            case Part():
                self._part(chord, record, offset)
            case Chosen():
                chord.slices[record.owner, record.n] = record.parts
            case Decided():
                if chord.first is None:
                    chord.first, chord.first_at = record, at_ms
                    chord.doing.inherited = not self._live
            case Fired():
                chord.fired_at = at_ms
            case Cancelled():
                chord.cancelled = chord.cancelled or record

    def _part(self, chord: Chord, part: Part, offset: int) -> None:
        if chord.first is not None:
            return  # frozen
        member = (part.task, part.index)
        candidate = Candidate(part.succeeded, part.key, part.id, offset)
        best = chord.members.get(member)
        if best is None or candidate > best:
            chord.members[member] = candidate

    def _remove(self, gone: Gone) -> None:
        key = gone.key
        id_ = (key.group, key.generation)
        chord = self._chords.get(id_)
        if chord is None:
            return
        raw = records.make_key(key.group, key.generation, key.kind, *key.rest)
        chord.live.pop(raw, None)
        self._asked.pop(raw, None)
        if raw in chord.forgetting:
            assert isinstance(chord.forgetting, set)
            chord.forgetting.discard(raw)
        if chord.fired_at is None:
            self._retract(chord, key)
        elif key.kind == records.FIRED:
            # Its time is over; what came late is swept as a chord that nobody declared.
            late = self._chords[id_] = Chord()
            late.live, late.seen_ms = chord.live, chord.seen_ms
            chord = late
        elif not chord.forgetting:
            # Emptied, they would keep the room that they once took.
            chord.forgetting, chord.live = NO_KEYS, dict(chord.live)
        if not chord.live:
            del self._chords[id_]
            self._touched.discard(id_)
            self._waiting.discard(id_)

    @staticmethod
    def _retract(chord: Chord, key: records.Key) -> None:
        match key.kind, key.rest:
            case records.DECLARED, _:
                chord.body_task_id = None
            case records.SIZED, _:
                chord.size = None
            case records.CANCELLED, (request_id,):
                if chord.cancelled is not None and chord.cancelled.id == request_id:
                    chord.cancelled = None
            case records.EXTENDED, (task,):
                chord.extended.pop(task, None)
            case records.PART, (task, index, event_id):
                member = (task, None if index == "-" else int(index))
                if member in chord.members and chord.members[member].id == event_id:
                    del chord.members[member]
            case records.CHOSEN, (owner, n):
                chord.slices.pop((owner, int(n)), None)
            case records.DECIDED, (owner,):
                if chord.first is not None and chord.first.owner == owner:
                    chord.first = None

    # -- what is to be done ----------------------------------------------------------------------

    def caught_up(self) -> None:
        """Say that the log has been read up to the end as it was when the partition was assigned."""
        self._live = True

    def due(self, now_ms: int) -> list[Action]:
        """Return what is to be done now, each thing once.

        Args:
            now_ms: This process's wall clock, ms since 1970.
        """
        if not self._live:
            return []
        actions: list[Action] = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            self._touched.add(heappop(self._deadlines)[1])
        looked_at, self._touched = self._touched | self._waiting, set()
        for id_ in sorted(looked_at):
            chord = self._chords.get(id_)
            if chord is None:
                continue
            action = self._next(id_, chord, now_ms)
            if action is not None:
                actions.append(action)
        return actions + self._resends() if self._asked else actions

    def _resends(self) -> list[Action]:
        found: list[Action] = []
        for key, (request, at_ms) in self._asked.items():
            chord = self._chords[request.group, request.generation]
            if chord.fired_at is not None and key not in self._resending:
                self._resending.add(key)
                needed = (records.make_key(request.group, request.generation, records.DECLARED), chord.keep)
                slices = slices_of(chord.keep)
                wanted = {one: at for one, at in chord.live.items() if one in needed or one.startswith(slices)}
                found.append(Resend(request, at_ms, wanted))
        return found

    def _next(self, id_: Id, chord: Chord, now_ms: int) -> Action | None:
        doing = chord.doing
        if chord.fired_at is not None:
            self._waiting.discard(id_)
            return self._clean(chord)
        if chord.first is None:
            ended = None if chord.complete else chord.ended(now_ms)
            if doing.deciding or not (chord.complete or ended):
                return None
            doing.deciding = True
            return Append(self._decide(id_, chord, ended, now_ms))
        if doing.firing:
            return None
        ours = chord.first.owner == self.owner
        if not ours and not doing.inherited:
            doing.overtaken_at = doing.overtaken_at or now_ms
            if now_ms - doing.overtaken_at < TAKE_OVER_AFTER_MS:
                self._waiting.add(id_)
                return None
        declared = chord.live.get(records.make_key(*id_, records.DECLARED))
        if declared is None:
            return None  # somebody removed it; nothing can be sent
        self._waiting.discard(id_)
        doing.firing = True
        parts = self._chosen(id_, chord, chord.first)
        return Fire(chord.first, parts, declared, look_first=not ours, since_ms=chord.first_at)

    def _decide(self, id_: Id, chord: Chord, ended: Ended | None, now_ms: int) -> tuple[Record, ...]:
        group, generation = id_
        ordered = chord.ordered()
        if ended is not None and ended.fire:
            ordered = [(member, best) for member, best in ordered if best.succeeded]
        parts = tuple(Choice(task, index, best.id, best.offset) for (task, index), best in ordered)
        failed = next((task for (task, _), best in ordered if not best.succeeded), None)
        last = max(range(len(parts)), key=lambda i: parts[i].offset, default=0)
        slices: list[Record] = []
        if len(parts) > self.slice_size:
            slices = [
                Chosen(
                    group=group,
                    generation=generation,
                    owner=self.owner,
                    n=n,
                    parts=parts[start : start + self.slice_size],
                )
                for n, start in enumerate(range(0, len(parts), self.slice_size))
            ]
        decided = Decided(
            group=group,
            generation=generation,
            owner=self.owner,
            outcome=records.SUCCESS if (failed is None if ended is None else ended.fire) else records.FAILURE,
            body_task_id=chord.body_task_id or "",
            body_run=run_at(now_ms),
            parts=() if slices else parts,
            slices=len(slices),
            size=len(parts),
            last=last,
            failed=failed if ended is None else None,
            why=ended.why if ended is not None else "",
            at=now_ms,
        )
        return (*slices, decided)

    def _chosen(self, id_: Id, chord: Chord, decided: Decided) -> tuple[Choice, ...]:
        """Return a decision's members, each with the offset at which its record stands now."""
        parts: Iterable[Choice] = decided.parts
        if decided.slices:
            parts = [choice for n in range(decided.slices) for choice in chord.slices.get((decided.owner, n), ())]

        def now_at(choice: Choice) -> Choice:
            # A re-sent part has the same key, so compaction may have removed the one that was chosen.
            offset = chord.live.get(records.part_key(*id_, choice.task, choice.index, choice.id), choice.offset)
            return choice if offset == choice.offset else msgspec.structs.replace(choice, offset=offset)

        return tuple(now_at(choice) for choice in parts)

    @staticmethod
    def _clean(chord: Chord) -> Action | None:
        """The parts have served, and all else that neither explains the chord nor sends its body again."""
        if chord.first is not None:
            chord.keep = records.key_of(chord.first)
            chord.first = None
        # Finished chords are most of the memory, until the retention is over.
        chord.members, chord.slices, chord.extended, chord.doing = NO_MEMBERS, NO_SLICES, NO_EXTENSIONS, DONE
        unwanted = [key for key in chord.live if not stays(key, chord.keep)]
        if not unwanted:
            chord.forgetting = NO_KEYS
            return None
        keys = tuple(key for key in unwanted if key not in chord.forgetting)
        chord.forgetting = {*chord.forgetting, *keys}
        return Forget(keys) if keys else None

    def sweep(self, now_ms: int) -> list[Action]:
        """Return the tombstones that are due by time alone, and those that never arrived."""
        if not self._live:
            return []
        actions: list[Action] = []
        for id_, chord in self._chords.items():
            chord.forgetting = NO_KEYS
            action = self._expire(id_, chord) if self._is_over(chord, now_ms) else None
            if action is None and chord.fired_at is not None:
                action = self._clean(chord)
            if action is not None:
                actions.append(action)
        return actions

    def _is_over(self, chord: Chord, now_ms: int) -> bool:
        if chord.fired_at is not None:
            return now_ms - chord.fired_at >= self.retention_ms
        if chord.first is not None and chord.body_task_id is not None:
            return False  # to be carried out, however late
        patience = ABANDON_FACTOR if chord.body_task_id is not None else 1
        return now_ms - chord.seen_ms >= self.retention_ms * patience

    def _expire(self, id_: Id, chord: Chord) -> Action:
        # `Fired` last: alone it is harmless, a decision alone would be carried out again.
        fired = records.make_key(*id_, records.FIRED)
        keys = tuple(sorted(chord.live, key=lambda key: key == fired))
        chord.forgetting = set(keys)
        return Forget(keys)

    # -- what the host asks ----------------------------------------------------------------------

    def is_open(self, decided: Decided) -> bool:
        """Return whether a decision still waits to be carried out, as far as this owner has read."""
        chord = self._chords.get((decided.group, decided.generation))
        if chord is None or chord.fired_at is not None or chord.first is None:
            return False
        return chord.first.owner == decided.owner

    def has_fired(self, group: str, generation: int) -> bool:
        """Return whether nothing is left to do for a chord."""
        chord = self._chords.get((group, generation))
        return chord is not None and chord.fired_at is not None

    def is_asked(self, request: Resent) -> bool:
        """Return whether a body still waits to be sent again, as far as this owner has read."""
        return records.key_of(request) in self._asked
