"""The servers under the other tests are real: they keep data, die, hang and come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from tests.integration.kafka_topics import create
from tests.patience import PATIENCE_S
from tests.services import kafka_wire, ports, processes, redis

if TYPE_CHECKING:
    from tests.services.kafka import KafkaCluster
    from tests.services.redis import RedisServer

ROOT = Path(__file__).parents[2]


def create_topic(bootstrap: str, topic: str, **settings: int) -> None:
    """Create a topic and wait for the answer."""
    admin = AdminClient({"bootstrap.servers": bootstrap})  # named, for its futures fail when it is collected
    create(admin, NewTopic(topic, **settings))


def produce(bootstrap: str, topic: str, values: list[bytes], timeout_s: float = PATIENCE_S) -> None:
    """Produce with acks=all, and raise unless every record is acknowledged."""
    producer = Producer(
        {"bootstrap.servers": bootstrap, "enable.idempotence": True, "message.timeout.ms": int(timeout_s * 1000)}
    )
    refused: list[object] = []
    for value in values:
        producer.produce(topic, value, on_delivery=lambda error, _: refused.append(error) if error else None)
    assert producer.flush(timeout_s + 5) == 0
    if refused:
        raise KafkaException(refused[0])


def consume(bootstrap: str, topic: str, count: int, timeout_s: float = PATIENCE_S) -> list[bytes]:
    """Read ``count`` values from the beginning, as a member of a group, and commit."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"{topic}-group",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([topic])
    values: list[bytes] = []
    deadline = time.monotonic() + timeout_s
    while len(values) < count and time.monotonic() < deadline:
        values += [message.value() for message in consumer.consume(500, 0.2) if message.error() is None]
    consumer.commit(asynchronous=False)
    consumer.close()
    return values


@pytest.mark.kafka
def test_a_broker_keeps_what_it_acknowledged(kafka: KafkaCluster, topic_prefix: str) -> None:
    """Idempotent produce, a consumer group and a commit work on the single broker."""
    topic, values = f"{topic_prefix}kept", [b"%d" % i for i in range(1000)]
    create_topic(kafka.bootstrap, topic, num_partitions=1, replication_factor=1)
    produce(kafka.bootstrap, topic, values)
    assert consume(kafka.bootstrap, topic, len(values)) == values


@pytest.mark.kafka
def test_a_mistyped_topic_is_an_error(kafka: KafkaCluster, topic_prefix: str) -> None:
    """No topic comes into being by being written to."""
    with pytest.raises(KafkaException):
        produce(kafka.bootstrap, f"{topic_prefix}mistyped", [b"lost?"], timeout_s=2)


@pytest.mark.kafka
def test_three_brokers_survive_a_killed_one(kafka3: KafkaCluster, topic_prefix: str) -> None:
    """With acks=all and two in-sync replicas, kill -9 of the partition's leader loses nothing and stops nothing."""
    topic = f"{topic_prefix}replicated"
    create_topic(kafka3.bootstrap, topic, num_partitions=1, replication_factor=3)
    before, during = [b"before %d" % i for i in range(500)], [b"during %d" % i for i in range(500)]
    produce(kafka3.bootstrap, topic, before)
    leader = (
        AdminClient({"bootstrap.servers": kafka3.bootstrap}).list_topics(topic, 10).topics[topic].partitions[0].leader
    )
    broker = kafka3.brokers[leader - 1]
    old_pid = broker.pid
    broker.kill()
    try:
        assert kafka_wire.live_brokers(broker.port) == set()
        produce(kafka3.bootstrap, topic, during)
        assert consume(kafka3.bootstrap, topic, 1000) == before + during
    finally:
        broker.restart()
        kafka3.wait()
    assert broker.pid != old_pid


@pytest.mark.kafka
def test_a_frozen_broker_hangs_and_a_thawed_one_answers(kafka3: KafkaCluster) -> None:
    """SIGSTOP keeps the port open and answers nothing: the failure that a closed connection does not show."""
    broker = kafka3.brokers[0]
    broker.freeze()
    try:
        assert kafka_wire.live_brokers(broker.port) == set()
    finally:
        broker.thaw()
        kafka3.wait()
    assert 1 in kafka_wire.live_brokers(broker.port)


@pytest.mark.redis
def test_each_test_has_an_empty_redis_database(redis_server: RedisServer) -> None:
    """What one database holds, the next does not."""
    first, second = redis_server.clean_database(), redis_server.clean_database()
    assert first != second
    number = first.rpartition("/")[2]
    assert redis.ask(redis_server.port, f"SELECT {number}", "SET k v") == ["+OK", "+OK"]
    assert redis.ask(redis_server.port, f"SELECT {second.rpartition('/')[2]}", "EXISTS k") == ["+OK", ":0"]


@pytest.mark.redis
@pytest.mark.parametrize(("appendonly", "kept"), [(True, ":1"), (False, ":0")])
def test_a_killed_redis_keeps_its_data_only_if_asked(redis_server: RedisServer, appendonly, kept) -> None:
    """``appendonly`` decides what a view looks like after the store's kill -9. The shared server only proves one runs."""
    own = redis.start(appendonly=appendonly)
    try:
        assert redis.ask(own.port, "SET k v") == ["+OK"]
        own.kill()
        assert redis.ask(own.port, "PING") == []
        own.restart()
        assert redis.ask(own.port, "EXISTS k") == [kept]
        own.freeze()
        assert redis.ask(own.port, "PING") == []
        own.thaw()
        assert redis.ask(own.port, "PING") == ["+PONG"]
    finally:
        own.stop()


@pytest.mark.redis
def test_a_server_outlives_the_thread_that_restarted_it(redis_server: RedisServer) -> None:
    """The kernel's "my parent died" means the parent's *thread*."""
    own = redis.start()
    try:
        thread = threading.Thread(target=own.restart)
        thread.start()
        thread.join()
        time.sleep(0.2)
        assert redis.ask(own.port, "PING") == ["+PONG"]
    finally:
        own.stop()


@pytest.mark.redis
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_server_outlives_its_run(redis_server: RedisServer, how: signal.Signals) -> None:
    """However the process that started a server ends, the server ends; even a frozen one."""
    program = (
        "import json, time; from tests.services import redis; s = redis.start(); s.freeze();"
        "print(json.dumps([s.pid, s.port]), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        pid, port = json.loads(run.stdout.readline())
        os.kill(run.pid, how)
        run.wait(PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert redis.ask(port, "PING") == []
    assert not Path(f"/proc/{pid}").exists()


def test_the_leak_check_finds_children_and_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child by its parent; a daemon, whose parent has gone, by its environment."""
    monkeypatch.setenv("CKB_TEST_ORPHAN", "yes")
    with subprocess.Popen(["sh", "-c", "sleep 61 & exec sleep 62"]) as child:
        try:
            found = {process.command: process for process in processes.started_by_us("CKB_TEST_ORPHAN", "yes")}
            deadline = time.monotonic() + PATIENCE_S
            while {"sleep 61", "sleep 62"} - found.keys() and time.monotonic() < deadline:
                found = {process.command: process for process in processes.started_by_us("CKB_TEST_ORPHAN", "yes")}
            assert {"sleep 61", "sleep 62"} <= found.keys()
        finally:
            child.kill()
            child.wait()
    orphans = [p for p in processes.started_by_us("CKB_TEST_ORPHAN", "yes") if p.command == "sleep 61"]
    for orphan in orphans:
        processes.kill(orphan)
    assert [orphan.parent != os.getpid() for orphan in orphans] == [True]


def test_free_ports_are_free_and_different() -> None:
    """Six are needed for three brokers."""
    assert len(set(ports.free(6))) == 6
