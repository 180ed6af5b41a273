"""Chords of single tasks through the whole fleet, with declarations signed."""

from __future__ import annotations

import signal
import time
import uuid

import pytest
from celery import chord
from celery.exceptions import ChordError
from celery.result import AsyncResult

from celery_kafka_backend import events
from tests.patience import PATIENCE_S

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.redis,
    pytest.mark.parametrize(
        "fleet", [{"settings": {"chord_key": "a secret", "history": {"redis": True}}}], indirect=True
    ),
]


def body_runs(fleet, body_id):
    """How often the body started, by the log."""
    return fleet.kinds(body_id).count(events.STARTED)


def test_two_hundred_members_in_header_order_and_the_body_once(fleet):
    tasks = fleet.app
    body = chord([tasks.add.s(i, 0) for i in range(200)])(tasks.listed.s())
    assert body.get(timeout=PATIENCE_S) == list(range(200))
    time.sleep(0.5)
    assert body_runs(fleet, body.id) == 1


def test_a_member_that_retries_counts_once_it_ends(fleet):
    tasks = fleet.app
    assert chord([tasks.flaky.s(2), tasks.add.s(1, 1)])(tasks.listed.s()).get(timeout=PATIENCE_S) == [2, 2]


def test_the_body_gets_the_result_of_a_member_that_ignores_it(fleet):
    tasks = fleet.app
    header = [tasks.quiet.s(), tasks.add.s(1, 1), tasks.add.s(2, 2).set(ignore_result=True)]
    result = chord(header)(tasks.listed.s())
    assert result.get(timeout=PATIENCE_S) == ["not stored", 2, 4]
    assert result.parent.results[0].state == "PENDING"


def test_an_immutable_body_gets_no_results(fleet):
    tasks = fleet.app
    assert chord([tasks.big.s(100_000) for _ in range(20)])(tasks.add.si(20, 22)).get(timeout=PATIENCE_S) == 42


@pytest.mark.parametrize("immutable", [False, True])
def test_a_member_whose_result_is_too_large_has_failed(fleet, immutable):
    """Its part alone would fit, of an immutable body at least."""
    tasks = fleet.app
    body = tasks.note.si("all are in") if immutable else tasks.listed.s()
    result = chord([tasks.big.s(2_000_000), tasks.add.s(2, 2)])(body)
    with pytest.raises(ChordError, match="max_message_bytes"):
        AsyncResult(result.id, app=tasks.app).get(timeout=PATIENCE_S)
    assert result.parent.results[0].state == "FAILURE"


def test_a_killed_member_fails_the_chord(fleet):
    tasks = fleet.app
    body = chord([tasks.die.s(), tasks.add.s(1, 1)])(tasks.listed.s())
    with pytest.raises(ChordError, match="WorkerLostError"):
        AsyncResult(body.id, app=tasks.app).get(timeout=PATIENCE_S)


def test_an_errback_of_the_body_hears_of_a_failed_member(fleet):
    tasks = fleet.app
    result = chord([tasks.fail.s("member"), tasks.add.s(1, 1)])(tasks.listed.s().on_error(tasks.note_error.s()))
    fleet.until("worker", f"errback of {result.id}")


def test_a_body_that_was_never_sent_is_found_by_its_name_and_in_its_workflow(fleet):
    tasks = fleet.app
    first = tasks.add.s(1, 1).set(task_id=str(uuid.uuid4()))  # the root of all
    last = (first | chord([tasks.fail.si("member"), tasks.add.si(1, 1)], tasks.listed.s()) | tasks.note.s()).delay()
    with pytest.raises(ChordError):
        AsyncResult(last.id, app=tasks.app).get(timeout=PATIENCE_S)
    for task_id, name in ((last.parent.id, "fleet_app.listed"), (last.id, "fleet_app.note")):
        failed = fleet.last(task_id, events.FAILURE)
        assert (failed.name, failed.root) == (name, first.id)
    assert fleet.last(last.parent.id, events.FAILURE).parent in {one.id for one in last.parent.parent.results}


def test_the_view_shows_the_chord_s_progress(fleet):
    tasks = fleet.app
    result = chord([tasks.add.s(1, 1), tasks.nap.s(1)])(tasks.listed.s())
    result.get(timeout=PATIENCE_S)
    facts = tasks.app.backend.reader.chord(result.parent.id)
    kinds = {name.split("|")[1] for name in facts}
    assert {"declared", "sized", "part", "decided"} <= kinds


def test_a_chord_survives_the_death_of_every_processor(fleet):
    tasks = fleet.app
    body = chord([tasks.nap.s(1), tasks.nap.s(1.2)])(tasks.listed.s())
    pipeline = fleet.processes.pop("pipeline")
    pipeline.send_signal(signal.SIGKILL)
    pipeline.wait()
    time.sleep(2)
    fleet.pipeline()
    assert body.get(timeout=PATIENCE_S) == [1, 1.2]


def test_a_chord_of_one_and_of_none(fleet):
    tasks = fleet.app
    assert chord([tasks.add.s(3, 4)])(tasks.listed.s()).get(timeout=PATIENCE_S) in ([7], 7)
    assert chord([])(tasks.listed.s()).get(timeout=PATIENCE_S) == []
