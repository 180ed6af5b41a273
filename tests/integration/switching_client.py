"""A client under load while the fleet is switched: sends canvases of every shape, waits for each, compares the answer."""

from __future__ import annotations

import client_threads
import fleet_app
from celery import VERSION, chain, chord, group
from celery.exceptions import ChordError
from fleet_app import add, adds_to_chord, fail, fan_in, flaky, listed, nap, replaced, total

LOST_S = 180


def task(dice):
    a = dice.randrange(100)
    return add.s(a, 1), a + 1


def group_of_tasks(dice):
    a = dice.randrange(100)
    return group(add.s(a, i) for i in range(4)), [a, a + 1, a + 2, a + 3]


def open_chord(dice):
    """Open while workers come and go."""
    naps = [dice.choice([0.1, 0.3, 0.6, 1.5]) for _ in range(4)]
    return chord([nap.s(one) for one in naps], listed.s()), naps


def chord_of_groups(dice):
    """Nested, so that who completes it on Redis reads every member's result back."""
    a = dice.randrange(100)
    return chord([chain(nap.s(0.5), group(add.s(a), add.s(1))), add.s(a, 2)], listed.s()), [[a + 0.5, 1.5], a + 2]


def chord_in_a_chain(dice):
    a = dice.randrange(100)
    return chain(nap.s(0.5), group(add.s(a), add.s(1)), total.s()), a + 2.0


def chord_with_retries(dice):
    return chord([flaky.s(1), flaky.s(2), add.s(1, 1)], listed.s()), [1, 2, 2]


def chord_in_a_chord(dice):
    a = dice.randrange(100)
    return chord([chord([nap.s(0.5), add.s(a, 0)], total.s()), add.s(a, 1)], total.s()), 2 * a + 1.5


def chord_with_a_replaced_member(dice):
    return chord([replaced.s(1, 2), add.s(3, 4)], listed.s()), [3, 7]


def chord_that_is_extended(dice):
    return chord([adds_to_chord.s(dict(add.s(1, 1)), 5), nap.s(0.5)], total.s()), 7.5


def failing_chord(dice):
    return chord([add.s(1, 1), fail.s("on purpose"), nap.s(0.5)], total.s()), "on purpose"


def begun_in_a_task(dice):
    return fan_in.s(4), 12


SHAPES = (
    task, group_of_tasks, open_chord, chord_of_groups, chord_in_a_chain, chord_with_retries, chord_in_a_chord,
    chord_with_a_replaced_member, chord_that_is_extended, failing_chord, begun_in_a_task,
)  # fmt: skip
if VERSION[:2] < (5, 7):
    # Celery's own Redis backend joins a nested header without waiting for all of it: None for a member, or no end at all.
    SHAPES = tuple(shape for shape in SHAPES if shape is not chord_of_groups)


def answer(shape, canvas):
    sent = canvas.apply_async()
    if shape is failing_chord:
        try:
            return f"no exception but {sent.get(timeout=LOST_S)!r}"
        except (ValueError, ChordError) as exc:
            return "on purpose" if "on purpose" in str(exc) else repr(exc)
    found = sent.get(timeout=LOST_S)
    return fleet_app.app.AsyncResult(found).get(timeout=LOST_S) if shape is begun_in_a_task else found


def told(shape, dice):
    """What came out, and what should have."""
    canvas, expected = shape(dice)
    try:
        found = answer(shape, canvas)
    except Exception as exc:  # noqa: BLE001 - an answer, too
        found = repr(exc)
    return {"expected": expected, "found": found}


if __name__ == "__main__":
    client_threads.run(SHAPES, told)
