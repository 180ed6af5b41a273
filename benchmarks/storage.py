"""Bytes per task: in Redis against Celery's Redis backend, and in Kafka from a busy fleet."""

from __future__ import annotations

import secrets
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import redis as redis_client
from celery import Celery

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.stage import Progress, log_bytes, say
from celery_kafka_backend import events, order, topics
from celery_kafka_backend.changes import Batch, Logged
from celery_kafka_backend.codec import encode
from celery_kafka_backend.events import Event
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink

if TYPE_CHECKING:
    from benchmarks.stage import Stage

SIZES = (("400-byte results", 400, 1.35), ("tiny results", 0, 1.7))
CHUNK = 2000


def run(stage: Stage) -> list[Row]:
    tasks = stage.size(50_000, 5_000)
    rows = []
    for title, size, most in SIZES:
        stock = _stock(stage, tasks, size)
        ours = _ours(stage, tasks, size, history=False)
        with_history = _ours(stage, tasks, size, history=True)
        say(f"{title}: {ours:.0f} bytes a task, with history {with_history:.0f}, Celery {stock:.0f}")
        against = "Celery's Redis backend"
        rows += [
            Row(
                what=f"Redis, {title}",
                unit="bytes/task",
                ours=[ours],
                peer=[stock],
                against=against,
                bound=Bound(most=most),
            ),
            Row(
                what=f"Redis, {title}, with history",
                unit="bytes/task",
                ours=[with_history],
                peer=[stock],
                against=against,
            ),
        ]
    rows[0] = Row(
        **{name: getattr(rows[0], name) for name in Row.__struct_fields__} | {"note": f"used_memory, {tasks:,} tasks"}
    )
    return [*rows, *_kafka(stage)]


def _result(number: int, size: int) -> Any:
    return secrets.token_hex(size // 2) if size else number


def _growth(server: Any, fill: Any) -> int:
    client = redis_client.Redis.from_url(server.url)
    fill()  # scripts, buffers, a first table
    client.flushall()
    client.config_resetstat()
    time.sleep(0.2)
    before = int(client.info("memory")["used_memory"])
    fill()
    time.sleep(0.2)
    grown = int(client.info("memory")["used_memory"]) - before
    client.close()
    return grown


def _stock(stage: Stage, tasks: int, size: int) -> float:
    with stage.redis() as server:
        backend = Celery("bench", broker="memory://", backend=server.url).backend

        def fill() -> None:
            pipe = backend.client.pipeline(transaction=False)
            for number in range(tasks):
                document, key = _document(backend, str(uuid4()), number, size)
                pipe.setex(key, backend.expires, document)
                if number % CHUNK == 0:
                    pipe.execute()
            pipe.execute()

        grown = _growth(server, fill)
        backend.client.close()
    return grown / tasks


def _document(backend: Any, task_id: str, number: int, size: int) -> tuple[bytes, bytes]:
    """Return what Celery's own backend would store, and where."""
    request = SimpleNamespace(children=[], group=None, parent_id=None, stamped_headers=None, id=task_id)
    meta = backend._get_result_meta(  # noqa: SLF001
        result=_result(number, size), state="SUCCESS", traceback=None, request=request
    )
    meta["task_id"] = task_id
    return backend.encode(meta).encode(), backend.get_key_for_task(task_id)


def _ours(stage: Stage, tasks: int, size: int, *, history: bool) -> float:
    """The same documents, from the three events of each task, through the sink."""
    with stage.redis() as server:
        backend = Celery("bench", broker="memory://", backend=server.url).backend
        sink = open_sink(server.url, StoreOptions(namespace="bench", history=history))
        sink.open()

        def fill() -> None:
            for start in range(0, tasks, CHUNK):
                logged = [
                    one for number in range(start, min(start + CHUNK, tasks)) for one in _events(backend, number, size)
                ]
                sink.write(Batch(fold(logged)))

        grown = _growth(server, fill)
        sink.close()
    return grown / tasks


def _events(backend: Any, number: int, size: int) -> list[Logged]:
    task_id = str(uuid4())
    document, _ = _document(backend, task_id, number, size)
    wall = order.system_wall_ms()
    run = order.run_at(wall)
    common = {
        "task": task_id, "at": wall, "run": run, "host": "worker-17", "pid": 4711, "name": "shop.tasks.price",
        "worker": "celery@worker-17", "sent_at": wall - 20, "received_at": wall - 15, "expires_at": wall + 86_400_000,
        "queue": "celery", "routing_key": "celery", "root": task_id,
    }  # fmt: skip
    found = [
        Event(id=uuid4().hex, kind=events.RECEIVED, hlc=wall - 15, role=events.PARENT, **common),
        Event(id=uuid4().hex, kind=events.STARTED, hlc=wall - 10, started_at=wall - 10, **common),
        Event(
            id=uuid4().hex, kind=events.SUCCESS, hlc=wall, started_at=wall - 10, runtime_s=0.010123, state="SUCCESS",
            key=order.order_key(order.Rank.SUCCEEDED, wall, run), doc=load.msgspec.Raw(document), **common,
        ),
    ]  # fmt: skip
    return [Logged(event, encode(event)) for event in found]


def _kafka(stage: Stage) -> list[Row]:
    """The log of a busy fleet: large batches, which compress well."""
    cluster = stage.kafka(1)
    settings = stage.settings(cluster)
    topic = topics.task_events(settings.topic_prefix)
    tasks = stage.size(100_000, 10_000)
    progress = Progress("writing events", load.PER_TASK * tasks)
    load.fill(settings, topic, load.apart(load.Maker(), tasks, 1000), progress)
    progress.end()
    time.sleep(0.5)
    note = f"{load.PER_TASK} events of {load.EVENT_BYTES} bytes a task, one copy, lz4 on large batches, half of the text random"
    return [
        Row(what="bytes in Kafka, busy fleet", unit="bytes/task", ours=[log_bytes(cluster, topic) / tasks], note=note)
    ]
