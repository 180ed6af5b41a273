"""100,000 results that one process waits for, and 1,000 processes that wait for one each, against Celery's Redis backend.

No worker and no Kafka: results are written by the sink, or as Celery's own backend writes them, once everybody waits.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import msgspec

from benchmarks.figures import Row, percentile
from benchmarks.fleet import OURS, STOCK
from benchmarks.stage import BenchError, say
from celery_kafka_backend import codec, events
from celery_kafka_backend.changes import Batch, Logged
from celery_kafka_backend.events import Event
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

    from benchmarks.stage import Child, Stage
    from tests.services.redis import RedisServer

CHUNK = 1000
READY_S = 180.0


class Waited(NamedTuple):
    """What came of one run: the child's report, when each result was written, and Redis' connections before that."""

    report: dict[str, Any]
    written: list[float]
    connections: int


def run(stage: Stage) -> list[Row]:
    many, processes = stage.size(100_000, 2_000), stage.size(1_000, 50)
    found: dict[str, list[Waited]] = {}
    with stage.redis() as server:
        for number in range(min(stage.runs, 3)):
            for mode, count in (("many", many), ("processes", processes)):
                for backend in (STOCK, OURS):
                    waited = _wait(stage, server, backend, {"mode": mode, "count": count, "name": uuid4().hex})
                    found.setdefault(f"{mode} {backend}", []).append(waited)
                    shown = {name: value for name, value in waited.report.items() if name != "done_at"}
                    say(
                        f"{mode}, run {number + 1}, {backend}: {_seconds(waited):.2f} s until the last one had its result, {shown}"
                    )
    against = "Celery's Redis backend"

    def rows(mode: str, what: str, unit: str, figure: Callable[[Waited], float], note: str = "") -> Row:
        ours, peer = ([figure(one) for one in found[f"{mode} {backend}"]] for backend in (OURS, STOCK))
        return Row(what=what, unit=unit, ours=ours, peer=peer, against=against, note=note)

    each, kib, mib = f"one get() of {many:,} results", 1024, 1 << 20
    return [
        rows("many", f"{each}: memory while it waits, per result", "KiB", lambda one: one.report["waiting_bytes"] / many / kib,
             "more than the process had before it made the results; with Celery's own objects, whatever the backend"),
        rows("many", "… at its peak, with the results", "KiB", lambda one: one.report["peak_bytes"] / many / kib),
        rows("many", "… sockets", "", lambda one: one.report["sockets"]),
        rows("many", "… connections to Redis", "", lambda one: one.connections),
        rows("many", "… threads", "", lambda one: one.report["threads"]),
        rows("many", "… CPU of the client in all", "s", lambda one: one.report["cpu_s"]),
        rows("many", "… from the first result written to the end of get()", "s", _seconds),
        rows("processes", f"{processes:,} processes in get(): memory of its own, per process", "MiB", lambda one: one.report["own_bytes"] / mib,
             "forked by a process that has read a result; all results are written at once"),
        rows("processes", "… connections to Redis, per process", "", lambda one: one.connections / processes),
        rows("processes", "… threads, per process", "", lambda one: one.report["threads"]),
        rows("processes", "… from the first result written to the last one had", "s", _seconds),
        rows("processes", "… from each written to its process: p50", "ms", lambda one: 1000 * percentile(_delays(one), 0.5)),
        rows("processes", "… p99", "ms", lambda one: 1000 * percentile(_delays(one), 0.99)),
    ]  # fmt: skip


def _wait(stage: Stage, server: RedisServer, backend: str, asked: dict[str, Any]) -> Waited:
    view = server.clean_database()
    url = f"kafka://127.0.0.1:9/?view={view}" if backend == OURS else view
    env = {"BENCH_BROKER": "memory://", "BENCH_BACKEND": url, "BENCH_SETTINGS": ""}
    import redis  # noqa: PLC0415 - the driver of both

    with redis.Redis.from_url(view) as store, stage.child("waiting_child", asked, env) as child:
        _until_all_wait(store, backend, asked["count"], child)
        connections = store.info("clients")["connected_clients"] - 1
        write = _sink_writes(view) if backend == OURS else _celery_writes(store)
        written = []
        for start in range(0, asked["count"], CHUNK):
            numbers = range(start, min(start + CHUNK, asked["count"]))
            now = time.monotonic()
            write([(f"{asked['name']}-{number}", number) for number in numbers])
            written += [now] * len(numbers)
        child.process.wait(READY_S)
        return Waited(child.report(), written, connections)


def _until_all_wait(store: redis.Redis, backend: str, count: int, child: Child) -> None:
    """Ours registers in a key for each task; Celery's own subscribes to a channel for each."""
    deadline = time.monotonic() + READY_S
    while (store.dbsize() if backend == OURS else len(store.pubsub_channels())) < count:  # type: ignore[arg-type]
        child.check()
        if time.monotonic() > deadline:
            raise BenchError(f"{backend}: not all {count} wait after {READY_S:g} s")
        time.sleep(0.2)


def _document(task_id: str, number: int) -> bytes:
    meta = {"status": "SUCCESS", "result": number, "traceback": None, "children": [], "date_done": None}
    return json.dumps({**meta, "task_id": task_id}).encode()


def _sink_writes(view: str) -> Callable[[list[tuple[str, int]]], None]:
    sink = open_sink(view, StoreOptions())
    sink.open()

    def write(results: list[tuple[str, int]]) -> None:
        sink.write(Batch(fold(_logged(results))))

    return write


def _logged(results: list[tuple[str, int]]) -> Iterator[Logged]:
    for task_id, number in results:
        document = msgspec.Raw(_document(task_id, number))
        event = Event(
            id=uuid4().hex, kind=events.SUCCESS, task=task_id, key=1, at=1, hlc=1, state="SUCCESS", doc=document
        )
        yield Logged(event, codec.encode(event))


def _celery_writes(store: redis.Redis) -> Callable[[list[tuple[str, int]]], None]:
    def write(results: list[tuple[str, int]]) -> None:
        pipe = store.pipeline(transaction=False)
        for task_id, number in results:
            key, document = f"celery-task-meta-{task_id}", _document(task_id, number)
            pipe.setex(key, 3600, document)
            pipe.publish(key, document)
        pipe.execute()

    return write


def _seconds(waited: Waited) -> float:
    done = waited.report["done_at"]
    return float((max(done.values()) if isinstance(done, dict) else done) - waited.written[0])


def _delays(waited: Waited) -> list[float]:
    return [at - waited.written[int(number)] for number, at in waited.report["done_at"].items()]
