"""What metrics cost: the fold and a worker's tasks with them, against the same without, by turns in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.fleet import OURS, fleet
from benchmarks.fold_redis import DISTANCE, once
from benchmarks.stage import Progress, say
from celery_kafka_backend import topics

if TYPE_CHECKING:
    from benchmarks.stage import Stage

AGAINST = "without metrics"


def run(stage: Stage) -> list[Row]:
    return [*_fold(stage), *_worker(stage)]


def _fold(stage: Stage) -> list[Row]:
    settings = stage.settings(stage.kafka(1))
    tasks = stage.size(2 * DISTANCE, 50_000)
    progress = Progress("writing events", load.PER_TASK * tasks)
    count = load.fill(settings, topics.task_events(settings.topic_prefix), load.adjacent(load.Maker(), tasks), progress)
    progress.end()
    found: dict[str, list[float]] = {"metered": [], "materializer": []}
    cpu: dict[str, list[float]] = {"metered": [], "materializer": []}
    for number in range(stage.runs):
        for mode in ("materializer", "metered") if number % 2 else ("metered", "materializer"):
            report = once(stage, settings.topic_prefix, "fold_child", mode, count)
            found[mode].append(report["rate"])
            cpu[mode].append(1e6 * report["cpu_s"] / report["events"])
            say(f"fold, run {number + 1} of {stage.runs}, {mode}: {report['rate']:,.0f} events/s")
    return [
        Row(
            what="fold into Redis with metrics", unit="events/s", ours=found["metered"], peer=found["materializer"],
            against=AGAINST, bound=Bound(least=0.95), note="1 process, adjacent events",
        ),
        Row(
            what="… its CPU", unit="us/event", ours=cpu["metered"], peer=cpu["materializer"], against=AGAINST,
        ),
    ]  # fmt: skip


def _worker(stage: Stage) -> list[Row]:
    cluster = stage.kafka(stage.brokers)
    tasks = stage.size(2_000, 200)
    found: dict[str, list[float]] = {"on": [], "off": []}
    cpu: dict[str, list[float]] = {"on": [], "off": []}
    with (
        stage.redis() as server,
        fleet(stage, OURS, server, cluster, metrics_port=0) as on,
        fleet(stage, OURS, server, cluster) as off,
    ):
        fleets = {"on": on, "off": off}
        for number in range(stage.runs):
            for name in ("on", "off") if number % 2 else ("off", "on"):
                one = fleets[name]
                before = one.worker.cpu_s()
                report = stage.ask(
                    "client_child", {"mode": "batch", "task": "wait", "seconds": 0.0, "tasks": tasks}, one.env
                )
                cpu[name].append(1e6 * (one.worker.cpu_s() - before) / tasks)
                found[name].append(report["rate"])
                say(f"worker, run {number + 1} of {stage.runs}, metrics {name}: {report['rate']:.1f} tasks/s")
    return [
        Row(
            what="worker with metrics, empty tasks", unit="tasks/s", ours=found["on"], peer=found["off"],
            against=AGAINST, bound=Bound(least=0.95), note="2 children, acknowledged",
        ),
        Row(what="… its CPU", unit="us/task", ours=cpu["on"], peer=cpu["off"], against=AGAINST),
    ]  # fmt: skip
