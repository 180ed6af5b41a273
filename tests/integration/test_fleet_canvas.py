"""Chords of any canvas through the whole fleet: nested, extended, failed inside one another."""

from __future__ import annotations

import time

import pytest
from celery import VERSION, chain, chord, group
from celery.exceptions import ChordError
from celery.result import AsyncResult

from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.kafka, pytest.mark.redis]


def test_results_keep_the_shape_of_the_header(fleet):
    tasks = fleet.app
    tail = chain(tasks.add.s(1, 1), group(tasks.add.s(1), tasks.add.s(2)))
    assert chord([tail, tasks.add.s(5, 5)])(tasks.listed.s()).get(timeout=PATIENCE_S) == [[3, 4], 10]


def test_a_group_inside_the_header_is_part_of_it(fleet):
    tasks = fleet.app
    header = [tasks.add.s(1, 1), group(tasks.add.s(2, 2), tasks.add.s(3, 3))]
    assert sorted(chord(header)(tasks.listed.s()).get(timeout=PATIENCE_S)) == [2, 4, 6]


def test_a_chord_of_chords(fleet):
    tasks = fleet.app
    inner = [chord([tasks.add.s(i, 0), tasks.add.s(i, 1)], tasks.total.s()) for i in range(3)]
    assert chord(inner)(tasks.listed.s()).get(timeout=PATIENCE_S) == [1, 3, 5]


def test_chords_in_a_chain_and_a_chord_as_body(fleet):
    tasks = fleet.app
    steps = (
        chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], tasks.total.s())
        | group(tasks.add.s(1), tasks.add.s(2))
        | tasks.total.s()
    )
    assert steps.delay().get(timeout=PATIENCE_S) == 15
    body = chord([tasks.total.s(), tasks.total.s()], tasks.listed.s())
    assert chord([tasks.add.s(1, 1), tasks.add.s(2, 2)])(body).get(timeout=PATIENCE_S) == [6, 6]


def test_a_generator_is_a_header(fleet):
    tasks = fleet.app
    assert chord(tasks.add.s(i, i) for i in range(5))(tasks.listed.s()).get(timeout=PATIENCE_S) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("by", ["task", "chain", "group", "chord"])
def test_a_member_may_be_replaced(fleet, by):
    tasks = fleet.app
    canvas, expected = {
        "task": (tasks.add.si(1, 2), 3),
        "chain": (tasks.add.si(1, 2) | tasks.add.s(3), 6),
        "group": (group(tasks.add.si(1, 2), tasks.add.si(3, 4)), [3, 7]),
        "chord": (chord([tasks.add.si(1, 2), tasks.add.si(3, 4)], tasks.total.s()), 10),
    }[by]
    header = [tasks.replaced_by.s(canvas), tasks.add.s(0, 1)]
    found, beside = chord(header)(tasks.listed.s()).get(timeout=PATIENCE_S)
    if by == "group" and VERSION[:2] < (5, 6):
        found.sort()  # such a Celery gives every task of the group the index of the member that it replaces
    assert (found, beside) == (expected, 1)


@pytest.mark.parametrize("end", ["task", "group", "chord"])
def test_a_body_may_be_a_chain(fleet, end):
    tasks = fleet.app
    both = group(tasks.add.s(1), tasks.add.s(2))
    body, expected = {
        "task": (tasks.total.s() | tasks.add.s(10), 15),
        "group": (tasks.total.s() | both, [6, 7]),
        "chord": (tasks.total.s() | both | tasks.listed.s(), [6, 7]),
    }[end]
    assert chord([tasks.add.s(1, 1), tasks.add.s(1, 2)])(body).get(timeout=PATIENCE_S) == expected


@pytest.mark.parametrize("kind", ["group", "chord", "chain"])
def test_the_tasks_of_a_body_keep_their_own_headers(fleet, kind):
    tasks = fleet.app
    own = [tasks.about_me.s().set(headers={"mine": n}) for n in (1, 2)]
    body = {"group": group(own), "chord": chord(own, tasks.listed.s()), "chain": own[0] | tasks.listed.s()}[kind]
    found = chord([tasks.add.s(1, 1), tasks.add.s(2, 2)])(body).get(timeout=PATIENCE_S)
    assert found["mine"] == 1 if kind == "chain" else [one["mine"] for one in found] == [1, 2]


def test_a_member_may_add_another(fleet):
    tasks = fleet.app
    header = [tasks.adds_to_chord.s(tasks.add.si(20, 2), 1), tasks.add.s(0, 2)]
    assert chord(header)(tasks.listed.s()).get(timeout=PATIENCE_S) == [1, 22, 2]


@pytest.mark.parametrize("kind", ["task", "chain", "group", "chord"])
def test_a_failed_chord_fails_the_chord_around_it_and_errbacks_hear_once(fleet, kind):
    """On Celery's Redis backend the outer chord waits for ever: nobody tells it."""
    tasks = fleet.app
    body = {
        "task": tasks.listed.s(),
        "chain": tasks.listed.s() | tasks.listed.s(),
        "group": group(tasks.listed.s(), tasks.listed.s()),
        "chord": chord([tasks.listed.s(), tasks.listed.s()], tasks.listed.s()),
    }[kind]
    inner = chord([tasks.fail.s("inside"), tasks.add.s(1, 1)], body)
    outer = chord([inner, tasks.add.s(2, 2)], tasks.listed.s())
    told = f"told-{kind}"
    outer.link_error(tasks.note.si(told))
    result = outer.delay()
    with pytest.raises(ChordError, match="inside"):
        AsyncResult(result.id, app=tasks.app).get(timeout=PATIENCE_S)  # without its parents, whose error comes first
    # Every task of a group has its own; Celery 5.4 does not link errbacks to a chord in the header.
    expected = 2 if kind == "group" and VERSION[:2] >= (5, 5) else 1
    deadline = time.monotonic() + PATIENCE_S
    while fleet.log("worker").count(f"noted {told}") < expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tasks.note.delay("nothing behind it").get(timeout=PATIENCE_S)
    assert fleet.log("worker").count(f"noted {told}") == expected


def test_the_body_of_a_failed_chord_may_be_a_chord(fleet):
    """On Celery's Redis backend its state stays PENDING: the failure goes to the id of the body's header."""
    tasks = fleet.app
    body = chord([tasks.listed.s(), tasks.listed.s()], tasks.listed.s())
    result = chord([tasks.fail.s("first of all"), tasks.add.s(1, 1)])(body)
    with pytest.raises(ChordError, match="first of all"):
        AsyncResult(result.id, app=tasks.app).get(timeout=PATIENCE_S)  # without its parents, whose error comes first


def test_a_failed_chain_in_the_header_fails_every_member_that_it_would_have_had(fleet):
    tasks = fleet.app
    header = [chain(tasks.fail.s("early"), group(tasks.add.s(1), tasks.add.s(2))), tasks.add.s(2, 2)]
    with pytest.raises(ChordError, match="early"):
        chord(header)(tasks.listed.s()).get(timeout=PATIENCE_S)
