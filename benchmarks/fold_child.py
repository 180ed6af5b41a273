"""What `fold_redis` measures, in a process of its own: the materializer, the sink alone, bare consuming.

Prints one JSON object. Seconds run from the assignment of the partitions to the last awaited commit.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
from confluent_kafka import Consumer

from celery_kafka_backend import codec, topics
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.board import Board
from celery_kafka_backend.changes import Batch, Logged, Partition
from celery_kafka_backend.kafka import consumer_config
from celery_kafka_backend.processors import consumers
from celery_kafka_backend.processors import materializer as materializer_module
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.processors.hosting import calm
from celery_kafka_backend.processors.metering import TEXT_BYTES, VIEW, Place
from celery_kafka_backend.sinks.contract import Sink, StoreOptions
from celery_kafka_backend.sinks.registry import open_sink

if TYPE_CHECKING:
    from celery_kafka_backend.settings import Settings


def main() -> None:
    given = json.loads(sys.argv[1])
    settings = settings_module.parse(given["backend"], given["overrides"])
    measure = {"materializer": _materializer, "metered": _metered, "memory": _memory, "ceiling": _ceiling}[
        given["mode"]
    ]
    if given["mode"] not in ("materializer", "metered"):  # which does this itself
        calm()
    print(json.dumps(measure(settings, given["events"])))


class _Until(Sink):
    """Passes everything on, counts, looks what we hold, and sends us SIGTERM once so many events are written."""

    def __init__(self, inner: Sink, count: int) -> None:
        self.url = inner.url
        self._inner = inner
        self._count = count
        self.events = self.changes = self.batches = 0
        self.halfway = self.at_end = (0, 0)

    def open(self) -> None:
        self._inner.open()

    def write(self, batch: Batch) -> None:
        self._inner.meanwhile = self.meanwhile
        self._inner.write(batch)
        self.events += sum(len(change.history) for change in batch.changes)
        self.changes += len(batch.changes)
        self.batches += 1
        if 2 * self.events >= self._count and not any(self.halfway):
            self.halfway = _held()
        if self.events >= self._count:
            self.at_end = _held()
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        self._inner.close()


class _Assigned(logging.Handler):
    """Notes when the partitions came."""

    at = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if "assigned" in record.getMessage() and not self.at:
            self.at = time.monotonic()


def _metered(settings: Settings, count: int) -> dict[str, Any]:
    """As `pipeline run --metrics-port` starts it."""
    return _materializer(settings, count, Place(Board(1, VIEW.size, TEXT_BYTES), 0))


def _materializer(settings: Settings, count: int, place: Place | None = None) -> dict[str, Any]:
    assigned = _Assigned()
    consumers.logger.addHandler(assigned)
    consumers.logger.setLevel(logging.INFO)
    url, options = settings.views[0], StoreOptions(namespace=settings.topic_prefix)
    sink = _Until(open_sink(url, options), count)
    materializer_module.open_sink = lambda *_: sink
    before = _cpu_s()
    # The body of a process as `pipeline run` starts it; it returns when the last commit is acknowledged.
    materializer_module.materialize(settings, url, options, place)
    return {
        "seconds": time.monotonic() - assigned.at,
        "events": sink.events,
        "changes": sink.changes,
        "batches": sink.batches,
        "halfway": sink.halfway,
        "at_end": sink.at_end,
        "cpu_s": _cpu_s() - before,
    }


def _memory(settings: Settings, count: int) -> dict[str, Any]:
    """The sink alone, on the batches that the fold gives; their making is not counted."""
    url = settings.views[0]
    sink = open_sink(url, StoreOptions(namespace=settings.topic_prefix))
    sink.open()
    consumer = _consumer(settings)
    topic = topics.task_events(settings.topic_prefix)
    read = changes = 0
    seconds = cpu = 0.0
    while read < count:
        messages = consumer.consume(consumers.MAX_RECORDS, 5.0)
        if not messages:
            break
        logged = [Logged(codec.decode(message.value()), message.value()) for message in messages]
        ends = {Partition(topic, message.partition()): message.offset() + 1 for message in messages}
        batch = Batch(fold(logged), (), ends)
        read += len(messages)
        changes += len(batch.changes)
        spent, began = time.process_time(), time.monotonic()
        sink.write(batch)
        seconds += time.monotonic() - began
        cpu += time.process_time() - spent
    consumer.close()
    sink.close()
    return {"seconds": seconds, "events": read, "changes": changes, "cpu_s": cpu}


def _ceiling(settings: Settings, count: int) -> dict[str, Any]:
    """What any consumer in Python must do: fetch, and decode JSON."""
    decode = msgspec.json.Decoder().decode
    assigned = 0.0

    def on_assign(*_: object) -> None:
        nonlocal assigned
        assigned = assigned or time.monotonic()

    consumer = _consumer(settings, on_assign)
    read = 0
    before = _cpu_s()
    while read < count:
        messages = consumer.consume(consumers.MAX_RECORDS, 0.2)
        for message in messages:
            decode(message.value())
        read += len(messages)
    seconds = time.monotonic() - assigned
    consumer.close()
    return {"seconds": seconds, "events": read, "cpu_s": _cpu_s() - before}


def _consumer(settings: Settings, on_assign: Any = lambda *_: None) -> Consumer:
    group = f"{settings.topic_prefix}.{time.time_ns()}"
    consumer = Consumer(consumer_config(settings, group))
    consumer.subscribe([topics.task_events(settings.topic_prefix)], on_assign=on_assign)
    return consumer


def _held() -> tuple[int, int]:
    """Return resident bytes, and connections."""
    us = psutil.Process()
    return us.memory_info().rss, len(us.net_connections())


def _cpu_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    main()
