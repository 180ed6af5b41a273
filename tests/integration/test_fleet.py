"""A real worker, real servers: what Celery users do, and what the log then says about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError, WorkerLostError
from celery.result import AsyncResult, GroupResult

from celery_kafka_backend import events, order
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.kafka, pytest.mark.redis]


def kinds(found):
    return [event.kind for event in found]


def test_results_and_exceptions_come_back_as_they_were_raised(fleet):
    tasks = fleet.app
    assert tasks.add.delay(2, 3).get(timeout=PATIENCE_S) == 5
    with pytest.raises(ValueError, match="broken"):
        tasks.fail.delay("broken").get(timeout=PATIENCE_S)
    failed = tasks.fail.delay("seen")
    failed.get(timeout=PATIENCE_S, propagate=False)
    assert failed.state == "FAILURE"
    assert "ValueError" in failed.traceback
    assert failed.args == ["seen"]
    assert failed.name == "fleet_app.fail"


def test_a_task_leaves_its_whole_life_in_the_log(fleet):
    began = time.monotonic()
    result = fleet.app.add.delay(1, 1)
    result.get(timeout=PATIENCE_S)
    life = fleet.history(result.id, events.SENT, events.RECEIVED, events.SUCCESS)
    assert kinds(life) == [events.SENT, events.RECEIVED, events.STARTED, events.SUCCESS]
    sent, received, started, success = life
    assert sent.role == events.CLIENT
    assert received.role == events.PARENT
    assert started.role == success.role == events.CHILD
    assert sent.pid == os.getpid()
    assert success.worker.startswith("worker@")
    assert len({event.run for event in life}) == 1
    assert success.sent_at <= success.received_at <= success.started_at <= success.at
    assert 0 <= success.runtime_s <= time.monotonic() - began
    assert sent.args == "(1, 1)"
    assert success.queue == "celery"


def test_a_retry_keeps_the_run_and_says_when_the_next_attempt_is_due(fleet):
    result = fleet.app.flaky.delay(2)
    assert result.get(timeout=PATIENCE_S) == 2
    life = fleet.history(result.id, *[events.SENT] * 3, *[events.RECEIVED] * 3, *[events.RETRY] * 2, events.SUCCESS)
    assert len({event.run for event in life}) == 1
    retries = [event for event in life if event.kind == events.RETRY]
    assert [event.attempt for event in retries] == [0, 1]
    assert all(event.exception == "builtins.RuntimeError" and event.due >= event.started_at + 50 for event in retries)
    for retry in retries:
        # Celery publishes the successor first; its start must beat the RETRY all the same.
        follower = next(event for event in life if event.kind == events.RECEIVED and event.attempt == retry.attempt + 1)
        assert retry.hlc < follower.hlc


def test_custom_states_and_their_meta(fleet):
    result = fleet.app.progress.delay(3)
    assert result.get(timeout=PATIENCE_S) == 3
    steps = [event for event in fleet.history(result.id, events.SENT, events.SUCCESS) if event.kind == events.STATE]
    assert [event.state for event in steps] == ["PROGRESS"] * 3
    assert b'"step": 2' in steps[-1].document


def test_an_ignored_result_leaves_no_document_but_its_life(fleet):
    result = fleet.app.quiet.delay()
    life = fleet.history(result.id, events.SENT, events.SUCCESS)
    assert life[-1].ignored
    assert life[-1].document is None
    assert result.state == "PENDING"


def test_a_replacement_inherits_the_run(fleet):
    result = fleet.app.replaced.delay(4, 5)
    assert result.get(timeout=PATIENCE_S) == 9
    life = fleet.history(result.id, *[events.SENT] * 2, events.SUCCESS)
    assert len({event.run for event in life}) == 1
    assert [event.name for event in life if event.kind == events.SENT] == ["fleet_app.replaced", "fleet_app.add"]


def test_a_chain_s_successor_inherits_the_run_and_a_child_starts_its_own(fleet):
    tasks = fleet.app
    last = chain(tasks.identity.s(), tasks.identity_after.s())()
    last.get(timeout=PATIENCE_S)
    assert last.result["run"] == last.parent.get(timeout=PATIENCE_S)["run"]
    parent = tasks.spawn.delay(2)
    children = parent.get(timeout=PATIENCE_S)
    for child in children:
        first = fleet.history(child, events.SENT, events.SUCCESS)[0]
        assert first.parent == parent.id
        assert first.run == order.run_at(first.sent_at)


def test_a_killed_child_is_a_lost_worker_told_by_the_parent(fleet):
    result = fleet.app.die.delay()
    with pytest.raises(WorkerLostError):
        result.get(timeout=PATIENCE_S)
    lost = fleet.last(result.id, events.WORKER_LOST)
    assert lost.role == events.PARENT
    assert lost.state == "FAILURE"


def test_a_requeued_task_of_a_killed_child_succeeds_in_its_second_life(fleet, tmp_path):
    result = fleet.app.die_once.delay(str(tmp_path / "died"))
    assert result.get(timeout=PATIENCE_S) == "second life"
    life = fleet.history(result.id, events.SENT, *[events.RECEIVED] * 2, events.SUCCESS)
    # Its first "started" may have died with it; what the parent saw did not.
    assert kinds(life).count(events.RECEIVED) == 2
    assert len({event.run for event in life}) == 1


def test_revoked_before_it_starts(fleet, tmp_path):
    tasks, go = fleet.app, tmp_path / "go"
    busy = [tasks.until_there.delay(str(go)) for _ in range(2)]
    waiting = tasks.add.delay(1, 1)
    fleet.history(waiting.id, events.SENT, events.RECEIVED)
    tasks.app.control.revoke(waiting.id, reply=True, timeout=PATIENCE_S, destination=[fleet.node("worker")])
    go.touch()
    with pytest.raises(TaskRevokedError):
        waiting.get(timeout=PATIENCE_S)
    assert fleet.last(waiting.id, events.REVOKED).by.startswith("worker@")
    assert [one.get(timeout=PATIENCE_S) for one in busy] == [None, None]
    assert waiting.state == "REVOKED"


def test_revoked_while_it_runs(fleet):
    running = fleet.app.nap.delay(30)
    fleet.history(running.id, events.SENT, events.STARTED)
    running.revoke(terminate=True, signal="SIGKILL")
    with pytest.raises(TaskRevokedError):
        running.get(timeout=PATIENCE_S)
    said = fleet.last(running.id, events.REVOKED)
    assert said.message == "terminated"
    assert said.by.startswith("worker@")


def test_expired_before_a_worker_was_free(fleet, tmp_path):
    tasks, go = fleet.app, tmp_path / "go"
    busy = [tasks.until_there.delay(str(go)) for _ in range(2)]
    for one in busy:
        fleet.history(one.id, events.SENT, events.STARTED)
    late = tasks.add.apply_async((1, 1), expires=0.5)
    time.sleep(0.6)
    go.touch()
    with pytest.raises(TaskRevokedError):
        late.get(timeout=PATIENCE_S)
    assert fleet.last(late.id, events.EXPIRED).state == "REVOKED"
    for one in busy:
        one.get(timeout=PATIENCE_S)


def test_a_result_over_the_limit_fails_the_task_and_says_so(fleet):
    result = fleet.app.big.delay(2_000_000)
    result.get(timeout=PATIENCE_S, propagate=False)
    assert result.state == "FAILURE"
    assert "max_message_bytes" in str(result.result)


def test_groups_are_saved_restored_and_deleted(fleet):
    tasks = fleet.app
    made = group(tasks.add.s(i, i) for i in range(4)).apply_async()
    assert made.join_native(timeout=PATIENCE_S) == [0, 2, 4, 6]
    made.save()
    again = GroupResult.restore(made.id, app=tasks.app)
    assert again == made
    assert again.get(timeout=PATIENCE_S) == [0, 2, 4, 6]
    made.delete()
    tasks.app.backend._cache.clear()
    assert GroupResult.restore(made.id, app=tasks.app) is None
    made.save()
    assert GroupResult.restore(made.id, app=tasks.app) == made


def test_forgotten_is_gone_and_may_run_again(fleet):
    tasks = fleet.app
    task_id = str(uuid.uuid4())
    tasks.add.apply_async((1, 1), task_id=task_id).get(timeout=PATIENCE_S)
    AsyncResult(task_id, app=tasks.app).forget()
    assert AsyncResult(task_id, app=tasks.app).state == "PENDING"
    again = tasks.add.apply_async((2, 2), task_id=task_id)
    assert again.get(timeout=PATIENCE_S) == 4


def test_a_chord_s_body_gets_the_results_in_header_order(fleet):
    tasks = fleet.app
    assert chord([tasks.add.s(i, 0) for i in range(8)])(tasks.total.s()).get(timeout=PATIENCE_S) == 28
    inner = tasks.fan_in.delay(4).get(timeout=PATIENCE_S)
    assert AsyncResult(inner, app=tasks.app).get(timeout=PATIENCE_S) == 12


def test_a_chord_with_a_failing_member_fails_as_in_celery(fleet):
    tasks = fleet.app
    body = chord([tasks.add.s(1, 1), tasks.fail.s("member")])(tasks.total.s())
    with pytest.raises(ChordError, match="member"):
        AsyncResult(body.id, app=tasks.app).get(timeout=PATIENCE_S)
    with pytest.raises(ValueError, match="member"):  # a body with its parent at hand: as on Redis
        body.get(timeout=PATIENCE_S)


def test_a_result_expires_when_its_task_says(fleet):
    result = fleet.app.short_lived.delay()
    result.get(timeout=PATIENCE_S)
    import redis  # noqa: PLC0415

    with redis.Redis.from_url(fleet.view) as store:
        left = store.pttl(f"celery-task-meta-{result.id}")
    assert 0 < left <= 30_000


STOCK = """
    import sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "celery_kafka_backend":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Blocked())
    from celery import Celery
    app = Celery(backend=sys.argv[1])
    result = app.AsyncResult(sys.argv[2])
    print("waiting", result.state, flush=True)
    print(result.get(timeout=180), flush=True)
"""


def test_a_stock_client_that_was_already_waiting_hears_the_result(fleet):
    tasks = fleet.app
    task_id = str(uuid.uuid4())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        [sys.executable, "-I", "-c", textwrap.dedent(STOCK), fleet.view, task_id],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as stock:
        assert stock.stdout.readline() == "waiting PENDING\n"
        time.sleep(0.3)
        tasks.add.apply_async((20, 22), task_id=task_id)
        assert stock.stdout.readline() == "42\n"
        assert stock.wait(PATIENCE_S) == 0


def test_what_was_chained_behind_a_failed_task_is_of_its_workflow(fleet):
    tasks = fleet.app
    last = (tasks.fail.si("first") | tasks.add.si(1, 1) | tasks.add.si(2, 2)).delay()
    for one in (last, last.parent):
        failed = fleet.last(one.id, events.FAILURE)
        assert (failed.name, failed.root) == ("fleet_app.add", last.parent.parent.id)


def test_what_a_task_refuses_or_ignores_is_in_its_history(fleet):
    tasks = fleet.app
    refused = tasks.refuse.delay()
    assert fleet.last(refused.id, events.REJECTED).requeue is False
    ignored = tasks.shrug.delay()
    assert fleet.last(ignored.id, events.STATE).state == "IGNORED"
    assert ignored.state == "PENDING"


def test_an_errback_sees_the_failure_that_it_hears_of(fleet, tmp_path):
    tasks, states = fleet.app, tmp_path / "states"
    for number in range(50):
        tasks.fail.apply_async((str(number),), link_error=tasks.note_state.s(path=str(states)))
    deadline = time.monotonic() + PATIENCE_S
    while not states.exists() or len(states.read_text().split()) < 50:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert states.read_text().split() == ["FAILURE"] * 50


def test_a_state_that_is_set_from_outside_is_in_the_log_when_that_returns(fleet):
    """A revoke that comes next reads it there, whatever the view shows."""
    backend = fleet.app.app.backend
    for number in range(20):
        task_id = str(uuid.uuid4())
        backend.store_result(task_id, {"done": number}, "PROGRESS")
        event = backend.barrier.beyond("task", task_id, dict, PATIENCE_S)
        assert event is not None
        assert event.state == "PROGRESS"


def test_an_unknown_task_is_in_the_history_of_its_id(fleet):
    result = fleet.app.app.send_task("no.such.task")
    said = fleet.last(result.id, events.UNKNOWN_TASK)
    assert said.name == "no.such.task"
    assert said.role == events.PARENT


def test_recycled_children_lose_nothing(fleet):
    fleet.worker("--max-tasks-per-child=1", "-Q", "recycled", name="recycler")
    tasks = fleet.app
    sent = [tasks.add.apply_async((i, i), queue="recycled") for i in range(20)]
    assert [one.get(timeout=PATIENCE_S) for one in sent] == [2 * i for i in range(20)]
    process = fleet.processes.pop("recycler")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
