"""A producer per child against one publisher process per worker host, at 8 children: docs/adr/0006 and its successor.

*Ours* is a producer per process; the peer is `publisher_process`, a prototype that really does the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.figures import Row, percentile
from benchmarks.stage import say

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

    from benchmarks.stage import Child, Stage
    from tests.services.kafka import KafkaCluster
    from tests.services.redis import RedisServer

CHILDREN = 8
PER_CHILD, ONE_PROCESS = "a producer per child", "a publisher process"
MODELS = (PER_CHILD, ONE_PROCESS)
MIB = 1 << 20
TASKS = {0: 1200, 100: 2400, 10: 400}
"""Tasks for each ``max_tasks_per_child``; 0: never. At 100 each child is replaced three times."""
Figures = dict[tuple[str, str], list[float]]


class Model(NamedTuple):
    """One way to publish, ready to be used.

    Attributes:
        given: For children that publish: backend, overrides, path.
        env: For workers and clients.
        server: The publisher process, if it is that way.
    """

    given: dict[str, Any]
    env: dict[str, str]
    server: Child | None


def run(stage: Stage) -> list[Row]:
    cluster = stage.kafka(stage.brokers)
    figures: Figures = {}
    with stage.redis() as server:
        for number in range(stage.runs):
            for name in MODELS if number % 2 else reversed(MODELS):
                with _model(stage, name, cluster, server) as model:
                    _latencies(stage, model, figures, name)
                    for recycle in TASKS:
                        _worker(stage, model, figures, name, recycle, cluster)
    return _rows(figures)


@contextlib.contextmanager
def _model(stage: Stage, name: str, cluster: KafkaCluster, server: RedisServer) -> Iterator[Model]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckb-model-")))
        view = server.clean_database()
        settings = stage.settings(cluster, view)
        overrides = stage.overrides(cluster, settings.topic_prefix)
        url = f"kafka://{cluster.bootstrap}/?view={view}"
        path = str(folder / "publisher") if name == ONE_PROCESS else ""
        given = {"backend": url, "overrides": overrides, "path": path}
        env = {
            "BENCH_BROKER": server.clean_database(),
            "BENCH_BACKEND": url,
            "BENCH_SETTINGS": json.dumps(overrides),
            "BENCH_SOCKET": path,
        }
        stack.enter_context(stage.child("materializer_child", given))
        publisher = stack.enter_context(stage.child("publisher_process", given)) if path else None
        while path and not os.path.exists(path):  # noqa: PTH110 - a socket
            time.sleep(0.05)
        yield Model(given, env, publisher)


def _latencies(stage: Stage, model: Model, figures: Figures, name: str) -> None:
    found = stage.ask("process_model_child", model.given)
    _keep(figures, name, "first", [1000 * median(found["first"])])
    _keep(figures, name, "warm", [1000 * median(found["warm"])])
    _keep(figures, name, "later p50", [1000 * median(found["later"])])
    _keep(figures, name, "later p99", [1000 * percentile(found["later"], 0.99)])
    say(f"{name}: first {figures[name, 'first'][-1]:.0f} ms, later {figures[name, 'later p50'][-1]:.2f} ms")


def _worker(stage: Stage, model: Model, figures: Figures, name: str, recycle: int, cluster: KafkaCluster) -> None:
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.process_model_app", "worker", "-l", "WARNING"]
    command += ["-P", "prefork", "-c", str(CHILDREN), "-n", "worker@bench"]
    command += ["--max-tasks-per-child", str(recycle)] if recycle else []
    tasks = stage.size(TASKS[recycle], 200)
    with stage.program(command, model.env) as worker:
        report = stage.ask(
            "client_child", {"mode": "batch", "task": "wait", "seconds": 0.02, "tasks": tasks}, model.env
        )
        _keep(figures, name, f"rate {recycle}", [report["rate"]])
        say(f"{name}, max_tasks_per_child {recycle}: {report['rate']:.0f} tasks/s")
        if not recycle:
            _resources(worker, model, figures, name, cluster)


def _resources(worker: Child, model: Model, figures: Figures, name: str, cluster: KafkaCluster) -> None:
    family = [worker.watched, *worker.watched.children(recursive=True)]
    if model.server is not None:
        family.append(model.server.watched)
    memory = [process.memory_full_info() for process in family]
    _keep(figures, name, "processes", [len(family)])
    _keep(figures, name, "threads", [sum(process.num_threads() for process in family)])
    _keep(figures, name, "pss", [sum(one.pss for one in memory) / MIB])
    _keep(figures, name, "rss", [sum(one.rss for one in memory) / MIB])
    _keep(figures, name, "sockets", [len({link for process in family for link in _sockets(process.pid)})])
    _keep(figures, name, "to kafka", [_connections(family, {broker.port for broker in cluster.brokers})])


def _sockets(pid: int) -> list[str]:
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(entry.readlink()))
    return [link for link in links if link.startswith("socket:")]


def _connections(family: list[psutil.Process], ports: set[int]) -> int:
    """Return how many connections to Kafka there are: one that a fork inherited counts once."""
    return len({
        each.laddr
        for process in family
        for each in process.net_connections("tcp")
        if each.raddr and each.raddr.port in ports
    })  # fmt: skip


def _keep(figures: Figures, name: str, what: str, found: list[float]) -> None:
    figures.setdefault((name, what), []).extend(found)


def _rows(figures: Figures) -> list[Row]:
    shown = [
        ("first acknowledgement after a fork, at once", "ms", "first"),
        ("… after a first task of 1.5 s", "ms", "warm"),
        ("later acknowledgements, p50", "ms", "later p50"),
        ("… p99", "ms", "later p99"),
        *((f"tasks of 20 ms, max_tasks_per_child {recycle or 'off'}", "tasks/s", f"rate {recycle}") for recycle in TASKS),
        ("processes", "", "processes"),
        ("threads", "", "threads"),
        ("memory, shared pages split (PSS)", "MiB", "pss"),
        ("memory, resident (RSS)", "MiB", "rss"),
        ("sockets", "", "sockets"),
        ("connections to Kafka", "", "to kafka"),
    ]  # fmt: skip
    return [
        Row(what=what, unit=unit, ours=figures[PER_CHILD, key], peer=figures[ONE_PROCESS, key], against=ONE_PROCESS)
        for what, unit, key in shown
    ]
