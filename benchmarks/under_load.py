"""From a task's end until ``get()`` returns, while the log takes 2,000 tasks/s.

Two cores do not run so many through real workers, so a process appends the events that such a fleet would, three for each task,
into the same log; one materializer folds all of it; and a real worker's tasks, 50 a second among them, are what is timed.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from benchmarks import load
from benchmarks.figures import Row, percentile
from benchmarks.fleet import CHILDREN, OURS, fleet
from benchmarks.stage import BenchError, LogEnd, folded, say, view_of, wait_folded

if TYPE_CHECKING:
    from benchmarks.fleet import Fleet
    from benchmarks.stage import Stage

TASKS_PER_S = 2000
TIMED_PER_S = 50
SETTLE_S = 3.0
LONGEST_S = 600


def run(stage: Stage) -> list[Row]:
    cluster = stage.kafka(stage.brokers)
    seconds = stage.size(15, 3)
    alone: list[list[float]] = []
    loaded: list[list[float]] = []
    offered: list[float] = []
    behind: list[float] = []
    with stage.redis() as server, fleet(stage, OURS, server, cluster) as one:
        assert one.settings is not None
        assert one.materializer is not None
        end = LogEnd(cluster.bootstrap, one.topic)
        view = view_of(one.settings, one.settings.views[0])
        for number in range(stage.runs):
            alone.append(_timed(stage, one, seconds))
            working = {"backend": one.env["BENCH_BACKEND"], "overrides": json.loads(one.env["BENCH_SETTINGS"])}
            working |= {"seed": number, "tasks": TASKS_PER_S * LONGEST_S, "tasks_per_s": TASKS_PER_S}
            with stage.child("load_child", working) as producer:
                time.sleep(SETTLE_S)
                first, began = end.records(), time.monotonic()
                loaded.append(_timed(stage, one, seconds))
                last, folded_to = end.records(), folded(view, one.topic)
                offered.append((last - first) / (time.monotonic() - began) / load.PER_TASK)
                behind.append((last - folded_to) / load.PER_TASK / TASKS_PER_S * 1000)
                producer.check()
            if offered[-1] < 0.95 * TASKS_PER_S:
                raise BenchError(f"{offered[-1]:.0f} tasks/s were appended, of {TASKS_PER_S} that the bench is about")
            say(
                f"run {number + 1} of {stage.runs}: p50 {percentile(loaded[-1], 0.5):.1f} ms, p99 {percentile(loaded[-1], 0.99):.1f} "
                f"ms at {offered[-1]:,.0f} tasks/s, {behind[-1]:.0f} ms behind; alone {percentile(alone[-1], 0.5):.1f} and "
                f"{percentile(alone[-1], 0.99):.1f} ms"
            )
            wait_folded(view, one.topic, end.records(), one.materializer, "folding the rest")
        view.close()
        end.close()
    what = f"a task's end until get() returned, {TASKS_PER_S:,} tasks/s"
    note = (
        f"{TIMED_PER_S} real tasks/s from a worker of {CHILDREN} children; the rest are events appended as their workers would, "
        f"3 a task, into the same log; 1 materializer; brokers: {stage.brokers}"
    )
    return [
        Row(
            what=f"{what}: p{100 * share:.0f}", unit="ms",
            ours=[percentile(each, share) for each in loaded], peer=[percentile(each, share) for each in alone],
            against="without the load", note=note if share == 0.5 else "",
        )
        for share in (0.5, 0.99)
    ] + [
        Row(what="… appended beside them", unit="tasks/s", ours=offered),
        Row(what="… the view behind the log at the end", unit="ms of the load", ours=behind),
    ]  # fmt: skip


def _timed(stage: Stage, one: Fleet, seconds: int) -> list[float]:
    arguments = {"mode": "ends", "tasks": TIMED_PER_S * seconds, "per_s": TIMED_PER_S}
    return [1000 * each for each in stage.ask("client_child", arguments, one.env)["latencies_s"]]
