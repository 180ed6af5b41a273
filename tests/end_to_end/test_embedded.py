"""The main job on the embedded stack: a real prefork worker, the processors, and `AsyncResult` as everybody uses it."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from celery import VERSION, chord, group, states
from celery.exceptions import ChordError, TaskRevokedError, TimeoutError  # noqa: A004 - Celery's own

from tests.end_to_end.pipeline import Pipeline, running, until_state
from tests.patience import PATIENCE_S, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module", params=["redis", "files"])
def pipeline(request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    """With Redis for tasks and the primary view; and as where there is none."""
    with running(redis=request.param == "redis") as one:
        yield one


def test_a_result_comes_back(pipeline: Pipeline) -> None:
    result = pipeline.tasks.add.delay(2, 3)
    assert result.get(timeout=PATIENCE_S) == 5
    again = pipeline.app.AsyncResult(result.id)
    assert (again.state, again.result, again.successful()) == (states.SUCCESS, 5, True)
    assert isinstance(again.date_done, datetime)


def test_an_exception_comes_back_as_itself(pipeline: Pipeline) -> None:
    result = pipeline.tasks.fail.delay("no luck", 7)
    with pytest.raises(pipeline.tasks.Unlucky) as raised:
        result.get(timeout=PATIENCE_S)
    assert raised.value.args == ("no luck", 7)
    assert result.state == states.FAILURE
    assert "raise Unlucky(text, number)" in result.traceback


def test_a_result_that_nobody_can_encode_is_a_failure(pipeline: Pipeline) -> None:
    result = pipeline.tasks.unserializable.delay()
    with pytest.raises(Exception, match="object"):
        result.get(timeout=PATIENCE_S)
    assert result.state == states.FAILURE


def test_a_retry_shows_and_the_history_tells_every_attempt(pipeline: Pipeline) -> None:
    result = pipeline.tasks.third_time_lucky.delay()
    until_state(result, states.RETRY)
    assert isinstance(result.info, pipeline.tasks.Unlucky)
    assert result.get(timeout=PATIENCE_S) == 2
    until(lambda: pipeline.kinds(result.id)[-1:] == ["success"])
    events = pipeline.history(result.id)
    assert [event.kind for event in events] == ["sent", "received", "started", "retry"] * 2 + [
        "sent", "received", "started", "success",
    ]  # fmt: skip
    assert [event.attempt for event in events] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(event.due for event in events if event.kind == "retry")
    assert [event.role for event in events[:4]] == ["client", "parent", "child", "child"]


def test_retries_run_out(pipeline: Pipeline) -> None:
    with pytest.raises(pipeline.tasks.Unlucky, match="gave up"):
        pipeline.tasks.never_lucky.delay().get(timeout=PATIENCE_S)


def test_a_task_revoked_before_it_starts_never_runs(pipeline: Pipeline) -> None:
    result = pipeline.tasks.add.apply_async((1, 1), countdown=5)
    due = time.monotonic() + 5
    until(lambda: "received" in pipeline.kinds(result.id))
    result.revoke()
    with pytest.raises(TaskRevokedError):
        result.get(timeout=PATIENCE_S)
    assert result.state == states.REVOKED
    time.sleep(max(0.0, due - time.monotonic()) + 0.5)
    assert result.state == states.REVOKED
    assert "started" not in pipeline.kinds(result.id)


def test_a_running_task_is_terminated(pipeline: Pipeline, tmp_path: Path) -> None:
    result = pipeline.tasks.wait_for.delay(str(tmp_path / "never"))
    until_state(result, "WAITING")
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=PATIENCE_S)

    def said() -> list[bool]:
        return [event.terminated for event in pipeline.history(result.id) if event.kind == "revoked"]

    until(lambda: any(said()))
    # Celery 5.6 says it of a running task when it is asked to, and again when it has ended it.
    assert sorted(said()) == ([False, True] if VERSION[:2] == (5, 6) else [True])
    # The pool replaces the child it lost.
    assert pipeline.tasks.same.delay("alive").get(timeout=PATIENCE_S) == "alive"


def test_an_ignored_result_leaves_no_document_but_its_history(pipeline: Pipeline) -> None:
    result = pipeline.tasks.quiet.delay()
    until(lambda: "success" in pipeline.kinds(result.id))
    (end,) = (event for event in pipeline.history(result.id) if event.kind == "success")
    assert end.ignored
    assert end.document is None
    assert pipeline.app.AsyncResult(result.id).state == states.PENDING
    assert pipeline.app.backend.get(pipeline.app.backend.get_key_for_task(result.id)) is None


def test_a_state_of_ones_own_shows_with_its_meta(pipeline: Pipeline, tmp_path: Path) -> None:
    signal = tmp_path / "go"
    result = pipeline.tasks.wait_for.delay(str(signal))
    until_state(result, "WAITING")
    assert result.info == {"for": str(signal)}
    assert not result.ready()
    signal.touch()
    assert result.get(timeout=PATIENCE_S) == "there"


def test_started_shows_who_runs_it(pipeline: Pipeline, tmp_path: Path) -> None:
    signal = tmp_path / "go"
    result = pipeline.tasks.started_until.delay(str(signal))
    until_state(result, states.STARTED)
    assert result.info["pid"] > 0
    assert result.info["hostname"].startswith("celery@")
    signal.touch()
    assert result.get(timeout=PATIENCE_S) is None


def test_extended_results_tell_what_ran_where(pipeline: Pipeline) -> None:
    result = pipeline.tasks.add.apply_async((1,), {"y": 2})
    assert result.get(timeout=PATIENCE_S) == 3
    assert (result.name, result.args, result.kwargs) == ("celeryapp.add", [1], {"y": 2})
    assert (result.retries, result.queue) == (0, "celery")
    assert result.worker.startswith("celery@")


def test_children_are_known(pipeline: Pipeline) -> None:
    result = pipeline.tasks.with_children.delay([7, 8])
    assert result.get(timeout=PATIENCE_S) == 2
    children = pipeline.app.AsyncResult(result.id).children
    assert sorted(child.get(timeout=PATIENCE_S) for child in children) == [7, 8]


def test_a_group_is_joined_in_order_and_natively(pipeline: Pipeline) -> None:
    results = group(pipeline.tasks.same.s(number) for number in range(20)).apply_async()
    assert results.join_native(timeout=PATIENCE_S) == list(range(20))
    assert results.join(timeout=PATIENCE_S) == list(range(20))
    ids = {result.id for result in results}
    assert {task_id for task_id, meta in results.iter_native(timeout=PATIENCE_S) if meta["status"] == "SUCCESS"} == ids
    assert results.completed_count() == 20


def test_a_group_with_a_failure_says_so(pipeline: Pipeline) -> None:
    results = group(pipeline.tasks.same.s(1), pipeline.tasks.fail.s("no", 1)).apply_async()
    with pytest.raises(pipeline.tasks.Unlucky):
        results.join_native(timeout=PATIENCE_S)
    kept = results.join_native(timeout=PATIENCE_S, propagate=False)
    assert kept[0] == 1
    assert isinstance(kept[1], pipeline.tasks.Unlucky)


def test_a_group_is_saved_restored_and_deleted(pipeline: Pipeline) -> None:
    results = group(pipeline.tasks.same.s(number) for number in range(3)).apply_async()
    results.save()
    restored = pipeline.app.GroupResult.restore(results.id)
    assert [result.id for result in restored] == [result.id for result in results]
    assert restored.join_native(timeout=PATIENCE_S) == [0, 1, 2]
    restored.delete()
    assert pipeline.app.GroupResult.restore(results.id) is None
    results.save()  # later than its deletion, by the same process
    assert pipeline.app.GroupResult.restore(results.id) is not None


def test_forget_returns_when_nothing_shows(pipeline: Pipeline) -> None:
    result = pipeline.tasks.same.delay("secret")
    result.get(timeout=PATIENCE_S)
    result.forget()
    assert pipeline.app.AsyncResult(result.id).state == states.PENDING
    until(lambda: pipeline.kinds(result.id)[-1:] == ["forgotten"])


def test_a_task_decides_how_long_its_result_stays(pipeline: Pipeline) -> None:
    result = pipeline.tasks.fleeting.delay()
    kept = pipeline.tasks.same.delay("kept")
    assert result.get(timeout=PATIENCE_S) == "soon gone"
    assert kept.get(timeout=PATIENCE_S) == "kept"
    until(lambda: pipeline.app.AsyncResult(result.id).state == states.PENDING)
    assert pipeline.app.AsyncResult(kept.id).state == states.SUCCESS


def test_get_gives_up_in_time(pipeline: Pipeline) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        pipeline.app.AsyncResult(str(uuid.uuid4())).get(timeout=0.5)
    assert time.monotonic() - began > 0.4


def test_a_chord_of_single_tasks_calls_its_body_once(pipeline: Pipeline) -> None:
    result = chord(pipeline.tasks.add.s(number, number) for number in range(10))(pipeline.tasks.total.s())
    assert result.get(timeout=PATIENCE_S) == 90
    assert result.parent.join_native(timeout=PATIENCE_S) == [2 * number for number in range(10)]
    until(lambda: {"sent", "success"} <= set(pipeline.kinds(result.id)))
    assert pipeline.kinds(result.id).count("sent") == 1


def test_a_failing_member_fails_the_chord_as_with_redis(pipeline: Pipeline) -> None:
    members = [pipeline.tasks.same.s(1), pipeline.tasks.fail.s("no luck", 7)]
    result = chord(members)(pipeline.tasks.total.s())
    with pytest.raises(pipeline.tasks.Unlucky):  # its parent's error comes first
        result.get(timeout=PATIENCE_S)
    with pytest.raises(ChordError, match=r"Dependency .* raised Unlucky"):
        pipeline.app.AsyncResult(result.id).get(timeout=PATIENCE_S)
    assert result.state == states.FAILURE


def test_many_waiters_share_one_ear(pipeline: Pipeline) -> None:
    results = [pipeline.tasks.same.delay(number) for number in range(50)]
    assert [result.get(timeout=PATIENCE_S) for result in reversed(results)] == list(reversed(range(50)))


# -- encodings -----------------------------------------------------------------------------------

ENCODINGS: dict[str, dict[str, Any]] = {
    "pickle": {"result_serializer": "pickle"},
    "yaml": {"result_serializer": "yaml"},
    "msgpack": {"result_serializer": "msgpack"},
    "gzip": {"result_compression": "gzip"},
}
NEEDS = {"yaml": "yaml", "msgpack": "msgpack"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_makes_the_round_trip(pipeline: Pipeline, encoding: str) -> None:
    if encoding in NEEDS:
        pytest.importorskip(NEEDS[encoding])
    tasks = pipeline.project(queue=encoding, **ENCODINGS[encoding])
    value = {"text": "ж" * 500, "numbers": [1, 2.5, None, True, 2**40], "empty": []}
    with pipeline.worker(queue=encoding, children=1, **ENCODINGS[encoding]):
        done = tasks.same.delay(value)
        failed = tasks.fail.delay("no luck", 7)
        saved = group(tasks.same.s(number) for number in range(2)).apply_async()
        # Who sends the body knows only the routes of the processors' project.
        body = chord([tasks.same.s(1), tasks.same.s(2)])(tasks.total.s().set(queue=encoding))
        assert done.get(timeout=PATIENCE_S) == value
        with pytest.raises(tasks.Unlucky) as raised:
            failed.get(timeout=PATIENCE_S)
        assert raised.value.args == ("no luck", 7)
        saved.save()
        assert tasks.app.GroupResult.restore(saved.id).join_native(timeout=PATIENCE_S) == [0, 1]
        assert body.get(timeout=PATIENCE_S) == 3
    pipeline.project()  # the module that the other tests use is the default's again


# -- a client that has never heard of us -----------------------------------------------------------

STOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("celery_kafka_backend", "confluent_kafka"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())

from celery import Celery
from celery.result import AsyncResult, GroupResult

app = Celery("stock", backend=sys.argv[1])
what, one = sys.argv[2:]
if what == "get":
    result = AsyncResult(one, app=app)
    print("waiting", result.state, flush=True)
    print(result.get(timeout=180), result.state)
elif what == "fail":
    result = AsyncResult(one, app=app)
    print(type(result.result).__name__, result.result.args, result.state)
elif what == "group":
    print(GroupResult.restore(one, app=app).join(timeout=180))
"""


def stock(backend: str, what: str, one: str) -> subprocess.Popen[str]:
    """Start a client in whose process our package cannot be imported."""
    return subprocess.Popen([sys.executable, "-c", STOCK, backend, what, one], stdout=subprocess.PIPE, text=True)


def stock_backend(pipeline: Pipeline) -> str:
    """What such a client configures to read the primary view."""
    if pipeline.stack.redis is not None:
        return pipeline.stack.redis.url
    if VERSION[:2] < (5, 7):
        pytest.skip("such a Celery keeps results in SQL as pickles, and reads nothing else")
    pytest.importorskip("sqlalchemy")
    return f"db+{pipeline.stack.sqlite_url}"


def test_a_stock_client_reads_the_view(pipeline: Pipeline) -> None:
    backend = stock_backend(pipeline)
    tasks = pipeline.tasks
    done, failed = tasks.add.delay(1, 2), tasks.fail.delay("no", 1)
    results = group(tasks.same.s(number) for number in range(3)).apply_async()
    results.save()
    done.get(timeout=PATIENCE_S)
    failed.get(timeout=PATIENCE_S, propagate=False)
    processes = [stock(backend, "get", done.id), stock(backend, "fail", failed.id), stock(backend, "group", results.id)]
    said = [process.communicate(timeout=PATIENCE_S)[0].splitlines()[-1:] for process in processes]
    assert said == [["3 SUCCESS"], ["Unlucky ('no', 1) FAILURE"], ["[0, 1, 2]"]]


def test_a_stock_client_that_waits_already_is_told(pipeline: Pipeline) -> None:
    task_id = str(uuid.uuid4())
    waiting = stock(stock_backend(pipeline), "get", task_id)
    assert waiting.stdout is not None
    assert waiting.stdout.readline().split() == ["waiting", "PENDING"]
    time.sleep(0.3)  # into get()
    pipeline.tasks.add.apply_async((20, 22), task_id=task_id)
    assert waiting.communicate(timeout=PATIENCE_S)[0].split() == ["42", "SUCCESS"]
