"""What an audit finds by itself, over recorded lists with known answers."""

from __future__ import annotations

import json
import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import chord_records, events, order
from celery_kafka_backend.chord_records import Decided, Declared, Fired, Key, Part, Sized
from celery_kafka_backend.events import CHILD, CLIENT, PARENT, Event
from celery_kafka_backend.findings import Chords, Clocks, Finding, Tasks
from tests.examples import tried_on

NOON = 1_750_000_000_000
MINUTE = 60_000
NOW = NOON + 120 * MINUTE
BOUND, GONE = 60 * MINUTE, 10 * MINUTE
RUN = 20_000_000


def event(kind, minute, *, task="t", role=None, worker="w1", result=1, **more):
    role = role or {events.SENT: CLIENT, events.RECEIVED: PARENT}.get(kind, CHILD)
    if kind == events.SUCCESS:
        more["doc"] = msgspec.Raw(json.dumps({"status": "SUCCESS", "result": result, "date_done": minute}).encode())
    at = int(NOON + minute * MINUTE)
    common = {"queue": "q", "run": RUN, "name": "shop.pay", "pid": 1 if role == PARENT else 7, "host": "h", **more}
    ident = common.pop("id", f"{task} {kind} {minute}")
    return Event(
        id=ident, kind=kind, task=task, at=at, hlc=at, role=role, worker=None if role == CLIENT else worker, **common
    )


def found(*given_events, ignored=True, now=NOW):
    tasks = Tasks(ignored_are_recorded=ignored)
    for one in given_events:
        tasks.take(one)
    return list(tasks.findings(now, BOUND, GONE))


def kinds(*given_events, **more):
    return [(one.kind, one.task) for one in found(*given_events, **more)]


def whole(task, begin, **more):
    steps = ((events.SENT, 0), (events.RECEIVED, 0.1), (events.STARTED, 0.2), (events.SUCCESS, 0.3))
    return [event(kind, begin + after, task=task, sent_at=int(NOON + begin * MINUTE), **more) for kind, after in steps]


ALIVE = whole("alive", 119)


def test_a_task_that_ran_is_no_finding():
    assert kinds(*whole("t", 0), *ALIVE) == []


def test_a_task_that_was_sent_and_never_ended_is_one_once_the_bound_has_passed():
    sent = event(events.SENT, 0, queue="other")
    (one,) = found(sent, *ALIVE)
    assert (one.kind, one.task, one.events, one.name, one.queue) == ("unfinished", "t", (sent.id,), "shop.pay", "other")
    assert "sent, then nothing for 7200 s" in one.detail
    assert kinds(event(events.SENT, 61, queue="other"), *ALIVE) == []


def test_a_countdown_and_the_pause_before_a_retry_are_waited_for():
    assert kinds(event(events.SENT, 0, queue="other", eta=NOON + 90 * MINUTE)) == []
    assert kinds(*whole("t", 0)[:3], event(events.RETRY, 1, due=NOON + 90 * MINUTE), *ALIVE) == []


def test_a_queue_that_went_on_without_a_task_has_lost_it():
    (one,) = found(event(events.SENT, 0), *whole("later", 5))
    assert (one.kind, one.task) == ("purged", "t")
    assert "300 s later" in one.detail
    assert kinds(event(events.SENT, 0), *whole("earlier", -5)) == [("unfinished", "t")]


def test_a_task_whose_worker_has_restarted_is_found_without_waiting_for_the_bound():
    started = [event(events.RECEIVED, 100), event(events.STARTED, 100.1)]
    again = event(events.RECEIVED, 105, task="u", pid=2)
    (one,) = [each for each in found(*started, again, *whole("alive", 119, worker="w2")) if each.task == "t"]
    assert one.kind == "worker-gone"
    assert "w1 has restarted (pid 1, now 2)" in one.detail
    assert one.events == (started[1].id,)


def test_a_worker_that_is_silent_while_others_are_not_is_gone_and_an_idle_fleet_is_not():
    started = [event(events.RECEIVED, 100, worker="w2"), event(events.STARTED, 100.1, worker="w2")]
    assert kinds(*started, *ALIVE) == [("worker-gone", "t")]
    assert kinds(*started) == []
    assert kinds(*started, *whole("alive", 119)[:1]) == []


def test_a_long_task_on_a_worker_that_works_is_no_finding_before_the_bound():
    assert kinds(event(events.RECEIVED, 70), event(events.STARTED, 70.1), *ALIVE) == []


def test_two_different_results_of_one_run_contradict_each_other_and_two_equal_ones_do_not():
    one, other = event(events.SUCCESS, 2, result=1), event(events.SUCCESS, 3, result=2, worker="w2")
    (said,) = [each for each in found(one, other) if each.kind == "two-results"]
    assert said.events == (one.id, other.id)
    assert said.detail == "on w1, and on w2"
    assert kinds(one, event(events.SUCCESS, 3, result=1)) == []
    assert kinds(one, event(events.SUCCESS, 3, result=2, run=RUN + 5)) == []


def test_a_state_after_the_end_is_late_and_a_success_after_a_failure_is_the_end():
    late = event(events.STARTED, 5)
    (said,) = found(*whole("t", 0), late)
    assert (said.kind, said.events) == ("late-state", ("t success 0.3", late.id))
    assert kinds(event(events.WORKER_LOST, 1), event(events.STARTED, 2), event(events.SUCCESS, 3)) == []
    for kind in (events.FAILURE, events.WORKER_LOST, events.REVOKED, events.EXPIRED):
        assert kinds(event(events.SUCCESS, 3), event(kind, 4)) == [("late-state", "t")], kind


def test_what_workers_say_who_never_had_a_task_counts_for_nothing():
    assert kinds(*whole("t", 0), event(events.REVOKED, 5, run=None, role=PARENT)) == []


def test_a_guess_that_a_task_was_revoked_is_no_late_state():
    key = order.order_key(order.Rank.GUESSED_REVOKED, NOON + 5 * MINUTE, RUN)
    assert kinds(*whole("t", 0), event(events.REVOKED, 5, key=key, role=PARENT)) == []


def test_ends_of_every_kind_end():
    for kind in (
        events.FAILURE,
        events.WORKER_LOST,
        events.REVOKED,
        events.EXPIRED,
        events.UNKNOWN_TASK,
        events.REJECTED,
        events.FORGOTTEN,
    ):
        assert kinds(event(events.SENT, 0), event(kind, 1), *ALIVE) == [], kind
    assert kinds(event(events.SENT, 0), event(events.STATE, 1, state="IGNORED"), *ALIVE) == []
    assert kinds(event(events.SENT, 0), event(events.REJECTED, 1, requeue=True), *ALIVE) == [("purged", "t")]


def test_tasks_that_never_say_how_they_ended_are_left_out():
    assert kinds(event(events.SENT, 0, ignored=True), ignored=False) == []
    assert kinds(event(events.SENT, 0, ignored=True)) == [("unfinished", "t")]


some = st.sampled_from(
    [
        event(kind, minute, task=task, worker=worker, result=result, id=f"{task}{kind}{minute}{worker}{result}")
        for kind in sorted(events.KINDS - events.GROUP_KINDS)
        for minute in (0, 1, 50, 118)
        for task in "ab"
        for worker, result in (("w1", 1), ("w2", 2))
    ]
)


@tried_on()
@given(st.lists(some, max_size=12, unique_by=lambda one: one.id), st.randoms(use_true_random=False))
def test_the_order_in_which_events_come_and_how_often_makes_no_difference(chosen, chance):
    def key(one: Finding):
        return msgspec.json.encode(one)

    shuffled = [*chosen, *chosen]
    chance.shuffle(shuffled)
    assert sorted(found(*shuffled), key=key) == sorted(found(*chosen), key=key)


# -- clocks and chords -------------------------------------------------------------------------


def test_a_host_that_writes_from_the_future_is_ahead_and_one_of_which_everything_is_old_is_behind():
    clocks = Clocks()
    for n in range(100):
        for host, wrong in (("right", 0), ("ahead", 30_000), ("behind", -30_000)):
            at = NOON + n * 1000
            one = msgspec.structs.replace(event(events.SENT, 0, id=f"{host}{n}"), at=at + wrong, host=host)
            clocks.take(one, at + random.Random(n).randrange(5, 500))
    assert [(one.kind, one.host) for one in clocks.findings()] == [("clock-skew", "ahead"), ("clock-skew", "behind")]


def test_events_of_no_host_are_of_no_clock():
    clocks = Clocks()
    clocks.take(event(events.SENT, 0, host=""), NOON + 30_000)
    assert list(clocks.findings()) == []


def test_one_late_event_is_no_wrong_clock():
    clocks = Clocks()
    clocks.take(event(events.SENT, 0), NOON + 3_600_000)
    clocks.take(event(events.SENT, 1), NOON + MINUTE + 5)
    assert list(clocks.findings()) == []


def chord(*records, now=NOW):
    chords = Chords()
    for minute, record in records:
        chords.take(record, NOON + minute * MINUTE)
    return [(one.group, one.task, one.detail) for one in chords.findings(now, BOUND)]


here = {"group": "g", "generation": 1}
DECLARED = Declared(**here, body=b"{}", body_task_id="body", body_name="total")
PARTS = [Part(**here, task=f"m{n}", index=n, id=f"e{n}", key=1) for n in range(2)]


def test_a_chord_that_waits_for_a_member_is_stuck_once_the_bound_has_passed():
    waiting = [(0, DECLARED), (0, Sized(**here, size=3)), *((1, part) for part in PARTS)]
    assert chord(*waiting) == [("g", "body", "2 of 3 members are in")]
    assert chord(*waiting, (119, PARTS[0])) == []


def test_a_chord_that_was_decided_and_not_fired_is_stuck_and_a_fired_one_is_not():
    decided = Decided(**here, owner="o", outcome=chord_records.SUCCESS, body_task_id="body", body_run=RUN)
    assert chord((0, DECLARED), (1, decided)) == [("g", "body", "decided, not fired")]
    fired = Fired(**here, owner="o", body_task_id="body")
    gone = chord_records.Gone(Key("g", 1, "declared", ()))
    assert chord((0, DECLARED), (1, decided), (1, fired), (2, gone)) == []
