"""What older versions of Celery lack, and Celery 5.7 does by itself: the same here on whichever is installed."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
from celery import VERSION, Celery, chord, group
from celery.app.task import Context
from celery.backends.cache import CacheBackend
from celery.exceptions import BackendGetMetaError, ChordError, WorkerLostError

from celery_kafka_backend import older


class Memory(*([older._Backend] if older.LACKS else []), CacheBackend):
    """A backend in memory: Celery 5.7's own does what is asked here by itself."""


class App(Celery):
    def _get_backend(self):
        return Memory(app=self, backend="memory")


class Consumer(older._ResultConsumer):
    def __init__(self, backend, app):
        self.heard = []
        super().__init__(backend, app, backend.accept, backend._pending_results, backend._pending_messages)

    def consume_from(self, task_id):
        self.heard.append(task_id)

    def cancel_for(self, task_id):
        if task_id in self.heard:  # also said by each result that is collected
            self.heard.remove(task_id)


class Waiting(older._AsyncBackendMixin, CacheBackend):
    def __init__(self, app):
        super().__init__(app=app, backend="memory")
        self.result_consumer = Consumer(self, app)


def nothing(*_):
    """What every task here does."""


@pytest.fixture
def app():
    made = App("older", broker="memory://", set_as_current=False)
    for name in ("one", "two", "three"):
        made.task(nothing, name=name, shared=False)
    return made


@pytest.fixture
def memory(app):
    return app.backend


def complain(cause):
    raise ChordError("member") from cause


def fail(memory, body, cause=None):
    try:
        complain(cause)
    except ChordError as exc:
        memory.chord_error_from_stack(body, exc)


def done(task_id):
    return {"task_id": task_id, "status": "SUCCESS", "result": 1, "traceback": None, "children": []}


def test_every_result_of_an_id_hears_and_one_that_gives_up_takes_nothing_from_the_others(app):
    backend = Waiting(app)
    first, second, gone = (app.AsyncResult("id", backend=backend) for _ in range(3))
    for one in (first, second, gone, first):
        backend._add_pending_result("id", one)
    backend.remove_pending_result(gone)
    assert backend.result_consumer.heard == ["id"] * 3
    backend.result_consumer.on_state_change({**done("id"), "status": "STARTED"}, None)
    assert (first._cache, second._cache) == (None, None)
    backend.result_consumer.on_state_change(done("id"), None)
    assert first._cache["result"] == second._cache["result"] == 1
    assert gone._cache is None
    assert backend.waiting_for("id") == []


def test_who_waits_weakly_is_not_kept_and_who_comes_late_finds_what_was_heard(app):
    backend = Waiting(app)
    backend._add_pending_result("id", app.AsyncResult("id", backend=backend), weak=True)
    gc.collect()
    assert backend.waiting_for("id") == []
    backend.result_consumer.on_state_change(done("id"), None)
    late = app.AsyncResult("id", backend=backend)
    backend.add_pending_result(late, start_drainer=False)
    assert late._cache["result"] == 1


def test_a_failed_chain_fails_the_body_of_a_chord_in_it(app, memory):
    inner = chord([app.signature("one")], app.signature("two"), app=app)
    canvas = chord([app.signature("one")], inner, app=app)
    canvas.freeze("end")
    request = Context(id="id", task="one", chain=[canvas], delivery_info={})
    memory.mark_as_failure("id", ValueError("no"), request=request)
    assert memory.get_state("id") == memory.get_state(inner.body.id) == "FAILURE"
    assert inner.body.id == "end"


def test_a_failed_chord_fails_every_task_of_its_body_and_each_errback_hears(app, memory):
    told = []
    memory._call_task_errbacks = lambda request, exc, _: told.append((request.id, request.errbacks, exc))
    own, common = app.signature("one", immutable=True), app.signature("two", immutable=True)
    ends = [app.signature("three").on_error(own), app.signature("three"), app.signature("one") | app.signature("two")]
    body = group(ends, app=app, link_error=[common])
    results = body.freeze().results
    cause = ValueError("cause")
    fail(memory, body, cause)
    assert [memory.get_state(one.id) for one in results] == ["FAILURE"] * 3
    assert [one[0] for one in told] == [one.id for one in results]
    assert [len(one[1]) for one in told] == [2, 1, 1]
    assert all(one[2] is cause for one in told)


def test_what_was_chained_after_a_failed_body_fails(app, memory):
    after = app.signature("two")
    after.freeze("after")
    body = app.signature("one", chain=[dict(after)])
    body.freeze("body")
    fail(memory, body)
    assert memory.get_state("body") == memory.get_state("after") == "FAILURE"


@pytest.mark.parametrize("middle", ["two", "a group"])
def test_a_chain_as_a_body_is_declared_under_the_id_of_its_result(app, memory, middle):
    declared = []

    def apply_chord(_, body, **__):
        older.name_body(body)
        declared.append((body.id, body.options["task_id"]))

    memory.apply_chord = apply_chord
    one, two = app.signature("one"), app.signature("two")
    body = one | (group([one, two], app=app) if middle == "a group" else two) | app.signature("three")
    result = chord([one, two], app=app)(body)
    assert declared == [(result.id, result.id)]


@pytest.mark.parametrize("state", ["SUCCESS", "STARTED", "FAILURE", None])
def test_a_child_that_is_lost_after_its_success_is_no_failure(memory, monkeypatch, state):
    monkeypatch.setattr(older, "LACKS", True)
    task_id = f"lost-{state}"
    if state:
        memory.store_result(task_id, 1 if state != "FAILURE" else ValueError(), state)
    request, ignored = (Context(id=task_id, task="one", ignore_result=it) for it in (False, True))
    lost = WorkerLostError("signal 9")
    assert older.had_succeeded(memory, task_id, lost, request) is (state == "SUCCESS")
    assert not older.had_succeeded(memory, task_id, ValueError(), request)
    assert not older.had_succeeded(memory, task_id, lost, ignored)


def test_where_nobody_can_tell_a_lost_child_is_a_failure(memory, monkeypatch):
    def away(_):
        raise BackendGetMetaError("away")

    monkeypatch.setattr(older, "LACKS", True)
    monkeypatch.setattr(memory, "_get_task_meta_for", away)
    assert not older.had_succeeded(memory, "id", WorkerLostError(), Context(id="id", task="one"))


@pytest.mark.parametrize(("always", "calls"), [(True, 3), (False, 1)])
def test_what_may_be_tried_again_is_within_its_bounds(memory, always, calls):
    memory.always_retry, memory.max_retries = always, 2
    memory.base_sleep_between_retries_ms = memory.max_sleep_between_retries_ms = 1
    memory.exception_safe_to_retry = lambda exc: isinstance(exc, OSError)
    made = []

    def call(number):
        made.append(number)
        raise OSError(number)

    with pytest.raises(OSError, match="7"):
        memory._ensure_retryable(call, 7)
    assert made == [7] * calls


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("asked", [{}, {"ignore_result": True}, {"ignore_result": False}, {"ignore_result": None}])
def test_whether_a_result_is_ignored_is_as_this_celery_says(stored, asked):
    task = SimpleNamespace(ignore_result=not stored, track_started=True)
    request = Context(asked)
    if VERSION[:2] >= (5, 7):
        from celery.app.task import get_actual_ignore_result  # noqa: PLC0415 - older ones have none

        expected = started = get_actual_ignore_result(task, request)
    else:
        expected, started = not stored or bool(asked.get("ignore_result")), not stored
    assert older.ignores_result(task, request) is expected
    assert older.stores_started(task, request) is not started
