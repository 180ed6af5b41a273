"""The peer of `fold_redis`: a Faust agent with ``take(2000)``, in a process of its own. Prints one JSON object.

``each``   one guarded script call per event.
``folded`` our fold first, so one call per task in what was taken.

Both decode with our codec and write with our sink's pipeline, so that only the engine differs. It blocks the event loop
for some milliseconds, and is still much faster than redis-py's asyncio pipeline (5 us for packing a command, 4 for its
reply). Seconds run from the first batch that the agent gets: Faust's own start is not counted.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
from typing import Any

import faust

from celery_kafka_backend import codec, topics
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.changes import Batch, Change, Logged
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink

TAKE = 2000
WITHIN_S = 0.5


def main() -> None:
    given = json.loads(sys.argv[1])
    settings = settings_module.parse(given["backend"], given["overrides"])
    app = faust.App(
        f"{settings.topic_prefix}-{time.time_ns()}",
        broker=";".join(f"kafka://{server}" for server in settings.bootstrap_servers.split(",")),
        store="memory://",
        datadir=tempfile.mkdtemp(prefix="ckb-bench-faust-"),
        web_enabled=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        stream_buffer_maxsize=8 * TAKE,
    )
    log = app.topic(
        topics.task_events(settings.topic_prefix), key_type=bytes, value_type=bytes, key_serializer="raw",
        value_serializer="raw",
    )  # fmt: skip
    sink = open_sink(settings.views[0], StoreOptions(namespace=settings.topic_prefix))
    sink.open()
    state = _Run(given["events"])

    @app.agent(log)
    async def view(stream: Any) -> None:
        async for values in stream.take(TAKE, within=WITHIN_S):
            state.begin()
            try:
                sink.write(Batch(_changes(values, given["mode"])))
            except Exception:  # noqa: BLE001 - Faust would start the agent again, for ever
                traceback.print_exc()
                os._exit(1)
            state.count(len(values))

    faust.Worker(app, loglevel="WARNING").execute_from_commandline()


class _Run:
    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.read = 0
        self.began = 0.0
        self.cpu = 0.0

    def begin(self) -> None:
        if not self.began:
            self.began, self.cpu = time.monotonic(), _cpu_s()

    def count(self, more: int) -> None:
        self.read += more
        if self.read >= self.wanted:
            seconds = time.monotonic() - self.began
            report = {"seconds": seconds, "events": self.read, "cpu_s": _cpu_s() - self.cpu}
            print(json.dumps(report), file=sys.__stdout__, flush=True)  # Faust takes stdout for its log
            os._exit(0)


def _changes(values: list[bytes], mode: str) -> list[Change]:
    logged = [Logged(codec.decode(value), value) for value in values]
    if mode == "folded":
        return fold(logged)
    return [change for one in logged for change in fold((one,))]


def _cpu_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    main()
