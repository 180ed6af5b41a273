"""What a window promises, against an oracle in plain Python: under late, repeated, reordered and overtaken partials."""

from __future__ import annotations

import random
from collections import Counter
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import events, partials
from celery_kafka_backend.changes import Logged
from celery_kafka_backend.events import Event
from celery_kafka_backend.partials import BUCKET, Cell, Partial
from celery_kafka_backend.processors import minutes
from celery_kafka_backend.processors.minutes import Minute
from celery_kafka_backend.processors.tally import ERRORS, Tally
from celery_kafka_backend.windows import WINDOWS, Dimension, figures, span
from tests.examples import tried_on

MINUTE = 60_000
NOW = 29_000_000 * MINUTE
KINDS = (events.SENT, events.STARTED, events.SUCCESS, events.FAILURE, events.RETRY)


def attempts(rng: random.Random, count: int, mark: str) -> list[Event]:
    """Attempts that began within the last 70 minutes; most of them have ended."""
    made = []
    for number in range(count):
        start = NOW - rng.randrange(70 * MINUTE)
        known: dict[str, Any] = {
            "name": rng.choice("abc"), "queue": rng.choice("qr"), "worker": rng.choice("vw"),
            "sent_at": start - rng.randrange(1, 90_000), "started_at": start,
        }  # fmt: skip
        made.append(Event(id=f"{mark}{number}", kind=events.STARTED, task="t", at=start, hlc=start, **known))
        run_ms = rng.randrange(1, 5 * MINUTE)
        if start + run_ms <= NOW and rng.random() < 0.9:
            end = start + run_ms
            kind = rng.choice([events.SUCCESS, events.SUCCESS, events.FAILURE, events.RETRY])
            # A task may be retried without an error.
            error = (
                {"exception": rng.choice(["E", "F"] + ["", None] * (kind == events.RETRY))} if kind in ERRORS else {}
            )
            made.append(
                Event(
                    id=f"{mark}{number}e",
                    kind=kind,
                    task="t",
                    at=end,
                    hlc=end,
                    runtime_s=run_ms / 1000,
                    **known,
                    **error,
                )
            )
    rng.shuffle(made)
    return made


def told(partition: int, made: list[Event], rng: random.Random) -> list[bytes]:
    """All partials that a materializer tells, in batches of any size."""
    tally, found, position = Tally(partition, 0), [], 0
    while position < len(made):
        batch = made[position : position + rng.randrange(1, 700)]
        tally.add(position, [Logged(one, b"x") for one in batch])
        position += len(batch)
        found += [partials.encode(one) for one in tally.partials()]
    return found


def table_of(arrived: list[bytes]) -> dict[bytes, bytes]:
    """What the processor's table holds; each value goes through its bytes, as through a changelog."""
    table: dict[bytes, bytes] = {}
    for value in arrived:
        partial = partials.decode(value)
        minute = minutes.decode(table.get(minutes.key(partial)))
        if minute.take(partial):
            table[minutes.key(partial)] = minutes.encode(minute)
    return table


def rows_of(table: dict[bytes, bytes]) -> list[tuple[int, str, list[Cell]]]:
    return [
        (key[0], key[2], minutes.decode(value).cells)
        for value, key in ((v, minutes.parse_key(k)) for k, v in table.items())
    ]


def within(found: float | None, values: list[float], quantile: float) -> bool:
    """Whether a quantile is that of the values, within 1 % of one of its neighbours."""
    if found is None:
        return not values
    rank = quantile * (len(values) - 1)
    ordered = sorted(values)
    low, high = ordered[int(rank)], ordered[ceil(rank)]
    return low * 0.9899 <= found <= high * 1.0101


@tried_on(25)
@given(
    st.data(), st.integers(0, 1 << 30), st.sampled_from(sorted(WINDOWS)), st.sampled_from(["task", "queue", "worker"])
)
def test_every_figure_is_the_oracles(data: st.DataObject, seed: int, window: str, by: Dimension):
    """Over two partitions, with repeated, reordered and overtaken partials, at any time within a minute."""
    rng = random.Random(seed)
    logs = [attempts(rng, data.draw(st.integers(0, 900), label="attempts"), mark) for mark in "xy"]
    arrived = [value for number, log in enumerate(logs) for value in told(number, log, rng)]
    arrived += rng.choices(arrived, k=20) if arrived else []
    if data.draw(st.booleans(), label="any order"):
        rng.shuffle(arrived)
    at = NOW + data.draw(st.integers(0, MINUTE - 1), label="into the minute")
    log = logs[0] + logs[1]
    found = {one.name: one for one in figures(rows_of(table_of(arrived)), WINDOWS[window], at, by)}

    taken = span(WINDOWS[window], at)
    attribute = {"task": "name"}.get(by, by)
    assert set(found) >= {getattr(one, attribute) for one in log if taken.first <= one.at // MINUTE <= taken.last}
    for name, ours in found.items():
        mine = [one for one in log if getattr(one, attribute) == name]
        inside = [one for one in mine if taken.first <= one.at // MINUTE <= taken.last]
        kinds = Counter(one.kind for one in inside)
        assert ours.kinds == kinds
        assert ours.rates == {kind: count / taken.seconds for kind, count in kinds.items()}
        assert ours.errors == Counter(one.exception for one in inside if one.exception)
        waits = [float(one.started_at - one.sent_at) for one in inside if one.kind == events.STARTED]
        runs = [one.runtime_s * 1000 for one in inside if one.runtime_s is not None]
        for theirs, values in ((ours.wait, waits), (ours.run, runs)):
            for quantile, each in ((0.5, theirs.p50), (0.95, theirs.p95), (0.99, theirs.p99)):
                assert within(each, values, quantile), (each, quantile, sorted(values))
        ended = {one.id.removesuffix("e") for one in mine if one.kind != events.STARTED}
        unfinished = [
            one.started_at for one in mine
            if one.kind == events.STARTED and one.id not in ended and one.started_at // MINUTE >= taken.last - 60
        ]  # fmt: skip
        assert ours.in_flight == len(unfinished)
        assert ours.oldest_ms == (min(unfinished) // MINUTE * MINUTE if unfinished else None)
        final = kinds["success"] + kinds["failure"]
        assert ours.failure_ratio == (kinds["failure"] / final if final else None)
        assert ours.retry_ratio == (kinds["retry"] / (final + kinds["retry"]) if final + kinds["retry"] else None)


def test_a_whole_bucket_is_a_number_in_the_table():
    """And its partial, told again or late, changes nothing."""
    held = Minute()
    late = Partial(partition=0, bucket=3, minute=1, task="a", upto=3_500, cells=[Cell(kinds={"sent": 4})])
    whole = Partial(partition=0, bucket=3, minute=1, task="a", upto=3_000 + BUCKET, cells=[Cell(kinds={"sent": 9})])
    assert [held.take(late), held.take(late), held.take(whole), held.take(late), held.take(whole)] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert held == Minute(whole={3}, sums=[Cell(kinds={"sent": 9})])


@pytest.mark.parametrize("window", sorted(WINDOWS))
def test_at_a_minutes_first_moment_a_window_is_exactly_its_minutes(window: str):
    rows = [(NOW // MINUTE + n, "a", [Cell(kinds={"success": 1})]) for n in range(-200, 5)]
    (found,) = figures(rows, WINDOWS[window], NOW)
    assert found.kinds == {"success": WINDOWS[window]}
    assert found.rates == {"success": 1 / 60}


def test_an_end_without_a_beginning_is_set_against_the_oldest():
    """A lost worker's parent does not know when its child began."""
    minute = NOW // MINUTE
    rows = [(minute - 9, "a", [Cell(begun=1)]), (minute - 5, "a", [Cell(begun=2)]), (minute - 1, "a", [Cell(over=1)])]
    (found,) = figures(rows, 5, NOW)
    assert (found.in_flight, found.oldest_ms) == (2, NOW - 5 * MINUTE)


def test_only_what_is_asked_for():
    cells = [Cell(queue="q", worker="v", kinds={"sent": 1}), Cell(queue="r", worker="v", kinds={"sent": 2})]
    rows = [(NOW // MINUTE - 1, "a", cells), (NOW // MINUTE - 1, "b", cells)]
    assert [(one.name, one.kinds["sent"]) for one in figures(rows, 1, NOW, "worker", {"queue": "r"})] == [("v", 4)]
    assert [(one.name, one.kinds["sent"]) for one in figures(rows, 1, NOW, "task", {"queue": "q"})] == [
        ("a", 1),
        ("b", 1),
    ]
    assert figures(rows, 1, NOW, "task", {"worker": "z"}) == []


@pytest.mark.parametrize(
    ("minute", "says"), [(1_000, ""), (1_010, ""), (1_011, "ahead"), (880, ""), (879, "old"), (0, "old")]
)
def test_what_is_too_far_from_kafkas_clock_is_not_believed(minute: int, says: str):
    """Kafka's, not ours: so a clock of ours that jumps changes nothing."""
    partial = Partial(partition=0, bucket=0, minute=minute, task="a", upto=1, cells=[])
    found = minutes.unbelievable(partial, 1_000)
    assert bool(found) == bool(says)
    assert found is None or says in found[0]
