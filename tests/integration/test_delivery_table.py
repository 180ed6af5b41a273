"""docs/delivery.md, row by row: what task, broker, client and log see when Kafka does not take a result.

A real prefork worker, a real Kafka behind a proxy, a real broker. The short form scales the times down:
``DELIVERY_TIMEOUT_S`` is the timeout, 120 in `make delivery-table` as by default, and the absences keep their proportion to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import redis
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

from tests.patience import PATIENCE_S
from tests.services import kafka as kafka_service
from tests.services.proxy import Proxy

from . import locked_kafka
from .conftest import Fleet

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

TIMEOUT_S = float(os.environ.get("DELIVERY_TIMEOUT_S", "5"))
RECONNECT_S = 4.0
"""So much before the timeout is over Kafka must be back: librdkafka looks for it every 2 s, on a busy machine later."""
SHORT_S, MIDDLE_S, LONG_S = TIMEOUT_S / 24, min(TIMEOUT_S / 2, TIMEOUT_S - RECONNECT_S), 2 * TIMEOUT_S
SETTINGS = {"delivery_timeout_s": TIMEOUT_S}
EARLY, LATE, AGAIN = "journaled_early", "journaled_late", "journaled_late_again"
COLUMNS = (EARLY, LATE, AGAIN)


class Seen(NamedTuple):
    """What a task's surroundings saw.

    Attributes:
        runs: How often the task's body began.
        message: "gone" from the broker, or "kept" there.
        client: State, and for a failure its exception's class.
    """

    runs: int
    message: str
    client: str


class Row:
    """Three tasks, one for each column, that run while something happens to Kafka."""

    def __init__(self, fleet: Fleet, folder: Any, size: int = 10):
        self.fleet = fleet
        self.broker = redis.Redis.from_url(fleet.environment["FLEET_BROKER"])
        self.journals = {name: folder / name for name in COLUMNS}
        self.results = {name: getattr(fleet.app, name).delay(str(self.journals[name]), size) for name in COLUMNS}
        self.until(lambda: all(self.runs(name) for name in COLUMNS), "a task started")

    def until(self, fact: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S + 10 * TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not fact():
            if time.monotonic() > deadline:
                seen = {name: self.seen(name) for name in COLUMNS}
                pytest.fail(f"never: {what}; {seen}\n{self.fleet.log('worker')[-6000:]}")
            time.sleep(0.1)

    def runs(self, name: str) -> int:
        journal = self.journals[name]
        return len(journal.read_text().splitlines()) if journal.exists() else 0

    def message(self, name: str) -> str:
        task_id = self.results[name].id.encode()
        held = [*self.broker.hvals("unacked"), *self.broker.lrange("celery", 0, -1)]
        return "kept" if any(task_id in each for each in held) else "gone"

    def client(self, name: str) -> str:
        result = self.fleet.app.app.AsyncResult(self.results[name].id)
        meta = result.backend.get_task_meta(result.id)
        state = meta["status"]
        return f"{state} {type(meta['result']).__name__}" if state == "FAILURE" else state

    def seen(self, name: str) -> Seen:
        return Seen(self.runs(name), self.message(name), self.client(name))

    def come_to(self, **expected: Seen) -> None:
        """Wait until each column has come to what is expected of it."""
        for name, seen in expected.items():
            self.until(lambda: self.seen(name) == seen, f"{name} {seen}")  # noqa: B023 - called at once


@pytest.fixture(scope="module")
def away(redis_server, tmp_path_factory):
    """A fleet whose worker's Kafka can be taken away."""
    proxies: list[Proxy] = []

    def advertise(port: int) -> int:
        proxies.append(Proxy(port))
        return proxies[-1].port

    cluster = kafka_service.start(1, advertise=advertise)
    (proxy,) = proxies
    made = Fleet(
        f"127.0.0.1:{proxy.port}", redis_server.clean_database(), redis_server.clean_database(),
        tmp_path_factory.mktemp("away"), SETTINGS, {},
    )  # fmt: skip
    try:
        made.serve("-c", "3")
        yield made, proxy, cluster
    finally:
        made.stop()
        proxy.close()
        cluster.stop()


SUCCESS = Seen(1, "gone", "SUCCESS")
NOT_STORED = Seen(1, "gone", "FAILURE BackendStoreError")


@pytest.mark.parametrize("away_s", [SHORT_S, MIDDLE_S])
def test_away_for_less_than_the_timeout(away, tmp_path, away_s):
    fleet, proxy, _ = away
    row = Row(fleet, tmp_path)
    proxy.cut()
    time.sleep(1 + away_s)
    proxy.heal()
    row.come_to(**dict.fromkeys(COLUMNS, SUCCESS))
    assert "not stored" not in fleet.log("worker")


def test_away_for_twice_the_timeout(away, tmp_path):
    fleet, proxy, _ = away
    row = Row(fleet, tmp_path)
    proxy.cut()
    began = time.monotonic()
    row.until(lambda: row.runs(AGAIN) > 1, "the third ran again")
    for name in (EARLY, LATE):
        fleet.until("worker", f"SUCCESS of {row.results[name].id} not stored in Kafka")
        row.until(lambda: row.message(name) == "gone", "the message was acknowledged")  # noqa: B023 - called at once
    fleet.until("worker", f"SUCCESS of {row.results[AGAIN].id} not stored in Kafka")
    assert "its message goes back to the broker (reject_on_worker_lost)" in fleet.log("worker")
    # … and as long as Kafka is away, this is how it stays.
    assert row.message(AGAIN) == "kept"
    assert {row.client(name) for name in COLUMNS} <= {"PENDING", "STARTED"}
    time.sleep(max(LONG_S - (time.monotonic() - began), 0))
    proxy.heal()
    row.come_to(**{EARLY: NOT_STORED, LATE: NOT_STORED})
    row.until(lambda: row.client(AGAIN) == "SUCCESS" and row.message(AGAIN) == "gone", "the third succeeded")


@pytest.mark.parametrize("away_s", [SHORT_S, MIDDLE_S])
def test_frozen_for_less_than_the_timeout(away, tmp_path, away_s):
    fleet, _, cluster = away
    row = Row(fleet, tmp_path)
    said = fleet.log("worker").count("not stored")
    cluster.brokers[0].freeze()
    time.sleep(1 + away_s)
    cluster.brokers[0].thaw()
    row.come_to(**dict.fromkeys(COLUMNS, SUCCESS))
    assert fleet.log("worker").count("not stored") == said


def test_a_broker_that_was_frozen_holds_the_consumers_no_longer(away):
    """What they had asked it is given up after 10 s. At librdkafka's 60 s no view moved for a minute after the thaw."""
    fleet, _, cluster = away
    for number in range(20):  # commits and heartbeats are under way
        fleet.app.add.delay(number, 1)
    cluster.brokers[0].freeze()
    time.sleep(12)
    cluster.brokers[0].thaw()
    assert fleet.app.add.delay(40, 2).get(timeout=55) == 42


def test_larger_than_the_client_s_limit(away, tmp_path):
    fleet, *_ = away
    row = Row(fleet, tmp_path, size=1_100_000)
    row.come_to(**dict.fromkeys(COLUMNS, Seen(1, "gone", "FAILURE EncodeError")))
    assert "over max_message_bytes = 1048576" in fleet.log("worker")


def test_larger_than_the_topic_s_limit(away, tmp_path):
    fleet, _, cluster = away
    limit(fleet, cluster.bootstrap, "20000")
    try:
        # random-looking, or compression would make it fit
        row = Row(fleet, tmp_path, size=-200_000)
        row.come_to(**dict.fromkeys(COLUMNS, Seen(1, "gone", "FAILURE EncodeError")))
        assert "MSG_SIZE_TOO_LARGE" in fleet.log("worker")
    finally:
        limit(fleet, cluster.bootstrap, "1100000")


def limit(fleet: Fleet, servers: str, size: str) -> None:
    topic = f"{fleet.app.app.backend.settings.topic_prefix}.task-events"
    change = ConfigEntry("max.message.bytes", size, incremental_operation=AlterConfigOpType.SET)
    wanted = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[change])
    admin = AdminClient({"bootstrap.servers": servers})
    for done in admin.incremental_alter_configs([wanted]).values():
        done.result(PATIENCE_S)


@pytest.mark.parametrize(
    ("waited_s", "ends"), [(TIMEOUT_S, [NOT_STORED]), (0.0, [NOT_STORED, SUCCESS])], ids=["late", "at once"]
)
def test_the_topics_are_missing(kafka, redis_server, tmp_path, waited_s, ends):
    """… and made when librdkafka has given up what waited for them; or before, so that it may be appended yet."""
    fleet = Fleet(kafka.bootstrap, redis_server.clean_database(), redis_server.clean_database(), tmp_path, SETTINGS, {})
    try:
        fleet.worker("-c", "3")
        fleet.until("worker", "no result can be stored")
        assert "create the topics: `celery -A proj pipeline init`" in fleet.log("worker")
        row = Row(fleet, tmp_path)
        for name in COLUMNS:
            fleet.until("worker", f"SUCCESS of {row.results[name].id} not stored in Kafka")
            row.until(lambda: row.message(name) == "gone", "the message was acknowledged")  # noqa: B023 - called at once
        time.sleep(waited_s)
        fleet.init()
        fleet.pipeline()
        for name in COLUMNS:
            row.until(lambda: row.seen(name) in ends, f"{name} {ends}")  # noqa: B023 - called at once
    finally:
        fleet.stop()


def test_not_authorised(redis_server, tmp_path):
    """A user who may see the topics and not write to them: final, so no message goes back to be refused again."""
    server = locked_kafka.start()
    fleet = Fleet(server.open, redis_server.clean_database(), redis_server.clean_database(), tmp_path, SETTINGS, {})
    try:
        fleet.init()
        fleet.environment["FLEET_BACKEND"] = f"kafka://{server.locked}/?view={fleet.view}"
        settings = fleet.environment["FLEET_SETTINGS"]
        fleet.environment["FLEET_SETTINGS"] = json.dumps({**json.loads(settings), "client": server.client()})
        fleet.worker("-c", "3")
        fleet.until("worker", "no result can be stored")
        row = Row(fleet, tmp_path)
        for name in COLUMNS:
            row.until(lambda: row.message(name) == "gone", "the message was acknowledged")  # noqa: B023 - called at once
            fleet.until("worker", f"SUCCESS of {row.results[name].id} not stored in Kafka")
            fleet.until("worker", f"FAILURE of {row.results[name].id} is lost")
            assert row.runs(name) == 1
        assert "lacks Write on topic" in fleet.log("worker")
    finally:
        fleet.stop()
        server.stop()


def test_the_leader_moves(kafka3, redis_server, tmp_path):
    fleet = Fleet(
        kafka3.bootstrap, redis_server.clean_database(), redis_server.clean_database(), tmp_path,
        {**SETTINGS, "replication_factor": 3, "min_insync_replicas": 2, "delivery_timeout_s": max(TIMEOUT_S, 20)}, {},
    )  # fmt: skip
    try:
        fleet.serve("-c", "3")
        row = Row(fleet, tmp_path)
        kafka3.brokers[0].kill()
        row.come_to(**dict.fromkeys(COLUMNS, SUCCESS))
        assert "not stored" not in fleet.log("worker")
    finally:
        kafka3.brokers[0].restart()
        kafka3.wait()
        fleet.stop()


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of its own; there is none for who may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no filesystem can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Leave not a byte; return the file that has them all."""
    hog = folder / "hog"
    with hog.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return hog


def test_the_broker_s_disk_is_full(redis_server, small_disk, tmp_path):
    """With one log folder the broker ends itself at its next write."""
    cluster = kafka_service.start(1, folder=small_disk)
    fleet = Fleet(
        cluster.bootstrap, redis_server.clean_database(), redis_server.clean_database(), tmp_path,
        SETTINGS, {},
    )  # fmt: skip
    try:
        fleet.serve("-c", "3")
        hog = fill(small_disk)
        row = Row(fleet, tmp_path)
        row.until(lambda: row.runs(AGAIN) > 1, "the third ran again")
        for name in (EARLY, LATE):
            fleet.until("worker", f"SUCCESS of {row.results[name].id} not stored in Kafka")
        hog.unlink()
        cluster.brokers[0].restart()
        row.come_to(**{EARLY: NOT_STORED, LATE: NOT_STORED})
        row.until(lambda: row.client(AGAIN) == "SUCCESS" and row.message(AGAIN) == "gone", "the third succeeded")
    finally:
        fleet.stop()
        cluster.stop()
