"""Folding the log into each store on disk: from Kafka, against the same guarded writes fed from memory.

Peers beside it: Celery's own backend, which stores results one by one, and a bulk loader that guards nothing.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.stage import PARTITIONS, Progress, say
from celery_kafka_backend import topics
from tests.services import cassandra, elasticsearch, mongodb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.stage import Stage


class Store(NamedTuple):
    """What is measured of a store.

    Attributes:
        name: Its name.
        start: Starts its server.
        clean: Returns a URL of that server at which nothing is yet.
        least: The least share of the rate from memory.
        stock: Results that Celery's own backend stores, in some seconds.
    """

    name: str
    start: Callable[[], Any]
    clean: Callable[[Any], str]
    least: float
    stock: int


TASKS = 20_000
WARM_UP = 30_000
STORES = {
    "mongodb": Store("MongoDB", mongodb.start, lambda server: server.clean_database(), 0.7, 1_500),
    # As in production, Java compiles all it can, and has the memory for it; so the first figures would be of a cold one.
    "elasticsearch": Store(
        "Elasticsearch", partial(elasticsearch.start, heap="1g", tier=4), lambda server: server.clean_index(), 0.7, 400
    ),
    "cassandra": Store(
        "Cassandra",
        partial(cassandra.start, heap="1g", tier=4),
        lambda server: server.url(server.new_keyspace()),
        0.6,
        600,
    ),
}


def run(stage: Stage) -> list[Row]:
    return [row for scheme in STORES for row in _store(stage, scheme)]


def _store(stage: Stage, scheme: str) -> list[Row]:
    cluster = stage.kafka(1)
    settings = stage.settings(cluster)
    tasks = stage.size(TASKS, 3_000)
    progress = Progress("writing events", load.PER_TASK * tasks)
    count = load.fill(
        settings, topics.task_events(settings.topic_prefix), load.apart(load.Maker(), tasks, tasks // 2), progress
    )
    progress.end()
    found: dict[str, list[dict[str, Any]]] = {}
    store = STORES[scheme]
    with _server(store) as clean:

        def ask(module: str, mode: str, events: int) -> dict[str, Any]:
            given = {"mode": mode, "backend": f"kafka://{cluster.bootstrap}/?view={clean()}", "events": events}
            return stage.ask(module, {**given, "overrides": stage.overrides(cluster, settings.topic_prefix)})

        ask("fold_child", "memory", WARM_UP)
        for number in range(stage.runs):
            for module, mode, events in (
                ("fold_child", "materializer", count),
                ("fold_child", "memory", count),
                ("stores_child", "stock", stage.size(store.stock, 100)),
                ("stores_child", "bulk", count),
            ):
                report = ask(module, mode, events)
                report["rate"] = report["events"] / report["seconds"]
                say(f"{scheme}, run {number + 1} of {stage.runs}, {mode}: {report['rate']:,.0f} rows/s")
                found.setdefault(mode, []).append(report)
    rates = {mode: [report["rate"] for report in reports] for mode, reports in found.items()}
    title, ours = f"fold into {store.name}", rates["materializer"]
    return [
        Row(
            what=title, unit="events/s", ours=ours, peer=rates["memory"], against="same guarded writes from memory",
            bound=Bound(least=store.least),
            note=f"1 process, {PARTITIONS} partitions, {load.EVENT_BYTES}-byte events, a task's apart; history on",
        ),
        Row(what=title, unit="events/s", ours=ours, peer=rates["bulk"], against="unguarded bulk loader, a row per event"),
        Row(what=title, unit="events/s", ours=ours, peer=rates["stock"], against="Celery's own backend, one by one"),
    ]  # fmt: skip


@contextlib.contextmanager
def _server(store: Store) -> Iterator[Callable[[], str]]:
    server = store.start()
    try:
        yield partial(store.clean, server)
    finally:
        server.stop()
