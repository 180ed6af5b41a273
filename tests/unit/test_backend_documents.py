"""The short way to the plainest document gives what Celery's own method gives."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from uuid import uuid4

import msgspec
import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, states
from celery.app.task import Context
from celery.exceptions import NotRegistered
from celery.utils.objects import Bunch
from kombu.exceptions import EncodeError
from kombu.serialization import register_json, registry

from celery_kafka_backend import codec

ZONES = [{}, {"timezone": "Asia/Kolkata"}, {"timezone": "Europe/Berlin", "enable_utc": False}]


def backend_of(conf):
    app = Celery("documents", broker="memory://", backend="kafka://127.0.0.1:9/?view=memory://x", set_as_current=False)
    app.conf.update(conf)
    return app.backend


@pytest.mark.parametrize("conf", [*ZONES, {"result_extended": True}])
@pytest.mark.parametrize("more", [{}, {"group": "g"}, {"parent_id": "p"}])
@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE, states.STARTED])
def test_a_document_is_what_celery_s_own_backends_write(conf, more, state):
    backend = backend_of(conf)
    request = Context({"id": "t", "task": "x", "hostname": "w", "retries": 1, **more})
    ours = backend._meta("t", {"n": 1}, state, None, request)
    theirs = backend._get_result_meta(result={"n": 1}, state=state, traceback=None, request=request)
    assert list(ours) == [*theirs, "task_id"]
    when, expected = ours.pop("date_done"), theirs.pop("date_done")
    assert ours == {**theirs, "task_id": "t"}
    if state in states.READY_STATES:
        when, expected = datetime.fromisoformat(when), datetime.fromisoformat(expected)
        assert abs(when - expected) < timedelta(minutes=1)
        assert when.utcoffset() == expected.utcoffset()
    else:
        assert when is expected is None


def test_children_are_listed_as_celery_lists_them():
    backend = backend_of({})
    child = backend.app.AsyncResult(str(uuid4()))
    request = Context({"id": "t"})
    request.children.append(child)
    ours = backend._meta("t", 1, states.SUCCESS, None, request)
    assert ours["children"] == backend.current_task_children(request) == [child.as_tuple()]


WHEN = datetime(2026, 1, 1)  # noqa: DTZ001 - a task may return a naive one
ODD = ["\U0001f600", "\udcff", "[" * 300, float("nan"), {"x": float("-inf")}, {1: None}, {"d": WHEN}, b"\xff", 10**400]


@pytest.mark.parametrize("result", [None, 1.5, "ü", [{}], *ODD], ids=repr)
def test_the_short_way_to_json_gives_the_bytes_of_kombu_s(result):
    """… or, where they cannot be embedded, leaves them to the long way."""
    backend = backend_of({})
    meta = backend._meta("t", result, states.SUCCESS, None, Context({"id": "t"}))
    found = backend._documents(meta)
    expected = backend.encode(meta).encode()
    if codec.is_json_document(expected):
        assert bytes(found["doc"]) == expected
    else:
        assert found["opaque"].meta == expected


@pytest.mark.parametrize("depth", [200, 300])
def test_what_is_nested_too_deep_is_not_embedded(depth):
    result = []
    for _ in range(depth):
        result = [result]
    backend = backend_of({})
    found = backend._documents(backend._meta("t", result, states.SUCCESS, None, Context({"id": "t"})))
    assert ("doc" in found) == (depth < codec.MAX_DEPTH)


class Interrupted:
    """A soft time limit comes while it is encoded, and another time it does not."""

    seen = False

    def __json__(self):
        if not self.seen:
            self.seen = True
            raise SoftTimeLimitExceeded
        return "encoded"


def test_a_time_limit_that_comes_while_a_state_is_encoded_is_the_task_s():
    backend = backend_of({})
    meta = backend._meta("t", Interrupted(), "PROGRESS", None, Context({"id": "t"}))
    with pytest.raises(SoftTimeLimitExceeded):
        backend._documents(meta)


@pytest.fixture
def json_of_ones_own():
    registry.register("json", lambda value: json.dumps({"mine": value["result"]}), json.loads, "application/json")
    yield
    register_json()


def test_a_user_s_own_json_is_used(json_of_ones_own):
    backend = backend_of({})
    found = backend._documents(backend._meta("t", 1, states.SUCCESS, None, Context({"id": "t"})))
    assert bytes(found["doc"]) == b'{"mine": 1}'


def test_a_message_of_an_unknown_task_fails_as_with_celery_s_own_backends():
    """Celery's consumer hands over a request without an id."""
    backend = backend_of({"result_extended": True})
    request = Bunch(name="x", chord=None, root_id="t", errbacks=None)
    error = NotRegistered("x")
    encoded = backend.encode_result(error, states.FAILURE)
    theirs = json.loads(backend.encode(backend._get_result_meta(encoded, states.FAILURE, None, request)))
    ours = json.loads(backend._state_event("t", error, encoded, states.FAILURE, None, request).document)
    assert list(ours) == [*theirs, "task_id"]
    assert {**ours, "date_done": None} == {**theirs, "date_done": None, "task_id": "t"}


@pytest.mark.parametrize(
    "conf", [{}, {"result_serializer": "pickle", "accept_content": ["json", "pickle"]}], ids=["json", "pickle"]
)
@pytest.mark.parametrize("large", [{"children"}, {"args"}, {"kwargs"}, {"children", "args"}], ids=sorted)
@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE, states.RETRY])
def test_what_is_beside_a_result_never_keeps_it_from_being_stored(conf, large, state, caplog):
    """A task that sent 30,000 others, or whose arguments `result_extended` stores."""
    backend = backend_of({"result_extended": True, **conf})
    backend.settings = backend.recorder.settings = msgspec.structs.replace(backend.settings, max_message_bytes=20_000)
    much = [str(uuid4()) for _ in range(2_000)]
    request = Context(
        {
            "id": "t", "task": "x", "hostname": "w", "retries": 0,
            "args": much if "args" in large else [1], "kwargs": {"a": much} if "kwargs" in large else {"a": 2},
        }
    )  # fmt: skip
    request.children.extend(backend.app.AsyncResult(one) for one in (much if "children" in large else ["c"]))
    result = 42 if state == states.SUCCESS else ValueError(42)
    encoded = backend.encode_result(result, state)
    event = backend._state_event("t", result, encoded, state, None, request)
    record = backend._state_record(event, encoded, None, request)
    assert len(record.value) < 20_000
    found = backend.decode(codec.decode(record.value).document)
    assert found["status"] == state
    assert repr(found["result"]) == repr(backend.decode(backend.encode(encoded)))
    assert bool(found["children"]) == ("children" not in large)
    assert bool(found["args"]) == bool(found["kwargs"]) == (not large & {"args", "kwargs"})
    assert "SUCCESS of t is stored without" in caplog.text or state != states.SUCCESS


def test_a_result_that_is_too_large_itself_is_refused():
    backend, result, request = backend_of({}), "x" * 2_000_000, Context({"id": "t"})
    event = backend._state_event("t", result, result, states.SUCCESS, None, request)
    with pytest.raises(EncodeError, match="max_message_bytes"):
        backend._state_record(event, result, None, request)
