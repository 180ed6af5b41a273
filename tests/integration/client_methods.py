"""Every method of Celery's results, each with what it must answer: ``every_method()`` returns how many functions that took.

Imported by scripts that are clients of every kind; the app is `fleet_app`.
"""

from __future__ import annotations

import copy
import pickle
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import fleet_app
import pytest
from celery import VERSION, chain, chord, group
from celery.exceptions import ImproperlyConfigured, IncompleteStream
from celery.exceptions import TimeoutError as NotInTime
from celery.result import AsyncResult, GroupResult, ResultSet, result_from_tuple
from fleet_app import add, app, fail, nap, quiet, spawn, total

SOON = 180


def get():
    assert add.delay(1, 2).get(SOON) == 3
    heard = []
    found = add.delay(1, 2)
    assert found.get(
        timeout=SOON, propagate=True, interval=0.1, no_ack=False, follow_parents=False, disable_sync_subtasks=False,
        on_message=heard.append, callback=lambda task_id, value: heard.append((task_id, value)), on_interval=lambda: None,
    ) == 3  # fmt: skip
    assert (found.id, 3) in heard
    assert found.get() == found.wait() == 3


def get_in_time():
    with pytest.raises(NotInTime):
        AsyncResult(str(uuid.uuid4()), app=app).get(timeout=0.2)
    late = AsyncResult(str(uuid.uuid4()), app=app)
    with pytest.raises(NotInTime):
        late.get(timeout=0.05)
    add.apply_async((1, 2), task_id=late.id)
    assert late.get(timeout=SOON) == 3


def a_timeout_of_zero_asks_once():
    late = AsyncResult(str(uuid.uuid4()), app=app)
    for one in late, ResultSet([late]):
        with pytest.raises(NotInTime):
            one.get(timeout=0)
    add.apply_async((1, 2), task_id=late.id)
    late.get(timeout=SOON)
    assert AsyncResult(late.id, app=app).get(timeout=0) == 3
    assert ResultSet([AsyncResult(late.id, app=app)]).join(timeout=0) == [3]
    assert ResultSet([AsyncResult(late.id, app=app)]).join_native(timeout=0) == [3]


def a_callback_spends_the_time_there_is():
    done, late = add.delay(1, 1), nap.delay(2)
    done.get(timeout=SOON)
    heard = []

    def take(task_id, value):
        heard.append((task_id, value))
        time.sleep(0.3)

    with pytest.raises(NotInTime):
        ResultSet([done, late]).join(timeout=0.2, callback=take)
    assert heard == [(done.id, 2)]


def get_a_failure():
    failed = fail.delay("broken")
    with pytest.raises(ValueError, match="broken"):
        failed.get(timeout=SOON)
    assert isinstance(failed.get(timeout=SOON, propagate=False), ValueError)
    assert failed.failed()
    assert not failed.successful()
    assert "ValueError: broken" in failed.traceback
    with pytest.raises(ValueError, match="broken"):
        failed.maybe_throw()
    heard = []
    assert failed.maybe_reraise(propagate=False, callback=lambda task_id, _: heard.append(task_id)) is failed.result
    assert heard == [failed.id]


def on_message():
    states = []
    found = fleet_app.progress.delay(3)
    assert found.get(timeout=SOON, on_message=lambda meta: states.append(meta["status"])) == 3
    # What was there before the wait began is not a message, with any backend.
    assert set(states) <= {"PENDING", "PROGRESS", "SUCCESS"}
    found = nap.delay(0.3)
    found.get(timeout=SOON, on_message=lambda meta: states.append(meta["task_id"]))
    assert states[-1] == found.id


def follow_parents():
    last = chain(fail.si("first"), add.si(1, 1))()
    with pytest.raises(ValueError, match="first"):
        last.get(timeout=SOON)
    with pytest.raises(ValueError, match="first"):
        last.parent.get(timeout=SOON)


def ignored():
    assert quiet.delay().get(timeout=SOON) is None


def facts():
    found = add.delay(20, 22)
    exists = getattr(AsyncResult, "exists", None)
    assert (exists is None) == (VERSION[:2] < (5, 7))
    assert exists is None or not exists(AsyncResult(str(uuid.uuid4()), app=app))
    found.get(timeout=SOON)
    again = AsyncResult(found.id, app=app)
    assert again.ready()
    assert exists is None or exists(again)
    assert (again.state, again.status, again.result, again.info) == ("SUCCESS", "SUCCESS", 42, 42)
    assert again.date_done is not None
    assert (again.name, again.args, again.kwargs, again.retries, again.queue) == (
        "fleet_app.add",
        [20, 22],
        {},
        0,
        "celery",
    )
    assert "@" in again.worker
    assert result_from_tuple(again.as_tuple(), app=app) == again == copy.copy(again)
    assert again.as_list() == [found.id]


def pickled():
    found = add.delay(1, 1)
    assert pickle.loads(pickle.dumps(found)).get(timeout=SOON) == 2


def then():
    heard = []
    found = add.delay(2, 2)
    found.then(lambda result: heard.append(result.id))
    found.get(timeout=SOON)
    found.then(lambda result: heard.append(result.get()))
    assert heard == [found.id, 4]


def children_and_leaves():
    parent = spawn.delay(3)
    ids = parent.get(timeout=SOON)
    assert [child.id for of in parent.children for child in of.results] == ids
    assert [value for node, value in parent.collect(timeout=SOON) if not node.children][-1] == 4
    end = chain(add.s(1, 1), add.s(2))()
    end.get(timeout=SOON)
    assert end.parent.get_leaf() == 4
    assert len(end.parent.build_graph().topsort()) == 2
    with pytest.raises(IncompleteStream):
        list(AsyncResult(str(uuid.uuid4()), app=app).iterdeps())


def forget():
    found = add.delay(1, 1)
    found.get(timeout=SOON)
    found.forget()
    assert AsyncResult(found.id, app=app).state == "PENDING"


def group_result():
    made = group(add.s(i, i) for i in range(5)).apply_async()
    assert made.get(timeout=SOON) == made.join(timeout=SOON) == made.join_native(timeout=SOON) == [0, 2, 4, 6, 8]
    assert made.ready()
    assert made.successful()
    assert (made.waiting(), made.failed(), made.completed_count(), len(made)) == (False, False, 5, 5)
    fresh = group(add.s(i, 1) for i in range(5)).apply_async()
    assert {task_id: meta["result"] for task_id, meta in fresh.iter_native(timeout=SOON)} == {
        one.id: i + 1 for i, one in enumerate(fresh.results)
    }
    heard = {}
    group(add.s(i, 2) for i in range(5)).apply_async().get(timeout=SOON, callback=heard.__setitem__)
    assert sorted(heard.values()) == [2, 3, 4, 5, 6]
    with pytest.raises(ImproperlyConfigured):
        made.join(on_message=print)


def group_with_a_failure():
    made = group(add.s(1, 1), fail.s("member"), nap.s(0.1)).apply_async()
    with pytest.raises(ValueError, match="member"):
        made.get(timeout=SOON)
    found = made.join(timeout=SOON, propagate=False)
    assert (found[0], str(found[1]), found[2]) == (2, "member", 0.1)
    assert made.failed()
    assert made.completed_count() == 2


def group_in_time():
    with pytest.raises(NotInTime):
        GroupResult(str(uuid.uuid4()), [AsyncResult(str(uuid.uuid4()), app=app), add.delay(1, 1)], app=app).get(
            timeout=0.05
        )


def saved_group():
    made = group(add.s(i, i) for i in range(3)).apply_async()
    made.save()
    found = GroupResult.restore(made.id, app=app)
    assert found == made
    assert found.get(timeout=SOON) == [0, 2, 4]
    found.delete()
    assert GroupResult.restore(made.id, app=app) is None


def result_set():
    sent_later = AsyncResult(str(uuid.uuid4()), app=app)
    found = ResultSet([sent_later])
    found.add(add.delay(2, 2))
    add.apply_async((1, 1), task_id=sent_later.id)
    gone = add.delay(3, 3)
    found.update([gone])
    found.remove(gone.id)
    found.discard(gone)
    heard = []
    found.then(lambda _: heard.append("all"))
    assert found.join_native(timeout=SOON) == [2, 4]
    assert heard == ["all"]
    late = add.delay(5, 5)
    if VERSION[:2] < (5, 7):  # a set that has ended waits for no new member
        with pytest.raises(ValueError, match="full barrier"):
            found.add(late)
        found.discard(late)
    else:
        found.add(late)
        assert found.join_native(timeout=SOON) == [2, 4, 10]
    found.forget()
    found.clear()
    assert len(found) == 0


def nested_groups():
    made = group(chain(add.s(1, 1), group(add.s(1), add.s(2))), add.s(3, 3)).apply_async()
    assert made.get(timeout=SOON) == [[3, 4], 6]


def a_nested_group_in_time():
    """Celery waits for the members of a group in a group without a timeout; and these may have been sent in another thread."""
    with ThreadPoolExecutor(1) as elsewhere:
        never = elsewhere.submit(lambda: AsyncResult(str(uuid.uuid4()), app=app)).result()
    done = add.delay(1, 1)
    inside = GroupResult(str(uuid.uuid4()), [never], app=app)
    for nested in inside, GroupResult(str(uuid.uuid4()), [inside], app=app):
        for how in GroupResult.get, GroupResult.join, GroupResult.join_native:
            with pytest.raises(NotInTime):
                how(GroupResult(str(uuid.uuid4()), [nested, done], app=app), timeout=0.2)
    failed = GroupResult(str(uuid.uuid4()), [fail.delay("inside")], app=app)
    with pytest.raises(ValueError, match="inside"):
        GroupResult(str(uuid.uuid4()), [failed, never], app=app).get(timeout=SOON)


def chords():
    assert chord([add.s(i, i) for i in range(5)])(total.s()).get(timeout=SOON) == 20


def many_at_once():
    sent = [add.delay(i, 1) for i in range(40)]
    assert [one.get(timeout=SOON) for one in sent] == [i + 1 for i in range(40)]


METHODS = (
    get, get_in_time, get_a_failure, on_message, follow_parents, ignored, facts, pickled, then, children_and_leaves, forget,
    group_result, group_with_a_failure, group_in_time, saved_group, result_set, nested_groups,
    a_nested_group_in_time, chords, many_at_once,
)  # fmt: skip


def every_method():
    for method in METHODS:
        method()
    return len(METHODS)
