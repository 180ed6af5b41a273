"""A worker's main process that forks: how long a child waits for its first acknowledgement, and for later ones."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from benchmarks.publisher_process import SocketPublisher
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend import topics
from celery_kafka_backend.producer.publisher import Publisher, Record

FORKS, LATER = 8, 100
WAIT_S = 30.0


def main() -> None:
    given = json.loads(sys.argv[1])
    settings = settings_module.parse(given["backend"], given["overrides"])
    publisher: Any = SocketPublisher(settings, given["path"]) if given["path"] else Publisher(settings)
    topic = topics.task_events(settings.topic_prefix)
    _timed(publisher, topic)  # the parent publishes too
    found: dict[str, list[float]] = {"first": [], "warm": [], "later": []}
    for _ in range(FORKS):
        _in_fork(publisher, topic, 0.0, found, "first")
        _timed(publisher, topic)
        _in_fork(publisher, topic, 1.5, found, "warm")
    print(json.dumps(found), flush=True)


def _timed(publisher: Any, topic: str) -> float:
    began = time.monotonic()
    publisher.publish(Record(topic, b"key", b"v" * 400)).wait(WAIT_S)
    return time.monotonic() - began


def _in_fork(publisher: Any, topic: str, task_s: float, found: dict[str, list[float]], name: str) -> None:
    """Fork, warm up as `worker_process_init` does, run a first task of so many seconds, and time its acknowledgement."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        publisher.warm_up()
        time.sleep(task_s)
        said = {"first": _timed(publisher, topic), "later": [_timed(publisher, topic) for _ in range(LATER)]}
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = json.loads(pipe.read())
    os.waitpid(child, 0)
    found[name].append(said["first"])
    found["later"] += said["later"]


if __name__ == "__main__":
    main()
