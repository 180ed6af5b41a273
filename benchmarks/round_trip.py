"""``delay().get()`` through worker, Kafka, materializer and Redis, against Celery's Redis backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Bound, Row, percentile
from benchmarks.fleet import CHILDREN, OURS, STOCK, fleet
from benchmarks.stage import say

if TYPE_CHECKING:
    from benchmarks.stage import Stage

PER_S = 200


def run(stage: Stage) -> list[Row]:
    cluster = stage.kafka(stage.brokers)
    modes = {
        "sequential": {"mode": "sequential", "tasks": stage.size(1000, 100)},
        "steady": {"mode": "steady", "tasks": stage.size(15, 3) * PER_S, "per_s": PER_S},
    }
    found: dict[tuple[str, str], list[list[float]]] = {}
    with (
        stage.redis() as server,
        fleet(stage, OURS, server, cluster) as ours,
        fleet(stage, STOCK, server, cluster) as stock,
    ):
        for number in range(stage.runs):
            for mode, arguments in modes.items():
                for backend, one in ((STOCK, stock), (OURS, ours)):
                    report = stage.ask("client_child", arguments, one.env)
                    latencies = [1000 * each for each in report["latencies_s"]]
                    found.setdefault((mode, backend), []).append(latencies)
                    say(
                        f"{mode}, run {number + 1} of {stage.runs}, {backend}: "
                        f"p50 {percentile(latencies, 0.5):.1f} ms, p99 {percentile(latencies, 0.99):.1f} ms"
                    )
    rows = []
    for mode in modes:
        title = "round trip, sequential" if mode == "sequential" else f"round trip, {PER_S} tasks/s"
        for share, bound in ((0.5, Bound(most=2.0)), (0.99, Bound("value", most=25.0))):
            rows.append(
                Row(
                    what=f"{title}: p{100 * share:.0f}",
                    unit="ms",
                    ours=[percentile(each, share) for each in found[mode, OURS]],
                    peer=[percentile(each, share) for each in found[mode, STOCK]],
                    against="Celery's Redis backend",
                    bound=bound,
                    note=f"worker of {CHILDREN} children, Redis as broker; brokers: {stage.brokers}, acks=all"
                    if share == 0.5
                    else "",
                )
            )
    return rows
