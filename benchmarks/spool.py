"""A worker of two children on tasks of 20 ms: what a spool costs while Kafka is there, and what is left while it is away."""

from __future__ import annotations

import tempfile
import time
from typing import TYPE_CHECKING

from benchmarks.figures import Bound, Row
from benchmarks.fleet import CHILDREN, OURS, fleet
from benchmarks.stage import BenchError, say
from celery_kafka_backend.producer.spool import spool_for

if TYPE_CHECKING:
    from benchmarks.fleet import Fleet
    from benchmarks.stage import Stage
    from tests.services.kafka import KafkaCluster

SECONDS = 0.02
SPOOLED_S = 120.0
LOOK_S = 0.5


def run(stage: Stage) -> list[Row]:
    cluster = stage.kafka(stage.brokers)
    tasks, away_tasks = stage.size(500, 100), stage.size(1000, 600)
    without, there, away, known = [], [], [], []
    with (
        tempfile.TemporaryDirectory(prefix="ckb-bench-spool-") as folder,
        stage.redis() as server,
        fleet(stage, OURS, server, cluster, spool=folder) as ours,
        fleet(stage, OURS, server, cluster) as peer,
    ):
        for one in (peer, ours):
            _spans(stage, one, 50)  # warm
        for number in range(stage.runs):
            # Whoever is first has the machine as the one before left it: in turns.
            for one, rates in ((peer, without), (ours, there))[:: 1 if number % 2 else -1]:
                rates.append(_rate(_spans(stage, one, tasks)))
            spans = _away(stage, ours, cluster, away_tasks)
            away.append(_rate(spans))
            known.append(_rate(spans[len(spans) // 2 :]))
            say(
                f"run {number + 1} of {stage.runs}, tasks/s: no spool {without[-1]:.1f}, spool {there[-1]:.1f}, "
                f"Kafka away {away[-1]:.1f}, its second half {known[-1]:.1f}"
            )
    note = f"{CHILDREN} children, tasks that wait {1000 * SECONDS:.0f} ms, acknowledged; brokers: {stage.brokers}"
    outage = f"killed before {away_tasks} tasks were sent; from the first that began to the last that ended"
    return [
        Row(
            what="worker with a spool, Kafka there", unit="tasks/s", ours=there, peer=without,
            against="without a spool", bound=Bound(least=0.97), note=note,
        ),
        Row(
            what="worker with a spool, Kafka away", unit="tasks/s", ours=away, peer=there,
            against="Kafka there", bound=Bound(least=0.8), note=f"{outage}, each child's first second of waiting included",
        ),
        Row(
            what="... once Kafka is known to be away", unit="tasks/s", ours=known, peer=there,
            against="Kafka there", note="the second half of the same tasks",
        ),
    ]  # fmt: skip


def _spans(stage: Stage, one: Fleet, tasks: int) -> list[list[float]]:
    arguments = {"mode": "spans", "seconds": SECONDS, "tasks": tasks}
    return sorted(stage.ask("client_child", arguments, one.env)["spans"])


def _away(stage: Stage, one: Fleet, cluster: KafkaCluster, tasks: int) -> list[list[float]]:
    """Kill Kafka until everything is in the spool; the client reads the results once Kafka has them."""
    assert one.settings is not None
    spool = spool_for(one.settings)
    arguments = {"mode": "spans", "seconds": SECONDS, "tasks": tasks}
    for broker in cluster.brokers:
        broker.kill()
    with stage.child("client_child", arguments, one.env) as client:
        try:
            deadline = time.monotonic() + SPOOLED_S
            while spool.state().records < tasks:
                client.check()
                if time.monotonic() > deadline:
                    raise BenchError(
                        f"of {tasks} results only {spool.state().records} were spooled in {SPOOLED_S:.0f} s"
                    )
                time.sleep(LOOK_S)
        finally:
            for broker in cluster.brokers:
                broker.restart()
        client.process.wait(SPOOLED_S)
        spans = sorted(client.report()["spans"])
    while not spool.empty():
        time.sleep(LOOK_S)
    return spans


def _rate(spans: list[list[float]]) -> float:
    return (len(spans) - 1) / (max(end for _, end in spans) - spans[0][0])
