"""A worker of two children on tasks of 20 ms, against the same worker on Celery's Redis backend."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.figures import Bound, Row
from benchmarks.fleet import CHILDREN, OURS, STOCK, fleet
from benchmarks.stage import cluster_cpu_s, log_bytes, say

if TYPE_CHECKING:
    from benchmarks.fleet import Fleet
    from benchmarks.stage import Stage

SECONDS = 0.02
TASKS = {"wait": "waiting", "compute": "computing"}


def run(stage: Stage) -> list[Row]:
    cluster = stage.kafka(stage.brokers)
    tasks = stage.size(800, 100)
    rates: dict[tuple[str, str], list[float]] = {}
    costs: dict[tuple[str, str], list[float]] = {}
    with (
        stage.redis() as server,
        fleet(stage, OURS, server, cluster) as ours,
        fleet(stage, STOCK, server, cluster) as stock,
    ):
        sent = 0
        for number in range(stage.runs):
            for task in TASKS:
                for backend, one in ((STOCK, stock), (OURS, ours)):
                    before = {**_cpu(one), "kafka": cluster_cpu_s(cluster)}
                    arguments = {"mode": "batch", "task": task, "seconds": SECONDS, "tasks": tasks}
                    report = stage.ask("client_child", arguments, one.env)
                    after = {**_cpu(one), "kafka": cluster_cpu_s(cluster)}
                    rates.setdefault((task, backend), []).append(report["rate"])
                    if task == "wait":
                        for what, spent in before.items():
                            costs.setdefault((what, backend), []).append(1e6 * (after[what] - spent) / tasks)
                    say(f"{task}, run {number + 1} of {stage.runs}, {backend}: {report['rate']:.1f} tasks/s")
                    sent += tasks + 30 if backend == OURS else 0
        time.sleep(0.5)
        stored = log_bytes(cluster, ours.topic) / sent
    against = "Celery's Redis backend"
    note = f"{CHILDREN} children, tasks of {1000 * SECONDS:.0f} ms, acknowledged; brokers: {stage.brokers}"
    rows = [
        Row(
            what=f"worker, tasks that are {word}", unit="tasks/s", ours=rates[task, OURS], peer=rates[task, STOCK],
            against=against, bound=Bound(least=0.95) if task == "wait" else None,
            note=note if task == "wait" else "every core is busy, and Kafka and the materializer need some of it",
        )
        for task, word in TASKS.items()
    ]  # fmt: skip
    rows.append(
        Row(
            what="CPU of the worker", unit="s/million tasks", ours=costs["worker", OURS], peer=costs["worker", STOCK],
            against=against, note="the tasks themselves only wait",
        )
    )  # fmt: skip
    rows += [
        Row(
            what=f"CPU of {what}, at the worker's rate",
            unit="s/million tasks",
            ours=costs[what, OURS],
            note="small batches cost more than a backlog; Kafka's includes idling" if what == "kafka" else "",
        )
        for what in ("materializer", "kafka")
    ]
    rows.append(
        Row(
            what="bytes in Kafka, one worker's trickle",
            unit="bytes/task",
            ours=[stored],
            note="4 events a task, one copy, lz4 on batches of one or two events",
        )
    )
    return rows


def _cpu(one: Fleet) -> dict[str, float]:
    return {
        "worker": one.worker.cpu_s(),
        "materializer": one.materializer.cpu_s() if one.materializer is not None else 0.0,
    }
