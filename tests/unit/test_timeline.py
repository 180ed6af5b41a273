"""The causal order of a task's events, its state at any moment, and its workflow, over recorded lists."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import events, order, timeline
from celery_kafka_backend.events import Event
from celery_kafka_backend.order import Rank
from tests.examples import tried_on

NOON = 1_750_000_000_000
RUN = order.run_at(NOON)
RANKS = {
    events.STARTED: Rank.UNREADY, events.STATE: Rank.UNREADY, events.RETRY: Rank.UNREADY,
    events.SUCCESS: Rank.SUCCEEDED, events.FAILURE: Rank.FAILED, events.WORKER_LOST: Rank.FAILED, events.REVOKED: Rank.FAILED,
}  # fmt: skip


def event(kind, at, *, task="t", run=RUN, attempt=0, role=None, **more):
    """An event; ``at`` is ms since noon."""
    role = role or {events.SENT: events.CLIENT, events.RECEIVED: events.PARENT}.get(kind, events.CHILD)
    key = order.order_key(RANKS[kind], NOON + at, run) if kind in RANKS else 0
    if kind == events.FORGOTTEN:
        key = order.forget_key(run)
    ident = more.pop("id", f"{task} {kind} {at} {attempt} {role}")
    return Event(
        id=ident,
        kind=kind,
        task=task,
        key=key,
        at=NOON + at,
        hlc=NOON + at,
        run=run,
        attempt=attempt,
        role=role,
        **more,
    )


LIFE = [
    event(events.SENT, 0),
    event(events.RECEIVED, 10),
    event(events.STARTED, 20),
    event(events.RETRY, 30),
    event(events.SENT, 31, attempt=1, role=events.CHILD),
    event(events.RECEIVED, 40, attempt=1),
    event(events.STARTED, 50, attempt=1),
    event(events.STATE, 60, attempt=1, state="PROGRESS"),
    event(events.SUCCESS, 70, attempt=1),
]


def ids(found):
    return [one.id for one in found]


def test_any_order_and_any_duplication_gives_one_order():
    for seed in range(50):
        shuffled = LIFE * 2
        random.Random(seed).shuffle(shuffled)
        assert timeline.causal(shuffled) == LIFE


def test_a_clock_that_is_years_ahead_does_not_put_an_effect_before_its_cause():
    poisoned = [event(events.SENT, 2_000_000_000_000), *LIFE[1:]]
    assert timeline.causal(reversed(poisoned)) == poisoned
    retry_late = [*LIFE[:3], event(events.RETRY, 2_000_000_000_000), *LIFE[4:]]
    assert timeline.causal(retry_late) == retry_late


def test_clocks_that_tie_are_decided_by_what_happens_first():
    tied = [event(kind, 5) for kind in (events.SENT, events.RECEIVED, events.STARTED, events.SUCCESS)]
    for shuffled in itertools.permutations(tied):
        assert timeline.causal(shuffled) == tied


def test_an_event_of_an_unknown_run_stands_in_for_no_cause_of_a_known_one():
    stray = event(events.SENT, 0, run=None)
    poisoned = event(events.SENT, 2_000_000_000_000)
    received = event(events.RECEIVED, 10)
    assert timeline.causal([received, poisoned, stray]) == [stray, poisoned, received]
    guess = event(events.RECEIVED, 20, role=events.OPERATOR)
    late = [event(events.RECEIVED, 2_000_000_000_000), event(events.STARTED, 30)]
    assert timeline.causal([*late, guess]) == [guess, *late]


def test_a_redelivery_stays_where_its_clock_says():
    again = [
        *LIFE[:3],
        event(events.RECEIVED, 25, redelivered=True),
        event(events.STARTED, 26),
        event(events.SUCCESS, 29),
    ]
    assert timeline.causal(reversed(again)) == again


def test_what_was_rejected_or_expired_before_another_worker_started_it_stays_there():
    for kind in (events.REJECTED, events.EXPIRED, events.REVOKED):
        refused = event(kind, 15, role=events.PARENT, requeue=kind == events.REJECTED)
        life = [*LIFE[:2], refused, event(events.RECEIVED, 16), *LIFE[2:]]
        assert timeline.causal(reversed(life)) == life, kind
    terminated = [*LIFE[:2], event(events.STARTED, 10**12), event(events.REVOKED, 15, terminated=True)]
    assert timeline.causal(reversed(terminated)) == terminated
    requeued = [*LIFE[:2], event(events.REJECTED, 15, requeue=True), event(events.STARTED, 20)]
    assert timeline.state(timeline.causal(requeued)) == "started"


def test_runs_come_one_after_the_other_and_an_event_of_no_known_run_with_the_one_that_it_fell_into():
    later = RUN + 10
    second = [event(events.SENT, 80_000, run=later), event(events.SUCCESS, 80_100, run=later)]
    guess = event(events.REVOKED, 80_050, run=None)
    early = event(events.REVOKED, -600_000, run=None)
    found = timeline.runs([guess, *second, *LIFE, early])
    assert [run.number for run in found] == [RUN, later]
    assert found[0].events == (early, *LIFE)
    assert found[1].events == (second[0], guess, second[1])


def test_nothing_is_nothing():
    assert timeline.causal([]) == []
    assert timeline.state([]) == timeline.UNKNOWN
    assert not timeline.ended([])


kinds = st.sampled_from(sorted(events.KINDS - events.GROUP_KINDS))
made = st.builds(
    lambda kind, at, attempt, run, role, n: event(kind, at, attempt=attempt, run=run, role=role, id=f"{n}{kind}{at}"),
    kinds, st.integers(0, 50) | st.just(10**12), st.integers(0, 3), st.sampled_from([RUN, RUN + 1, None]),
    st.sampled_from([events.CLIENT, events.PARENT, events.CHILD, events.OPERATOR]), st.integers(0, 1_000_000),
)  # fmt: skip


@tried_on()
@given(st.lists(made, max_size=14, unique_by=lambda one: one.id), st.randoms(use_true_random=False))
def test_every_event_is_there_once_and_the_order_does_not_depend_on_how_they_came(found, chance):
    ordered = timeline.causal(found)
    assert sorted(ids(ordered)) == sorted(ids(found))
    shuffled = found + found[: len(found) // 2]
    chance.shuffle(shuffled)
    assert timeline.causal(shuffled) == ordered


@tried_on()
@given(st.lists(made, max_size=14, unique_by=lambda one: one.id))
def test_of_one_attempt_the_first_sent_is_before_the_first_received_before_the_first_started(found):
    for run in timeline.runs(found):
        for attempt in range(4):
            firsts = []
            for kind, roles in (
                (events.SENT, {events.CLIENT, events.PARENT, events.CHILD, events.OPERATOR}),
                (events.RECEIVED, {events.PARENT, events.CHILD}),
                (events.STARTED, {events.PARENT, events.CHILD}),
            ):
                places = [
                    n for n, one in enumerate(run.events)
                    if one.kind == kind and one.attempt == attempt and one.role in roles and one.run is not None
                ]  # fmt: skip
                firsts += places[:1]
            assert firsts == sorted(firsts)


@tried_on()
@given(
    st.lists(
        made.filter(lambda one: one.hlc < NOON + 1000 and one.run is not None),
        max_size=14,
        unique_by=lambda one: one.hlc,
    )
)
def test_where_no_clock_contradicts_a_cause_the_order_is_the_clocks(found):
    for run in timeline.runs(found):
        by_clock = sorted(run.events, key=lambda one: one.hlc)
        stages = [(one.attempt, timeline._STAGES.get(one.kind, 4)) for one in by_clock]
        if stages == sorted(stages):
            assert list(run.events) == by_clock


# -- as it was then ----------------------------------------------------------------------------


def test_the_state_at_every_moment_of_a_life():
    said = [timeline.state(timeline.as_of(LIFE, NOON + at)) for at in (-1, 0, 15, 25, 30, 35, 45, 55, 65, 70, 10**6)]
    assert said == [
        "unknown", "sent", "received", "started", "retry", "sent", "received", "started", "PROGRESS", "success", "success",
    ]  # fmt: skip


def test_a_late_state_does_not_undo_an_end_and_a_forget_does():
    late = [*LIFE, event(events.STARTED, 80)]
    assert timeline.state(timeline.causal(late)) == "success"
    assert timeline.state([*late, event(events.FORGOTTEN, 90, role=events.CLIENT)]) == "forgotten"


def test_a_new_run_counts_not_the_old_one():
    again = [*LIFE, event(events.SENT, 80_000, run=RUN + 10)]
    assert timeline.state(again) == "sent"
    assert timeline.ended(LIFE)
    assert not timeline.ended(again)


# -- a workflow --------------------------------------------------------------------------------


def lives(*rows):
    """(task, parent, at) each."""
    return [event(events.SENT, at, task=task, parent=parent, root="a") for task, parent, at in rows]


def test_a_workflow_is_a_tree_and_siblings_come_by_time():
    found = lives(("d", "c", 9), ("a", None, 0), ("c", "a", 5), ("b", "a", 3), ("e", "b", 20))
    shape = [(node.task, node.depth) for node in timeline.tree(found, "a")]
    assert shape == [("a", 0), ("b", 1), ("e", 2), ("c", 1), ("d", 2)]
    assert [(node.task, node.depth) for node in timeline.tree(found, "c")] == [("c", 0), ("d", 1)]


def test_a_task_whose_parent_left_no_event_is_below_the_first():
    found = lives(("a", None, 0), ("lonely", "lost", 5))
    assert [(node.task, node.depth) for node in timeline.tree(found, "a")] == [("a", 0), ("lonely", 1)]


def test_a_circle_of_parents_ends():
    found = lives(("a", "b", 0), ("b", "a", 1))
    assert {node.task for node in timeline.tree(found, "a")} == {"a", "b"}


def test_a_workflow_deeper_than_the_recursion_limit():
    chain = lives(*((str(n) if n else "a", (str(n - 1) if n > 1 else "a") if n else None, n) for n in range(5_000)))
    assert timeline.tree(chain, "a")[-1].depth == 4_999


def test_causes_are_said():
    assert (
        timeline.cause(event(events.SENT, 0, parent="p", root="r", beat="nightly"))
        == "schedule nightly, parent p, root r"
    )
    assert timeline.cause(event(events.SENT, 0, attempt=2)) == "retry 2"
    assert timeline.cause(event(events.REVOKED, 0, by="ann@ops", signum=15)) == "by ann@ops, signal 15"


# -- many tasks --------------------------------------------------------------------------------


@tried_on()
@given(st.lists(made.filter(lambda one: one.hlc < NOON + 1000), max_size=14, unique_by=lambda one: one.hlc))
def test_a_tally_says_of_each_task_what_its_state_is(found):
    # By clocks that put no effect before its cause, which is what a tally goes by.
    ordered = sorted(found, key=timeline._clock)
    if ids(timeline.latest_run(timeline.causal(found))) != ids(timeline.latest_run(ordered)):
        return
    tally = timeline.Tally()
    for one in [*found, *reversed(found)]:
        tally.take(one)
    assert list(tally.counts().elements()) == ([("", timeline.state(ordered))] if found else [])


def test_a_tally_counts_tasks_by_name_and_state():
    tally = timeline.Tally()
    for n in range(3):
        tally.take(event(events.SENT, 0, task=f"t{n}", name="shop.pay"))
    tally.take(event(events.SUCCESS, 5, task="t0"))
    tally.take(event(events.GROUP_SAVED, 5, task="g"))
    assert tally.counts() == {("shop.pay", "sent"): 2, ("shop.pay", "success"): 1}
