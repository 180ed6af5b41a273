"""The chord protocol against everything that may happen to it, in a simulated Kafka.

Real here: records and their bytes (`chord_records`), and every decision (`decision.Ledger`). Simulated:
the log with compaction, owners that crash or live on as zombies, the broker that takes bodies. One
seed is one history; a crash, a pause and a compaction are steps like any other.

Two things are taken for granted, because Kafka promises them: offsets order a partition, and a
tombstone outlives every reader that has not passed it (``delete.retention.ms``, a day).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_kafka_backend import chord_records as records
from celery_kafka_backend.chord_records import (
    Cancelled,
    Chosen,
    Decided,
    Declared,
    Extended,
    Fired,
    Gone,
    Part,
    Resent,
    Sized,
)
from celery_kafka_backend.processors import decision
from celery_kafka_backend.processors.decision import Append, Fire, Forget, Ledger, Resend
from tests.examples import tried_on

RETENTION_MS = 10**9


class Entry(NamedTuple):
    offset: int
    key: bytes
    value: bytes | None
    at: int


class Sent(NamedTuple):
    owner: str
    taken_over: bool
    task: str
    run: int
    outcome: str
    parts: tuple[tuple[str, int | None, str, bytes], ...]


class Log:
    """One compacted partition. `history` never forgets, to check against."""

    def __init__(self):
        self.entries: list[Entry] = []
        self.history: list[Entry] = []
        self.cleaned_to = 0

    @property
    def end(self):
        return len(self.history)

    def append(self, key, value, at):
        entry = Entry(self.end, key, value, at)
        self.entries.append(entry)
        self.history.append(entry)

    def read_from(self, offset):
        return next((entry for entry in self.entries if entry.offset >= offset), None)

    def at(self, offset):
        return next((entry for entry in self.entries if entry.offset == offset), None)

    def live_from(self, key, offset):
        """The last record with this key, if it is not a tombstone."""
        found = [entry for entry in self.entries if entry.key == key and entry.offset >= offset]
        return found[-1] if found and found[-1].value is not None else None

    def compact(self, bound, slowest_reader):
        last = {entry.key: entry.offset for entry in self.entries if entry.offset < bound}
        kept = []
        for entry in self.entries:
            if entry.offset < bound:
                if last[entry.key] != entry.offset:
                    continue
                if entry.value is None and entry.offset < min(self.cleaned_to, slowest_reader):
                    continue
            kept.append(entry)
        self.entries = kept
        self.cleaned_to = max(self.cleaned_to, bound)

    def first_decided(self, id_):
        for entry in self.history:
            if entry.value is not None:
                record = records.decode(entry.key, entry.value)
                if isinstance(record, Decided) and (record.group, record.generation) == id_:
                    return record
        return None


class Owner:
    """A processor with the partition: reads a record, or does the next small piece of what is due."""

    def __init__(self, world, name):
        self.world = world
        self.name = name
        self.ledger = world.ledger_class(name, RETENTION_MS, world.slice_size)
        self.position = 0
        self.must_read_to = world.log.end
        self.not_alone = bool(world.owners)
        self.has_read = []
        self.work = []
        self.sent_unfired = set()

    def step(self, rng):
        """Do one small thing; return whether there was anything to do."""
        choices = []
        if self.world.log.read_from(self.position):
            choices.append(self.read)
        if self.work:
            choices.append(self.act)
        if not choices:
            return self.look()
        rng.choice(choices)()
        if rng.random() < 0.5:
            self.look()
        return True

    def read(self):
        entry = self.world.log.read_from(self.position)
        record = records.decode(entry.key, entry.value)
        self.ledger.apply(record, entry.offset, entry.at)
        self.has_read.append(record)
        self.position = entry.offset + 1

    def look(self):
        if self.position >= self.must_read_to or not self.world.log.read_from(self.position):
            self.ledger.caught_up()
        actions = self.ledger.due(self.world.now)
        for action in actions:
            self.take(action)
        return bool(actions)

    def take(self, action):
        match action:
            case Append(appended):
                self.world.note_decision(self, appended)
                # In one go for the ledger, one by one in the log.
                self.work.append([lambda record=record: self.append(record) for record in appended])
            case Fire():
                self.work.append([lambda: self.read_parts(action)])
            case Resend():
                self.work.append([lambda: self.send_again(action)])
            case Forget(keys):
                self.work.append([lambda key=key: self.world.log.append(key, None, self.world.now) for key in keys])

    def act(self):
        pieces = self.world.rng.choice(self.work)
        piece = pieces.pop(0)
        more = piece()
        if more:
            pieces[:0] = more
        if not pieces:
            self.work = [other for other in self.work if other is not pieces]

    def append(self, record):
        if isinstance(record, Fired):
            self.sent_unfired.discard((record.group, record.generation))
        self.world.log.append(*records.encode(record), self.world.now)

    def read_parts(self, fire):
        decided = fire.decided
        id_ = (decided.group, decided.generation)
        parts = []
        for choice in fire.parts:
            entry = self.world.log.at(choice.offset)
            key = records.part_key(*id_, choice.task, choice.index, choice.id)
            if entry is None or entry.key != key or entry.value is None:
                # Compacted away since: a later one says the same, or the chord is finished. Read on.
                self.world.restart(self)
                return []
            parts.append((choice.task, choice.index, choice.id, records.decode(entry.key, entry.value).result))
        return [lambda: self.send(fire, tuple(parts))]

    def send(self, fire, parts):
        decided = fire.decided
        id_ = (decided.group, decided.generation)
        if not self.ledger.is_open(decided):
            return []
        fired = Fired(
            group=id_[0],
            generation=id_[1],
            owner=self.name,
            outcome=decided.outcome,
            body_task_id=decided.body_task_id,
            at=self.world.now,
        )
        if not (fire.look_first and decided.body_run in self.world.seen_runs[id_]):
            self.world.sent(self, fire, parts)
            self.sent_unfired.add(id_)
        return [lambda: self.append(fired)]

    def send_again(self, resend):
        """Carry an operator's request out; what it needs must be in the log."""
        request = resend.request
        found = {}
        for key, offset in resend.wanted.items():
            entry = self.world.log.live_from(key, offset)
            if entry is None:
                self.world.restart(self)  # finished, or expired, meanwhile
                return []
            found[key] = records.decode(key, entry.value)
        kinds = sorted(type(record).__name__ for record in found.values())
        assert kinds[-2:] == ["Decided", "Declared"], kinds
        decided = next(record for record in found.values() if isinstance(record, Decided))
        id_ = (request.group, request.generation)
        assert decided == self.world.log.first_decided(id_), "sent again what was not decided"
        assert len(found) == 2 + decided.slices
        if not self.ledger.is_asked(request):
            return []
        self.world.resent[id_, request.id].add((resend.at_ms, decided.body_run))
        done = Resent(group=id_[0], generation=id_[1], id=request.id, done=self.world.now, outcome="success")
        return [lambda: self.append(done)]


class World:
    """A workload of chords, a log, owners, and what is known of them for the checks."""

    def __init__(self, seed, *, faults, ledger_class=Ledger, slice_size=1_000):
        self.rng = random.Random(seed)
        self.faults = faults
        self.ledger_class = ledger_class
        self.slice_size = slice_size
        self.now = 1_700_000_000_000
        self.log = Log()
        self.owners: list[Owner] = []
        self.names = 0
        self.sends = defaultdict(list)
        self.seen_runs = defaultdict(set)
        self.excused = Counter()
        self.decided_from = {}
        self.complete_ids = set()
        self.asked = set()
        self.resent = defaultdict(set)
        self.pending = self.workload()
        self.steps = 0
        self.add_owner()

    # -- the workload --------------------------------------------------------------------------

    def workload(self):
        """Return the facts to come, one queue per chord; some have what a fleet's bad day adds."""
        rng, queues = self.rng, []
        for number in range(rng.randint(1, 3)):
            for generation in range(1, rng.randint(1, 2) + 1):
                group = f"g|{number}"
                members = [(f"t{i}", rng.choice([i, i, None])) for i in range(rng.randint(0, 5))]
                if members and rng.random() < 0.2:
                    members.append((members[0][0], 99))  # one frozen signature, used twice
                extended = [(f"x{i}", 0) for i in range(rng.choice([0, 0, 1, 2]))]
                complete = rng.random() < 0.85
                here = {"group": group, "generation": generation}
                deadline = self.now + rng.randint(1, 400_000) if rng.random() < 0.2 else None
                declared = Declared(**here, body=b"body", body_task_id=f"b-{group}-{generation}", deadline=deadline)
                facts = [declared]
                cancels = rng.choice([0, 0, 0, 1, 2])
                facts += [Cancelled(**here, id=f"c{n}", fire=rng.random() < 0.5) for n in range(cancels)]
                facts.append(Sized(**here, size=len(members)))
                facts += [Extended(**here, task=task, index=index) for task, index in extended]
                everyone = members + extended
                absent = rng.choice(everyone) if everyone and not complete else None
                if complete or not everyone or cancels or deadline:
                    self.complete_ids.add((group, generation))
                    requests = [Resent(**here, id=f"r{n}") for n in range(rng.choice([0, 0, 1, 2]))]
                    self.asked |= {((group, generation), request.id) for request in requests}
                    facts += requests
                for task, index in everyone:
                    if (task, index) != absent:
                        facts += self.parts(here, task, index)
                rng.shuffle(facts)
                # An extension is acknowledged before its member is sent, and before its author's part.
                facts.sort(key=lambda fact: not isinstance(fact, Extended))
                # What an operator asks is appended once, by an idempotent producer: whoever asks again, asks anew.
                repeatable = [fact for fact in facts if not isinstance(fact, Resent)]
                for _ in range(rng.choice([0, 0, 1, 3])):
                    facts.insert(rng.randint(0, len(facts)), rng.choice(repeatable))
                facts.sort(key=lambda fact: not isinstance(fact, Extended))
                queues.append(facts)
        return queues

    def parts(self, here, task, index):
        rng = self.rng
        found = []
        for n in range(rng.choice([1, 1, 1, 2, 3])):
            value = rng.choice([b"1", b"1", b"2"])
            state = rng.choice(["SUCCESS", "SUCCESS", "SUCCESS", "FAILURE", "REVOKED"])
            key = rng.randint(1, 5)
            found.append(Part(**here, task=task, index=index, id=f"e{n}", key=key, state=state, result=value))
        return found

    # -- the owners ----------------------------------------------------------------------------

    def add_owner(self):
        self.names += 1
        for zombie in self.owners:
            zombie.not_alone = True
        self.owners.append(Owner(self, f"o{self.names}"))

    def crash(self, owner):
        for id_ in owner.sent_unfired:
            self.excused[id_] += 1
        self.owners.remove(owner)

    def restart(self, owner):
        """One that lost its footing drops everything and comes back as another."""
        last = self.owners[-1] is owner
        self.crash(owner)
        if last:
            self.add_owner()

    def hand_over(self):
        """A rebalance in good order: the old owner finishes what it began, reads no more."""
        owner = self.owners[-1]
        while owner.work:
            owner.act()
        if owner in self.owners:
            self.owners.remove(owner)
            self.add_owner()

    # -- what the checks need --------------------------------------------------------------------

    def note_decision(self, owner, appended):
        for record in appended:
            if isinstance(record, Decided):
                read = [r for r in owner.has_read if not isinstance(r, Gone)]
                self.decided_from[record.owner, record.group, record.generation] = read

    def sent(self, owner, fire, parts):
        decided = fire.decided
        id_ = (decided.group, decided.generation)
        assert self.log.first_decided(id_) == decided, "carried out a decision that is not the first"
        if not fire.look_first:
            assert decided.owner == owner.name, "carried out another's decision as if it were its own"
        self.check_complete(id_, self.decided_from[(decided.owner, *id_)], parts, decided)
        if fire.look_first and owner.not_alone:  # the other may send at the same time
            self.excused[id_] += 1
        self.sends[id_].append(
            Sent(owner.name, fire.look_first, decided.body_task_id, decided.body_run, decided.outcome, parts)
        )
        if self.rng.random() < 0.7:
            self.seen_runs[id_].add(decided.body_run)

    def check_complete(self, id_, has_read, parts, decided):
        """Compare with a second, plainer reading of the rule: by what the author had read."""
        declared, size, extended, best, ended = None, None, {}, {}, []
        for record in has_read:
            if (record.group, record.generation) != id_:
                continue
            match record:
                case Declared():
                    declared = record
                case Cancelled():
                    ended.append(record)
                case Sized():
                    size = record.size
                case Extended():
                    extended[record.task] = record.delta
                case Part():
                    rank = (record.state == "SUCCESS", record.key, record.id)
                    best[record.task, record.index] = max(best.get((record.task, record.index), (False, 0, "")), rank)
        assert declared, "sent before it was declared"
        complete = size is not None and len(best) >= size + sum(extended.values())
        if decided.why:
            assert not complete, "ended though it was complete"
            expired = declared.deadline is not None and decided.at >= declared.deadline
            assert ended or expired, "ended by nobody"
            if decided.outcome == "success":
                assert any(request.fire for request in ended)
                best = {member: rank for member, rank in best.items() if rank[0]}
            assert {(task, index): event for task, index, event, _ in parts} == {m: r[2] for m, r in best.items()}
            return
        assert complete, "sent before all parts were there"
        assert {(task, index): event for task, index, event, _ in parts} == {m: rank[2] for m, rank in best.items()}
        assert (decided.outcome == "success") == all(rank[0] for rank in best.values())

    # -- one history -----------------------------------------------------------------------------

    def run(self, steps=150):
        while self.steps < steps or self.pending:
            self.steps += 1
            self.step()
        return self

    def step(self):
        rng = self.rng
        self.now += rng.choice([1, 50, 5_000])
        dice = rng.random()
        if dice < 0.35 and self.pending:
            queue = rng.choice(self.pending)
            fact = queue.pop(0)
            self.log.append(*records.encode(fact), self.now)
            if not queue:
                self.pending.remove(queue)
        elif dice < 0.90:
            rng.choice(self.owners).step(rng)
        elif dice < 0.94:
            self.compact(rng.randint(0, self.log.end))
        elif dice < 0.95:
            self.hand_over()
        elif self.faults:
            self.fault(dice)

    def fault(self, dice):
        if dice < 0.97:
            self.crash(self.rng.choice(self.owners))
            if not self.owners:
                self.add_owner()
        elif dice < 0.985 and len(self.owners) < 4:
            self.add_owner()  # the others are zombies now
        else:
            self.uncertain_append(self.rng.choice(self.owners))

    def uncertain_append(self, owner):
        """Its records arrived, but nobody told it so."""
        for _ in range(self.rng.randint(0, 4)):
            if owner.work and owner in self.owners:
                owner.act()
        if owner in self.owners:
            self.restart(owner)

    def compact(self, bound):
        self.log.compact(bound, min(owner.position for owner in self.owners))

    def settle(self):
        """Zombies end, nothing more fails, time passes."""
        for zombie in self.owners[:-1]:
            self.crash(zombie)
        for _ in range(3):
            while self.owners[-1].step(self.rng):
                pass
            self.now += max(decision.TAKE_OVER_AFTER_MS, 400_000)  # and every deadline
        return self

    def sweep(self):
        owner = self.owners[-1]
        for action in owner.ledger.sweep(self.now):
            owner.take(action)
        self.settle()

    def left(self):
        """Return the records that a thorough compaction leaves, by chord."""
        for _ in range(2):
            self.compact(self.log.end)
        found = defaultdict(list)
        for entry in self.log.entries:
            record = records.decode(entry.key, entry.value)
            assert not isinstance(record, Gone)
            found[record.group, record.generation].append(record)
        return found


SEEDS = st.integers(0, 2**64 - 1)
MANY = settings(tried_on(150), suppress_health_check=list(HealthCheck), derandomize=True)


def check_sends(world):
    for id_, sends in world.sends.items():
        assert id_ in world.complete_ids
        assert len({sent[2:] for sent in sends}) == 1, "two sendings of one chord differ"
        assert len(sends) <= 1 + world.excused[id_], "sent again without need"
    assert set(world.resent) == world.asked, "asked to send again, and not done"
    for runs in world.resent.values():
        assert len(runs) == 1, "two sendings of one request differ"
    assert set(world.sends) | {id_ for id_, runs in world.seen_runs.items() if runs} == world.complete_ids


@MANY
@given(SEEDS)
def test_whatever_fails_a_complete_chord_sends_one_and_the_same_body_at_least_once(seed):
    check_sends(World(seed, faults=True).run().settle())


@MANY
@given(SEEDS)
def test_without_a_crash_each_body_is_sent_exactly_once(seed):
    world = World(seed, faults=False).run().settle()
    assert {id_: len(sends) for id_, sends in world.sends.items()} == dict.fromkeys(world.complete_ids, 1)


@MANY
@given(SEEDS)
def test_a_finished_chord_leaves_no_part_and_after_the_retention_nothing(seed):
    world = World(seed, faults=True).run().settle()
    world.sweep()
    left = world.left()
    for id_ in world.complete_ids:
        kinds = sorted(type(record).__name__ for record in left[id_] if not isinstance(record, Cancelled | Resent))
        assert kinds == ["Decided", "Declared", "Fired"], kinds
        assert all(record.done for record in left[id_] if isinstance(record, Resent))
    world.now += RETENTION_MS
    world.sweep()
    assert not {id_ for id_ in world.left() if id_ in world.complete_ids}
    world.now += decision.ABANDON_FACTOR * RETENTION_MS
    world.sweep()
    assert not world.left()
    assert len(world.owners[-1].ledger) == 0
    check_sends(world)


@MANY
@given(SEEDS)
def test_large_decisions_are_as_safe_as_small_ones(seed):
    """The members of a decision too large for one record stand in slices before it."""
    world = World(seed, faults=True, slice_size=2).run().settle()
    check_sends(world)
    big = [record for entry in world.log.history if entry.value for record in [records.decode(entry.key, entry.value)]]
    for record in big:
        if isinstance(record, Decided) and record.slices:
            slices = [c for c in big if isinstance(c, Chosen) and c.owner == record.owner and c.group == record.group]
            assert sum(len(c.parts) for c in slices if c.generation == record.generation) == record.size


# -- the simulation itself must notice ---------------------------------------------------------


class ActsTooEarly(Ledger):
    """Acts on what it finds before it has read to the end."""

    def due(self, now_ms):
        live, self._live = self._live, True
        try:
            return super().due(now_ms)
        finally:
            self._live = live


class TrustsTheLast(Ledger):
    """Takes the last decision for the decision."""

    def apply(self, record, offset, at_ms):
        if isinstance(record, Decided) and (record.group, record.generation) in self._chords:
            self._chords[record.group, record.generation].first = None
        super().apply(record, offset, at_ms)


class CountsAny(Ledger):
    """Counts records, not members."""

    def _part(self, chord, part, offset):
        super()._part(chord, part, offset)
        if (best := chord.members.get((part.task, part.index))) is not None:
            chord.members.setdefault((part.task + part.id, part.index), best)


class NeverTakesOver(Ledger):
    """Leaves a decision to its author, dead or not."""

    def _next(self, id_, chord, now_ms):
        if chord.fired_at is None and chord.first is not None and chord.first.owner != self.owner:
            return None
        return super()._next(id_, chord, now_ms)


class ReadsWhereItWas(Ledger):
    """Expects the chosen records where they were when the decision was taken."""

    def _chosen(self, id_, chord, decided):
        return decided.parts


class EndsTheComplete(Ledger):
    """Lets a request or a deadline go before what is complete."""

    def _next(self, id_, chord, now_ms):
        ended = chord.ended(now_ms)
        if chord.first is None and chord.fired_at is None and not chord.doing.deciding and ended:
            chord.doing.deciding = True
            return Append(self._decide(id_, chord, ended, now_ms))
        return super()._next(id_, chord, now_ms)


class SweepsUpTooSoon(Ledger):
    """Forgets the parts once the decision is in the log, not the body."""

    def _next(self, id_, chord, now_ms):
        action = super()._next(id_, chord, now_ms)
        if action is None and chord.first is not None and chord.fired_at is None:
            parts = tuple(key for key in chord.live if b"|part|" in key and key not in chord.forgetting)
            chord.forgetting = {*chord.forgetting, *parts}
            return Forget(parts) if parts else None
        return action


@pytest.mark.parametrize(
    "broken",
    [ActsTooEarly, TrustsTheLast, CountsAny, NeverTakesOver, ReadsWhereItWas, SweepsUpTooSoon, EndsTheComplete],
)
def test_the_simulation_catches_a_broken_protocol(broken):
    caught = 0
    for seed in range(300):
        world = World(seed, faults=True, ledger_class=broken)
        try:
            world.run()
            for _ in range(2_000):  # a broken one may never come to rest
                if not world.owners[-1].step(world.rng):
                    world.now += decision.TAKE_OVER_AFTER_MS
                    if not world.owners[-1].step(world.rng):
                        break
            else:
                pytest.fail("never comes to rest")
            check_sends(world)
        except (AssertionError, pytest.fail.Exception):
            caught += 1
            break
    assert caught
