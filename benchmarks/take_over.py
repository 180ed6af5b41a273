"""``kill -9`` of a materializer: how long until the view has what was appended afterwards, whoever folds it.

Once another process of the group takes the partitions, as where two hosts run `pipeline run`; once it was the only one,
and `pipeline run` starts it again. In both the dead one's partitions are free when Kafka has missed its heartbeats.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from typing import TYPE_CHECKING

from confluent_kafka import ConsumerGroupState, KafkaException
from confluent_kafka.admin import AdminClient

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.stage import PARTITIONS, BenchError, LogEnd, folded, say, view_of
from celery_kafka_backend import topics

if TYPE_CHECKING:
    from benchmarks.stage import Stage
    from celery_kafka_backend.settings import Settings

MOST_S = 10.0
KILLS = 10
TASKS = 100
"""Appended after each kill: enough for every partition to get some."""
APART_S = 16.0
"""Between two kills: `pipeline run` gives up at the fifth within a minute."""
LIMIT_S = 180.0


def run(stage: Stage) -> list[Row]:
    return [row for others in (True, False) for row in _scenario(stage, others=others)]


def _scenario(stage: Stage, *, others: bool) -> list[Row]:
    cluster = stage.kafka(1)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(stage.redis()).url
        settings = stage.settings(cluster, url)
        overrides = stage.overrides(cluster, settings.topic_prefix)
        backend = f"kafka://{cluster.bootstrap}/?view={url}"
        group = Group(settings, url)
        end = LogEnd(cluster.bootstrap, group.topic)
        stack.callback(end.close)
        view = view_of(settings, url)
        stack.callback(view.close)

        def start() -> None:
            stack.enter_context(stage.child("materializer_child", {"backend": backend, "overrides": overrides}))

        if others:
            start()
        else:
            command = [sys.executable, "-m", "celery", "-A", "benchmarks.celery_app", "pipeline", "run", "--no-chords"]
            env = {"BENCH_BROKER": "memory://", "BENCH_BACKEND": backend, "BENCH_SETTINGS": json.dumps(overrides)}
            stack.enter_context(stage.program(command, env))
        took = []
        for number in range(stage.size(KILLS, 2)):
            if others:
                start()
            dead = group.settled(2 if others else 1)[-1]
            time.sleep(random.uniform(0.0, 2.0))
            began = time.monotonic()
            os.kill(dead, signal.SIGKILL)
            load.fill(settings, group.topic, load.adjacent(load.Maker(seed=number), TASKS), lambda _count: None)
            while folded(view, group.topic) < end.records():
                if time.monotonic() > began + LIMIT_S:
                    raise BenchError(f"nobody took over within {LIMIT_S:g} s")
                time.sleep(0.02)
            took.append(time.monotonic() - began)
            say(f"kill {number + 1}: {took[-1]:.1f} s")
            if not others:
                time.sleep(max(0.0, APART_S - took[-1]))
    what = "kill -9 of one of two materializers" if others else "kill -9 of the only materializer of `pipeline run`"
    most = Bound("value", most=MOST_S)
    return [
        Row(what=f"{what}, until the view is up to date", unit="s", ours=took, bound=most),
        Row(what=f"{what}: the slowest of {len(took)}", unit="s", ours=[max(took)], bound=most),
    ]


class Group:
    """The consumer group of a view.

    Attributes:
        topic: The log.
    """

    def __init__(self, settings: Settings, url: str) -> None:
        self.topic = topics.task_events(settings.topic_prefix)
        self._name = topics.group_id(settings.topic_prefix, topics.view_name(url))
        self._admin = AdminClient({"bootstrap.servers": settings.bootstrap_servers})

    def settled(self, processes: int) -> list[int]:
        """Return the ids of so many processes once they share the log's partitions; in no order that matters."""
        give_up = time.monotonic() + LIMIT_S
        while time.monotonic() < give_up:
            found = self._shares()
            if len(found) == processes and sum(found.values()) == PARTITIONS:
                return list(found)
            time.sleep(0.2)
        raise BenchError(f"{processes} materializers never shared {self.topic}: {self._shares()}")

    def _shares(self) -> dict[int, int]:
        """Return how many of the log's partitions each process has; {} while that is being settled."""
        try:
            described = self._admin.describe_consumer_groups([self._name])[self._name].result()
        except KafkaException:
            return {}  # a new broker's first group: its coordinator is still loading
        if described.state is not ConsumerGroupState.STABLE:
            return {}
        shares: dict[int, int] = {}
        for member in described.members:
            mine = [each for each in member.assignment.topic_partitions if each.topic == self.topic]
            if mine:
                pid = int(member.client_id.rpartition("/")[2])
                shares[pid] = shares.get(pid, 0) + len(mine)
        return shares
