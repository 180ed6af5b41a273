"""A failed chord's member says what really happened, also when its end is shown after the chord's."""

from __future__ import annotations

import contextlib
import time

import pytest
from celery import Celery
from celery.exceptions import ChordError
from celery.result import AsyncResult, GroupResult

from celery_kafka_backend import parents
from celery_kafka_backend.parents import Parents

FAILED = {"status": "FAILURE", "result": ValueError("broken"), "traceback": None, "children": []}
DONE = {"status": "SUCCESS", "result": 1, "traceback": None, "children": []}


class Late:
    """A view that shows each member's end when it has been asked so many times."""

    def __init__(self, ends, after):
        self.asked = 0
        self._ends = ends
        self._after = after

    def documents(self, ids):
        self.asked += 1
        return {one: one for one in ids if self.asked > self._after[one]}

    def pending(self, ids):
        return contextlib.nullcontext()

    def decode_result(self, one):
        return {**self._ends[one], "task_id": one}


@pytest.fixture
def body():
    app = Celery(set_as_current=False, backend="cache+memory://")
    header = GroupResult("header", [AsyncResult("a", app=app), AsyncResult("b", app=app)], app=app)
    return AsyncResult("body", app=app, parent=header)


def ended(result, error):
    result._cache = {"status": "FAILURE", "result": error, "traceback": None, "children": [], "task_id": result.id}


def test_a_member_that_is_shown_later_is_waited_for(body):
    view = Late({"a": DONE, "b": FAILED}, {"a": 0, "b": 3})
    ended(body, ChordError("Dependency b raised ValueError('broken')"))
    with pytest.raises(ValueError, match="broken"):
        Parents(view, body, lambda: None).settle(None)
    assert view.asked == 4


def test_a_chord_that_failed_by_itself_is_not_waited_for(body):
    view = Late({"a": DONE, "b": DONE}, {"a": 0, "b": 0})
    ended(body, ChordError("Join error"))
    Parents(view, body, lambda: None).settle(None)
    assert view.asked == 1


def test_a_body_that_failed_by_itself_asks_nobody(body):
    view = Late({}, {"a": 0, "b": 0})
    ended(body, KeyError("mine"))
    Parents(view, body, lambda: None).settle(None)
    assert view.asked == 0


def test_it_ends_in_time(body, monkeypatch):
    view = Late({}, {"a": 1 << 30, "b": 1 << 30})
    ended(body, ChordError("Dependency c raised"))
    waiting = Parents(view, body, lambda: None)
    waiting.settle(time.monotonic())
    assert view.asked == 1
    monkeypatch.setattr(parents, "SETTLE_S", 0.05)
    waiting.settle(None)
    assert view.asked > 1
