"""Folding the log into Redis, one process, everything on: guard, notification, applied offsets, awaited commits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.stage import PARTITIONS, BenchError, Progress, cluster_cpu_s, redis_cpu_s, say
from celery_kafka_backend import topics

if TYPE_CHECKING:
    from benchmarks.stage import Stage

DISTANCE = 60_000
"""Tasks between a task's events; with 8 partitions more than a batch in each of them."""


def run(stage: Stage) -> list[Row]:
    cluster = stage.kafka(1)
    rows = []
    for name, least in (("adjacent", 10.0), ("apart", 5.0)):
        settings = stage.settings(cluster)
        distance = stage.size(DISTANCE, 50_000)
        tasks = stage.size(4 * DISTANCE, 50_000)
        peer_events = stage.size(3 * DISTANCE, 50_000)
        maker = load.Maker()
        records = load.adjacent(maker, tasks) if name == "adjacent" else load.apart(maker, tasks, distance)
        progress = Progress(f"writing events, {name}", load.PER_TASK * tasks)
        count = load.fill(settings, topics.task_events(settings.topic_prefix), records, progress)
        progress.end()
        rows += _rows(name, least, _measure(stage, settings.topic_prefix, name, count, min(peer_events, count)))
    return rows


def _measure(stage: Stage, prefix: str, name: str, count: int, peer_events: int) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(stage.runs):
        for module, mode, events in (
            ("fold_child", "materializer", count),
            ("fold_child", "memory", count),
            ("faust_child", "each", peer_events),
            ("faust_child", "folded", peer_events),
            ("fold_child", "ceiling", count),
        ):
            report = once(stage, prefix, module, mode, events)
            say(f"fold {name}, run {number + 1} of {stage.runs}, {mode}: {report['rate']:,.0f} events/s")
            found.setdefault(mode, []).append(report)
    for report in found["materializer"]:
        if name == "apart" and report["changes"] != report["events"]:
            raise BenchError("events of a task met in one batch, though they were to be apart")
    return found


def once(stage: Stage, prefix: str, module: str, mode: str, events: int, **settings: Any) -> dict[str, Any]:
    cluster = stage.kafka(1)
    with stage.redis() as server:
        arguments = {
            "mode": mode,
            "backend": f"kafka://{cluster.bootstrap}/?view={server.url}",
            "overrides": stage.overrides(cluster, prefix) | settings,
            "events": events,
        }
        before = cluster_cpu_s(cluster)
        report = stage.ask(module, arguments)
        report["redis_cpu_s"] = redis_cpu_s(server)
        report["kafka_cpu_s"] = cluster_cpu_s(cluster) - before
    report["rate"] = report["events"] / report["seconds"]
    return report


def _rows(name: str, least: float, found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    def rates(mode: str) -> list[float]:
        return [report["rate"] for report in found[mode]]

    def per_million_tasks(mode: str, what: str) -> list[float]:
        return [load.PER_TASK * 1e6 * report[what] / report["events"] for report in found[mode]]

    ours = rates("materializer")
    title = f"fold into Redis, {name}"
    conditions = f"1 process, {PARTITIONS} partitions, {load.EVENT_BYTES}-byte events, 1 broker"
    return [
        Row(
            what=title, unit="events/s", ours=ours, peer=rates("each"), against="Faust agent, a call per event",
            bound=Bound(least=least), note=conditions,
        ),
        Row(what=title, unit="events/s", ours=ours, peer=rates("folded"), against="Faust agent, our fold before"),
        Row(
            what=title, unit="events/s", ours=ours, peer=rates("memory"), against="same Lua calls from memory",
            bound=Bound(least=0.6) if name == "apart" else None,
        ),
        Row(what=title, unit="events/s", ours=ours, peer=rates("ceiling"), against="ceiling: consume + JSON decode"),
        Row(
            what=f"{title}: CPU of the materializer", unit="s/million tasks",
            ours=per_million_tasks("materializer", "cpu_s"), peer=per_million_tasks("each", "cpu_s"),
            against="Faust agent, a call per event",
        ),
        Row(
            what=f"{title}: CPU of Redis", unit="s/million tasks",
            ours=per_million_tasks("materializer", "redis_cpu_s"), peer=per_million_tasks("each", "redis_cpu_s"),
            against="Faust agent, a call per event",
        ),
        Row(
            what=f"{title}: CPU of Kafka, reading", unit="s/million tasks",
            ours=per_million_tasks("materializer", "kafka_cpu_s"), peer=per_million_tasks("each", "kafka_cpu_s"),
            against="Faust agent, a call per event",
        ),
    ]  # fmt: skip
