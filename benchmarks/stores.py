"""Folding the log into a store on disk: from Kafka, against the same guarded writes fed from memory.

Peers beside it: Celery's own backend, which stores results one by one, and a bulk loader that guards nothing. A first
round is thrown away, for a server in Java is a third slower in it. After that, rounds go through the sides in turns
forwards and backwards, for whoever comes later has the warmer server, and the fuller one.
"""

from __future__ import annotations

import contextlib
import os
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
MIB = 1 << 20
STORES = {
    "mongodb": Store("MongoDB", mongodb.start, lambda server: server.clean_database(), 0.7, 1_500),
    # As in production, Java compiles all it can, and has the memory for it.
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


def fold_into(scheme: str, stage: Stage) -> list[Row]:
    """Measure one store."""
    cluster = stage.kafka(1)
    settings = stage.settings(cluster)
    tasks = stage.size(TASKS, 3_000)
    progress = Progress("writing events", load.PER_TASK * tasks)
    count = load.fill(
        settings, topics.task_events(settings.topic_prefix), load.apart(load.Maker(), tasks, tasks // 2), progress
    )
    progress.end()
    store = STORES[scheme]
    sides = [
        ("fold_child", "materializer", count),
        ("fold_child", "memory", count),
        ("stores_child", "stock", stage.size(store.stock, 100)),
        ("stores_child", "bulk", count),
    ]
    found: dict[str, list[dict[str, Any]]] = {mode: [] for _, mode, _ in sides}
    with _server(store) as clean:

        def ask(module: str, mode: str, events: int) -> dict[str, Any]:
            given = {"mode": mode, "backend": f"kafka://{cluster.bootstrap}/?view={clean()}", "events": events}
            return stage.ask(module, {**given, "overrides": stage.overrides(cluster, settings.topic_prefix)})

        for number in range(stage.runs + 1):
            for module, mode, events in sides if number % 2 else reversed(sides):
                report = ask(module, mode, events)
                report["rate"] = report["events"] / report["seconds"]
                which = f"run {number} of {stage.runs}" if number else "warming up"
                say(f"{scheme}, {which}, {mode}: {report['rate']:,.0f} rows/s, load average {os.getloadavg()[0]:.1f}")
                if number:
                    found[mode].append(report)
    rates = {mode: [report["rate"] for report in reports] for mode, reports in found.items()}
    title, ours = f"fold into {store.name}", rates["materializer"]
    halfway, at_end = ([each[when] for each in found["materializer"]] for when in ("halfway", "at_end"))
    return [
        Row(
            what=title, unit="events/s", ours=ours, peer=rates["memory"], against="same guarded writes from memory",
            bound=Bound(least=store.least),
            note=f"1 process, {PARTITIONS} partitions, {load.EVENT_BYTES}-byte events, a task's apart; history on",
        ),
        Row(what=title, unit="events/s", ours=ours, peer=rates["bulk"], against="unguarded bulk loader, a row per event"),
        Row(what=title, unit="events/s", ours=ours, peer=rates["stock"], against="Celery's own backend, one by one"),
        Row(
            what=f"{title}: resident memory at the backlog's end", unit="MiB", ours=[rss / MIB for rss, _ in at_end],
            peer=[rss / MIB for rss, _ in halfway], against="halfway", bound=Bound(most=1.1),
        ),
        Row(
            what=f"{title}: connections at the backlog's end", unit="", ours=[float(count) for _, count in at_end],
            peer=[float(count) for _, count in halfway], against="halfway", bound=Bound(most=1.0),
            note="those of two consumers and a producer to Kafka are among them",
        ),
    ]  # fmt: skip


@contextlib.contextmanager
def _server(store: Store) -> Iterator[Callable[[], str]]:
    server = store.start()
    try:
        yield partial(store.clean, server)
    finally:
        server.stop()
