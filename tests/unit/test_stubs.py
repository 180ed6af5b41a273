"""A body is in its declaration once, and nowhere in the messages of its members."""

from __future__ import annotations

import json

import pytest
from celery import Celery, chain, chord, group
from celery.canvas import Signature, maybe_signature

from celery_kafka_backend.producer import headers as names
from celery_kafka_backend.producer.stubs import is_declared, stub, without_bodies

app = Celery("stubs", broker="memory://", backend="cache+memory://", set_as_current=False)


def task(*args):
    return Signature("proj.task", args, app=app)


def declared_body():
    body = task("a large argument" * 1000)
    body.freeze("body-id")
    body.options[names.GENERATION] = 7
    return body


MEMBERS = {
    "the last of a chain": lambda: chain(task(1), task(2), app=app),
    "a group at the end of a chain": lambda: chain(task(1), group(task(2), task(3), app=app), app=app),
    "a chord at the end of a chain": lambda: chain(task(1), chord([task(2), task(3)], task(), app=app), app=app),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_no_message_of_a_member_holds_the_body(member):
    canvas = MEMBERS[member]()
    canvas.freeze(chord=declared_body(), group_id="g")
    before = json.dumps(canvas, default=list)
    assert "large" in before
    without = json.dumps(without_bodies(canvas), default=list)
    assert "large" not in without
    assert "body-id" in without
    assert json.dumps(canvas, default=list) == before, "the user's own canvas was changed"


def test_what_is_left_is_a_signature_of_the_same_canvas():
    canvas = MEMBERS["a chord at the end of a chain"]()
    canvas.freeze(chord=declared_body(), group_id="g")
    again = maybe_signature(json.loads(json.dumps(without_bodies(canvas), default=list)), app=app)
    assert isinstance(again.tasks[1].body, Signature)
    assert again.tasks[1].body.options["chord"]["options"] == {"task_id": "body-id", names.GENERATION: 7}


def test_a_body_that_nobody_declared_stays_whole():
    """The chord of another result backend: its workers need all of it."""
    body = task("large")
    body.freeze("body-id")
    assert not is_declared(body)
    canvas = task(1).set(chord=body)
    assert without_bodies(canvas)["options"]["chord"] == body


def test_a_stub_of_a_stub_is_the_same():
    assert stub(stub(declared_body())) == stub(declared_body())
