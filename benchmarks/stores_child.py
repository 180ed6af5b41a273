"""The peers that `stores` measures, in a process of their own: Celery's own backend, and a loader that guards nothing."""

from __future__ import annotations

import json
import sys
import time
import uuid
from typing import Any

import pymongo
from celery import Celery, states

from benchmarks.fold_child import _consumer
from celery_kafka_backend import codec
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.processors.materializer import MAX_RECORDS


def main() -> None:
    given = json.loads(sys.argv[1])
    settings = settings_module.parse(given["backend"], given["overrides"])
    (url,) = settings.views
    print(json.dumps(_stock(url, given["events"]) if given["mode"] == "stock" else _bulk(settings, given["events"])))


def _stock(url: str, count: int) -> dict[str, Any]:
    """Store results of the size that the log's have, as a worker does."""
    backend = Celery("stock", backend=url, set_as_current=False).backend
    backend.store_result("first", 1, states.SUCCESS)
    began = time.monotonic()
    for _ in range(count):
        backend.store_result(str(uuid.uuid4()), "x" * 40, states.SUCCESS)
    return {"seconds": time.monotonic() - began, "events": count}


def _bulk(settings: Any, count: int) -> dict[str, Any]:
    """Insert each event as a row; decoding and waiting for Kafka are not counted, the journal is awaited as ours is."""
    consumer = _consumer(settings)
    read, seconds = 0, 0.0
    with pymongo.MongoClient(settings.views[0]) as client:
        rows = client.get_default_database().get_collection("rows", write_concern=pymongo.WriteConcern(j=True))
        while read < count:
            messages = consumer.consume(MAX_RECORDS, 5.0)
            if not messages:
                break
            events = [codec.decode(message.value()) for message in messages]
            documents = [
                {"_id": event.id, "task": event.task, "state": event.state, "value": message.value()}
                for event, message in zip(events, messages, strict=True)
            ]
            began = time.monotonic()
            rows.insert_many(documents, ordered=False)
            seconds += time.monotonic() - began
            read += len(messages)
    consumer.close()
    return {"seconds": seconds, "events": read}


if __name__ == "__main__":
    main()
