# ruff: noqa: INP001 - a module of the example, not of a package
"""The example app: what a user's own module looks like with this result backend."""

from __future__ import annotations

import os
import time

from celery import Celery

KAFKA = os.environ.get("KAFKA", "localhost:9092")
REDIS = os.environ.get("REDIS", "localhost:6379")

app = Celery(
    "tasks",
    broker=f"redis://{REDIS}/1",
    backend=f"kafka://{KAFKA}/?view=redis://{REDIS}/0",
)
app.conf.update(
    task_track_started=True,
    result_extended=True,
    # For one broker only: in production leave the defaults, three copies of which two must have each event.
    kafka_backend_settings={
        "replication_factor": 1,
        "min_insync_replicas": 1,
        # Of the worker; the processors' are an option of `pipeline run`.
        "metrics_port": 9808,
        "metrics_address": "0.0.0.0",  # noqa: S104 - of a container, which publishes it to this machine only
    },
)


@app.task
def add(x: float, y: float) -> float:
    """Return the sum."""
    return x + y


@app.task
def total(numbers: list[float]) -> float:
    """Return the sum of a chord's parts."""
    return sum(numbers)


@app.task(bind=True)
def crunch(self, seconds: int = 5) -> str:  # noqa: ANN001 - a bound task is Celery's own business
    """Work for a while and say how far it is."""
    for second in range(seconds):
        self.update_state(state="PROGRESS", meta={"done": second, "of": seconds})
        time.sleep(1)
    return f"crunched for {seconds} s"


@app.task(autoretry_for=(ConnectionError,), retry_backoff=True, max_retries=3)
def flaky() -> None:
    """Fail, retry, and fail for good: a history worth looking at."""
    raise ConnectionError("the other side is not there")
