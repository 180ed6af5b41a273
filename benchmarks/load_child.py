"""Appends events at a steady rate until SIGTERM, or so many of them: the fleet that works on."""

from __future__ import annotations

import json
import signal
import sys

from benchmarks import load
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend import topics


def main() -> None:
    given = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = settings_module.parse(given["backend"], given["overrides"])
    # A second's worth of tasks lies between a task's events: tasks that take a second.
    records = load.apart(load.Maker(seed=given["seed"]), given["tasks"], given["tasks_per_s"])
    load.fill(
        settings, topics.task_events(settings.topic_prefix), records, lambda _count: None,
        per_s=load.PER_TASK * given["tasks_per_s"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
