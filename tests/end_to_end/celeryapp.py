"""The Celery project that the tests of this folder run in a real worker; the environment says where its servers are."""

from __future__ import annotations

import json
import os
import time

from celery import Celery, Task

app = Celery("end_to_end")
app.conf.update(json.loads(os.environ["E2E_CONFIG"]))
app.conf.task_routes = {"*": {"queue": os.environ.get("E2E_QUEUE", "celery")}}


class Unlucky(Exception):  # noqa: N818 - as users name them
    """An exception of the user's own."""


@app.task
def add(x, y):
    return x + y


@app.task
def same(value):
    return value


@app.task
def fail(text, number):
    raise Unlucky(text, number)


@app.task
def unserializable():
    return object()


@app.task(bind=True, max_retries=5)
def third_time_lucky(self):
    if self.request.retries < 2:
        raise self.retry(exc=Unlucky("not yet"), countdown=0.6)
    return self.request.retries


@app.task(bind=True)
def never_lucky(self):
    raise self.retry(exc=Unlucky("gave up", 7), countdown=0.05, max_retries=2)


@app.task(ignore_result=True)
def quiet():
    return "nobody will know"


@app.task(bind=True, track_started=True)
def wait_for(self, path, seconds=180.0):
    """Until somebody makes the file."""
    self.update_state(state="WAITING", meta={"for": path})
    end = time.monotonic() + seconds
    while not os.path.exists(path) and time.monotonic() < end:  # noqa: PTH110 - a task like any
        time.sleep(0.01)
    return "there"


@app.task(track_started=True)
def started_until(path, seconds=180.0):
    """As `wait_for`, without a state of its own."""
    end = time.monotonic() + seconds
    while not os.path.exists(path) and time.monotonic() < end:  # noqa: PTH110
        time.sleep(0.01)


@app.task
def with_children(numbers):
    for number in numbers:
        same.delay(number)
    return len(numbers)


class Fleeting(Task):
    """Its results are wanted for two seconds."""

    result_expires = 2


@app.task(base=Fleeting)
def fleeting():
    return "soon gone"


@app.task
def total(numbers):
    return sum(numbers)
