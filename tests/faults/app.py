"""The app of the fault suite's workers, clients and processors; where it lives comes from the environment.

Every task says in the journal what it is about to return, and its hooks say when Celery came back from storing that.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path

from celery import Celery, Task

from tests.faults.journal import Journal, digest
from tests.redis_broker import RESTORES_SOON

journal = Journal(Path(os.environ["FAULTS_JOURNAL"]), "task")

app = Celery("faults", broker=os.environ["FAULTS_BROKER"], backend=os.environ["FAULTS_BACKEND"])
app.conf.update(
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    # Thirty greenlets acknowledge at once; at kombu's ten connections some of them could not ("Couldn't ack").
    broker_transport_options={**RESTORES_SOON, "max_connections": 100},
    worker_hijack_root_logger=False,
    task_track_started=True,
    **json.loads(os.environ.get("FAULTS_CONF", "{}")),
)


class Failed(Exception):  # noqa: N818 - what a task raises on purpose
    """Raised by tasks that are to fail."""


class Journalled(Task):
    """Celery calls these hooks when the backend has returned from storing."""

    def before_start(self, task_id, args, kwargs):
        journal.note("began", task=task_id)

    def on_success(self, retval, task_id, args, kwargs):
        journal.note("stored", task=task_id, state="SUCCESS", value=digest(retval))

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        journal.note("stored", task=task_id, state="FAILURE", value=f"{type(exc).__name__}: {exc}")


def returned(task, **payload):
    """Return a result that no other execution returns."""
    result = {"task": task.request.id, "execution": uuid.uuid4().hex, **payload}
    ignored = bool(task.request.ignore_result or task.ignore_result)
    more = {"got": payload["got"]} if "got" in payload else {}
    journal.note("ended", task=task.request.id, state="SUCCESS", value=digest(result), ignored=ignored, **more)
    return result


def failed(task):
    """Return an exception that no other execution raises."""
    exc = Failed(uuid.uuid4().hex)
    journal.note("ended", task=task.request.id, state="FAILURE", value=f"Failed: {exc}", ignored=False)
    return exc


@app.task(bind=True, base=Journalled)
def value(self, n, size=0):
    return returned(self, n=n, pad="x" * size)


@app.task(bind=True, base=Journalled, acks_late=True, reject_on_worker_lost=True)
def late(self, n, seconds=0.0):
    time.sleep(seconds)
    return returned(self, n=n)


@app.task(bind=True, base=Journalled, acks_late=True, reject_on_worker_lost=True)
def fail(self, n, seconds=0.0):
    time.sleep(seconds)
    raise failed(self)


@app.task(bind=True, base=Journalled, acks_late=True, reject_on_worker_lost=True, max_retries=5)
def retry(self, n, times, *, then_fail=False):
    if self.request.retries < times:
        raise self.retry(countdown=0.3, exc=Failed("again"))
    if then_fail:
        raise failed(self)
    return returned(self, n=n)


@app.task(bind=True, base=Journalled)
def progress(self, n, steps):
    for step in range(steps):
        self.update_state(state="PROGRESS", meta={"step": step})
        time.sleep(0.05)
    return returned(self, n=n)


@app.task(bind=True, base=Journalled, ignore_result=True)
def quiet(self, n):
    return returned(self, n=n)


@app.task(bind=True, base=Journalled, acks_late=True, reject_on_worker_lost=True)
def collect(self, results):
    return returned(self, got=[result["n"] for result in results])
