"""Stores results, one after the other, with each backend in turn; prints one JSON object of seconds per call."""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from celery import Celery, states
from celery.app.task import Context
from confluent_kafka import Producer

from celery_kafka_backend import kafka, topics
from celery_kafka_backend.producer import headers as names
from celery_kafka_backend.producer import metering

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = {"order": 40_961, "state": "shipped", "lines": [{"sku": "A-1002", "n": 2}, {"sku": "B-77", "n": 1}]}
WARM_UP = 200
METERED = "buffered, with metrics"


def main() -> None:
    given = json.loads(sys.argv[1])
    stores = {what: _store(what, given) for what in given["what"]}
    for store, finish in stores.values():
        _timed(store, finish, WARM_UP)
    found: dict[str, list[dict[str, float]]] = {what: [] for what in stores}
    for _ in range(given["runs"]):
        for what, (store, finish) in stores.items():
            found[what].append(_timed(store, finish, given["calls"]))
    print(json.dumps(found), flush=True)


def _timed(store: Callable[[Context], Any], finish: Callable[[], Any], calls: int) -> dict[str, float]:
    """Return a call's median and mean, and the time until the last result is in Kafka, all in seconds per call."""
    requests = [_request(str(uuid4())) for _ in range(calls)]
    each = []
    began = time.perf_counter()
    for request in requests:
        at = time.perf_counter()
        store(request)
        each.append(time.perf_counter() - at)
    called = time.perf_counter() - began
    finish()
    return {
        "median": statistics.median(each),
        "mean": called / calls,
        "arrived": (time.perf_counter() - began) / calls,
    }


def _store(what: str, given: dict[str, Any]) -> tuple[Callable[[Context], Any], Callable[[], Any]]:
    if what == "raw":
        return _raw(given)
    url, settings = given["redis"], {}
    if what != "redis":
        mode = {"delivery": "buffered", "metrics_port": 0} if what == METERED else {"delivery": what}
        url, settings = given["kafka"], {**given["settings"], **mode}
    app = Celery(f"bench-{what}", broker="memory://", backend=url, set_as_current=False)
    if settings:
        app.conf.kafka_backend_settings = settings

    @app.task(name="bench.add")
    def add() -> None: ...

    backend = app.backend
    if what == METERED:
        metering.measure(backend.recorder)

    def store(request: Context) -> None:
        backend.store_result(request.id, RESULT, states.SUCCESS, request=request)

    def finish() -> None:
        if what != "redis" and backend.recorder.courier.finish(60):
            raise SystemExit("Kafka did not take every result in a minute")

    return store, finish


def _request(task_id: str) -> Context:
    """Return what a worker's child knows of a task."""
    now = int(time.time() * 1000)
    return Context(
        {
            "id": task_id, "task": "bench.add", "root_id": task_id, "parent_id": None, "retries": 0,
            "hostname": "celery@bench", "delivery_info": {"exchange": "", "routing_key": "celery", "priority": 0},
            names.TASK: task_id, names.RUN: (now - 1_577_836_800_000) // 8000, names.HLC: now,
            names.SENT_AT: now, names.RECEIVED_AT: now, names.STARTED_AT: now,
        },
        called_directly=False,
    )  # fmt: skip


def _raw(given: dict[str, Any]) -> tuple[Callable[[Context], Any], Callable[[], Any]]:
    """Produce and wait for the acknowledgement, with the same producer configuration and a record of the same size."""
    from celery_kafka_backend import settings as settings_module  # noqa: PLC0415

    settings = settings_module.parse(given["kafka"], given["settings"])
    producer = Producer(kafka.producer_config(settings))
    topic = topics.task_events(settings.topic_prefix)
    value = json.dumps({"v": 99, "result": RESULT, "filler": uuid4().hex * 14}).encode()

    def store(request: Context) -> None:
        answers: list[Any] = []
        producer.produce(topic, value=value, key=request.id, on_delivery=lambda error, _: answers.append(error))
        while not answers:
            producer.poll(1)
        if answers[0] is not None:
            raise SystemExit(f"raw produce: {answers[0]}")

    return store, lambda: producer.flush(60)


if __name__ == "__main__":
    main()
