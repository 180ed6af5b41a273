"""Partial statistics: the same totals whatever the batches, however often something crashes and is told again."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import events, partials
from celery_kafka_backend.changes import Logged
from celery_kafka_backend.events import Event
from celery_kafka_backend.partials import BUCKET, Cell, Partial, merged
from celery_kafka_backend.processors.tally import Tally
from tests.examples import tried_on

if TYPE_CHECKING:
    from collections.abc import Iterable

MINUTE = 60_000
NOW = 29_000_000 * MINUTE


def log(seed: int, length: int) -> list[Logged | None]:
    """A partition of the log, some of whose records are no events; drawn by seed, for hypothesis is slow at thousands."""
    rng = random.Random(seed)
    return [None if rng.random() < 0.02 else event(rng, number) for number in range(length)]


def event(rng: random.Random, number: int) -> Logged:
    at = NOW + rng.randrange(4 * MINUTE)
    kind = rng.choice([*sorted(events.KINDS), events.STARTED, events.SUCCESS, events.SUCCESS])
    known: dict[str, Any] = {}
    if rng.random() < 0.8:
        known |= {"sent_at": at - rng.randrange(MINUTE), "queue": rng.choice("qr"), "worker": rng.choice("vw")}
        known |= {"started_at": at - rng.randrange(2 * MINUTE), "runtime_s": rng.expovariate(1)}
    if rng.random() < 0.9:
        known["name"] = rng.choice(["a", "b", "c"])
    if kind in (events.FAILURE, events.RETRY):
        known["exception"] = rng.choice(["builtins.ValueError", "app.Away"])
    made = Event(id=str(number), kind=kind, task="t", at=at, hlc=at, **known)
    return Logged(made, b"x" * rng.randrange(1, 50))


class Reader:
    """All that a reader of partials has to know: of each bucket the fullest."""

    def __init__(self) -> None:
        self.fullest: dict[tuple[int, int, int, str], Partial] = {}

    def take(self, value: bytes) -> None:
        partial = partials.decode(value)
        where = (partial.partition, partial.bucket, partial.minute, partial.task)
        held = self.fullest.get(where)
        if held is None or partial.upto > held.upto:
            self.fullest[where] = partial

    def totals(self) -> dict[tuple[int, str], list[dict[str, Any]]]:
        rows: dict[tuple[int, str], list[Cell]] = {}
        for partial in self.fullest.values():
            rows.setdefault((partial.minute, partial.task), []).extend(partial.cells)
        return {row: [msgspec.to_builtins(cell) for cell in merged(cells)] for row, cells in sorted(rows.items())}


def told(tally: Tally, *, arrive: bool = True) -> Iterable[bytes]:
    for partial in list(tally.partials()):
        value = partials.encode(partial)
        tally.delivered(partial, arrived=arrive)
        if arrive:
            yield value


def straight(records: list[Logged | None]) -> Reader:
    tally = Tally(0, 0)
    tally.add(0, records)
    reader = Reader()
    for value in told(tally):
        reader.take(value)
    return reader


def counted(records: Iterable[Logged | None]) -> dict[tuple[int, str], dict[str, int]]:
    """The oracle: kinds per minute and name, counted one by one."""
    found: dict[tuple[int, str], dict[str, int]] = {}
    for one in records:
        if one is not None and one.event.kind not in events.GROUP_KINDS:
            kinds = found.setdefault((one.event.at // MINUTE, one.event.name or ""), {})
            kinds[one.event.kind] = kinds.get(one.event.kind, 0) + 1
    return found


@tried_on(60)
@given(st.data(), st.integers(0, 1 << 30), st.integers(1, 4 * BUCKET))
def test_crashes_duplicates_batches_and_lost_partials_change_no_total(data: st.DataObject, seed: int, length: int):
    """At any point the counting process dies, or batches come again, or what was told is lost; partials arrive in any order."""
    records = log(seed, length)
    arrived: list[bytes] = []
    tally, committed, position = Tally(0, 0), 0, 0
    for _ in range(data.draw(st.integers(0, 12), label="steps")):
        what = data.draw(st.sampled_from(["read", "tell", "lose", "again", "settle", "crash"]), label="step")
        if what == "read":
            end = min(length, position + data.draw(st.integers(1, 1500), label="records"))
            tally.add(position, records[position:end])
            position = end
        elif what == "again":  # the view was rewound
            back = data.draw(st.integers(0, position), label="back")
            tally.add(back, records[back:position])
        elif what in ("tell", "lose"):
            arrived += told(tally, arrive=what == "tell")
        elif what == "settle":
            committed = tally.settled
        else:  # the materializer goes on from anywhere up to where it was; its statistics from what is settled
            position = data.draw(st.integers(0, position), label="materializer's position")
            tally = Tally(0, committed)
            tally.add(committed, records[committed:position])
    tally.add(position, records[position:])
    arrived += told(tally)
    reader = Reader()
    repeated = data.draw(st.lists(st.sampled_from(arrived or [b""]), max_size=10), label="repeated") if arrived else []
    for value in data.draw(st.permutations(arrived + repeated), label="arrival"):
        reader.take(value)
    assert reader.totals() == straight(records).totals()
    sums = {
        row: {kind: sum(cell.get("kinds", {}).get(kind, 0) for cell in cells) for kind in expected}
        for row, expected in counted(records).items()
        if (cells := reader.totals()[row])
    }
    assert sums == counted(records)


@tried_on(30)
@given(st.integers(0, 1 << 30), st.integers(1, 3 * BUCKET))
def test_what_begins_in_a_minute_is_weighed_against_what_of_it_has_ended(seed: int, length: int):
    """In whichever minute it ended."""
    records = log(seed, length)
    balance: dict[int, int] = {}
    for one in filter(None, records):
        if one.event.kind == events.STARTED:
            minute = (one.event.started_at or one.event.at) // MINUTE
            balance[minute] = balance.get(minute, 0) + 1
        elif one.event.kind in ("success", "failure", "retry", "worker-lost", "revoked"):
            lost = one.event.kind == events.WORKER_LOST
            started = one.event.started_at or (one.event.at if lost else None)
            if started is not None:
                balance[started // MINUTE] = balance.get(started // MINUTE, 0) - 1
    found: dict[int, int] = {}
    for (minute, _), cells in straight(records).totals().items():
        found[minute] = found.get(minute, 0) + sum(c.get("begun", 0) - c.get("over", 0) for c in cells)
    assert {minute: left for minute, left in found.items() if left} == {m: left for m, left in balance.items() if left}


def test_what_is_settled_needs_no_memory():
    """However long the log is."""
    tally = Tally(0, 0)
    records = log(7, 5 * BUCKET)
    tally.add(0, records)
    assert tally.settled == 0
    assert list(told(tally))
    assert not list(told(tally)), "told once"
    assert tally.settled == 5 * BUCKET
    assert len(tally) == 0


def test_a_bucket_without_any_task_settles():
    """Records that nobody can read, or of groups only."""
    tally = Tally(0, 0)
    tally.add(0, [None] * (BUCKET + 1))
    assert not list(told(tally))
    assert tally.settled == BUCKET


def test_a_gap_that_ends_with_its_bucket_takes_nothing_from_the_next_one() -> None:
    """A control record, as an operator's transaction leaves one, is no record that is read."""
    records: list[Logged | None] = [event(random.Random(0), number) for number in range(BUCKET + 9)]
    tally, reader = Tally(0, 0), Reader()
    tally.add(0, records[: BUCKET - 1])
    tally.add(BUCKET, [])
    tally.add(BUCKET, records[BUCKET : BUCKET + 3])
    for value in told(tally):
        reader.take(value)
    tally.add(BUCKET + 3, records[BUCKET + 3 :])
    for value in told(tally):
        reader.take(value)
    records[BUCKET - 1] = None
    assert reader.totals() == straight(records).totals()
