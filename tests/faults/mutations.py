"""Lies about a run, one for every way in which results are lost: a checker that believes one of them is broken.

Each takes the evidence of a healthy run and returns that of one where something went wrong. They pick what they spoil by
themselves, so they work on made-up evidence as on a real run's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tests.faults.checker import Evidence, Shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.faults.checker import Chord, Execution, LogEvent

LATE_S = 10_000.0


class Mutation(NamedTuple):
    """A lie, and the check that has to notice it."""

    check: str
    tell: Callable[[Evidence], Evidence]


def _stored(e: Evidence) -> Execution:
    """A success that is stored and shown."""
    return next(
        one
        for one in e.executions
        if one.stored and not one.ignored and one.state == "SUCCESS" and e.view[one.task].value == one.value
    )


def _fired(e: Evidence) -> Chord:
    """A chord whose body ran, as it had to."""
    stored = {one.task for one in e.executions if one.stored}
    return next(one for one in e.chords if one.applied and stored.issuperset(one.members) and e.bodies.get(one.body))


def _without(table: Mapping, key: str) -> dict:
    return {name: value for name, value in table.items() if name != key}


def _greatest(e: Evidence, task: str) -> LogEvent:
    return max((event for event in e.log or () if event.task == task), key=lambda event: (event.key, event.id))


def result_dropped(e: Evidence) -> Evidence:
    return e._replace(view=_without(e.view, _stored(e).task))


def result_unready(e: Evidence) -> Evidence:
    task = _stored(e).task
    return e._replace(view={**e.view, task: e.view[task]._replace(state="STARTED", value="{}")})


def result_failed(e: Evidence) -> Evidence:
    task = _stored(e).task
    return e._replace(view={**e.view, task: e.view[task]._replace(state="FAILURE", value="WorkerLostError: gone")})


def value_changed(e: Evidence) -> Evidence:
    task = _stored(e).task
    return e._replace(view={**e.view, task: e.view[task]._replace(value="another")})


def values_swapped(e: Evidence) -> Evidence:
    first = _stored(e)
    second = next(one for one in reversed(e.executions) if one.task != first.task and one.task in e.view)
    return e._replace(view={**e.view, first.task: e.view[second.task], second.task: e.view[first.task]})


def acknowledged_but_not_logged(e: Evidence) -> Evidence:
    lost = _stored(e)
    kept = tuple(event for event in e.log or () if (event.task, event.value) != (lost.task, lost.value))
    return e._replace(log=kept)


def completed_without_a_trace(e: Evidence) -> Evidence:
    lost = _stored(e)
    ended = tuple(one._replace(stored=False, survived=True) if one.task == lost.task else one for one in e.executions)
    return result_dropped(e)._replace(
        executions=ended, log=None if e.log is None else tuple(event for event in e.log if event.task != lost.task)
    )


def ignored_but_shown(e: Evidence) -> Evidence:
    one = next(one for one in e.executions if one.ignored)
    return e._replace(view={**e.view, one.task: Shown("SUCCESS", one.value, 1)})


def get_invents(e: Evidence) -> Evidence:
    get = next(get for get in e.gets if get.outcome == "value")
    return e._replace(gets=(get._replace(values=("another",) * len(get.values)), *e.gets))


def get_late(e: Evidence) -> Evidence:
    return e._replace(gets=(e.gets[0]._replace(took_s=LATE_S), *e.gets))


def get_raises(e: Evidence) -> Evidence:
    return e._replace(gets=(e.gets[0]._replace(outcome="error", error="ConnectionError: "), *e.gets))


def send_blocks(e: Evidence) -> Evidence:
    return e._replace(sendings=(e.sendings[0]._replace(took_s=LATE_S), *e.sendings))


def send_raises(e: Evidence) -> Evidence:
    sending = next(one for one in e.sendings if one.kind != "chord")
    return e._replace(sendings=(sending._replace(error="OperationalError: no Kafka"), *e.sendings))


def seen_backwards(e: Evidence) -> Evidence:
    task, states = next(iter(e.seen.items()))
    return e._replace(seen={**e.seen, task: (*states, states[-1]._replace(key=states[-1].key - 1))})


def seen_started_after_success(e: Evidence) -> Evidence:
    task, states = next((task, states) for task, states in e.seen.items() if states[-1].state == "SUCCESS")
    # As a store without order keys would show it: only the state tells.
    again = states[-1]._replace(state="STARTED", value="{}")
    return e._replace(seen={**e.seen, task: (*states, again)})


def seen_another_success(e: Evidence) -> Evidence:
    task, states = next((task, states) for task, states in e.seen.items() if states[-1].state == "SUCCESS")
    again = states[-1]._replace(value="another")
    return e._replace(seen={**e.seen, task: (*states, again)})


def seen_vanishing(e: Evidence) -> Evidence:
    task, states = next((task, states) for task, states in e.seen.items() if states[-1].state is not None)
    return e._replace(seen={**e.seen, task: (*states, states[-1]._replace(state=None, value=""))})


def event_not_in_history(e: Evidence) -> Evidence:
    event = (e.log or ())[0]
    return e._replace(history={**e.history, event.task: e.history[event.task] - {event.id}}, letters=frozenset())


def older_event_shown(e: Evidence) -> Evidence:
    # One whose start is in the log: nobody waits for that, so a storm may have swallowed it.
    started = {event.task: event for event in e.log or () if event.state == "STARTED"}
    older = next(started[one.task] for one in e.executions if one.stored and not one.ignored and one.task in started)
    assert older.key < _greatest(e, older.task).key
    return e._replace(view={**e.view, older.task: Shown(older.state, older.value, older.key)})


def body_not_sent(e: Evidence) -> Evidence:
    body = _fired(e).body
    return e._replace(began=_without(e.began, body), view=_without(e.view, body), deaths=())


def body_got_other_values(e: Evidence) -> Evidence:
    chord = _fired(e)
    return e._replace(bodies={**e.bodies, chord.body: ((*chord.values[1:], -1),)})


def body_sent_twice(e: Evidence) -> Evidence:
    body = _fired(e).body
    # Nobody waits for the event of a sending, so a storm may have swallowed the real one.
    sent = next(event for event in e.log or () if event.task == body)._replace(kind="sent")
    return e._replace(log=(*(e.log or ()), sent, sent), calm=True)


def restless(e: Evidence) -> Evidence:
    return e._replace(stuck=("the view is behind",))


def never_ends(e: Evidence) -> Evidence:
    return e._replace(exits=(*e.exits, ("worker", None, 90.0)))


def ends_badly(e: Evidence) -> Evidence:
    return e._replace(exits=(*e.exits, ("worker", 1, 1.0)))


MUTATIONS: dict[str, Mutation] = {
    tell.__name__: Mutation(check, tell)
    for check, tells in {
        "acknowledged": (result_dropped, result_unready, result_failed, acknowledged_but_not_logged),
        "completed": (completed_without_a_trace,),
        "ignored": (ignored_but_shown,),
        "truthful": (value_changed, values_swapped, get_invents),
        "forwards": (seen_backwards, seen_started_after_success, seen_another_success, seen_vanishing),
        "in time": (get_late, get_raises, send_blocks, send_raises),
        "nothing falls out": (event_not_in_history, older_event_shown),
        "chords fire": (body_not_sent, body_got_other_values),
        "chords fire once": (body_sent_twice,),
        "at rest": (restless, never_ends, ends_badly),
    }.items()
    for tell in tells
}
