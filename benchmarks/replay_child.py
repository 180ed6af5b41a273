"""What `replay` measures, in a process of its own: a replay, bare consume and decode, SQLite's own bulk insert.

Prints one JSON object. A replay's seconds run from the first question to Kafka to the last batch in the store; processes
of its own are started within.
"""

from __future__ import annotations

import json
import resource
import sqlite3
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from celery_kafka_backend import codec, events, topics
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.changes import Logged
from celery_kafka_backend.past import batches, reader
from celery_kafka_backend.processors.crew import feed_all
from celery_kafka_backend.processors.extent import extent
from celery_kafka_backend.processors.hosting import calm
from celery_kafka_backend.processors.plan import Target, begin, prepare
from celery_kafka_backend.processors.replay import Replayed, feed
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink
from celery_kafka_backend.sinks.sqlite_native import task_row
from celery_kafka_backend.sinks.sqlite_statements import NATIVE

if TYPE_CHECKING:
    from celery_kafka_backend.settings import Settings


def main() -> None:
    given = json.loads(sys.argv[1])
    settings = settings_module.parse(given["backend"], given["overrides"])
    measure = {"replay": _replay, "ceiling": _ceiling, "bulk": _bulk}[given["mode"]]
    before = _cpu_s()
    found = measure(settings, given)
    print(json.dumps({**found, "cpu_s": _cpu_s() - before}))


def _replay(settings: Settings, given: dict[str, Any]) -> dict[str, Any]:
    target = Target(given["target"], StoreOptions(namespace=settings.topic_prefix, history=given["history"]))
    memory: list[tuple[int, int]] = []
    us = psutil.Process()

    def look(done: Replayed) -> None:
        memory.append((done.read, us.memory_info().rss))

    began = time.monotonic()
    prepared = prepare(settings, target)
    begin(target, prepared)
    if given["processes"] > 1:
        done = feed_all(settings, target, prepared.job.divided(given["processes"]), lambda _: None)
    else:
        calm()
        done = feed(settings, target, prepared.job, look)
    seconds = time.monotonic() - began
    at_a_fifth = max((rss for read, rss in memory if read <= done.total / 5), default=0)
    at_the_end = max((rss for read, rss in memory if read >= done.total * 4 / 5), default=0)
    return {"seconds": seconds, "events": done.events, "early": at_a_fifth, "late": at_the_end}


def _ceiling(settings: Settings, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001 - as the others
    """What any consumer in Python must do: fetch, and decode JSON."""
    calm()
    decode = msgspec.json.Decoder().decode
    began = time.monotonic()
    consumer = reader(settings)
    part = extent(consumer, settings, None, None)
    read = 0
    for messages, _ in batches(consumer, part.spans):
        for message in messages:
            decode(message.value() or b"null")
        read += len(messages)
    seconds = time.monotonic() - began
    consumer.close()
    return {"seconds": seconds, "events": read}


def _bulk(settings: Settings, given: dict[str, Any]) -> dict[str, Any]:
    """The same rows into the same tables with the same indices, a transaction per batch; their making is not counted.

    Of a task what stands there in the end, once: no guard, no merging, nothing that is replaced later.
    """
    path = Path(given["target"].removeprefix("sqlite:///"))
    sink = open_sink(given["target"], StoreOptions())
    sink.open()  # the tables
    sink.close()
    db = sqlite3.connect(path, isolation_level=None)
    for pragma in ("synchronous = FULL", "wal_autocheckpoint = 8000", "cache_size = -32768"):
        db.execute(f"PRAGMA {pragma}")
    consumer = reader(settings)
    part = extent(consumer, settings, None, None)
    log = topics.task_events(settings.topic_prefix)
    read, seconds = 0, 0.0
    for messages, _ in batches(consumer, {at: span for at, span in part.spans.items() if at.topic == log}):
        logged = [Logged(codec.decode(message.value()), message.value() or b"") for message in messages]
        ended = [event for event, _ in logged if event.kind == events.SUCCESS]
        tasks = [
            (e.task, e.key, e.id, e.document, e.expires_at, e.expires_at, e.run, e.hlc, 0, e.hlc, e.hlc, 0, e.worker)
            for e in ended
        ]
        native = [(e.task, *task_row(e, e.document or b"")) for e in ended]
        history = [(e.task, e.hlc, e.id, e.kind, e.state, e.at, value, e.expires_at or 0) for e, value in logged]
        began = time.monotonic()
        db.execute("BEGIN")
        db.executemany(f"INSERT INTO ckb_task VALUES ({', '.join('?' * 13)})", tasks)
        db.executemany(f"INSERT INTO celery_taskmeta (task_id, {NATIVE}) VALUES ({', '.join('?' * 13)})", native)
        db.executemany(f"INSERT INTO ckb_history VALUES ({', '.join('?' * 8)})", history)
        db.execute("COMMIT")
        seconds += time.monotonic() - began
        read += len(messages)
    consumer.close()
    db.close()
    return {"seconds": seconds, "events": read}


def _cpu_s() -> float:
    return sum(
        spent.ru_utime + spent.ru_stime
        for spent in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


if __name__ == "__main__":
    main()
