"""A pool whose children share a queue, and have threads of ours: one is told to end, and the others go on.

Run by `test_threads`. What takes a thousandth of a thousandth of a second takes a twentieth of one here: from a child's
last word until it gives back the lock of the queue. Its parent, which hears that word, sends it another SIGTERM meanwhile.
"""

from __future__ import annotations

import os
import signal
import time

from billiard import common, connection
from billiard.pool import Pool

from celery_kafka_backend import threads

_send = connection.Connection.send_bytes


def _send_slowly(self, *arguments, **more) -> None:
    _send(self, *arguments, **more)
    time.sleep(0.05)


def child() -> None:
    common.reset_signals()
    connection.Connection.send_bytes = _send_slowly
    for _ in range(2):
        threads.start(time.sleep, "ours", 600)


def work(number: int) -> int:
    return number


if __name__ == "__main__":
    pool = Pool(2, initializer=child, threads=True, lost_worker_timeout=1.0)
    told: list[int] = []
    pool.apply_async(time.sleep, (600,), accept_callback=lambda pid, _: told.append(pid))
    while not told:
        time.sleep(0.01)
    pool.terminate_job(told[0], signal.SIGTERM)
    assert [pool.apply_async(work, (n,)).get(timeout=180) for n in range(4)] == [0, 1, 2, 3]
    print("went on", flush=True)
    os._exit(0)
