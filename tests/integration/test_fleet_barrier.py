"""Reads inside a worker while no processor folds: what Kafka has acknowledged counts, whatever the view shows."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid

import pytest
import redis
from celery import VERSION
from celery.result import AsyncResult, GroupResult

from celery_kafka_backend import events
from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S, until
from tests.services import kafka as kafka_service

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

VISIBLE_S = 2
REVOKE_READS = VERSION[:2] >= (5, 7)
"""Whether a worker that is asked to revoke reads what became of the tasks."""
REVOKED_AT_ONCE = VERSION[:2] >= (5, 6)
"""Whether a task that waits for its time says that it was revoked before that time comes."""
REQUEUES_UNREAD = VERSION[:2] < (5, 7)
"""Whether a worker puts a lost child's task back (`reject_on_worker_lost`) without asking whether it had succeeded."""


def shown(fleet, task_id):
    return fleet.app.app.backend.reader.shown(task_id)


def barriered(fleet, path):
    """Wait until both of the worker's processes have done what was queued before."""
    fleet.app.touch.delay(str(path))
    until(path.exists, "the worker does nothing more")


def until_found_succeeded(fleet, task_id, runs, *, runs_again):
    """Wait until the worker has seen that a child that was killed had succeeded, or has let its task run once more."""
    said = f"[{task_id}] succeeded {'in' if runs_again else 'before the worker was lost'}"
    until(lambda: said in fleet.log("worker"), lambda: fleet.log("worker")[-3000:])
    assert runs.read_text() == "ran\n" * (1 + runs_again)


@pytest.mark.parametrize("acknowledged", ["early", "late"])
def test_a_child_killed_after_its_success_has_succeeded(fleet, tmp_path, acknowledged):
    tasks = fleet.app
    runs = tmp_path / "runs"
    killed = tasks.stored_and_killed if acknowledged == "late" else tasks.stored_and_killed_early
    with fleet.paused():
        chained = killed.s(str(runs)) | tasks.listed.s()
        last = chained.apply_async(link_error=tasks.note_error.s())
        first = last.parent
        until_found_succeeded(fleet, first.id, runs, runs_again=REQUEUES_UNREAD and acknowledged == "late")
        barriered(fleet, tmp_path / "after")
        assert shown(fleet, first.id) is None or shown(fleet, first.id).document is None
    assert last.get(timeout=PATIENCE_S) == "stored"
    assert first.get(timeout=PATIENCE_S) == "stored"
    assert f"errback of {first.id}" not in fleet.log("worker")
    assert not {events.WORKER_LOST, events.FAILURE} & {*fleet.kinds(first.id), *fleet.kinds(last.id)}


def test_a_child_killed_before_its_success_is_lost(fleet):
    """The barrier must not invent a success either."""
    with fleet.paused():
        died = fleet.app.die.delay()
        until(lambda: f"[{died.id}]" in fleet.log("worker") and "WorkerLostError" in fleet.log("worker"), "not lost")
    with pytest.raises(Exception, match="SIGKILL"):
        died.get(timeout=PATIENCE_S)


def test_a_revoke_of_what_has_succeeded_is_not_even_written(fleet, tmp_path):
    tasks, control = fleet.app, fleet.app.app.control
    with fleet.paused():
        done = tasks.touch.delay(str(tmp_path / "done"))
        until(lambda: f"[{done.id}] succeeded" in fleet.log("worker"), "not done")
        waiting = tasks.add.apply_async((1, 1), countdown=3600 if REVOKED_AT_ONCE else 20)
        until(lambda: f"[{waiting.id}] received" in fleet.log("worker"), "not received")
        said = control.revoke([done.id, waiting.id], reply=True, timeout=PATIENCE_S, destination=[_node(fleet)])
        assert said, "no answer to the revoke"
    until(lambda: waiting.state == "REVOKED", "the other one is revoked")
    until(lambda: done.state == "SUCCESS", "the view shows it")
    if VERSION[:2] != (5, 6):  # it writes that without looking
        assert events.REVOKED not in fleet.kinds(done.id)
    # Where somebody writes it all the same, the order key keeps the success.
    tasks.app.backend.mark_as_revoked(done.id, reason="revoked")
    until(lambda: events.REVOKED in fleet.kinds(done.id), "not in the history")
    assert AsyncResult(done.id, app=tasks.app).state == "SUCCESS"


def test_a_saved_group_is_restored_by_whoever_saved_it_and_by_a_worker(fleet, tmp_path):
    tasks = fleet.app
    results = [tasks.add.delay(1, 1), tasks.add.delay(2, 2)]
    saved = GroupResult(f"group-{os.getpid()}", results, app=tasks.app)
    with fleet.paused():
        began = time.monotonic()
        saved.save()
        took = time.monotonic() - began
        assert took < tasks.app.backend.settings.delivery_timeout_s / 2
        assert GroupResult.restore(saved.id, app=tasks.app) == saved
        assert _group_in_worker(fleet, tmp_path / "saved", saved.id) == [one.id for one in results]
        saved.delete()
        assert GroupResult.restore(saved.id, app=tasks.app) is None
        assert _group_in_worker(fleet, tmp_path / "deleted", saved.id) is None
    assert tasks.app.backend.catch_up(saved.id, timeout_s=PATIENCE_S)
    assert not tasks.app.backend.reader.groups([saved.id])
    assert GroupResult.restore(saved.id, app=tasks.app) is None


def test_a_forget_holds_at_once_for_its_process_and_later_for_all(fleet):
    tasks = fleet.app
    result = tasks.add.delay(3, 4)
    assert result.get(timeout=PATIENCE_S) == 7
    with fleet.paused():
        result.forget()
        assert AsyncResult(result.id, app=tasks.app).state == "PENDING"
        assert shown(fleet, result.id).document is not None
    until(lambda: shown(fleet, result.id).document is None, "the forget is not shown")
    assert AsyncResult(result.id, app=tasks.app).state == "PENDING"


def test_a_forget_holds_for_what_the_view_has_not_even_seen(fleet, tmp_path):
    tasks = fleet.app
    with fleet.paused():
        done = tasks.touch.delay(str(tmp_path / "unseen"))
        until(lambda: f"[{done.id}] succeeded" in fleet.log("worker"), "not done")
        done.forget()
        assert AsyncResult(done.id, app=tasks.app).state == "PENDING"
    assert tasks.app.backend.catch_up(done.id, timeout_s=PATIENCE_S)
    assert shown(fleet, done.id).document is None
    assert fleet.kinds(done.id).count(events.SUCCESS) == 1


def test_a_client_can_wait_for_the_view_to_catch_up(fleet, tmp_path):
    tasks = fleet.app
    backend = tasks.app.backend
    with fleet.paused():
        told = tasks.touch.delay(str(tmp_path / "told"))
        until(lambda: f"[{told.id}] succeeded" in fleet.log("worker"), "not done")
        assert told.state == "PENDING"
        assert not backend.catch_up(told.id, timeout_s=3.0)
    assert backend.catch_up(told.id, timeout_s=PATIENCE_S)
    assert told.state == "SUCCESS"


def test_what_follows_a_failed_task_is_failed_without_reading_the_view(fleet, tmp_path):
    """A chord whose member's chain fails again: its part is counted, though the view shows the earlier failure."""
    tasks = fleet.app
    backend = tasks.app.backend
    failed = tasks.fail.delay("earlier")
    failed.get(timeout=PATIENCE_S, propagate=False)
    parts = []
    told = {"task": "t", "args": [], "kwargs": {}, "options": {"task_id": failed.id, "chord": {"task": "body"}}}
    original = backend.on_chord_part_return
    backend.on_chord_part_return = lambda request, state, result: parts.append((request.id, state))
    try:
        backend._fail_chain([told], ValueError("again"), store_result=False)
    finally:
        backend.on_chord_part_return = original
    assert parts == [(failed.id, "FAILURE")]


def _node(fleet):
    """Return the worker's name once it answers: what is sent before it listens is lost, and it is "ready" before."""
    node = fleet.node("worker")
    until(lambda: fleet.app.app.control.inspect([node], timeout=2).ping(), "it answers a ping")
    return node


def _group_in_worker(fleet, path, group_id):
    fleet.app.group_of.delay(str(path), group_id)
    return json.loads(until(lambda: path.exists() and path.read_text(), "the worker restored nothing"))


# -- fleets of their own -----------------------------------------------------------------------


@contextlib.contextmanager
def a_fleet(kafka_address, redis_server, folder, settings=None, **conf):
    databases = redis_server.clean_database(), redis_server.clean_database()
    with Fleet(kafka_address, *databases, folder, settings or {}, conf) as made:
        made.init()
        yield made


def test_a_redelivered_task_that_has_succeeded_does_not_run_again(kafka, redis_server, tmp_path):
    """The worker is killed between its child's success and the broker's acknowledgement; nothing folds meanwhile."""
    conf = {
        "worker_deduplicate_successful_tasks": True,
        "task_acks_late": True,
        "broker_transport_options": {"visibility_timeout": VISIBLE_S, "polling_interval": 0.01},
    }
    runs = tmp_path / "runs"
    with a_fleet(kafka.bootstrap, redis_server, tmp_path, {"barrier_timeout_s": 60}, **conf) as fleet:
        fleet.worker(name="doomed")
        result = fleet.app.stored_and_killed.delay(str(runs), parent=True)
        fleet.processes.pop("doomed").wait(PATIENCE_S)
        # kombu looks for what a dead worker had when a worker starts, and then not for a long time.
        broker = redis.Redis.from_url(fleet.environment["FLEET_BROKER"])
        ((_, taken),) = broker.zrange("unacked_index", 0, -1, withscores=True)
        until(lambda: time.time() > taken + VISIBLE_S, "the clock stands still")
        fleet.worker()
        until(lambda: f"{result.id}] Task already completed" in fleet.log("worker"), lambda: fleet.log("worker"))
        assert runs.read_text() == "ran\n"
        fleet.pipeline()
        assert result.get(timeout=PATIENCE_S) == "stored"
        assert runs.read_text() == "ran\n"


def test_a_worker_whose_kafka_is_frozen_answers_and_reads_are_bounded(redis_server, tmp_path):
    broker = kafka_service.start()
    try:
        with a_fleet(broker.bootstrap, redis_server, tmp_path, {"spool": str(tmp_path / "spool")}) as fleet:
            fleet.worker()
            node = _node(fleet)
            warm = fleet.app.touch.delay(str(tmp_path / "warm"))
            until(lambda: f"[{warm.id}] succeeded" in fleet.log("worker"), "not done")
            broker.brokers[0].freeze()
            # Twenty reads: without a memory of the first one's silence, 40 s.
            fleet.app.app.control.revoke([f"unknown-{number}" for number in range(20)])
            assert fleet.app.app.control.inspect([node], timeout=30).ping() == {node: {"ok": "pong"}}
            reads = 20 if REVOKE_READS else 0
            until(lambda: fleet.log("worker").count("cannot tell whether task") >= reads, lambda: fleet.log("worker"))
            # A success that is in this host's spool is one, whatever Kafka would say.
            runs = tmp_path / "runs"
            killed = fleet.app.stored_and_killed_early if REQUEUES_UNREAD else fleet.app.stored_and_killed
            spooled = killed.delay(str(runs))
            until_found_succeeded(fleet, spooled.id, runs, runs_again=False)
            broker.brokers[0].thaw()
            fleet.pipeline()
            assert spooled.get(timeout=PATIENCE_S) == "stored"
            assert runs.read_text() == "ran\n"
    finally:
        broker.stop()


def test_a_state_that_a_client_sets_is_seen_by_whoever_asks_next(fleet):
    tasks = fleet.app
    for number in range(30):
        task_id = str(uuid.uuid4())
        tasks.app.backend.store_result(task_id, {"number": number}, "PROGRESS")
        assert tasks.app.AsyncResult(task_id).state == "PROGRESS"
    with fleet.paused():
        task_id = str(uuid.uuid4())
        tasks.app.backend.store_result(task_id, {}, "PROGRESS")  # comes back all the same
    until(lambda: tasks.app.AsyncResult(task_id).state == "PROGRESS", "not shown")
