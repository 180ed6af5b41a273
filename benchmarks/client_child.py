"""A client's process: sends tasks to a worker, reads their results, prints one JSON object."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from celery import chord, group
from celery.result import GroupResult, ResultSet

from benchmarks.celery_app import add, app, compute, count, nothing, wait

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S = 60.0
WARM_UP = 30
THREADS = 8


def main() -> None:
    given = json.loads(sys.argv[1])
    print(
        json.dumps(
            {
                "sequential": _sequential,
                "steady": _steady,
                "ends": _ends,
                "batch": _batch,
                "spans": _spans,
                "chord": _chord,
                "chords": _chords,
                "group": _group,
            }[given["mode"]](given)
        ),
        flush=True,
    )


def _warm_up(count: int = WARM_UP) -> None:
    for _ in range(count):
        add.delay(1, 2).get(timeout=TIMEOUT_S)


def _sequential(given: dict[str, Any]) -> dict[str, Any]:
    """One round trip after the other."""
    _warm_up()
    found = []
    for number in range(given["tasks"]):
        began = time.monotonic()
        assert add.delay(number, 1).get(timeout=TIMEOUT_S) == number + 1
        found.append(time.monotonic() - began)
    return {"latencies_s": found}


def _steady(given: dict[str, Any]) -> dict[str, Any]:
    """So many a second, each timed from when it was due: a late start counts."""

    def one(due: float) -> float:
        add.delay(1, 1).get(timeout=TIMEOUT_S)
        return time.monotonic() - due

    return _paced(given, one)


def _ends(given: dict[str, Any]) -> dict[str, Any]:
    """So many a second, each timed from its task's end."""

    def one(_due: float) -> float:
        _, ended = wait.delay(0.0).get(timeout=TIMEOUT_S)
        return time.monotonic() - float(ended)

    return _paced(given, one)


def _paced(given: dict[str, Any], one: Callable[[float], float]) -> dict[str, Any]:
    """So many a second from a few threads."""
    found: list[float] = []
    pace = THREADS / given["per_s"]
    each = given["tasks"] // THREADS
    ready = threading.Barrier(THREADS)

    def work(number: int) -> None:
        _warm_up(WARM_UP // THREADS + 1)
        ready.wait()
        due = time.monotonic() + pace * number / THREADS
        for _ in range(each):
            time.sleep(max(due - time.monotonic(), 0))
            found.append(one(due))
            due += pace

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) != each * THREADS:
        raise SystemExit("a thread failed")
    return {"latencies_s": found}


def _batch(given: dict[str, Any]) -> dict[str, Any]:
    """All at once; the rate from the last one sent to the last one done, as the tasks themselves saw it."""
    task = {"wait": wait, "compute": compute}[given["task"]]
    _warm_up()
    with app.producer_or_acquire() as producer:
        results = [task.apply_async((given["seconds"],), producer=producer) for _ in range(given["tasks"])]
    sent = time.monotonic()
    spans = ResultSet(results).join_native(timeout=TIMEOUT_S + 10 * given["seconds"] * given["tasks"])
    ends = sorted(end for _, end in spans)
    after = [end for end in ends if end >= sent]
    return {"rate": (len(after) - 1) / (after[-1] - after[0]), "counted": len(after)}


def _spans(given: dict[str, Any]) -> dict[str, Any]:
    """All at once, with no result read before: when each task began and ended, as they themselves saw it."""
    results = [wait.delay(given["seconds"]) for _ in range(given["tasks"])]
    return {"spans": ResultSet(results).join_native(timeout=TIMEOUT_S + 10 * given["seconds"] * given["tasks"])}


def _chord(given: dict[str, Any]) -> dict[str, Any]:
    """One chord, from its sending to its body's result."""
    _warm_up()
    chord([nothing.si()] * 2)(count.s()).get(timeout=TIMEOUT_S)
    members = given["members"]
    began = time.monotonic()
    assert (
        chord([nothing.si() for _ in range(members)])(count.s()).get(timeout=max(5 * TIMEOUT_S, members / 50))
        == members
    )
    return {f"chord of {members:,}": time.monotonic() - began}


def _chords(given: dict[str, Any]) -> dict[str, Any]:
    """One after the other; their group ids."""
    _warm_up()
    found = []
    for _ in range(given["chords"]):
        result = chord([nothing.si() for _ in range(given["members"])])(count.s())
        assert result.get(timeout=TIMEOUT_S) == given["members"]
        found.append(result.parent.id)
    time.sleep(0.5)  # the last one's `fired` comes after its body
    return {"groups": found}


def _group(given: dict[str, Any]) -> dict[str, Any]:
    """A group, from its sending to all its results; and the same results read once more, by somebody else."""
    _warm_up()
    members = given["members"]
    began = time.monotonic()
    sent = group(nothing.si() for _ in range(members)).apply_async()
    assert len(sent.get(timeout=5 * TIMEOUT_S)) == members
    done = time.monotonic()
    again = GroupResult(sent.id, [app.AsyncResult(one.id) for one in sent.results])
    assert len(again.get(timeout=TIMEOUT_S)) == members
    title = f"group of {members:,}"
    return {f"{title}: send and get()": done - began, f"{title}: get() when done": time.monotonic() - done}


if __name__ == "__main__":
    main()
