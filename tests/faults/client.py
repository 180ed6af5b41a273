"""A client: sends tasks of every kind and waits for their results, until told the time is up.

``python -m tests.faults.client SEED UNTIL PATIENCE_S``; UNTIL is a wall-clock time, for a client that was killed begins
anew; PATIENCE_S is the longest timeout.
"""

from __future__ import annotations

import concurrent.futures
import os
import random
import sys
import threading
import time
import uuid
from pathlib import Path

from celery import chord, group
from celery.exceptions import TimeoutError as NotInTime

from tests.faults import app as tasks
from tests.faults.journal import Journal, digest

THREADS = 48
PER_S = 6.0
TIMEOUTS_S = (0.5, 3.0, 10.0, 20.0, 40.0)
journal = Journal(Path(os.environ["FAULTS_JOURNAL"]), "client")


class Pulse:
    """Knows when this process was not running: frozen, or without a CPU."""

    BEAT_S = 0.05

    def __init__(self) -> None:
        self._gaps: list[tuple[float, float]] = []
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(self.BEAT_S)
            now = time.monotonic()
            if now - last > 4 * self.BEAT_S:
                self._gaps.append((last, now))
            last = now

    def stalled_s(self, since: float) -> float:
        """Return for how long since then it did not run."""
        time.sleep(2 * self.BEAT_S)  # the beat may come after us
        return sum(max(end - max(start, since), 0.0) for start, end in list(self._gaps))


pulse = Pulse()


def send(kind, ids, apply):
    """Journal an intention, carry it out, journal that it was."""
    journal.note("sending", kind=kind, tasks=ids)
    started = time.monotonic()
    try:
        result, error = apply(), ""
    except Exception as exc:  # noqa: BLE001 - the checker judges it
        result, error = None, f"{type(exc).__name__}: {exc}"
    took_s = time.monotonic() - started
    journal.note("sent", kind=kind, tasks=ids, took_s=took_s, stalled_s=pulse.stalled_s(started), error=error)
    return result


def wait(ids, result, timeout_s):
    """Journal what `get` gives."""
    started = time.monotonic()
    facts = {}
    try:
        got = result.get(timeout=timeout_s, propagate=False)
    except NotInTime:
        facts["outcome"] = "timeout"
    except Exception as exc:  # noqa: BLE001 - as above
        facts |= {"outcome": "error", "error": f"{type(exc).__name__}: {exc}"}
    else:
        facts |= {"outcome": "value", "values": [shown(one) for one in (got if isinstance(got, list) else [got])]}
    took_s = time.monotonic() - started
    journal.note("got", tasks=ids, timeout_s=timeout_s, took_s=took_s, stalled_s=pulse.stalled_s(started), **facts)


def shown(got):
    """Return the value of what `get` gave, as tasks journal it."""
    return f"{type(got).__name__}: {got}" if isinstance(got, BaseException) else digest(got)


def one(kind, signature, timeout_s):
    task_id = str(uuid.uuid4())
    result = send(kind, [task_id], lambda: signature.apply_async(task_id=task_id))
    if result is not None and kind != "quiet":
        wait([task_id], result, timeout_s)


def a_group(n, size, timeout_s):
    ids = [str(uuid.uuid4()) for _ in range(size)]
    members = [tasks.late.s(n + i).set(task_id=task_id) for i, task_id in enumerate(ids)]
    result = send("group", ids, lambda: group(members).apply_async())
    if result is not None:
        wait(ids, result, timeout_s)


def a_chord(n, size, seconds, *, fails, timeout_s):
    ids = [str(uuid.uuid4()) for _ in range(size)]
    body = str(uuid.uuid4())
    members = [tasks.late.s(n + i, seconds).set(task_id=task_id) for i, task_id in enumerate(ids)]
    if fails:
        members[-1] = tasks.fail.s(n, seconds).set(task_id=ids[-1])
    journal.note("chord", body=body, members=ids, values=[n + i for i in range(size)], fails=fails)
    result = send("chord", [*ids, body], lambda: chord(members)(tasks.collect.s().set(task_id=body)))
    if result is not None:
        journal.note("applied", body=body)
        wait([body], tasks.app.AsyncResult(body), timeout_s)


def act(seed, patience_s):
    """Do one thing."""
    chance = random.Random(seed)
    n, seconds = chance.randrange(1_000_000), chance.uniform(0, 0.2)
    timeout_s = min(chance.choice(TIMEOUTS_S), patience_s)
    match chance.choices(
        ("value", "late", "fail", "retry", "retry-fail", "progress", "quiet", "group", "chord", "chord-fail"),
        (6, 5, 2, 3, 1, 2, 1, 2, 4, 1),
    )[0]:
        case "value":
            one("value", tasks.value.s(n, chance.choice((0, 0, 0, 0, 1_000, 20_000))), timeout_s)
        case "late":
            one("late", tasks.late.s(n, seconds), timeout_s)
        case "fail":
            one("fail", tasks.fail.s(n, seconds), timeout_s)
        case "retry":
            one("retry", tasks.retry.s(n, chance.randint(1, 3)), timeout_s)
        case "retry-fail":
            one("retry", tasks.retry.s(n, 1, then_fail=True), timeout_s)
        case "progress":
            one("progress", tasks.progress.s(n, 3), timeout_s)
        case "quiet":
            one("quiet", tasks.quiet.s(n), timeout_s)
        case "group":
            a_group(n, chance.randint(2, 4), timeout_s)
        case "chord":
            a_chord(n, chance.randint(1, 5), seconds, fails=False, timeout_s=timeout_s)
        case "chord-fail":
            a_chord(n, chance.randint(2, 4), seconds, fails=True, timeout_s=timeout_s)


def main(seed: int, until: float, patience_s: float) -> None:
    chance = random.Random(f"{seed}/{os.getpid()}")
    free = threading.Semaphore(THREADS)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        while time.time() < until:
            if free.acquire(timeout=0.2):
                pool.submit(act, chance.random(), patience_s).add_done_callback(
                    lambda done: (free.release(), done.result())
                )
                time.sleep(chance.expovariate(PER_S))
    journal.note("finished")
    print("finished", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
