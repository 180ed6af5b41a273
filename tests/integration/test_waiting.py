"""A client that waits while its view is silent: the timeout is its own, not the connection's."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery
from celery.exceptions import TimeoutError as NotInTime
from celery.result import AsyncResult, GroupResult
from redis import Redis

from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.redis_view import RedisSubscription
from celery_kafka_backend.sinks.registry import open_sink
from tests.contract.factories import batch, stated
from tests.patience import PATIENCE_S, until
from tests.services import redis
from tests.services.errors import ServiceError
from tests.services.required import absent

pytestmark = pytest.mark.redis

THAW_S = 24.0
"""Long after every timeout here, and before the connection's own 30 s."""


@pytest.fixture(scope="module")
def server():
    try:
        started = redis.start()
    except ServiceError as error:
        absent("redis", error)
    yield started
    started.stop()


@pytest.fixture
def app(server):
    made = Celery("waiting", backend=f"kafka://127.0.0.1:1/?view={server.url}", set_as_current=False)
    yield made
    made.backend.result_consumer.stop()


@contextlib.contextmanager
def frozen(server):
    """Freeze it; yield what is set when it had to be thawed because nobody came back."""
    gave_up = threading.Event()

    def thaw():
        gave_up.set()
        server.thaw()

    watchdog = threading.Timer(THAW_S, thaw)
    server.freeze()
    watchdog.start()
    try:
        yield gave_up
    finally:
        watchdog.cancel()
        server.thaw()


@pytest.fixture
def end(server):
    """Call to have tasks end with 42: the view tells whoever waits for them."""
    sink = open_sink(server.url, StoreOptions())
    sink.open()
    yield lambda *ended: sink.write(batch(*(stated("SUCCESS", task=one.id, value=42) for one in ended)))
    sink.close()


def pending(app, count):
    """Results of one backend, as of tasks that one thread sent."""
    return [AsyncResult(uuid.uuid4().hex, app=app, backend=app.backend) for _ in range(count)]


def heard_of(result):
    """Whether somebody waits for a result, and has looked what is there already."""
    ear = result.backend.result_consumer.ear
    return lambda: result.id in ear._ids and result.id not in ear._new


def waits_in_vain(result, timeout):
    started = time.monotonic()
    with pytest.raises(NotInTime):
        result.get(timeout=timeout)
    return time.monotonic() - started


@pytest.mark.parametrize("met", [False, True], ids=["before it first asked", "after it had connected"])
def test_get_ends_by_its_timeout_though_the_view_is_frozen(server, app, met):
    if met:
        waits_in_vain(AsyncResult(str(uuid.uuid4()), app=app), 0.2)
    with frozen(server) as gave_up:
        waits_in_vain(AsyncResult(str(uuid.uuid4()), app=app), 0.5)
        waits_in_vain(
            GroupResult(str(uuid.uuid4()), [AsyncResult(str(uuid.uuid4()), app=app) for _ in range(3)], app=app), 0.5
        )
        assert not gave_up.is_set()


def test_the_first_look_at_a_frozen_view_is_part_of_the_timeout(server, app):
    with frozen(server) as gave_up:
        # Twice that is more than the watchdog allows.
        waits_in_vain(AsyncResult(str(uuid.uuid4()), app=app), THAW_S * 0.6)
        assert not gave_up.is_set()


def test_it_hears_when_the_view_is_back(server, app):
    import redis as driver  # noqa: PLC0415 - the module above is the server

    result = AsyncResult(str(uuid.uuid4()), app=app)
    with frozen(server):
        waits_in_vain(result, 0.5)
    with driver.Redis.from_url(server.url) as store:
        store.set(
            f"celery-task-meta-{result.id}",
            f'{{"status": "SUCCESS", "result": 42, "traceback": null, "children": [], "date_done": null, "task_id": "{result.id}"}}',
        )
    assert result.get(timeout=PATIENCE_S) == 42


def test_a_result_without_an_id_is_refused_as_with_other_backends(app):
    nobody = AsyncResult("", app=app)
    for one in nobody, GroupResult(str(uuid.uuid4()), [nobody], app=app):
        with pytest.raises(ValueError, match="must not be empty"):
            one.get(timeout=PATIENCE_S)


def test_a_fork_hears_though_a_thread_of_its_parent_was_hearing(server, app):
    backend, awaited = app.backend, uuid.uuid4().hex
    parents = AsyncResult(uuid.uuid4().hex, app=app, backend=backend)
    threads = [threading.Thread(target=waits_in_vain, args=(parents, 3)) for _ in range(2)]
    for one in threads:
        one.start()
    while not backend.result_consumer._hearing:
        time.sleep(0.001)
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException):
            status = 0 if AsyncResult(awaited, app=app, backend=backend).get(timeout=PATIENCE_S) == 42 else 1
        os._exit(status)
    time.sleep(0.5)  # it has looked, and waits
    document = f'{{"status": "SUCCESS", "result": 42, "traceback": null, "children": [], "task_id": "{awaited}"}}'
    with Redis(port=server.port) as client:
        client.set(f"celery-task-meta-{awaited}", document)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for one in threads:
        one.join()


def chord_of(app, count):
    members = [AsyncResult(uuid.uuid4().hex, app=app) for _ in range(count)]
    return AsyncResult(uuid.uuid4().hex, app=app, parent=GroupResult(uuid.uuid4().hex, members, app=app)), members


def test_the_parents_of_an_awaited_result_are_asked_for_all_at_once(server, app):
    body, members = chord_of(app, 300)
    intervals = []
    with Redis(port=server.port) as client:
        client.config_resetstat()
        with pytest.raises(NotInTime):
            body.get(timeout=1.5, on_interval=lambda *_: intervals.append(1))
        reads = client.info("commandstats")["cmdstat_mget"]["calls"]
    assert intervals
    # Celery asks for each when get() begins; then every 0.1 s all of them were asked for, one by one.
    assert reads < 2 * len(members)


def test_the_failure_of_a_parent_ends_the_wait_for_its_child(server, app):
    body, members = chord_of(app, 3)
    failure = {"exc_type": "ValueError", "exc_message": ["broken"], "exc_module": "builtins"}

    def end(*_):
        with Redis(port=server.port) as client:
            for member, status, result in ((members[0], "SUCCESS", 1), (members[2], "FAILURE", failure)):
                meta = {"status": status, "result": result, "traceback": None, "children": [], "task_id": member.id}
                client.set(f"celery-task-meta-{member.id}", json.dumps(meta))

    with pytest.raises(ValueError, match="broken"):
        body.get(timeout=PATIENCE_S, on_interval=end)
    assert members[0].result == 1


# -- what is called while one waits ---------------------------------------------------------------


@pytest.mark.parametrize("where", ["on_message", "then"])
def test_what_is_called_with_a_result_may_wait_for_another(app, end, where):
    first, second = pending(app, 2)
    found = []

    def wait(*_):
        if not found:
            found.append("waits")
            found.append(second.get(timeout=PATIENCE_S, on_interval=lambda *_: end(second)))

    more = {"on_message": wait} if where == "on_message" else {}
    if where == "then":
        first.then(wait)
    assert first.get(timeout=PATIENCE_S, on_interval=lambda *_: end(first), **more) == 42
    assert found == ["waits", 42]


def test_what_is_called_with_an_ended_result_is_called_once(app, end):
    first, second = pending(app, 2)
    heard = []
    first.then(lambda _: heard.append("before"))
    assert first.get(timeout=PATIENCE_S, on_interval=lambda *_: end(first)) == 42
    first.then(lambda _: heard.append("after"))
    assert second.get(timeout=PATIENCE_S, on_interval=lambda *_: end(second)) == 42
    assert heard == ["before", "after"]


def test_what_is_called_with_a_result_may_wait_for_another_thread_that_waits(app, end):
    first, second = pending(app, 2)
    with ThreadPoolExecutor(1) as elsewhere:

        def wait(_):
            other = elsewhere.submit(second.get, timeout=PATIENCE_S)
            until(heard_of(second), "the other thread waits")
            end(second)
            assert other.result() == 42

        first.then(wait)
        assert first.get(timeout=PATIENCE_S, on_interval=lambda *_: end(first)) == 42


def test_an_exception_of_what_is_called_with_a_result_keeps_nothing_else_from_being_heard(app, end):
    first, *others, last = pending(app, 6)
    heard = []
    for one in others:
        one.then(lambda result: heard.append(result.id))

    def refuse(meta):
        if meta["task_id"] == first.id:
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        first.get(on_message=refuse, on_interval=lambda *_: end(first, *others))
    app.backend.result_consumer.ear._reread_at = math.inf  # what is lost stays lost
    last.get(timeout=PATIENCE_S, on_interval=lambda *_: end(last) if len(heard) == len(others) else None)
    assert sorted(heard) == sorted(one.id for one in others)


def test_an_interrupt_in_the_moment_when_it_hears_loses_nothing(app, end, monkeypatch):
    first, other = pending(app, 2)
    heard = []
    other.then(heard.append)
    wait = RedisSubscription.wait

    def interrupted(subscription, timeout_s):
        if found := wait(subscription, timeout_s):
            monkeypatch.undo()
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(RedisSubscription, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.get(on_interval=lambda *_: end(other))
    first.get(timeout=PATIENCE_S, on_interval=lambda *_: end(first))
    assert heard == [other]
