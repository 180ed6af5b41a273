"""The Celery app of the benches: for workers (``celery -A benchmarks.celery_app worker``) and clients.

Configured by environment: ``BENCH_BROKER`` and ``BENCH_BACKEND`` are URLs, ``BENCH_SETTINGS`` is JSON. Everything else
is Celery's default, and the same for every backend.
"""

from __future__ import annotations

import json
import os
import time

from celery import Celery

app = Celery("bench", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_BACKEND"])
app.conf.worker_hijack_root_logger = False
settings = json.loads(os.environ.get("BENCH_SETTINGS") or "{}")
if settings:
    app.conf.kafka_backend_settings = settings


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def nothing() -> None:
    """Do nothing."""


@app.task
def count(results: list[object]) -> int:
    """Be a chord's body."""
    return len(results)


@app.task
def wait(seconds: float) -> tuple[float, float]:
    """Wait, as a task that asks a service does; return when it began and ended."""
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


@app.task
def compute(seconds: float) -> tuple[float, float]:
    """Use so much CPU; return when it began and ended."""
    began = time.monotonic()
    spent = time.thread_time()
    while time.thread_time() - spent < seconds:
        pass
    return began, time.monotonic()
