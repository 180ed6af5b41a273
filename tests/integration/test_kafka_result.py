"""`KafkaResult`: queued is not unknown, where a task was, when and for how long; and results that can be awaited."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
import uuid
from datetime import datetime, timezone

import pytest
from celery import VERSION, Celery, chord
from celery.result import AsyncResult

from celery_kafka_backend import events
from celery_kafka_backend.result import KafkaResult
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

HISTORY = pytest.param({}, id="history")
NO_HISTORY = pytest.param({"settings": {"history": {"redis": False}}}, id="no history")
both = pytest.mark.parametrize("fleet", [HISTORY, NO_HISTORY], indirect=True)
with_history = pytest.mark.parametrize("fleet", [HISTORY], indirect=True)


def until(result, word):
    deadline = time.monotonic() + PATIENCE_S
    while (said := KafkaResult.of(result).describe()) != word:
        assert time.monotonic() < deadline, f"{said}, never {word}"
        time.sleep(0.05)
    return KafkaResult.of(result)


def facts(found):
    return found.started_at, found.queue_wait_s, found.runtime_s, found.worker


@both
def test_queued_is_not_unknown(fleet):
    never = AsyncResult(str(uuid.uuid4()), app=fleet.app.app)
    assert KafkaResult.of(never).describe() == "unknown"
    assert KafkaResult.of(never).history() == []
    queued = fleet.app.add.apply_async((1, 1), queue="nobody's")
    until(queued, "sent")
    for one in (never, queued):
        assert one.state == "PENDING"
        assert facts(KafkaResult.of(one)) == (None, None, None, None)


@both
def test_from_received_to_the_end(fleet, tmp_path):
    go = tmp_path / "go"
    busy = [fleet.app.until_there.delay(str(go)) for _ in range(2)]
    for one in busy:
        until(one, "started")
        assert one.state == "PENDING"
    began = time.monotonic()
    waiting = fleet.app.nap.delay(0.3)
    until(waiting, "received")
    assert waiting.state == "PENDING"
    assert facts(KafkaResult.of(waiting))[:3] == (None, None, None)
    time.sleep(0.2)
    go.touch()
    assert waiting.get(timeout=PATIENCE_S) == 0.3
    found = until(waiting, "success")
    assert abs((datetime.now(timezone.utc) - found.started_at).total_seconds()) < PATIENCE_S
    assert found.queue_wait_s > 0.1
    assert 0.3 <= found.runtime_s <= time.monotonic() - began
    assert found.worker == fleet.node("worker")


@both
def test_how_a_task_ended(fleet):
    tasks = fleet.app
    countdown = 60 if VERSION[:2] >= (5, 6) else 10  # only then does an older Celery look whether it was revoked
    failed, flaky = tasks.fail.delay("no"), tasks.flaky.delay(2)
    revoked = tasks.add.apply_async((1, 1), countdown=countdown)
    until(failed, "failure")
    until(flaky, "success")
    until(revoked, "received")
    revoked.revoke()
    until(revoked, "revoked")
    forgotten = tasks.add.delay(1, 1)
    forgotten.get(timeout=PATIENCE_S)
    forgotten.forget()
    assert KafkaResult.of(forgotten).describe() == "forgotten"


@with_history
def test_what_only_a_history_tells(fleet):
    tasks = fleet.app
    until(tasks.quiet.delay(), "success")
    until(tasks.app.send_task("no.such.task"), "failure")
    until(tasks.die.delay(), "failure")
    began = time.monotonic()
    late = tasks.add.apply_async((1, 1), countdown=2)
    late.get(timeout=PATIENCE_S)
    found = until(late, "success")
    assert found.queue_wait_s <= time.monotonic() - began - 2, "the countdown is none of it"
    kinds = [event.kind for event in found.history()]
    assert kinds == [events.SENT, events.RECEIVED, events.STARTED, events.SUCCESS]
    flaky = tasks.flaky.delay(1)
    flaky.get(timeout=PATIENCE_S)
    assert until(flaky, "success").runtime_s < 1


@pytest.mark.parametrize("fleet", [NO_HISTORY], indirect=True)
def test_what_it_does_not_claim_without_one(fleet):
    flaky = fleet.app.flaky.delay(1)
    flaky.get(timeout=PATIENCE_S)
    assert until(flaky, "success").runtime_s is None
    assert KafkaResult.of(flaky).history() == []
    until(fleet.app.quiet.delay(), "started")


def test_results_of_other_backends_are_refused():
    other = Celery("other", backend="cache+memory://", set_as_current=False)
    with pytest.raises(TypeError, match="not of a kafka"):
        KafkaResult.of(AsyncResult("x", app=other))


# -- await ---------------------------------------------------------------------------------------


async def awaited(tasks):
    results = [tasks.add.delay(i, 1) for i in range(100)]
    assert await asyncio.gather(*(KafkaResult.of(one) for one in results)) == list(range(1, 101))
    assert await KafkaResult.of(results[0]) == 1
    with pytest.raises(ValueError, match="broken"):
        await KafkaResult.of(tasks.fail.delay("broken"))
    assert await KafkaResult.of(chord([tasks.add.s(i, i) for i in range(4)])(tasks.total.s())) == 12
    assert await KafkaResult.of(tasks.quiet.delay()) is None
    return len(results)


@both
def test_await(fleet):
    assert asyncio.run(awaited(fleet.app)) == 100


@with_history
def test_await_in_several_threads_and_forks(fleet):
    done = []
    threads = [threading.Thread(target=lambda: done.append(asyncio.run(awaited(fleet.app)))) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert done == [100] * 3
    asyncio.run(awaited(fleet.app))
    fork = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(awaited(fleet.app)))
    fork.start()
    fork.join(PATIENCE_S)
    assert fork.exitcode == 0


@with_history
def test_the_loop_runs_on_and_a_wait_can_be_given_up(fleet):
    async def main():
        never = AsyncResult(str(uuid.uuid4()), app=fleet.app.app)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(KafkaResult.of(never), 0.3)
        nap = fleet.app.nap.delay(1)
        waiting = asyncio.ensure_future(KafkaResult.of(nap))
        ticks = 0
        while not waiting.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert await waiting == 1
        return ticks

    assert asyncio.run(main()) > 5  # of a loop that stands still while it waits, 1
    hearing = [one for one in threading.enumerate() if one.name == "celery-kafka-hear"]
    for one in hearing:  # it ends when nobody waits
        one.join(PATIENCE_S)
        assert not one.is_alive()
