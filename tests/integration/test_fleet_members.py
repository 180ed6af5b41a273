"""However a member ends, its chord ends; and what a body inherits. With a real worker."""

from __future__ import annotations

import time

import pytest
from celery import VERSION, chord, group
from celery.canvas import StampingVisitor
from celery.exceptions import ChordError

from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.kafka, pytest.mark.redis]


def failed(result):
    """The error of a body, not of a parent of it, which may be known first."""
    with pytest.raises(ChordError) as caught:
        result.app.AsyncResult(result.id).get(timeout=PATIENCE_S)
    return str(caught.value)


def test_revoked(fleet):
    tasks = fleet.app
    # Only then does an older Celery look whether it was revoked.
    late = tasks.add.s(1, 1).set(countdown=60 if VERSION[:2] >= (5, 6) else 10)
    result = chord([late, tasks.add.s(2, 2)])(tasks.listed.s())
    result.parent.results[0].revoke()
    assert "TaskRevokedError('revoked')" in failed(result)


def test_expired(fleet):
    tasks = fleet.app
    result = chord([tasks.add.s(1, 1).set(expires=0.2, countdown=1), tasks.add.s(2, 2)])(tasks.listed.s())
    assert "TaskRevokedError('expired')" in failed(result)


@pytest.mark.parametrize(
    ("limit", "error"), [("soft_time_limit", "SoftTimeLimitExceeded"), ("time_limit", "TimeLimit")]
)
def test_out_of_time(fleet, limit, error):
    tasks = fleet.app
    result = chord([tasks.nap.s(30).set(**{limit: 1}), tasks.add.s(2, 2)])(tasks.listed.s())
    assert error in failed(result)


def test_out_of_retries(fleet):
    tasks = fleet.app
    result = chord([tasks.flaky.s(9), tasks.add.s(2, 2)])(tasks.listed.s())
    assert "attempt 3" in failed(result)


def test_a_lost_worker_whose_message_is_requeued_is_no_end(fleet, tmp_path):
    tasks = fleet.app
    header = [tasks.die_once.s(str(tmp_path / "died")), tasks.add.s(2, 2)]
    assert chord(header)(tasks.listed.s()).get(timeout=PATIENCE_S) == ["second life", 4]


@pytest.mark.parametrize("immutable", [False, True], ids=["body", "immutable body"])
def test_a_result_that_no_serializer_takes_is_a_failure(fleet, immutable):
    tasks = fleet.app
    body = tasks.note.si("all are in") if immutable else tasks.listed.s()
    result = chord([tasks.odd.s(), tasks.add.s(2, 2)])(body)
    assert "EncodeError" in failed(result)


@pytest.mark.parametrize("how", ["no name", "no text", "no JSON"])
def test_an_exception_that_cannot_be_said_is_the_failure_of_its_task_and_of_its_chord(fleet, how):
    tasks = fleet.app
    result = chord([tasks.fail_oddly.s(how), tasks.add.s(2, 2)])(tasks.listed.s())
    text = failed(result)
    member = result.parent.results[0]
    assert "odd" in text
    assert member.id in text
    assert "odd" in str(member.get(propagate=False, timeout=PATIENCE_S))
    assert type(member.result).__name__ != "UnicodeEncodeError"


@pytest.mark.parametrize(
    "body", [None, 7, "fleet_app.listed", [], object()], ids=["None", "number", "text", "list", "object"]
)
def test_a_body_that_is_no_signature_is_refused_and_nothing_is_sent(fleet, body):
    tasks = fleet.app
    header = [tasks.note.si("without a body"), tasks.note.si("without a body")]
    with pytest.raises(AttributeError):
        chord(header)(body)
    assert tasks.add.delay(1, 1).get(timeout=PATIENCE_S) == 2
    assert "without a body" not in fleet.log("worker")


def test_of_two_failed_the_first_of_the_header_is_named(fleet):
    tasks = fleet.app
    result = chord([tasks.add.s(1, 1), tasks.fail.s("second"), tasks.fail.s("third")])(tasks.listed.s())
    assert "second" in failed(result)


def test_links_and_errbacks_of_the_body(fleet):
    tasks = fleet.app
    body = tasks.listed.s()
    body.link(tasks.note.si("the link of a body"))
    assert chord([tasks.add.s(1, 1), tasks.add.s(2, 2)])(body).get(timeout=PATIENCE_S) == [2, 4]
    fleet.until("worker", "noted the link of a body")
    result = (group(tasks.fail.s("x"), tasks.add.s(1, 1)) | tasks.listed.s()).on_error(
        tasks.note.si("the errback of an upgraded group")
    )
    result.delay()
    fleet.until("worker", "noted the errback of an upgraded group")


def test_header_errbacks(fleet):
    tasks = fleet.app
    tasks.app.conf.task_allow_error_cb_on_chord_header = True
    try:
        canvas = chord([tasks.fail.s("x"), tasks.add.s(1, 1)], tasks.listed.s())
        canvas.link_error(tasks.note_error.s())
        result = canvas.delay()
        fleet.until("worker", f"errback of {result.parent.results[0].id}")
        fleet.until("worker", f"errback of {result.id}")
    finally:
        tasks.app.conf.task_allow_error_cb_on_chord_header = False


def test_the_body_keeps_its_options_and_inherits_root_parent_and_stamps(fleet):
    tasks = fleet.app

    class Tenant(StampingVisitor):
        def on_signature(self, sig, **headers):
            return {"tenant": "blue"}

    body = tasks.about_me.s().set(priority=7, headers={"mine": 1})
    canvas = chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], body)
    canvas.stamp(Tenant())
    result = canvas.delay()
    about = result.get(timeout=PATIENCE_S)
    members = [one.id for one in result.parent.results]
    assert about["priority"] == 7
    assert about["mine"] == 1
    assert about["stamps"] == {"tenant": "blue"}
    assert about["parent"] in members
    assert about["root"]


def test_an_applied_again_frozen_chord_runs_its_body_again(fleet):
    tasks = fleet.app
    canvas = chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], tasks.note.si("again and again"))
    canvas.freeze()
    for runs in (1, 2):
        canvas.apply_async()
        deadline = time.monotonic() + PATIENCE_S
        while fleet.log("worker").count("noted again and again") < runs and time.monotonic() < deadline:
            time.sleep(0.05)
        assert fleet.log("worker").count("noted again and again") == runs
