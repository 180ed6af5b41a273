"""The insight processor on a real Kafka: two Faust workers, killed in turn under load; bad input; a changelog that is gone."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import redis
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from celery_kafka_backend import partials, topics
from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.insight import Insight, insight_of
from celery_kafka_backend.partials import BUCKET, Cell, Partial
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.insight import open_insight
from tests.integration.conftest import Fleet
from tests.integration.kafka_topics import create, must_arrive
from tests.services import native

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from tests.services.kafka import KafkaCluster

pytestmark = pytest.mark.kafka

PARTITIONS = 4
PATIENCE_S = 300.0
LINES = 50
"""Of each worker's log, shown where it did not happen in time."""
ROOT = Path(__file__).parents[2]
NAMES = [f"app.task{n}" for n in range(12)]


HUGE = Partial(
    partition=(1 << 31) - 1,
    bucket=0,
    minute=time.time_ns() // 60_000_000_000,
    task="app.huge",
    upto=BUCKET,
    cells=[Cell(kinds={"success": 1})],
)
"""Of a partition that no log has."""


class World:
    """Topics, partials in them with the sums that they come to, and Faust workers."""

    def __init__(self, kafka: str, prefix: str, view: str, folder: Path) -> None:
        self.kafka, self.prefix, self.view, self.folder = kafka, prefix, view, folder
        self.expected: dict[tuple[int, str], int] = {}
        self.workers: list[subprocess.Popen[bytes]] = []
        self._admin = AdminClient({"bootstrap.servers": kafka})
        self._producer = Producer(
            {
                "bootstrap.servers": kafka,
                "partitioner": "murmur2_random",
                "log_level": 3,
                "on_delivery": must_arrive,
            }
        )
        self._random = random.Random(prefix)
        self._buckets = dict.fromkeys(range(3), 0)
        self._history: list[tuple[bytes, bytes]] = []
        self._store = open_insight(view, StoreOptions(namespace=prefix))

    def create(self, *names: str) -> None:
        create(self._admin, *(NewTopic(name, PARTITIONS, 1) for name in names))

    def delete(self, name: str) -> None:
        for done in self._admin.delete_topics([name]).values():
            done.result()
        while name in self._admin.list_topics(timeout=10).topics:
            time.sleep(0.1)

    def put(self, buckets: int) -> None:
        """So many buckets, each of them told two or three times, now and then one of long ago once more."""
        for _ in range(buckets):
            partition = self._random.randrange(len(self._buckets))
            bucket = self._buckets[partition]
            self._buckets[partition] += 1
            name, count = self._random.choice(NAMES), self._random.randrange(3, 50)
            minute = time.time_ns() // 60_000_000_000 - self._random.randrange(3)
            for share, upto in ((1, 10), (2, 500), (count, BUCKET)):
                cell = Cell(
                    queue="q", worker=self._random.choice("vw") if share == count else "v", kinds={"success": share}
                )
                told = Partial(
                    partition=partition,
                    bucket=bucket,
                    minute=minute,
                    task=name,
                    upto=bucket * BUCKET + upto,
                    cells=[cell],
                )
                self._send(name.encode(), partials.encode(told))
            self.expected[minute, name] = self.expected.get((minute, name), 0) + count
            if self._random.random() < 0.3:
                self._send(*self._random.choice(self._history))
        assert self._producer.flush(PATIENCE_S) == 0

    def put_raw(self, value: bytes | None) -> None:
        self._send(b"?", value)
        assert self._producer.flush(PATIENCE_S) == 0

    def _send(self, key: bytes, value: bytes | None) -> None:
        if value is not None:
            self._history.append((key, value))
        self._producer.produce(topics.task_stats(self.prefix), value, key)
        self._producer.poll(0)

    def empty_view(self) -> None:
        """As FLUSHDB, or a Redis that starts without its data."""
        client = redis.Redis.from_url(self.view)
        client.flushdb()
        client.close()

    def spoil_changelog(self) -> None:
        """Put what is no row under names of rows."""
        for key, value in ((b"1/0/a", b"\xff\xff"), (b"nonsense", b"nonsense"), (b"!0", b"soon")):
            for partition in range(PARTITIONS):
                self._producer.produce(topics.insight_changelog(self.prefix), value, key, partition)
        assert self._producer.flush(PATIENCE_S) == 0

    def worker(self) -> subprocess.Popen[bytes]:
        environment = {"INSIGHT_KAFKA": self.kafka, "INSIGHT_PREFIX": self.prefix, "INSIGHT_VIEW": self.view}
        faust = "faust -A tests.integration.insighting --loglevel info worker --without-web"
        command = [sys.executable, "-m", *faust.split()]
        with self._log_of(len(self.workers)).open("ab") as output:
            self.workers.append(native.popen(command, output=output, cwd=ROOT, env={**os.environ, **environment}))
        return self.workers[-1]

    def _log_of(self, number: int) -> Path:
        return self.folder / f"worker{number}.log"

    @property
    def log(self) -> str:
        return "".join(self._log_of(n).read_text(errors="replace") for n in range(len(self.workers)))

    def found(self) -> dict[tuple[int, str], int]:
        """Successes by minute and task name, of the last hour."""
        now = time.time_ns() // 60_000_000_000
        try:
            rows = self._store.read(range(now - 60, now + 1))
        except Unavailable:  # it is not there yet
            return {}
        cells = msgspec.json.Decoder(list[Cell])
        return {(row.minute, row.task): sum(cell.kinds["success"] for cell in cells.decode(row.value)) for row in rows}

    def settle(self) -> None:
        """Wait until all that was put is counted, once."""
        until(lambda: self.found() == self.expected, self._differences)
        totals: dict[str, int] = {}
        for (_, name), count in self.expected.items():
            totals[name] = totals.get(name, 0) + count
        assert {one.name: one.kinds["success"] for one in Insight(self._store).window("1h")} == totals

    def _differences(self) -> str:
        found, said = self.found(), []
        for minute, name in sorted({*found, *self.expected}):
            there, wanted = found.get((minute, name), 0), self.expected.get((minute, name), 0)
            if there != wanted:
                what = f"{wanted - there} are missing" if there < wanted else f"{there - wanted} are too many"
                said.append(f"minute {minute}, {name}: {there} instead of {wanted}: {what}")
        for number, worker in enumerate(self.workers):
            ended = worker.poll()
            said.append(f"-- worker {number}, {'running' if ended is None else f'ended with {ended}'}; its log ends:")
            said += self._log_of(number).read_text(errors="replace").splitlines()[-LINES:]
        return "\n".join(said)


def until(condition: Callable[[], object], explain: Callable[[], str] = lambda: "it did not happen in time") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(explain())
        time.sleep(0.1)


@pytest.fixture(params=["sqlite", "redis"])
def world(kafka: KafkaCluster, redis_url: str, topic_prefix: str, tmp_path: Path, request: Any) -> Iterator[World]:
    view = redis_url if request.param == "redis" else f"sqlite:///{tmp_path}/view.db"
    made = World(kafka.bootstrap, topic_prefix, view, tmp_path)
    made.create(topics.task_stats(topic_prefix), topics.insight_changelog(topic_prefix))
    yield made
    for worker in made.workers:
        native.end(worker)


@pytest.mark.parametrize("world", ["redis"], indirect=True)
def test_two_workers_killed_in_turn_under_load_count_each_bucket_once(world: World):
    """Kill -9, a third one that comes in, a fourth, and one that goes as it should."""
    first, second = world.worker(), world.worker()
    world.put(300)
    world.settle()
    for victim in (first, second):
        world.put(300)
        native.end(victim)  # SIGKILL
        world.worker()
        world.put(300)
        world.settle()
    world.workers[2].terminate()
    assert world.workers[2].wait(PATIENCE_S) == 0
    world.put(100)
    world.settle()


@pytest.mark.parametrize("world", ["sqlite"], indirect=True)
def test_bad_partials_are_said_and_left_out_and_a_lost_changelog_loses_no_window(world: World):
    """An unknown version, negative counts, a minute of 2099, a tombstone; then the changelog is deleted and made again."""
    worker = world.worker()
    good = Partial(partition=0, bucket=10**6, minute=1, task="x", upto=10**9 + 1, cells=[Cell(kinds={"success": 1})])
    for bad in (
        b'{"v":9}', None, b"nonsense",
        partials.encode(good).replace(b'"success":1', b'"success":-1'),
        partials.encode(good),
        partials.encode(good).replace(b'"minute":1', b'"minute":67000000'),
    ):  # fmt: skip
        world.put_raw(bad)
    world.put(50)
    world.settle()
    for said in ("version 9", "tombstone", "not a partial", ">= 0", "minutes old", "minutes ahead"):
        assert said in world.log
    native.end(worker)
    world.delete(topics.insight_changelog(world.prefix))
    world.create(topics.insight_changelog(world.prefix))
    world.worker()
    world.put(50)
    world.settle()


@pytest.mark.parametrize("world", ["redis"], indirect=True)
def test_windows_are_right_again_when_view_or_changelog_was_emptied_or_spoilt_meanwhile(world: World):
    """While a worker runs, and nothing more is told: what it has lost, the view gets back."""
    worker = world.worker()
    world.put(50)
    world.put_raw(partials.encode(HUGE))
    world.expected[HUGE.minute, HUGE.task] = 1
    world.settle()
    world.empty_view()
    world.settle()
    world.spoil_changelog()
    native.end(worker)
    world.empty_view()
    world.worker()
    world.put(50)
    world.settle()
    assert "cannot be read" in world.log
    world.delete(topics.insight_changelog(world.prefix))
    world.put(20)
    until(lambda: "the changelog cannot be written" in world.log)
    world.settle()
    world.create(topics.insight_changelog(world.prefix))
    world.put(20)
    world.settle()
    for each in world.workers:
        native.end(each)
    world.empty_view()
    world.worker()
    world.put(20)
    world.settle()


@pytest.mark.redis
def test_the_whole_way_from_a_task_to_top(kafka: KafkaCluster, redis_server: Any, tmp_path: Path):
    """A worker, `pipeline run --insight` with metrics, `pipeline top` as JSON and as a table, and the reader in code."""
    view = redis_server.clean_database()
    with Fleet(
        kafka.bootstrap, redis_server.clean_database(), view, tmp_path, {}, {"task_track_started": True}
    ) as fleet:
        fleet.init()
        fleet.start("pipeline", "pipeline", "run", "--insight", "--metrics-port", "0", ready="assigned")
        fleet.worker()
        name = fleet.app.add.name
        for number in range(7):
            assert fleet.app.add.delay(number, 1).get(timeout=60) == number + 1
        insight = insight_of(fleet.app.app)
        until(lambda: [one.kinds.get("success") for one in insight.window("5m", task=name)] == [7])
        (found,) = insight.window("5m", by="worker", task=name, worker=fleet.node("worker"))
        assert (found.kinds["started"], found.in_flight, found.failure_ratio) == (7, 0, 0.0)
        assert found.run.p99 is not None
        assert found.wait.p50 is not None
        said = json.loads(fleet.run("pipeline", "top", "--once", "--json", "--window", "5m", "--task", name).stdout)
        assert (said["window"], said["by"], said["figures"][0]["kinds"]["success"]) == ("5m", "task", 7)
        assert said["written_at"] > 0
        table = fleet.run("pipeline", "top", "--once", "--window", "5m", "--by", "queue").stdout
        assert "celery" in table
        assert "OLD" not in table
        url = re.search(r"Metrics and health: (http://\S+)/metrics", fleet.log("pipeline"))
        assert url is not None
        series = f'celery_kafka_insight_in_flight{{by="task",name="{name}"}} 0.0'
        until(lambda: series in urllib.request.urlopen(f"{url[1]}/metrics", timeout=10).read().decode())
        assert urllib.request.urlopen(f"{url[1]}/readyz", timeout=10).status == 200
        insight.close()
