"""The barrier on a real log, with a view as far behind as a test wants it."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import threading
import time

import msgspec
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewPartitions,
    NewTopic,
    ResourceType,
)
from confluent_kafka.admin import ResourcePatternType as Pattern

from celery_kafka_backend import codec, events, order, places, primary, topics
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.barrier import Barrier
from celery_kafka_backend.changes import GROUP, TASK, Batch, Partition
from celery_kafka_backend.errors import Unsure
from celery_kafka_backend.events import Event
from celery_kafka_backend.pointer import Pointer, position
from celery_kafka_backend.producer.publisher import Publisher, Record
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink
from tests.integration.kafka_topics import create
from tests.patience import PATIENCE_S, until
from tests.services import ports
from tests.services.errors import ServiceError

from . import locked_kafka

pytestmark = pytest.mark.kafka

PARTITIONS = 6


def an_event(task, key=1, kind=events.SUCCESS, event_id=None, **more):
    return Event(id=event_id or secrets.token_hex(8), kind=kind, task=task, key=key, at=1, hlc=1, **more)


class Log:
    """A topic of its own, and where each record of it is."""

    def __init__(self, address, prefix, **given):
        self.settings = settings_module.parse(
            f"kafka://{address}/?view=memory://x",
            {"topic_prefix": prefix, "partitions": PARTITIONS, "replication_factor": 1, "min_insync_replicas": 1}
            | given,
        )
        self.topic = topics.task_events(prefix)
        self.admin = AdminClient({"bootstrap.servers": address})
        create(self.admin, NewTopic(self.topic, PARTITIONS, 1))
        self.publisher = Publisher(self.settings)

    def append(self, event, value=None):
        record = Record(self.topic, event.task.encode(), value or codec.encode(event))
        delivery = self.publisher.publish(record, wait_s=PATIENCE_S)
        delivery.wait(PATIENCE_S)
        return delivery.stored

    def close(self):
        self.publisher.close()


@pytest.fixture
def log(kafka, topic_prefix):
    made = Log(kafka.bootstrap, topic_prefix)
    yield made
    made.close()


@pytest.fixture
def barrier(log):
    return Barrier(log.settings)


def nowhere():
    return {}


def test_every_partition_is_where_the_producer_put_it(log):
    for number in range(40):
        task = f"{number}-{secrets.token_hex(number % 7)}"
        assert log.append(an_event(task)).partition.partition == topics.partition_of(task, PARTITIONS)


def test_what_the_view_has_not_folded_is_read_from_the_log_and_nothing_else(log, barrier):
    first = log.append(an_event("a", 3, event_id="old"))
    log.append(an_event("a", 9, event_id="best"))
    log.append(an_event("a", 5))
    log.append(an_event("b", 99))
    found = barrier.beyond(TASK, "a", nowhere, PATIENCE_S)
    assert (found.id, found.key) == ("best", 9)
    # Folded up to and with the best one: what is left counts alone.
    behind = {first.partition: first.offset + 2}
    assert barrier.beyond(TASK, "a", lambda: behind, PATIENCE_S).key == 5
    assert barrier.beyond(TASK, "a", lambda: {first.partition: first.offset + 3}, PATIENCE_S) is None
    assert barrier.beyond(TASK, "never seen", nowhere, PATIENCE_S) is None


def test_a_task_and_a_group_of_one_id_are_two(log, barrier):
    log.append(an_event("one", 3))
    log.append(an_event("one", 4, events.GROUP_SAVED))
    assert barrier.beyond(TASK, "one", nowhere, PATIENCE_S).key == 3
    assert barrier.beyond(GROUP, "one", nowhere, PATIENCE_S).key == 4


def test_it_waits_for_a_view_that_moves_and_reads_nothing_then(log, barrier):
    stored = log.append(an_event("a"))
    asked = []

    def moving():
        asked.append(1)
        return {stored.partition: stored.offset + (len(asked) > 5)}

    assert barrier.beyond(TASK, "a", moving, PATIENCE_S) is None
    assert len(asked) == 6


def test_a_view_that_stands_still_is_waited_for_once(log, barrier):
    stored = log.append(an_event("a", 7))
    asked = []

    def stopped():
        asked.append(1)
        return {stored.partition: stored.offset}

    assert barrier.beyond(TASK, "a", stopped, 4).key == 7
    assert len(asked) > 5
    asked.clear()
    assert barrier.beyond(TASK, "a", stopped, 4).key == 7
    assert len(asked) == 1


def test_a_process_moves_to_another_view_when_that_shows_all_that_the_log_holds(log, monkeypatch):
    """Not sooner, whatever the positions of the view that it leaves: documents stand there before positions do."""
    monkeypatch.setattr(primary, "LOOK_S", 0.0)
    monkeypatch.setattr(primary, "AGAIN_S", 0.0)
    prefix = log.settings.topic_prefix
    views = [f"memory://{prefix}{name}" for name in ("old", "new")]
    both = {url: StoreOptions(namespace=prefix) for url in views}
    reader = primary.reader_of(msgspec.structs.replace(log.settings, views=tuple(views)), both)
    old, new = (open_sink(url, options) for url, options in both.items())
    stored = log.append(an_event("a"))
    old.write(Batch([], positions={stored.partition: stored.offset}))
    new.write(Batch([], positions={stored.partition: stored.offset}))
    assert reader.documents(["a"]) == {}
    old.write(Batch([], positions=position(prefix, Pointer(topics.view_name(views[1]), 1))))
    reader.documents(["a"])
    assert reader.view.url == views[0]
    new.write(Batch([], positions={stored.partition: stored.offset + 1}))
    reader.documents(["a"])
    assert reader.view.url == views[1]


def test_a_record_that_is_no_event_is_passed_over_and_one_of_newer_software_is_not(log, barrier):
    log.append(an_event("a", 1), b"rubbish")
    log.append(an_event("a", 2))
    assert barrier.beyond(TASK, "a", nowhere, PATIENCE_S).key == 2
    log.append(an_event("a", 3), codec.encode(msgspec.structs.replace(an_event("a", 3), v=codec.VERSION + 1)))
    with pytest.raises(Unsure, match="schema version"):
        barrier.beyond(TASK, "a", nowhere, PATIENCE_S)


def test_what_retention_deleted_is_not_waited_for(log, barrier):
    stored = log.append(an_event("a", 1))
    end = TopicPartition(*stored.partition, stored.offset + 1)
    for deleted in log.admin.delete_records([end]).values():
        deleted.result(20)
    assert barrier.beyond(TASK, "a", nowhere, PATIENCE_S) is None
    log.append(an_event("a", 2))
    assert barrier.beyond(TASK, "a", nowhere, PATIENCE_S).key == 2


def test_after_partitions_were_added_both_places_of_an_id_are_looked_at(log, barrier):
    grown = 2 * PARTITIONS
    task = next(
        f"t{n}" for n in range(1000) if topics.partition_of(f"t{n}", PARTITIONS) != topics.partition_of(f"t{n}", grown)
    )
    before = log.append(an_event(task, 5))
    for done in log.admin.create_partitions([NewPartitions(log.topic, grown)]).values():
        done.result(20)
    late = Publisher(log.settings)  # knows the new count at once; the old one's producer does not yet
    try:
        deadline = time.monotonic() + PATIENCE_S
        while len(barrier._log._partitions(barrier._log._handle(), deadline)) < grown:
            time.sleep(0.05)
        assert barrier.beyond(TASK, task, nowhere, PATIENCE_S).key == 5
        delivery = late.publish(Record(log.topic, task.encode(), codec.encode(an_event(task, 6))), wait_s=PATIENCE_S)
        delivery.wait(PATIENCE_S)
        assert delivery.stored.partition != before.partition
        assert barrier.beyond(TASK, task, nowhere, PATIENCE_S).key == 6
        assert barrier.beyond(TASK, task, lambda: {delivery.stored.partition: 99}, PATIENCE_S).key == 5
    finally:
        late.close()


def test_a_process_that_never_saw_the_earlier_count_looks_where_an_id_belonged_then(log, monkeypatch):
    monkeypatch.setattr(places, "HEARD_MS", 1_000)
    grown = 2 * PARTITIONS
    task = next(
        f"t{n}" for n in range(1000) if topics.partition_of(f"t{n}", PARTITIONS) != topics.partition_of(f"t{n}", grown)
    )
    before = log.append(an_event(task, 5))
    written = order.system_wall_ms()
    until(lambda: order.system_wall_ms() > written + places.HEARD_MS)  # the topic has not just been made
    for done in log.admin.create_partitions([NewPartitions(log.topic, grown)]).values():
        done.result(20)
    until(lambda: len(log.admin.list_topics(log.topic, timeout=PATIENCE_S).topics[log.topic].partitions) == grown)
    barrier = Barrier(msgspec.structs.replace(log.settings, partitions=grown))
    assert barrier.beyond(TASK, task, nowhere, PATIENCE_S).key == 5
    passed = {before.partition: before.offset + 1}

    def settled():
        assert barrier.beyond(TASK, task, lambda: passed, PATIENCE_S) is None
        return not barrier._log._moved.ends  # never looked for again

    until(settled, lambda: barrier._log._moved.ends)


def test_catching_up_waits_and_says_whether_it_did(log, barrier):
    stored = log.append(an_event("a"))
    assert not barrier.caught_up(["a"], nowhere, 3.0)
    assert barrier.caught_up(["a", "b"], lambda: {stored.partition: stored.offset + 1}, PATIENCE_S)


def test_threads_share_one_barrier(log, barrier):
    for number in range(20):
        log.append(an_event(f"t{number}", number + 1))
    found = {}

    def read(number):
        found[number] = barrier.beyond(TASK, f"t{number}", nowhere, PATIENCE_S).key

    threads = [threading.Thread(target=read, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found == {number: number + 1 for number in range(20)}


def _read_in_child(barrier, answers):
    answers.put(barrier.beyond(TASK, "a", nowhere, PATIENCE_S).key)
    answers.close()
    answers.join_thread()
    os._exit(0)  # as a worker's children leave


def test_a_fork_reads_through_a_handle_of_its_own(log, barrier):
    log.append(an_event("a", 8))
    assert barrier.beyond(TASK, "a", nowhere, PATIENCE_S).key == 8
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=_read_in_child, args=(barrier, answers))
    child.start()
    assert answers.get(timeout=PATIENCE_S) == 8
    child.join(PATIENCE_S)
    assert child.exitcode == 0
    assert barrier.beyond(TASK, "a", nowhere, PATIENCE_S).key == 8


def test_a_kafka_that_is_away_is_asked_once(topic_prefix):
    settings = settings_module.parse(
        f"kafka://127.0.0.1:{ports.free(1)[0]}/?view=memory://x", {"topic_prefix": topic_prefix}
    )
    barrier = Barrier(settings)
    with pytest.raises(Unsure, match=r"reading .*task-events") as first:
        barrier.beyond(TASK, "a", nowhere, 0.5)
    with pytest.raises(Unsure) as second:
        barrier.beyond(TASK, "b", nowhere, PATIENCE_S)
    assert str(second.value) == str(first.value)


# -- rights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked():
    try:
        server = locked_kafka.start()
    except ServiceError as error:
        if os.environ.get("REQUIRE_SERVICES", "") in ("all", "kafka"):
            pytest.fail(f"kafka is required (REQUIRE_SERVICES): {error}", pytrace=False)
        pytest.skip(f"kafka: {error}")
    yield server
    server.stop()


def test_missing_rights_are_named_and_no_group_is_needed(locked, topic_prefix):
    log = Log(locked.open, topic_prefix)
    try:
        log.append(an_event("a", 4))
        settings = msgspec.structs.replace(log.settings, bootstrap_servers=locked.locked, client=locked.client())

        def grant(operation):
            rule = AclBinding(
                ResourceType.TOPIC, log.topic, Pattern.LITERAL, f"User:{locked_kafka.USER}", "*", operation,
                AclPermissionType.ALLOW,
            )  # fmt: skip
            for done in log.admin.create_acls([rule]).values():
                done.result(10)

        with pytest.raises(Unsure, match=rf"reading {log.topic} .*right Describe.*init --print"):
            Barrier(settings).beyond(TASK, "a", nowhere, PATIENCE_S)
        grant(AclOperation.DESCRIBE)  # what a client has that may write only
        with pytest.raises(Unsure, match=rf"reading {log.topic} .*right Read.*authorization failed.*init --print"):
            Barrier(settings).beyond(TASK, "a", nowhere, PATIENCE_S)
        assert not Barrier(settings).caught_up(["a"], nowhere, 5.0)  # in which a crowded machine connects, too
        assert Barrier(settings).caught_up(["a"], lambda: dict.fromkeys(_all(log.topic), 9), PATIENCE_S)
        grant(AclOperation.READ)
        assert Barrier(settings).beyond(TASK, "a", nowhere, PATIENCE_S).key == 4
    finally:
        log.close()


def _all(topic):
    return [Partition(topic, number) for number in range(PARTITIONS)]
