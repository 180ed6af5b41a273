"""Two backends' documents compared: what is a difference, and what only looks like one."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest
from celery import Celery
from celery.app.task import Context

from celery_kafka_backend import shadow
from celery_kafka_backend.cli.shadow import Comparing, compare, differing
from celery_kafka_backend.codec import decode


def test_a_task_with_very_many_children_is_in_the_shadow(monkeypatch):
    app = Celery("shadowed", broker="memory://", set_as_current=False)
    mirror = shadow._Mirror(app, "kafka://127.0.0.1:9/?view=memory://x")
    request = Context({"id": "t"})
    request.children.extend(app.AsyncResult(str(number)) for number in range(50_000))
    sent = []
    monkeypatch.setattr(mirror.recorder.publisher, "cast", sent.append)
    mirror.harmless(mirror.stored, 42, "t", 42, "SUCCESS", request=request)
    (record,) = sent
    assert json.loads(decode(record.value).document)["result"] == 42


@pytest.fixture(autouse=True)
def without_a_pause(monkeypatch):
    monkeypatch.setattr("celery_kafka_backend.cli.shadow.PAUSE_S", 0)


NOON = datetime(2025, 6, 15, 12, tzinfo=timezone.utc)


def meta(status="SUCCESS", result=1, at=0.0, **more):
    done = None if status == "STARTED" else (NOON + timedelta(seconds=at)).isoformat()
    return {"status": status, "result": result, "traceback": None, "children": [], "date_done": done, **more}


@pytest.mark.parametrize(
    ("theirs", "ours", "fields"),
    [
        (meta(), meta(), None),
        (meta(), meta(at=1.9), None),
        (meta(), meta(at=2.1), ["date_done"]),
        (meta(), meta(result=2), ["result"]),
        (meta(), meta("FAILURE", result="x", at=0.1), ["result", "status"]),
        (meta(result=0), meta(result=False), None),
        (meta(), meta(queue="celery"), ["queue"]),
        (meta(), meta(queue=None), None),
        (meta("STARTED"), meta(), ["status", "date_done"]),
        (meta(), None, []),
        (None, meta(), []),
        (None, None, None),
    ],
)
def test_what_differs(theirs, ours, fields):
    assert differing(theirs, ours, 2.0) == fields


def compared(theirs, ours, then=lambda: None):
    def reads(documents):
        return lambda ids: {one: documents[one] for one in ids if one in documents}

    sides = Comparing(reads(theirs), reads(ours), 2.0, int((NOON - timedelta(hours=1)).timestamp() * 1000))
    return compare(sides, {*theirs, *ours}, 10, listed=True, settled=then)


def test_what_the_view_shows_a_moment_later_is_no_difference():
    theirs, ours = {"a": meta(), "b": meta(result=2)}, {"a": meta("STARTED", result=None)}
    found = compared(theirs, ours, lambda: ours.update(theirs))
    assert (found.same, found.different) == (2, 0)


def test_what_stays_different_is_named_with_its_fields():
    found = compared({"a": meta(), "b": meta(), "c": meta()}, {"a": meta(), "b": meta(result=7), "d": meta()})
    assert found.same == 1
    assert found.different == 3
    assert [(one.task, one.fields, one.theirs is None, one.ours is None) for one in found.differences] == [
        ("b", ["result"], False, False),
        ("c", [], False, True),
        ("d", [], True, False),
    ]


def test_what_ended_before_the_shadow_or_has_not_ended_is_counted_apart():
    runs = {"runs": meta("STARTED"), "is late": meta("STARTED", result=2)}
    found = compared({"old": meta(at=-7200), **runs}, {"is late": meta("STARTED", result=1)})
    assert (found.earlier, found.in_flight, found.different) == (1, 2, 0)


def test_a_task_that_runs_again_all_the_time_is_in_flight():
    theirs, ours, steps = {"a": meta(result=0)}, {"a": meta(result=-1)}, iter(range(1, 100))

    def move():
        ours["a"] = theirs["a"]
        theirs["a"] = meta(result=next(steps))

    found = compared(theirs, ours, move)
    assert (found.in_flight, found.different) == (1, 0)


@pytest.mark.parametrize("url", ["", "kafka://", "kafka://b/?view=nostore://x", "redis://h", "kafka://b/?nonsense=1"])
def test_an_app_works_as_without_a_shadow_whatever_its_setting_says(url, caplog):
    app = Celery("x", backend="cache+memory://", broker="memory://")
    app.conf.kafka_shadow = url
    shadow.follow(app)
    app.backend.store_result("t", 1, "SUCCESS")
    assert app.AsyncResult("t").get(timeout=1) == 1
    assert bool(url) == ("no shadow" in caplog.text)
