"""Folding the log into each store on disk: from Kafka, against the same guarded writes fed from memory.

Peers beside it: Celery's own backend, which stores results one by one, and a bulk loader that guards nothing.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.stage import PARTITIONS, Progress, say
from celery_kafka_backend import topics
from tests.services import mongodb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.stage import Stage

TASKS = 20_000
STOCK_TASKS = 1_500
STORES = {"mongodb": (mongodb, "MongoDB", 0.7)}
"""Module of its server, its name, and the least share of the rate from memory."""


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
    for number in range(stage.runs):
        for module, mode, events in (
            ("fold_child", "materializer", count),
            ("fold_child", "memory", count),
            ("stores_child", "stock", stage.size(STOCK_TASKS, 300)),
            ("stores_child", "bulk", count),
        ):
            with _server(scheme) as url:
                backend = f"kafka://{cluster.bootstrap}/?view={url}"
                overrides = stage.overrides(cluster, settings.topic_prefix)
                report = stage.ask(module, {"mode": mode, "backend": backend, "overrides": overrides, "events": events})
            report["rate"] = report["events"] / report["seconds"]
            say(f"{scheme}, run {number + 1} of {stage.runs}, {mode}: {report['rate']:,.0f} rows/s")
            found.setdefault(mode, []).append(report)
    _, name, least = STORES[scheme]
    rates = {mode: [report["rate"] for report in reports] for mode, reports in found.items()}
    title, ours = f"fold into {name}", rates["materializer"]
    return [
        Row(
            what=title, unit="events/s", ours=ours, peer=rates["memory"], against="same guarded writes from memory",
            bound=Bound(least=least),
            note=f"1 process, {PARTITIONS} partitions, {load.EVENT_BYTES}-byte events, a task's apart; history on",
        ),
        Row(what=title, unit="events/s", ours=ours, peer=rates["bulk"], against="unguarded bulk loader, a row per event"),
        Row(what=title, unit="events/s", ours=ours, peer=rates["stock"], against="Celery's own backend, one by one"),
    ]  # fmt: skip


@contextlib.contextmanager
def _server(scheme: str) -> Iterator[str]:
    server = STORES[scheme][0].start()
    try:
        yield server.url
    finally:
        server.stop()
