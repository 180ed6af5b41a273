"""Replaying the log into Redis and SQLite: against the ceiling of bare consuming, against SQLite's own bulk insert, and by two processes."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.stage import PARTITIONS, BenchError, Progress, say
from celery_kafka_backend import topics

if TYPE_CHECKING:
    from benchmarks.stage import Stage

EVENTS = int(os.environ.get("REPLAY_EVENTS", "5000000"))
DISTANCE = 3_000
"""Tasks between a task's events: so many are under way at once."""
MIB = 1 << 20


def run(stage: Stage) -> list[Row]:
    cluster = stage.kafka(1)
    settings = stage.settings(cluster)
    tasks = stage.size(EVENTS, 150_000) // load.PER_TASK
    progress = Progress("writing events", load.PER_TASK * tasks)
    records = load.apart(load.Maker(), tasks, DISTANCE)
    count = load.fill(settings, topics.task_events(settings.topic_prefix), records, progress)
    progress.end()
    found: dict[str, list[dict[str, Any]]] = {}
    ask(stage, settings.topic_prefix, "ceiling", 1, None)  # the page cache, for all alike
    for number in range(stage.runs):
        for what, mode, processes, store in (
            ("ceiling", "ceiling", 1, None),
            ("redis", "replay", 1, "redis"),
            ("redis by two", "replay", 2, "redis"),
            ("bulk", "bulk", 1, "sqlite"),
            ("sqlite", "replay", 1, "sqlite"),
        ):
            report = ask(stage, settings.topic_prefix, mode, processes, store)
            if report["events"] != count:
                raise BenchError(f"{what}: {report['events']} events of {count}")
            report["rate"] = report["events"] / report["seconds"]
            say(
                f"run {number + 1} of {stage.runs}, {what}: {report['rate']:,.0f} events/s, {report['cpu_s']:.1f} s of CPU"
            )
            found.setdefault(what, []).append(report)
    return _rows(count, found)


def ask(stage: Stage, prefix: str, mode: str, processes: int, store: str | None) -> dict[str, Any]:
    """Measure one thing, into a store of its own."""
    cluster = stage.kafka(1)
    arguments = {
        "mode": mode, "backend": f"kafka://{cluster.bootstrap}/?view=memory://", "processes": processes,
        "overrides": stage.overrides(cluster, prefix), "history": store == "sqlite", "target": "",
    }  # fmt: skip
    if store == "redis":
        with stage.redis() as server:
            return stage.ask("replay_child", {**arguments, "target": server.url})
    with tempfile.TemporaryDirectory() as folder:
        return stage.ask("replay_child", {**arguments, "target": f"sqlite:///{folder}/replay.db"})


def _rows(count: int, found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    def each(what: str, figure: str, scale: float = 1.0) -> list[float]:
        return [report[figure] * scale for report in found[what]]

    conditions = f"{count:,} events of {load.EVENT_BYTES} bytes, {PARTITIONS} partitions, 1 broker"
    return [
        Row(
            what="replay into Redis, 1 process", unit="events/s", ours=each("redis", "rate"), peer=each("ceiling", "rate"),
            against="ceiling: consume + JSON decode", bound=Bound(least=0.5), note=conditions,
        ),
        Row(
            what="replay into SQLite, with all history", unit="events/s", ours=each("sqlite", "rate"),
            peer=each("bulk", "rate"), against="SQLite's own bulk insert of the same rows", bound=Bound(least=0.5),
            note="the insert alone: reading, decoding and folding are not in the peer's time",
        ),
        Row(
            what="replay into Redis, 2 processes", unit="CPU s/million events",
            ours=each("redis by two", "cpu_s", 1e6 / count), peer=each("redis", "cpu_s", 1e6 / count),
            against="1 process", bound=Bound(most=1.1), note="of the replaying processes, their start included",
        ),
        Row(what="replay into Redis, 2 processes", unit="events/s", ours=each("redis by two", "rate"), peer=each("redis", "rate"), against="1 process"),
        Row(
            what="memory of a replay into Redis, in the last fifth", unit="MiB", ours=each("redis", "late", 1 / MIB),
            peer=each("redis", "early", 1 / MIB), against="in the first fifth", bound=Bound(most=1.1),
        ),
        Row(
            what="memory of a replay into SQLite, in the last fifth", unit="MiB", ours=each("sqlite", "late", 1 / MIB),
            peer=each("sqlite", "early", 1 / MIB), against="in the first fifth", bound=Bound(most=1.1),
        ),
    ]  # fmt: skip
