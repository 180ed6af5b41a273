"""The app of the canvas programs: a task that can end in every way, and errbacks; where it lives comes from the environment.

Whatever runs says in a journal what it was called with. The journal is compared too: an errback has no result to look at.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from celery import Celery
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from kombu import Queue

from tests.canvas.building import built
from tests.faults.journal import Journal
from tests.redis_broker import RESTORES_SOON

FOLDER = Path(os.environ["CANVAS_FOLDER"])
journal = Journal(FOLDER, "canvas")

app = Celery("canvas", broker=os.environ["CANVAS_BROKER"], backend=os.environ["CANVAS_BACKEND"])
app.conf.update(
    task_queues=[Queue(name, routing_key=name) for name in ("celery", "aside")],
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    broker_transport_options={**RESTORES_SOON, "queue_order_strategy": "priority"},
    **json.loads(os.environ.get("CANVAS_CONF", "{}")),
)


class Refused(Exception):  # noqa: N818 - what a task raises on purpose
    """Raised by tasks that are to fail; has more than a text."""

    def __init__(self, label, number):
        super().__init__(label, number)
        self.number = number


class Work(app.Task):
    def on_success(self, retval, task_id, args, kwargs):
        if kwargs.get("fate") == "twice" and first_time(kwargs["label"], "stored"):
            os.kill(os.getpid(), signal.SIGKILL)


def first_time(label, what):
    """Whether nobody has asked that before, in whichever process."""
    try:
        os.close(os.open(FOLDER / f"{label}.{what}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def note(task, label, got):
    request = task.request
    journal.note(
        "ran",
        label=label,
        id=request.id,
        root=request.root_id,
        parent=request.parent_id,
        group=request.group,
        index=request.group_index,
        got=got,
        queue=(request.delivery_info or {}).get("routing_key"),
        priority=(request.delivery_info or {}).get("priority"),
        mine=(request.headers or {}).get("mine"),
        stamps={name: request.stamps.get(name) for name in request.stamped_headers or ()},
        attempt=request.retries,
    )


@app.task(bind=True, base=Work, max_retries=2)
def work(self, *got, label, fate="value", more=None):
    """Take anything, come to an end of a given kind."""
    note(self, label, got)
    match fate:
        case "value":
            return [label, *got]
        case "none":
            return None
        case "error":
            raise ValueError(label)
        case "odd error":
            raise Refused(label, 7)
        case "no result":
            return object()
        case "retry":
            if self.request.retries < more:
                raise self.retry(countdown=0.05, exc=KeyError(label))
            return [label, self.request.retries, *got]
        case "ignore":
            raise Ignore
        case "reject":
            raise Reject(label, requeue=False)
        case "replace":
            raise self.replace(built(more))
        case "extend":
            self.add_to_chord(built(more))
            return None  # as what it added: on Celery's Redis backend either may come first
        case "out of time":
            time.sleep(60)
        case "out of soft time":
            try:
                time.sleep(60)
            except SoftTimeLimitExceeded:
                return [label, "soft"]
        case "lost":
            os.kill(os.getpid(), signal.SIGKILL)
        case "lost once":
            if first_time(label, "lost"):
                os.kill(os.getpid(), signal.SIGKILL)
            return [label, *got]
        case "twice":
            return [label, "first" if first_time(label, "ran") else "again", *got]
        case "begin":
            built(more).apply_async()
            return [label, *got]
        case "state":
            self.update_state(state="PROGRESS", meta={"label": label})
            return [label, *got]
    raise AssertionError(fate)


@app.task(bind=True, base=Work, acks_late=False, max_retries=2)
def early(self, *got, label, fate="value", more=None):
    """As `work`, acknowledged before it runs: what is lost stays lost."""
    note(self, label, got)
    if fate == "lost":
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return [label, *got]


@app.task(bind=True)
def both(self, x, y, label):
    note(self, label, [x, y])
    return [label, x, y]


@app.task
def heard(request, exc, traceback, *, label):
    """An errback of the newer kind: called where the failure is noticed."""
    journal.note("heard", label=label, failed=request.id, exc=[type(exc).__name__, str(exc)])


@app.task(bind=True)
def told(self, failed_id=None, *, label):
    """An errback of the older kind: a task of its own."""
    journal.note("told", label=label, failed=failed_id, id=self.request.id)


@app.task
def begin(spec):
    """A client inside a task."""
    return built(spec).apply_async().as_tuple()
