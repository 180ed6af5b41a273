"""The demo's app: an ordinary Celery project whose results go to Kafka.

Nothing here knows that it is a demo, except that where the servers are comes from the environment (`run.py` sets it).
"""

import ast
import json
import os
import time
import warnings
from pathlib import Path

from celery import Celery

app = Celery("stdlib_counts")
app.conf.update(
    json.loads(os.environ["DEMO_CONFIG"]),  # broker_url, result_backend, kafka_backend_settings
    task_track_started=True,
    worker_prefetch_multiplier=4,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)

DEFINITIONS = {
    ast.FunctionDef: "functions",
    ast.AsyncFunctionDef: "coroutines",
    ast.ClassDef: "classes",
    ast.Import: "imports",
    ast.ImportFrom: "imports",
}


def counts_of(path):
    """Parse one source file and count what it defines; what does not parse raises what Python raises."""
    source = Path(path).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old test files
        tree = ast.parse(source, path)
    found = dict.fromkeys(DEFINITIONS.values(), 0)
    for node in ast.walk(tree):
        name = DEFINITIONS.get(type(node))
        if name is not None:
            found[name] += 1
    return {**found, "lines": source.count(b"\n"), "bytes": len(source)}


@app.task
def count_definitions(path):
    """Count what one source file defines."""
    return counts_of(path)


@app.task(bind=True, max_retries=50)
def count_when_it_is_there(self, path, countdown_s=0.3):
    """Count as well, but try again for as long as there is no such file."""
    try:
        return counts_of(path)
    except FileNotFoundError as missing:
        raise self.retry(exc=missing, countdown=countdown_s) from missing


@app.task
def total(counts):
    """Sum up: the body of the chord over all files."""
    found = {}
    for one in counts:
        for name, number in one.items():
            found[name] = found.get(name, 0) + number
    return {"files": len(counts), **found}


@app.task(bind=True)
def watch(self, seconds):
    """Take so long that somebody loses patience and revokes it."""
    for second in range(seconds):
        self.update_state(state="WATCHING", meta={"second": second, "of": seconds})
        time.sleep(1)
    return seconds


@app.task
def echo(value):
    """Return at once: what its `get()` takes is what the machinery takes."""
    return value
