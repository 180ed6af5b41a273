"""Kafka goes away and comes back, under a real prefork worker that has a spool: nothing is lost, nothing happens twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from celery import chord
from confluent_kafka import Consumer, TopicPartition
from kombu.exceptions import OperationalError

from celery_kafka_backend import codec, topics
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.producer.spool import spool_for
from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S, until
from tests.services import kafka as kafka_service
from tests.services import native
from tests.services.proxy import Proxy


class Away:
    """A Kafka that everybody reaches through a proxy."""

    def __init__(self):
        self._proxies = []
        self.cluster = kafka_service.start(1, advertise=self._advertise)
        (self.proxy,) = self._proxies
        self.bootstrap = f"127.0.0.1:{self.proxy.port}"

    def _advertise(self, port):
        self._proxies.append(Proxy(port))
        return self._proxies[-1].port

    def stop(self):
        self.cluster.stop()
        self.proxy.close()


@pytest.fixture(scope="module")
def away():
    made = Away()
    yield made
    made.stop()


class Spooling:
    """A fleet with a spool."""

    def __init__(self, away, redis_server, folder, more=None, **conf):
        settings = {
            "spool": str(folder / "spool"),
            "spool_after_s": 0.5,
            "delivery_timeout_s": 10.0,
            "publish_timeout_s": 6.0,
            **(more or {}),
        }
        self.fleet = Fleet(
            away.bootstrap, redis_server.clean_database(), redis_server.clean_database(), folder, settings, conf
        )
        self.settings = settings_module.parse(
            self.fleet.environment["FLEET_BACKEND"], json.loads(self.fleet.environment["FLEET_SETTINGS"])
        )
        self.spool = spool_for(self.settings)
        self.bootstrap = away.cluster.bootstrap

    def start(self):
        self.fleet.init()
        self.fleet.pipeline()
        self.fleet.worker()
        return self

    def send(self, n, start=0):
        return [self.fleet.app.add.delay(number, 1000) for number in range(start, start + n)]

    def until(self, fact, what):
        until(fact, lambda: what + "\n" + self.fleet.log("worker")[-4000:])

    def spooled(self, n):
        self.until(lambda: self.spool.state().records >= n, f"never {n} spooled, but {self.spool.state()}")

    def drained(self):
        self.until(self.spool.empty, f"never drained: {self.spool.state()}")

    def cli(self, *arguments):
        return self.fleet.run("pipeline", "spool", *arguments)

    def successes(self):
        """The log's SUCCESS events: how often each event id is there, by task."""
        topic = topics.task_events(self.settings.topic_prefix)
        consumer = Consumer({"bootstrap.servers": self.bootstrap, "group.id": "reads", "auto.offset.reset": "earliest"})
        found: dict[str, dict[str, int]] = {}
        try:
            for partition in range(self.settings.partitions):
                at = TopicPartition(topic, partition, 0)
                _, end = consumer.get_watermark_offsets(at, timeout=PATIENCE_S)
                consumer.assign([at])
                while consumer.position([at])[0].offset < end:
                    message = consumer.poll(1)
                    if message is not None and message.error() is None:
                        event = codec.decode(message.value())
                        if event.kind == "success":
                            times = found.setdefault(event.task, {})
                            times[event.id] = times.get(event.id, 0) + 1
        finally:
            consumer.close()
        return found

    def proves(self, results, expected):
        """Every result is in the view with its value, and in the log as one event, however often."""
        assert [one.get(timeout=PATIENCE_S) for one in results] == expected
        found = self.successes()
        for one in results:
            assert len(found[one.id]) == 1, found[one.id]
        return sum(sum(found[one.id].values()) - 1 for one in results)


@pytest.fixture(scope="module")
def spooling(away, redis_server, tmp_path_factory):
    made = Spooling(away, redis_server, tmp_path_factory.mktemp("spooling")).start()
    yield made
    made.fleet.stop()


@pytest.fixture(autouse=True)
def healed(away):
    yield
    away.proxy.heal()


def test_an_outage_is_spooled_and_drained_by_the_worker_itself_and_nothing_is_lost_or_doubled(spooling, away):
    before = spooling.send(10)
    assert [one.get(timeout=PATIENCE_S) for one in before] == list(range(1000, 1010))
    away.proxy.cut()
    during = spooling.send(60)
    spooling.spooled(60)
    away.proxy.heal()
    after = spooling.send(10)
    spooling.drained()
    twice = spooling.proves(during, list(range(1000, 1060)))
    # What the two children sent in vain, and what they queued to notice that Kafka is back.
    assert twice <= 8
    spooling.proves(after, list(range(1000, 1010)))
    history = spooling.fleet.app.app.backend.reader.history(during[0].id)
    assert len([one for one in map(codec.decode, history) if one.kind == "success"]) == 1
    # On a busy machine the last ones may have waited too long for Kafka, and been spooled as well.
    spooling.until(lambda: not spooling.spool.path.exists(), "an emptied spool has no file")


def test_a_frozen_kafka_that_takes_what_it_was_sent_after_all_does_no_harm(spooling, away):
    away.proxy.freeze()
    during = spooling.send(20)
    spooling.spooled(20)
    away.proxy.heal()
    spooling.drained()
    spooling.proves(during, list(range(1000, 1020)))


def test_a_chord_whose_parts_were_spooled_fires_once(spooling, away):
    app = spooling.fleet.app

    result = chord([app.nap.s(3.0), app.add.s(1, 1), app.add.s(2, 2), app.add.s(3, 3)])(app.listed.s())
    away.proxy.cut()
    spooling.spooled(2)  # the first nap's part and success at least
    spooling.until(lambda: not _running(spooling), "the members never ended")
    away.proxy.heal()
    assert sorted(result.get(timeout=PATIENCE_S)) == [2, 3.0, 4, 6]
    spooling.drained()
    assert sum(spooling.successes()[result.id].values()) == 1


def test_applying_a_chord_is_not_spooled_but_refused(spooling, away):

    app = spooling.fleet.app
    away.proxy.cut()
    with pytest.raises(OperationalError, match="declaring chord"):
        chord([app.add.s(1, 1), app.add.s(2, 2)])(app.listed.s())
    away.proxy.heal()
    assert app.add.delay(1, 1).get(timeout=PATIENCE_S) == 2


def test_a_child_killed_with_spooled_records_loses_none(spooling, away):
    away.proxy.cut()
    during = spooling.send(20)
    spooling.spooled(20)
    lost = spooling.fleet.app.die.delay()
    spooling.until(lambda: "SIGKILL" in spooling.fleet.log("worker"), "the child never died")
    more = spooling.send(20, 100)
    spooling.spooled(40)
    away.proxy.heal()
    spooling.drained()
    spooling.proves(during, list(range(1000, 1020)))
    spooling.proves(more, list(range(1100, 1120)))
    with pytest.raises(Exception, match="signal 9"):
        lost.get(timeout=PATIENCE_S)


def test_two_workers_on_one_host_share_the_spool(spooling, away):
    spooling.fleet.worker(name="second")
    away.proxy.cut()
    during = spooling.send(80)
    spooling.spooled(80)
    assert len(spooling.spool.state().pids) > 2  # children of both
    away.proxy.heal()
    spooling.drained()
    twice = spooling.proves(during, list(range(1000, 1080)))
    assert twice <= 16

    native.end(spooling.fleet.processes.pop("second"))


def test_what_a_killed_worker_left_is_drained_by_the_next_and_by_the_command(spooling, away):
    fleet = spooling.fleet
    away.proxy.cut()
    during = spooling.send(20)
    spooling.spooled(20)
    _kill_all(fleet.processes.pop("worker"))
    status = spooling.cli("status")
    assert status.returncode == Exit.OK, status.stderr
    assert "20 records" in status.stdout
    assert "spooled by pid" in status.stdout
    refused = spooling.cli("drain", "--timeout", "2")
    assert refused.returncode == Exit.KAFKA_UNREACHABLE, refused.stdout + refused.stderr
    assert "20 records left" in refused.stderr
    away.proxy.heal()
    drained = spooling.cli("drain", "--timeout", "20")
    assert drained.returncode == Exit.OK, drained.stdout + drained.stderr
    assert "20 records drained" in drained.stdout
    spooling.proves(during, list(range(1000, 1020)))

    fleet.worker()
    away.proxy.cut()
    during = spooling.send(20)
    spooling.spooled(20)
    _kill_all(fleet.processes.pop("worker"))
    away.proxy.heal()
    fleet.worker()
    spooling.drained()
    spooling.proves(during, list(range(1000, 1020)))


def test_status_as_json_says_the_same(spooling):
    shown = spooling.cli("status", "--json")
    assert shown.returncode == Exit.OK, shown.stderr
    found = json.loads(shown.stdout)
    assert found["records"] == 0
    assert found["path"] == str(spooling.spool.path)
    assert found["limit"] == 1 << 30


def test_a_damaged_file_costs_what_cannot_be_read_and_nothing_else(spooling, away):
    away.proxy.cut()
    during = spooling.send(40)
    spooling.spooled(40)
    half = spooling.spool.path.stat().st_size // 2 // 4096 * 4096
    with spooling.spool.path.open("r+b") as file:
        file.truncate(half)
    after = spooling.send(20, 100)
    folder = spooling.spool.path.parent

    def noticed():
        # Not at once: whoever wrote last still has the lost pages in memory, and appends a record or two behind the hole.
        if spooling.spool.retired() or list(folder.glob("*.read")):
            return True
        after.extend(spooling.send(1, 100 + len(after)))
        time.sleep(0.5)
        return False

    spooling.until(noticed, "never noticed")
    away.proxy.heal()
    spooling.proves(after, list(range(1100, 1100 + len(after))))
    spooling.drained()
    found = spooling.successes()
    assert 10 < sum(one.id in found for one in during) < 40
    assert len(list(folder.glob("*.read"))) == 1


def test_with_a_full_spool_the_worker_waits_for_kafka_and_loses_nothing(away, redis_server, tmp_path):
    made = Spooling(
        away, redis_server, tmp_path, {"spool_max_bytes": 1 << 20, "delivery_timeout_s": 2.0},
        result_backend_always_retry=True,
    )  # fmt: skip
    try:
        made.start()
        assert made.send(1)[0].get(timeout=PATIENCE_S) == 1000
        away.proxy.cut()
        results = [made.fleet.app.big.delay(150_000) for _ in range(10)]
        made.until(lambda: "is full: spool_max_bytes = 1048576" in made.fleet.log("worker"), "never full")
        assert 3 <= made.spool.state().records < 10
        away.proxy.heal()
        assert [len(one.get(timeout=PATIENCE_S)) for one in results] == [150_000] * 10
        made.drained()
    finally:
        made.fleet.stop()


@pytest.mark.parametrize("pool", ["threads", "gevent", "eventlet"])
def test_every_other_pool_spools_and_drains_too(away, redis_server, tmp_path, pool):
    """There the tasks and whoever drains are threads, or greenlets, of one process."""
    made = Spooling(away, redis_server, tmp_path)
    try:
        made.fleet.serve("-P", pool, "-c", "4")
        assert made.send(1)[0].get(timeout=PATIENCE_S) == 1000
        away.proxy.cut()
        during = made.send(30)
        made.spooled(30)
        away.proxy.heal()
        made.drained()
        made.proves(during, list(range(1000, 1030)))
    finally:
        made.fleet.stop()


def test_a_worker_whose_spool_cannot_be_written_does_not_start(away, redis_server, tmp_path):
    (tmp_path / "spool").write_text("a file where the folder should be")
    made = Spooling(away, redis_server, tmp_path)
    made.fleet.init()
    done = subprocess.run(
        made.fleet.celery("worker", "-c", "1", "-l", "INFO", "--without-gossip", "--without-mingle"),
        env=made.fleet.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == Exit.CONFIGURATION, done.stdout + done.stderr
    assert "kafka_backend_settings['spool']" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def _running(spooling):
    found = spooling.fleet.app.app.control.inspect([spooling.fleet.node("worker")], timeout=PATIENCE_S).active()
    return [task for tasks in found.values() for task in tasks]


def _kill_all(process):
    """Kill -9 a worker and its children, as a power cut would."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
