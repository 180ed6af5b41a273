"""Waiting with a view that is polled: it tells once what has changed, so nothing of that may be lost on the way."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery
from celery.result import AsyncResult

from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink
from tests.contract.factories import batch, stated
from tests.patience import PATIENCE_S, until


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/view.db"


@pytest.fixture
def app(url):
    made = Celery("waiting", backend=f"kafka://127.0.0.1:1/?view={url}", set_as_current=False)
    yield made
    made.backend.result_consumer.stop()


@pytest.fixture
def end(url):
    """Call to have tasks end with 42."""
    sink = open_sink(url, StoreOptions())
    sink.open()
    yield lambda *ended: sink.write(batch(*(stated("SUCCESS", task=one.id, value=42) for one in ended)))
    sink.close()


def pending(app, count):
    return [AsyncResult(uuid.uuid4().hex, app=app, backend=app.backend) for _ in range(count)]


def test_an_exception_of_what_is_called_with_a_result_keeps_no_other_from_being_heard(app, end):
    first, *others, last = pending(app, 6)
    heard = []
    for one in others:
        one.then(lambda result: heard.append(result.id))

    def refuse(meta):
        if meta["task_id"] == first.id:
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        first.get(timeout=PATIENCE_S, on_message=refuse, on_interval=lambda *_: end(first, *others))
    last.get(timeout=PATIENCE_S, on_interval=lambda *_: end(last) if len(heard) == len(others) else None)
    assert sorted(heard) == sorted(one.id for one in others)


def test_what_is_called_with_a_message_and_raises_keeps_its_own_result_from_nobody(app, end):
    first, other, last = pending(app, 3)
    heard = []
    other.then(heard.append)

    def refuse(_):
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        first.get(timeout=PATIENCE_S, on_message=refuse, on_interval=lambda *_: end(other))
    last.get(timeout=PATIENCE_S, on_interval=lambda *_: end(last) if heard else None)
    assert heard == [other]


def test_an_interrupt_in_the_moment_when_it_hears_loses_nothing(app, end, monkeypatch):
    first, other = pending(app, 2)
    heard = []
    other.then(heard.append)
    ear = app.backend.result_consumer.ear
    news = ear._news

    def interrupted(found):
        if changed := news(found):
            monkeypatch.undo()
            raise KeyboardInterrupt
        return changed

    monkeypatch.setattr(ear, "_news", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.get(timeout=PATIENCE_S, on_interval=lambda *_: end(other))
    first.get(timeout=PATIENCE_S, on_interval=lambda *_: end(first) if heard else None)
    assert heard == [other]


def test_an_interrupt_in_the_moment_when_it_begins_to_hear_leaves_the_turn_to_other_threads(app, end, monkeypatch):
    first, other = pending(app, 2)
    consumer = app.backend.result_consumer
    takes_turn = consumer._takes_turn

    def interrupted(slice_s):
        assert takes_turn(slice_s)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(consumer, "_takes_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.get(timeout=PATIENCE_S)
    with ThreadPoolExecutor(1) as elsewhere:
        heard = elsewhere.submit(other.get, timeout=PATIENCE_S)
        until(lambda: other.id in consumer.ear._ids and other.id not in consumer.ear._new, "the other thread hears")
        end(other)
        assert heard.result() == 42
