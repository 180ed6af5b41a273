"""The stage of a bench: servers, topics, processes, and progress on the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from celery_kafka_backend import settings as settings_module
from celery_kafka_backend import topics
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_view
from tests.services import kafka, native, redis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import View
    from tests.services.kafka import KafkaCluster
    from tests.services.redis import RedisServer

ROOT = Path(__file__).resolve().parents[1]
PROGRESS_S = 1.0
CHILD_S = 2_400
PARTITIONS = 8


class BenchError(Exception):
    """Raised when a bench could not measure what it set out to; its figures would mean nothing."""


class Stage:
    """What the benches share: started on first use, stopped at the end.

    Args:
        runs: How often to repeat what is compared.
        quick: Small sizes, to see that it works; the figures mean little.
        brokers: Kafka brokers behind the workers; three share the cores with everything that is measured.
    """

    def __init__(self, runs: int, *, quick: bool, brokers: int = 1) -> None:
        self.runs = runs
        self.quick = quick
        self.brokers = brokers
        self._stack = contextlib.ExitStack()
        self._clusters: dict[int, KafkaCluster] = {}
        self._logs = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ckb-bench-")))

    def __enter__(self) -> Stage:  # noqa: PYI034 - Self came with Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        say("stopping the servers")
        self._stack.close()

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    # -- servers -----------------------------------------------------------------------------

    def kafka(self, brokers: int = 1) -> KafkaCluster:
        """Return the cluster of one broker or three; only one of them runs at a time, for they share the cores."""
        if brokers not in self._clusters:
            for other in self._clusters.values():
                other.stop()
            self._clusters.clear()
            say(f"starting Kafka, {brokers} broker{'s' if brokers > 1 else ''}")
            cluster = self._clusters[brokers] = kafka.start(brokers, tier=4)
            self._stack.callback(cluster.stop)
        return self._clusters[brokers]

    @contextlib.contextmanager
    def redis(self) -> Iterator[RedisServer]:
        """Start a Redis of one's own, empty."""
        server = redis.start()
        try:
            yield server
        finally:
            server.stop()

    def settings(self, cluster: KafkaCluster, view: str = "memory://", prefix: str = "") -> Settings:
        """Return settings on new topics, or on those of ``prefix``."""
        made = settings_module.parse(f"kafka://{cluster.bootstrap}/?view={view}", self.overrides(cluster, prefix))
        if not prefix:
            create_topics(made)
        return made

    @staticmethod
    def overrides(cluster: KafkaCluster, prefix: str = "") -> dict[str, Any]:
        """Return what differs from the defaults: one broker cannot hold three copies."""
        copies = min(len(cluster.brokers), 3)
        return {
            "topic_prefix": prefix or f"bench-{secrets.token_hex(4)}",
            "partitions": PARTITIONS,
            "chord_partitions": PARTITIONS,
            "replication_factor": copies,
            "min_insync_replicas": 2 if copies == 3 else 1,
        }

    # -- processes ---------------------------------------------------------------------------

    def ask(self, module: str, arguments: Mapping[str, Any], env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Run ``benchmarks.<module>`` to its end in a process of its own, and return what it reports."""
        with self.child(module, arguments, env) as child:
            try:
                child.process.wait(CHILD_S)
            except subprocess.TimeoutExpired:
                child.fail(f"did not end within {CHILD_S} s")
            return child.report()

    @contextlib.contextmanager
    def child(self, module: str, arguments: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Iterator[Child]:
        """Run ``benchmarks.<module>`` beside us, for as long as the block lasts."""
        command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(arguments)]
        with self.program(command, env) as child:
            yield child

    @contextlib.contextmanager
    def program(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[Child]:
        """Run a program beside us, for as long as the block lasts; SIGTERM ends it, and SIGKILL after 20 s."""
        log = self._logs / f"{secrets.token_hex(4)}.log"
        with log.open("wb") as output:
            process = native.popen(command, output=output, env=env, cwd=ROOT)
        try:
            yield Child(process, log, " ".join(command[1:4]))
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            native.end(process)


class Child:
    """A process of a bench."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, name: str) -> None:
        self.process = process
        self._name = name
        self._log = log
        self.watched = psutil.Process(process.pid)

    def report(self) -> dict[str, Any]:
        """Return the JSON object that it printed last.

        Raises:
            BenchError: It failed.
        """
        lines = [line for line in self._said().splitlines() if line.startswith("{")]
        if self.process.poll() or not lines:
            self.fail(f"ended with {self.process.poll()}")
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def check(self) -> None:
        """Raise if it has ended."""
        if self.process.poll() is not None:
            self.fail(f"ended with {self.process.poll()}")

    def fail(self, why: str) -> NoReturn:
        raise BenchError(f"{self._name} {why}; it said:\n{self._said()[-3000:]}")

    def _said(self) -> str:
        return self._log.read_text(errors="replace")

    def rss(self) -> int:
        return int(self.watched.memory_info().rss)

    def cpu_s(self) -> float:
        """Return the CPU seconds of the process and all its children so far."""
        return cpu_s(self.watched)


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU seconds of a process and of all its children, ended or not."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            spent = each.cpu_times()
            total += spent.user + spent.system
    ended = process.cpu_times()
    return total + float(ended.children_user + ended.children_system)


def cluster_cpu_s(cluster: KafkaCluster) -> float:
    return sum(cpu_s(psutil.Process(broker.pid)) for broker in cluster.brokers)


def redis_cpu_s(server: RedisServer) -> float:
    return cpu_s(psutil.Process(server.pid))


def create_topics(settings: Settings) -> None:
    """Create the topics that `pipeline init` would."""
    admin = AdminClient({"bootstrap.servers": settings.bootstrap_servers})
    wanted = [
        NewTopic(each.name, each.partitions, each.replication, config=each.config) for each in topics.wanted(settings)
    ]
    for made in admin.create_topics(wanted).values():
        made.result(30)


def log_bytes(cluster: KafkaCluster, topic: str) -> int:
    """Return the bytes of a topic's segments on the disk of the first broker."""
    data = Path(cluster.brokers[0].log).parent / "data"  # type: ignore[attr-defined]
    return sum(segment.stat().st_size for segment in data.glob(f"{topic}-*/*.log"))


def view_of(settings: Settings, url: str) -> View:
    return open_view(url, StoreOptions(namespace=settings.topic_prefix))


def folded(view: View, topic: str) -> int:
    """Return how many records of a topic a view has folded."""
    return sum(offset for at, offset in view.positions().items() if at.topic == topic)


class LogEnd:
    """Asks Kafka how many records a topic has."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench-end"})
        found = self._consumer.list_topics(topic, timeout=10).topics[topic]
        self._partitions = [TopicPartition(topic, number) for number in found.partitions]

    def records(self) -> int:
        return sum(self._consumer.get_watermark_offsets(each, timeout=10)[1] for each in self._partitions)

    def close(self) -> None:
        self._consumer.close()


def wait_folded(
    view: View, topic: str, count: int, child: Child, what: str, tick: Callable[[], None] | None = None
) -> None:
    """Return once a view has folded so many records of a topic."""
    progress = Progress(what, count)
    while (done := folded(view, topic)) < count:
        child.check()
        progress(done)
        if tick is not None:
            tick()
        time.sleep(0.02)
    progress.end()


# -- the terminal --------------------------------------------------------------------------------


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


class Progress:
    """A line that is rewritten once a second (on a terminal), or repeated every 10 s (in a log)."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._live = sys.stderr.isatty()
        self._every = PROGRESS_S if self._live else 10 * PROGRESS_S
        self._began = time.monotonic()
        self._next = self._began + self._every

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every
            text = f"  {self._what}: {done:,} of {self._total:,}, {now - self._began:.0f} s"
            print(
                f"\r\x1b[2K{text}" if self._live else text, end="" if self._live else "\n", file=sys.stderr, flush=True
            )

    def end(self) -> None:
        if self._live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Return what the figures depend on, in generic terms."""
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "cpu": _cpu_model(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def versions() -> dict[str, str]:
    from importlib.metadata import version  # noqa: PLC0415

    names = ("celery", "confluent-kafka", "redis", "msgspec", "faust-streaming", "aiokafka")
    return {name: version(name) for name in names} | {"kafka (server)": kafka.VERSION}
