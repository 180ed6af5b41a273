"""A worker with one backend or the other, and what belongs to it: for benches that run real tasks."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, NamedTuple

from celery_kafka_backend import settings as settings_module
from celery_kafka_backend import topics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.stage import Child, Stage
    from celery_kafka_backend.settings import Settings
    from tests.services.kafka import KafkaCluster
    from tests.services.redis import RedisServer

CHILDREN = 2
OURS, STOCK = "kafka", "redis"


class Fleet(NamedTuple):
    """A worker and its surroundings.

    Attributes:
        env: For a client's process.
        worker: The worker's main process.
        materializer: Ours; None for Celery's Redis backend.
        chords: The chord processor, where it was asked for.
        topic: The log; "" likewise.
        settings: Ours; None likewise.
    """

    env: dict[str, str]
    worker: Child
    materializer: Child | None
    chords: Child | None
    topic: str
    settings: Settings | None


@contextlib.contextmanager
def fleet(
    stage: Stage, backend: str, server: RedisServer, cluster: KafkaCluster, *, chords: bool = False, **more: object
) -> Iterator[Fleet]:
    """Start a worker of two children, its broker a database of ``server``, its results in another.

    ``chords`` starts the chord processor; ``more`` are settings of ours.
    """
    broker, view = server.clean_database(), server.clean_database()
    with contextlib.ExitStack() as stack:
        env = {"BENCH_BROKER": broker, "BENCH_BACKEND": view, "BENCH_SETTINGS": ""}
        materializer, decider, topic, parsed = None, None, "", None
        if backend == OURS:
            settings = stage.settings(cluster, view)
            overrides = {**stage.overrides(cluster, settings.topic_prefix), **more}
            url = f"kafka://{cluster.bootstrap}/?view={view}"
            parsed = settings_module.parse(url, overrides)
            env |= {"BENCH_BACKEND": url, "BENCH_SETTINGS": json.dumps(overrides)}
            materializer = stack.enter_context(
                stage.child("materializer_child", {"backend": url, "overrides": overrides})
            )
            if chords:
                decider = stack.enter_context(stage.child("chords_child", {}, env))
            topic = topics.task_events(settings.topic_prefix)
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.celery_app", "worker", "-l", "WARNING"]
        command += ["-P", "prefork", "-c", str(CHILDREN), "-n", f"{backend}@bench"]
        yield Fleet(env, stack.enter_context(stage.program(command, env)), materializer, decider, topic, parsed)
