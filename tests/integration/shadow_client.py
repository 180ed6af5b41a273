"""A client of a fleet in shadow mode: ``python shadow_client.py all|moving`` checks what it is told, and prints ids."""

from __future__ import annotations

import sys

from celery import chord, group
from fleet_app import add, app, fail, flaky, progress, replaced, total

SOON = 180


def everything():
    """Whatever stores something."""
    adds = [add.delay(n, n) for n in range(20)]
    failed, tried, moved = fail.delay("on purpose"), flaky.delay(2), progress.delay(3)
    canvas = chord([add.si(1, 1), add.si(2, 2)], total.s()).apply_async()
    inside = replaced.delay(1, 2)
    saved = group(add.s(n, 1) for n in range(3)).apply_async()
    saved.save()
    gone = add.delay(3, 3)
    assert [one.get(timeout=SOON) for one in adds] == [2 * n for n in range(20)]
    assert repr(failed.get(timeout=SOON, propagate=False)) == "ValueError('on purpose')"
    assert [one.get(timeout=SOON) for one in (tried, moved, canvas, inside, gone)] == [2, 3, 6, 3, 6]
    assert app.GroupResult.restore(saved.id).get(timeout=SOON) == [1, 2, 3]
    gone.forget()
    print(adds[0].id, failed.id)


def moving():
    """States that change all the time."""
    sent = [progress.delay(200) for _ in range(30)]
    print("sent", flush=True)
    assert [one.get(timeout=SOON) for one in sent] == [200] * 30


if __name__ == "__main__":
    {"all": everything, "moving": moving}[sys.argv[1]]()
