"""Clients that wait: for very many results in one process, or one result each in very many processes. Prints JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from statistics import median
from typing import Any

import psutil
from celery.result import AsyncResult, ResultSet

from benchmarks.celery_app import app

TIMEOUT_S = 200.0


def main() -> None:
    given = json.loads(sys.argv[1])
    found = {"many": _many, "processes": _processes}[given["mode"]](given)
    print(json.dumps(found), flush=True)


def _many(given: dict[str, Any]) -> dict[str, Any]:
    """Wait for all of them in one ``get()``."""
    me = psutil.Process()
    app.backend  # noqa: B018 - what any client has, whatever it waits for
    before = me.memory_info().rss
    wanted = ResultSet([AsyncResult(one, app=app) for one in _ids(given)])
    held: dict[str, int] = {}

    def first(_: Any) -> None:
        if not held:
            held["sockets"] = len([one for one in me.net_connections() if one.raddr])
            held["threads"] = me.num_threads()
            held["waiting_bytes"] = me.memory_info().rss - before

    found = wanted.get(timeout=TIMEOUT_S, on_message=first)
    done = time.monotonic()
    assert found == list(range(len(found)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"done_at": done, "peak_bytes": peak, "cpu_s": sum(me.cpu_times()[:2]), **held}


def _processes(given: dict[str, Any]) -> dict[str, Any]:
    """Fork one for each, as a server does that has loaded the app, and the driver of the store, before it forks."""
    assert AsyncResult("unheard of", app=app).state == "PENDING"
    reading, writing = os.pipe()
    for number, one in enumerate(_ids(given)):
        if os.fork() == 0:
            try:
                assert AsyncResult(one, app=app).get(timeout=TIMEOUT_S) == number
                done, me = time.monotonic(), psutil.Process()
                os.write(writing, f"{number} {done} {me.memory_full_info().uss} {me.num_threads()}\n".encode())
            finally:
                os._exit(0)
    os.close(writing)
    for _ in range(given["count"]):
        os.wait()
    with os.fdopen(reading) as said:
        ended = [line.split() for line in said]
    if len(ended) != given["count"]:
        raise SystemExit(f"{given['count'] - len(ended)} of {given['count']} got nothing")
    return {
        "done_at": {number: float(at) for number, at, _, _ in ended},
        "own_bytes": median(int(own) for _, _, own, _ in ended),
        "threads": max(int(threads) for _, _, _, threads in ended),
    }


def _ids(given: dict[str, Any]) -> list[str]:
    return [f"{given['name']}-{number}" for number in range(given["count"])]


if __name__ == "__main__":
    main()
