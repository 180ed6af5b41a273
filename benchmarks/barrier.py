"""A read that passes the barrier while the view is up to date, against a plain read; and one that reads the log itself."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING
from uuid import uuid4

import msgspec

from benchmarks.figures import Row
from benchmarks.stage import BenchError, say
from celery_kafka_backend import codec, events, topics
from celery_kafka_backend.barrier import Barrier
from celery_kafka_backend.changes import Batch, Logged
from celery_kafka_backend.events import Event
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.producer.publisher import Publisher, Record
from celery_kafka_backend.reader import Reader
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.stage import Stage
    from celery_kafka_backend.changes import Partition
    from celery_kafka_backend.settings import Settings

BEHIND = 10_000
"""Records that the frozen view has not folded, over all partitions."""
FAR_S = 30.0


def run(stage: Stage) -> list[Row]:
    reads = stage.size(1000, 50)
    found: dict[str, list[float]] = {"plain": [], "barrier": [], "scan": []}
    with stage.redis() as server:
        url = server.url
        settings = stage.settings(stage.kafka(stage.brokers), url)
        options = StoreOptions(namespace=settings.topic_prefix)
        reader, barrier = Reader(url, options), Barrier(settings)
        ids = [uuid4().hex for _ in range(100)]
        folded = _append(settings, ids, then_fold=lambda batch: _write(url, options, batch))
        _append(settings, [*(uuid4().hex for _ in range(BEHIND)), *ids])
        now_ms = time.time_ns() // 1_000_000

        def past(task_id: str) -> object:
            return barrier.task_document(reader, task_id, FAR_S, now_ms)

        for number in range(stage.runs):
            found["scan"].append(_ms(past, ids[:20], len(ids[:20])))
            say(f"barrier, run {number + 1} of {stage.runs}: behind {found['scan'][-1]:.2f} ms")
        _write(url, options, Batch([], positions={at: end + (1 << 40) for at, end in folded.items()}))
        for number in range(stage.runs):
            found["plain"].append(_ms(lambda task_id: reader.documents([task_id]), ids, reads))
            found["barrier"].append(_ms(past, ids, reads))
            say(f"barrier, run {number + 1}: plain {found['plain'][-1]:.2f} ms, barrier {found['barrier'][-1]:.2f} ms")
        reader.close()
    note = f"medians of {reads} reads; brokers: {stage.brokers}"
    return [
        Row(what="read past the barrier, view up to date", unit="ms", ours=found["barrier"], peer=found["plain"],
            against="plain read", note=note),
        Row(what=f"… view {BEHIND:,} records behind and frozen: the log is read", unit="ms", ours=found["scan"],
            peer=found["plain"], against="plain read"),
    ]  # fmt: skip


def _append(
    settings: Settings, ids: list[str], then_fold: Callable[[Batch], None] | None = None
) -> dict[Partition, int]:
    publisher = Publisher(settings)
    topic = topics.task_events(settings.topic_prefix)
    logged, deliveries = [], []
    for number, task_id in enumerate(ids):
        document = msgspec.json.encode({"status": "FAILURE", "result": "x" * 200, "task_id": task_id})
        event = Event(id=uuid4().hex, kind=events.FAILURE, task=task_id, key=number + 1, at=1, hlc=1,
                      state="FAILURE", doc=msgspec.Raw(document))  # fmt: skip
        value = codec.encode(event)
        logged.append(Logged(event, value))
        deliveries.append(publisher.publish(Record(topic, task_id.encode(), value), wait_s=FAR_S))
    ends: dict[Partition, int] = {}
    for delivery in deliveries:
        delivery.wait(FAR_S)
        at, offset = delivery.stored
        ends[at] = max(ends.get(at, 0), offset + 1)
    publisher.close()
    if then_fold is not None:
        then_fold(Batch(fold(logged), positions=ends))
    return ends


def _write(url: str, options: StoreOptions, batch: Batch) -> None:
    sink = open_sink(url, options)
    sink.open()
    sink.write(batch)
    sink.close()


def _ms(read: Callable[[str], object], ids: list[str], reads: int) -> float:
    samples = []
    for number in range(reads):
        began = time.perf_counter()
        if not read(ids[number % len(ids)]):
            raise BenchError("a read found nothing")
        samples.append(1000 * (time.perf_counter() - began))
    return median(samples)
