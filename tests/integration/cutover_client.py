"""A client that lives through a cut-over: it reads all the time, and every answer must be right and never go back."""

from __future__ import annotations

import threading
import time

import client_threads
from celery import chord, group
from fleet_app import add, app, ask, fail, nap, progress, total

LOST_S = 180
STATES = ("PENDING", "STARTED", "PROGRESS", "SUCCESS")
done: list[tuple[str, int]] = []
"""Ids and results of tasks that this process has seen end."""
one_asks = threading.Lock()


def wrong(found, expected):
    return None if found == expected else f"{found!r}, not {expected!r}"


def a_result(dice):
    """What one has waited for is there for whoever asks next, in this process."""
    x = dice.randrange(1000)
    sent = add.delay(x, 1)
    found = sent.get(timeout=LOST_S)
    again = app.AsyncResult(sent.id)
    done.append((sent.id, x + 1))
    return wrong((found, again.state, again.result), (x + 1, "SUCCESS", x + 1))


def an_older_result(dice):
    if not done:
        return None
    task_id, expected = dice.choice(done)
    found = app.AsyncResult(task_id)
    return wrong((found.state, found.get(timeout=LOST_S)), ("SUCCESS", expected))


def a_wait(dice):
    """Registered in one view, and perhaps answered by the other."""
    seconds = dice.choice([0.5, 1.5, 4.0])
    return wrong(nap.delay(seconds).get(timeout=LOST_S), seconds)


def a_group_that_is_saved(dice):
    numbers = [dice.randrange(100) for _ in range(3)]
    sent = group(add.s(one, one) for one in numbers).apply_async()
    sent.save()
    restored = app.GroupResult.restore(sent.id)
    if restored is None:
        return "a saved group is not there"
    found = restored.get(timeout=LOST_S)
    restored.delete()
    gone = app.GroupResult.restore(sent.id)
    return wrong((found, gone), ([2 * one for one in numbers], None))


def a_chord(dice):
    numbers = [dice.randrange(100) for _ in range(3)]
    canvas = chord([add.s(one, 0) for one in numbers] + [nap.s(0.5)], total.s())
    return wrong(canvas.apply_async().get(timeout=LOST_S), sum(numbers) + 0.5)


def a_task_that_waits(dice):
    """A worker's child is a client of the view, too. One at a time: they would wait for each other's children."""
    number = dice.randrange(100)
    with one_asks:
        return wrong(ask.delay([number, 1]).get(timeout=LOST_S), [2 * number, 2])


def a_state(dice):
    """No state goes back."""
    sent = progress.delay(dice.randrange(20, 60))
    latest = 0
    until = time.monotonic() + LOST_S
    while latest < len(STATES) - 1:
        state = app.AsyncResult(sent.id).state
        if STATES.index(state) < latest:
            return f"{state} after {STATES[latest]}"
        latest = STATES.index(state)
        if time.monotonic() > until:
            return f"still {state}"
    return None


def a_forgotten_result(dice):
    sent = add.delay(1, 1)
    sent.get(timeout=LOST_S)
    sent.forget()
    return wrong(app.AsyncResult(sent.id).state, "PENDING")


def a_failure(dice):
    sent = fail.delay("on purpose")
    found = sent.get(timeout=LOST_S, propagate=False)
    return wrong((repr(found), app.AsyncResult(sent.id).state), ("ValueError('on purpose')", "FAILURE"))


WAYS = (
    a_result, an_older_result, a_wait, a_group_that_is_saved, a_chord, a_task_that_waits, a_state, a_forgotten_result,
    a_failure,
)  # fmt: skip


def told(way, dice):
    """What is wrong with the answer, and which view gave it."""
    try:
        problem = way(dice)
    except Exception as exc:  # noqa: BLE001 - an answer, too
        problem = repr(exc)
    return {"wrong": problem, "view": app.backend.reader.view.url.partition("://")[0]}


if __name__ == "__main__":
    client_threads.run(WAYS, told)
