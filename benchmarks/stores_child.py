"""The peers that `stores` measures, in a process of their own: Celery's own backend, and a loader that guards nothing."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import elasticsearch
import elasticsearch.helpers
import pymongo
from cassandra.cluster import Cluster
from cassandra.concurrent import execute_concurrent
from cassandra.query import BatchStatement, BatchType
from celery import Celery, states

from benchmarks.fold_child import _consumer
from celery_kafka_backend import codec
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.processors.consumers import MAX_RECORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def main() -> None:
    given = json.loads(sys.argv[1])
    settings = settings_module.parse(given["backend"], given["overrides"])
    (url,) = settings.views
    print(json.dumps(_stock(url, given["events"]) if given["mode"] == "stock" else _bulk(settings, given["events"])))


def _stock(url: str, count: int) -> dict[str, Any]:
    """Store results of the size that the log's have, as a worker does."""
    app = Celery("stock", backend=url, set_as_current=False)
    if url.startswith("cassandra"):
        at = urlsplit(url)
        app.conf.update(cassandra_servers=[at.hostname], cassandra_port=at.port, cassandra_keyspace=at.path[1:])
        app.conf.update(cassandra_table="stock", result_backend="cassandra://")
    backend = app.backend
    backend.store_result("first", 1, states.SUCCESS)
    began = time.monotonic()
    for _ in range(count):
        backend.store_result(str(uuid.uuid4()), "x" * 40, states.SUCCESS)
    return {"seconds": time.monotonic() - began, "events": count}


def _bulk(settings: Any, count: int) -> dict[str, Any]:
    """Insert each event as a row; decoding and waiting for Kafka are not counted, the disk is awaited as ours is."""
    consumer = _consumer(settings)
    read, seconds = 0, 0.0
    with _loader(settings.views[0]) as load:
        while read < count:
            messages = consumer.consume(MAX_RECORDS, 5.0)
            if not messages:
                break
            events = [codec.decode(message.value()) for message in messages]
            rows = [
                {"_id": event.id, "task": event.task, "state": event.state, "value": message.value()}
                for event, message in zip(events, messages, strict=True)
            ]
            began = time.monotonic()
            load(rows)
            seconds += time.monotonic() - began
            read += len(messages)
    consumer.close()
    return {"seconds": seconds, "events": read}


@contextlib.contextmanager
def _loader(url: str) -> Iterator[Callable[[list[dict[str, Any]]], Any]]:
    """Yield the driver's own way to insert many rows."""
    if url.startswith("mongodb"):
        with pymongo.MongoClient(url) as client:
            rows = client.get_default_database().get_collection("rows", write_concern=pymongo.WriteConcern(j=True))
            yield partial(rows.insert_many, ordered=False)
        return
    if url.startswith("cassandra"):
        at = urlsplit(url)
        with Cluster([at.hostname], port=at.port) as cluster:
            yield _batches_of_50(cluster.connect(at.path[1:]))
        return
    base, _, index = url.removeprefix("elasticsearch").rpartition("/")
    with elasticsearch.Elasticsearch(f"http{base}") as client:
        yield lambda rows: elasticsearch.helpers.bulk(
            client, ({**row, "value": row["value"].decode()} for row in rows), index=index, chunk_size=2_000
        )


def _batches_of_50(session: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """Unlogged batches, 32 at once: five times as fast as statements (of several servers, one for each owner)."""
    session.execute("CREATE TABLE IF NOT EXISTS rows (id text PRIMARY KEY, task text, state text, value blob)")
    insert = session.prepare("INSERT INTO rows (id, task, state, value) VALUES (?, ?, ?, ?)")

    def load(rows: list[dict[str, Any]]) -> None:
        batches = []
        for start in range(0, len(rows), 50):
            batches.append(BatchStatement(BatchType.UNLOGGED))
            for row in rows[start : start + 50]:
                batches[-1].add(insert, tuple(row.values()))
        execute_concurrent(session, [(batch, ()) for batch in batches], concurrency=32)

    return load


if __name__ == "__main__":
    main()
