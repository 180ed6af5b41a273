"""`pipeline chord` beside a running fleet: what a chord waits for, and its repair, as an operator types it."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
from celery import chord
from celery.exceptions import ChordError
from celery.result import AsyncResult

from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.result import KafkaResult
from tests.patience import PATIENCE_S, until

SECRET = "a secret"

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.redis,
    pytest.mark.parametrize("fleet", [{"settings": {"chord_key": SECRET}}], indirect=True),
]


def pipeline_chord(fleet, *arguments, settings=None):
    """Run the command; return its exit code, its JSON if it printed any, and all it said."""
    environment = dict(fleet.environment)
    if settings:
        environment["FLEET_SETTINGS"] = json.dumps({**json.loads(environment["FLEET_SETTINGS"]), **settings})
    done = subprocess.run(
        fleet.celery("pipeline", "chord", *arguments),
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert SECRET not in said, said
    found = json.loads(done.stdout) if "--json" in arguments and done.stdout.strip() else None
    return Exit(done.returncode), found, said


def waiting_chord(tasks, body, *present):
    """A chord whose last member is in a queue that nobody reads."""
    header = [*present, tasks.add.si(40, 2).set(queue="nobody-reads-this")]
    return chord(header)(body)


def until_in(fleet, group, count):
    until(
        lambda: sum("|part|" in name for name in fleet.app.app.backend.reader.chord(group)) >= count,
        f"{count} parts of {group}",
    )


def until_sent(fleet, result):
    """Wait for what nobody waits for when a task is sent: that the log has it."""
    deadline = time.monotonic() + PATIENCE_S
    while KafkaResult.of(result).describe() != "sent":
        assert time.monotonic() < deadline, fleet.log("pipeline")[-3000:]
        time.sleep(0.05)


def body_error(result):
    with pytest.raises(ChordError) as caught:
        AsyncResult(result.id, app=result.app).get(timeout=PATIENCE_S)
    return str(caught.value)


def noted(fleet, text, times):
    deadline = time.monotonic() + PATIENCE_S
    while fleet.log("worker").count(f"noted {text}") < times and time.monotonic() < deadline:
        time.sleep(0.05)
    assert fleet.log("worker").count(f"noted {text}") == times


def test_a_stuck_chord_is_explained_then_failed(fleet):
    tasks = fleet.app
    result = waiting_chord(tasks, tasks.listed.s().on_error(tasks.note_error.s()), tasks.add.s(1, 1))
    group, stuck = result.parent.id, result.parent.results[1].id
    until_in(fleet, group, 1)
    until_sent(fleet, result.parent.results[1])
    for source in ((), ("--log",)):
        code, (shown,), _ = pipeline_chord(fleet, group, "--json", *source)
        assert code is Exit.OK
        assert (shown["state"], shown["expected"], shown["body"]) == ("waiting", 2, result.id)
        assert [(one["task"], one["state"]) for one in shown["members"]] == [(result.parent.results[0].id, "SUCCESS")]
        (missing,) = shown["missing"]
        assert (missing["task"], missing["seen"], missing["queue"]) == (stuck, "sent", "nobody-reads-this")
        assert shown["untraced"] == 0
    assert pipeline_chord(fleet, group, "--fail")[0] is Exit.CONFIGURATION
    code, (shown,), said = pipeline_chord(fleet, group, "--fail", "--reason", "it is stuck", "--actor", "ann", "--json")
    assert code is Exit.OK, said
    assert shown["state"] == "failed"
    assert [(one["what"], one["by"], one["reason"]) for one in shown["requests"]] == [("fail", "ann", "it is stuck")]
    assert body_error(result) == f"Chord {group} was cancelled by ann with 1 of 2 members in: it is stuck"
    fleet.until("worker", f"errback of {result.id}")
    code, _, said = pipeline_chord(fleet, group, "--fail", "--reason", "again")
    assert code is Exit.NOT_DONE
    assert "nothing to fail: the chord has failed at" in said
    code, _, said = pipeline_chord(fleet, group)
    assert code is Exit.OK
    assert "fail asked" in said
    assert "ann: it is stuck" in said


def test_a_chord_is_fired_with_what_is_there_and_its_body_sent_again(fleet):
    tasks = fleet.app
    text = "fired early"
    result = waiting_chord(tasks, tasks.listed.s() | tasks.note.si(text), tasks.add.s(1, 1), tasks.add.s(2, 2))
    group = result.parent.parent.id if result.parent.parent else result.parent.id
    until_in(fleet, group, 2)
    code, _, said = pipeline_chord(fleet, group, "--resend", "--reason", "too early")
    assert (code, "its body has not been sent yet" in said) == (Exit.NOT_DONE, True)
    code, found, said = pipeline_chord(fleet, group, "--fire", "--reason", "two will do", "--json")
    assert code is Exit.OK, said + fleet.log("pipeline")[-3000:]
    (shown,) = found
    assert shown["state"] == "sent"
    assert "@" in shown["requests"][0]["by"]
    noted(fleet, text, 1)
    code, (shown,), said = pipeline_chord(fleet, group, "--resend", "--reason", "lost", "--actor", "bob", "--json")
    assert code is Exit.OK, said
    assert [(one["what"], one["by"], one["outcome"]) for one in shown["requests"][1:]] == [("resend", "bob", "success")]
    noted(fleet, text, 2)
    assert result.get(timeout=PATIENCE_S) == text


def test_a_body_that_is_sent_again_gets_the_same_results_but_for_ignored_ones(fleet):
    tasks = fleet.app
    result = chord([tasks.add.s(1, 1), tasks.quiet.s(), tasks.big.s(3)])(tasks.listed.s())
    assert result.get(timeout=PATIENCE_S) == [2, "not stored", "xxx"]
    result.forget()
    code, _, said = pipeline_chord(fleet, result.parent.id, "--resend", "--reason", "forgotten by mistake")
    assert code is Exit.OK, said
    assert AsyncResult(result.id, app=tasks.app).get(timeout=PATIENCE_S) == [2, None, "xxx"]
    code, _, said = pipeline_chord(fleet, result.parent.id, "--fire", "--reason", "it has")
    assert (code, "nothing to fire: the chord has fired at" in said) == (Exit.NOT_DONE, True)


def test_an_unknown_group(fleet):
    for more in ((), ("--fail", "--reason", "x")):
        code, _, said = pipeline_chord(fleet, "no-such-group", *more)
        assert (code, "no chord of group" in said) == (Exit.NOT_FOUND, True)


def test_who_has_another_key_repairs_nothing(fleet):
    tasks = fleet.app
    result = waiting_chord(tasks, tasks.listed.s(), tasks.add.s(1, 1))
    until_in(fleet, result.parent.id, 1)
    arguments = (result.parent.id, "--fail", "--reason", "mine", "--timeout", "3")
    code, _, said = pipeline_chord(fleet, *arguments, settings={"chord_key": "another"})
    assert (code, "chord_key differs" in said) == (Exit.NOBODY_FOLDS, True)
    fleet.until("pipeline", "cancelled without our chord_key")
    assert result.state == "PENDING"


def test_a_deadline_fails_a_chord_and_calls_its_errbacks(fleet):
    tasks = fleet.app
    header = [tasks.add.s(1, 1), tasks.add.s(40, 2).set(queue="nobody-reads-this")]
    canvas = chord(header, tasks.listed.s().on_error(tasks.note_error.s()))
    result = canvas.apply_async(chord_deadline_s=2)
    assert "was ended by its deadline with 1 of 2 members in" in body_error(result)
    fleet.until("worker", f"errback of {result.id}")
    assert chord([tasks.add.s(1, 1)], tasks.listed.s()).apply_async(chord_deadline_s=60).get(timeout=PATIENCE_S) == [2]
    with pytest.raises(ValueError, match="chord_deadline_s='soon'"):
        chord(header, tasks.listed.s()).apply_async(chord_deadline_s="soon")


def test_what_was_asked_while_no_processor_ran_is_done_when_one_does(fleet):
    tasks = fleet.app
    result = waiting_chord(tasks, tasks.listed.s(), tasks.add.s(1, 1))
    until_in(fleet, result.parent.id, 1)
    pipeline = fleet.processes.pop("pipeline")
    pipeline.send_signal(signal.SIGKILL)
    pipeline.wait()
    code, _, said = pipeline_chord(fleet, result.parent.id, "--fire", "--reason", "enough", "--timeout", "3")
    assert (code, "recorded, but not carried out" in said) == (Exit.NOBODY_FOLDS, True)
    fleet.pipeline()
    assert result.get(timeout=PATIENCE_S) == [2]
