"""What a canvas comes down to for the chord around it."""

from __future__ import annotations

import json

from celery import Celery, chain, chord, group
from celery.app.task import Context
from celery.canvas import Signature
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend.producer.members import errbacks, fingerprint, last_tasks, members
from tests.examples import tried_on

app = Celery("unit", broker="memory://", set_as_current=False)


def task(name="t"):
    return Signature(name, app=app)


CANVASES = st.recursive(
    st.builds(task),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda some: group(some, app=app))
        | st.lists(inner, min_size=2, max_size=3).map(lambda some: chain(*some, app=app))
        | st.tuples(st.lists(inner, min_size=1, max_size=2), inner).map(lambda two: chord(two[0], two[1], app=app))
    ),
    max_leaves=8,
)


def as_sent(canvas):
    return json.loads(json.dumps(canvas, default=list))


@tried_on()
@given(CANVASES)
def test_there_are_as_many_last_tasks_as_celery_counts(canvas):
    assert len(list(last_tasks(canvas))) == chord._descend(canvas)
    assert len(list(last_tasks(as_sent(canvas)))) == chord._descend(canvas)


def test_an_empty_group_at_the_end_of_a_chain_ends_nothing():
    empty = {"task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": []}, "options": {}}
    sent = {"task": "celery.chain", "subtask_type": "chain", "kwargs": {"tasks": [task("first"), empty]}}
    assert [one["task"] for one in last_tasks(sent)] == ["first"]


def test_a_task_that_ran_stands_for_itself():
    request = Context(id="t-1", group="g", chord={"task": "body"})
    assert members(request) == [request]


def test_a_group_that_never_ran_stands_for_its_tasks_in_their_own_places():
    sent = as_sent(group([task().set(task_id=f"t-{n}", group_id="g", group_index=n) for n in range(2)], app=app))
    request = Context(sent, id="of-the-group", chord={"task": "body"}, root_id="root")
    found = members(request)
    assert [(one.id, one.group, one.group_index, one.chord, one.root_id) for one in found] == [
        ("t-0", "g", 0, {"task": "body"}, "root"),
        ("t-1", "g", 1, {"task": "body"}, "root"),
    ]


def test_an_errback_is_known_again_after_it_was_copied_and_encoded():
    errback = task("errback").set(immutable=True)
    canvas = group([task().on_error(errback), task().on_error(errback.clone())], app=app)
    assert {fingerprint(one) for one in errbacks(as_sent(canvas))} == {fingerprint(errback)}
    assert fingerprint(task("another")) != fingerprint(errback)
