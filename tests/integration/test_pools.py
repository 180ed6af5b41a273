"""Every pool that Celery has, on one suite of cases: what a client asks of it, and that nothing is lost.

The members of groups and chords, retries and so on run in the pool under test; what a task itself asks for, while it
occupies a pool that may have only one place, runs in the fleet's own worker.
"""

from __future__ import annotations

import signal
import subprocess
import uuid
from typing import NamedTuple

import pytest
from celery import VERSION, chord, group
from celery.exceptions import TaskRevokedError

from celery_kafka_backend import events
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

POOLS = ("prefork", "threads", "solo", "gevent", "eventlet")


class Pool(NamedTuple):
    """A running worker with one kind of pool, and the queue that it alone serves."""

    fleet: object
    name: str

    def send(self, task, *args, **options):
        return task.apply_async(args, queue=self.name, **options)

    def part(self, task, *args):
        return task.s(*args).set(queue=self.name)

    def terminate(self, result):
        # Told only to the worker that has it: any other one would at once mark a task that it does not know as revoked.
        node = self.fleet.node(self.name)
        self.fleet.app.app.control.revoke(result.id, terminate=True, signal="SIGKILL", destination=[node])


@pytest.fixture(scope="module", params=POOLS)
def pool(fleet, request):
    name = request.param
    fleet.worker("-P", name, "-c", "4", "-Q", name, name=name)
    yield Pool(fleet, name)
    worker = fleet.processes.pop(name)
    worker.send_signal(signal.SIGTERM)
    try:
        assert worker.wait(PATIENCE_S) == 0, fleet.log(name)[-3000:]
    except subprocess.TimeoutExpired:
        pytest.fail(f"the {name} worker hangs at exit:\n{fleet.log(name)[-3000:]}")
    assert "Traceback" not in fleet.log(name).partition("worker: Warm shutdown")[2]


@pytest.fixture
def tasks(fleet):
    return fleet.app


def test_success(pool, tasks):
    result = pool.send(tasks.add, 2, 3)
    assert result.get(timeout=PATIENCE_S) == 5
    said = pool.fleet.last(result.id, events.SUCCESS)
    assert said.role == events.CHILD
    assert said.worker.startswith(f"{pool.name}@")


def test_failure(pool, tasks):
    with pytest.raises(ValueError, match="broken"):
        pool.send(tasks.fail, "broken").get(timeout=PATIENCE_S)


def test_retry(pool, tasks):
    result = pool.send(tasks.flaky, 2)
    assert result.get(timeout=PATIENCE_S) == 2
    life = pool.fleet.history(result.id, events.RETRY, events.RETRY, events.SUCCESS)  # from up to three processes
    assert [event.attempt for event in life if event.kind == events.RETRY] == [0, 1]
    assert len({event.run for event in life}) == 1


def test_custom_states(pool, tasks):
    result = pool.send(tasks.progress, 3)
    assert result.get(timeout=PATIENCE_S) == 3
    life = pool.fleet.history(result.id, *[events.STATE] * 3, events.SUCCESS)
    assert [event.state for event in life if event.kind == events.STATE] == ["PROGRESS"] * 3


def test_ignored_result(pool, tasks):
    result = pool.send(tasks.quiet)
    assert pool.fleet.last(result.id, events.SUCCESS).ignored
    assert result.state == "PENDING"


def test_revoked_before_it_starts(pool, tasks):
    task_id = str(uuid.uuid4())
    tasks.app.control.revoke(task_id, destination=[pool.fleet.node(pool.name)], reply=True, timeout=PATIENCE_S)
    with pytest.raises(TaskRevokedError):
        pool.send(tasks.add, 1, 1, task_id=task_id).get(timeout=PATIENCE_S)
    assert pool.fleet.last(task_id, events.REVOKED).by.startswith(f"{pool.name}@")


def test_revoked_while_it_runs(pool, tasks):
    endless = {"threads", "solo", *(["gevent"] if VERSION[:2] < (5, 5) else [])}
    if pool.name in endless:  # Celery cannot end a thread, nor 5.4 a greenlet: the task goes on, and its result counts
        result = pool.send(tasks.nap, 1)
        pool.fleet.history(result.id, events.STARTED)
        pool.terminate(result)
        if VERSION[:2] == (5, 6):  # it stores REVOKED when it is asked to, and the success replaces that
            pool.fleet.history(result.id, events.SUCCESS)
            result = tasks.app.AsyncResult(result.id)
        assert result.get(timeout=PATIENCE_S) == 1
        return
    result = pool.send(tasks.nap, 60)
    pool.fleet.history(result.id, events.STARTED)
    pool.terminate(result)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=PATIENCE_S)


def test_group(pool, tasks):
    made = group(pool.part(tasks.add, i, i) for i in range(10)).apply_async()
    assert made.get(timeout=PATIENCE_S) == [2 * i for i in range(10)]


def test_chord(pool, tasks):
    body = chord([pool.part(tasks.add, i, i) for i in range(10)])(pool.part(tasks.total))
    assert body.get(timeout=PATIENCE_S) == 90


def test_a_chord_begun_inside_a_task(pool, tasks):
    body = pool.send(tasks.fan_in, 4).get(timeout=PATIENCE_S)
    assert tasks.app.AsyncResult(body).get(timeout=PATIENCE_S) == 12


def test_a_client_inside_a_task(pool, tasks):
    assert pool.send(tasks.ask, [1, 2, 3]).get(timeout=PATIENCE_S) == [2, 4, 6]


def test_many_clients_inside_tasks_at_once(pool, tasks):
    sent = [pool.send(tasks.ask_beside_others, [i, i + 1]) for i in range(8)]
    assert [one.get(timeout=PATIENCE_S) for one in sent] == [[2 * i, 2 * i + 2] for i in range(8)]


def test_two_hundred_quick_tasks(pool, tasks):
    sent = [pool.send(tasks.add, i, 1) for i in range(200)]
    assert [one.get(timeout=PATIENCE_S) for one in sent] == [i + 1 for i in range(200)]
    for one in sent:
        kinds = [event.kind for event in pool.fleet.history(one.id, events.SUCCESS)]
        assert kinds.count(events.SUCCESS) == 1


def test_a_warm_shutdown_loses_nothing(pool, tasks):
    sent = [pool.send(tasks.nap, 0.05) for _ in range(60)]
    sent[0].get(timeout=PATIENCE_S)
    worker = pool.fleet.processes[pool.name]
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 0
    pool.fleet.worker("-P", pool.name, "-c", "4", "-Q", pool.name, name=pool.name)
    assert [one.get(timeout=PATIENCE_S) for one in sent] == [0.05] * 60
