"""The app that the fleet tests' workers run; everything about its surroundings comes from the environment."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from celery import Celery, chord, group
from celery.exceptions import Ignore, Reject
from celery.result import allow_join_result

app = Celery("fleet", broker=os.environ["FLEET_BROKER"], backend=os.environ["FLEET_BACKEND"])
app.conf.update(
    kafka_backend_settings=json.loads(os.environ.get("FLEET_SETTINGS", "{}")),
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"polling_interval": 0.01},
    worker_hijack_root_logger=False,
)
app.conf.update(json.loads(os.environ.get("FLEET_CONF", "{}")))
if app.conf.get("kafka_shadow"):
    from celery_kafka_backend import shadow

    shadow.follow(app)


@app.task
def add(x, y):
    return x + y


@app.task
def total(numbers):
    return sum(numbers)


@app.task
def fail(text="no"):
    raise ValueError(text)


@app.task(bind=True, max_retries=3)
def flaky(self, failures):
    if self.request.retries < failures:
        raise self.retry(countdown=0.05, exc=RuntimeError(f"attempt {self.request.retries}"))
    return self.request.retries


@app.task(bind=True)
def progress(self, steps):
    for step in range(steps):
        self.update_state(state="PROGRESS", meta={"step": step})
    return steps


@app.task(bind=True, max_retries=1)
def fails_until(self, path, value):
    if not Path(path).exists():
        raise self.retry(countdown=0.01, exc=ValueError("not there")) if self.request.retries < 1 else ValueError("no")
    return value


@app.task
def nap(seconds):
    time.sleep(seconds)
    return seconds


@app.task
def until_there(path):
    """Busy until somebody makes the file."""
    while not Path(path).exists():
        time.sleep(0.01)


@app.task(ignore_result=True)
def quiet():
    return "not stored"


@app.task(bind=True)
def replaced(self, x, y):
    raise self.replace(add.s(x, y))


@app.task
def die():
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(acks_late=True, reject_on_worker_lost=True)
def die_once(path):
    marker = Path(path)
    if not marker.exists():
        marker.write_text("died")
        os.kill(os.getpid(), signal.SIGKILL)
    return "second life"


@app.task
def big(size):
    return "x" * size


@app.task(bind=True)
def identity(self):
    return {"run": self.request.ckb_run, "hlc": self.request.ckb_hlc, "id": self.request.id}


@app.task(bind=True)
def identity_after(self, _previous):
    return {"run": self.request.ckb_run, "hlc": self.request.ckb_hlc, "id": self.request.id}


@app.task(bind=True)
def spawn(self, n):
    return [r.id for r in group(add.s(i, i) for i in range(n)).apply_async().results]


@app.task
def fan_in(n):
    return chord([add.s(i, i) for i in range(n)])(total.s()).id


@app.task(result_expires=30)
def short_lived():
    return 1


@app.task(result_expires=1)
def brief(value):
    return value


@app.task
def refuse():
    raise Reject("not today", requeue=False)


@app.task
def shrug():
    raise Ignore


@app.task
def listed(results):
    return results


@app.task
def note_error(failed_id):
    print(f"errback of {failed_id}", flush=True)


@app.task
def ask(numbers):
    """A client inside a task: what it asks for runs in another worker."""
    with allow_join_result():
        return group(add.s(i, i) for i in numbers).apply_async().get(timeout=180)


@app.task
def ask_beside_others(numbers):
    """Likewise; where tasks share a process they also share what `allow_join_result` switches."""
    asked = group(add.s(i, i) for i in numbers).apply_async()
    return asked.get(timeout=180, disable_sync_subtasks=False)


@app.task
def whoami():
    return os.getpid()


@app.task(acks_late=True)
def nap_late(seconds):
    time.sleep(seconds)
    return seconds


@app.task(acks_late=True)
def long_once(path):
    """Take a minute, but only the first time."""
    marker = Path(path)
    if marker.exists():
        return "second life"
    marker.write_text("started")
    time.sleep(60)
    return "first life"


@app.task(bind=True)
def replaced_by(self, canvas):
    raise self.replace(app.signature(canvas))


@app.task(bind=True)
def adds_to_chord(self, canvas, value):
    self.add_to_chord(app.signature(canvas))
    return value


@app.task
def note(text):
    print(f"noted {text}", flush=True)
    return text


def _journaled(path, size):
    with Path(path).open("a") as journal:
        journal.write(f"{os.getpid()}\n")
    time.sleep(1)
    return "x" * size if size >= 0 else os.urandom(-size // 2).hex()


@app.task
def journaled_early(path, size):
    return _journaled(path, size)


@app.task(acks_late=True)
def journaled_late(path, size):
    return _journaled(path, size)


@app.task(acks_late=True, reject_on_worker_lost=True)
def journaled_late_again(path, size):
    return _journaled(path, size)


@app.task
def odd():
    return object()


@app.task
def fail_oddly(how):
    class Inside(Exception):  # noqa: N818 - nobody else can make it again
        def __init__(self, one, other):
            super().__init__(one)
            self.other = other

    raise {
        "no name": Inside("odd", object()),
        "no text": OSError("odd file \udcff"),
        "no JSON": ValueError("odd", {1: object}),
    }[how]


@app.task(bind=True)
def about_me(self, _results):
    request = self.request
    return {
        "priority": request.delivery_info.get("priority"),
        "mine": (request.headers or {}).get("mine"),
        "stamps": {name: request.stamps[name] for name in request.stamped_headers or ()},
        "root": request.root_id,
        "parent": request.parent_id,
    }


class _KilledAfter(app.Task):
    """Its child is killed a millisecond after its first success was acknowledged; with ``parent``, the whole worker is."""

    def on_success(self, retval, task_id, args, kwargs):
        if Path(args[0]).read_text() != "ran\n":  # where the worker lets it run again
            return
        time.sleep(0.001)
        if kwargs.get("parent"):
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _ran(path):
    with Path(path).open("a") as runs:
        runs.write("ran\n")
    return "stored"


@app.task(base=_KilledAfter)
def stored_and_killed_early(path):
    return _ran(path)


@app.task(base=_KilledAfter, acks_late=True, reject_on_worker_lost=True)
def stored_and_killed(path, parent=False):
    return _ran(path)


@app.task
def note_state(failed_id, *, path):
    """An errback as in Celery's manual: it asks for the failure, and does not wait.

    Before Celery 5.7 one that takes more than the id by position is called in place, with the request.
    """
    with Path(path).open("a") as states:
        states.write(app.AsyncResult(failed_id).state + "\n")


@app.task
def touch(path):
    Path(path).write_text("here")


@app.task
def group_of(path, group_id):
    """Say what this worker restores of a group, whatever the view shows."""
    found = app.backend.restore_group(group_id)
    Path(path).write_text(json.dumps(None if found is None else [result.id for result in found.results]))
