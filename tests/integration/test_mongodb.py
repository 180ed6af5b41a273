"""MongoDB as the primary view of a fleet; killed and frozen while the log is folded into it."""

from __future__ import annotations

import sys
import time
import uuid

import pytest
from celery import chord, group
from celery.result import AsyncResult, GroupResult

from celery_kafka_backend import codec, events, topics
from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.kafka import producer_config
from celery_kafka_backend.sinks.registry import open_view
from tests.contract.factories import sent, stated
from tests.integration import materializing
from tests.integration.conftest import Fleet
from tests.services import mongodb as service
from tests.services import native

pytest.importorskip("pymongo")
pytestmark = [pytest.mark.kafka, pytest.mark.mongodb]

SOON = 40


@pytest.fixture(scope="module")
def mongo_fleet(kafka, redis_server, mongodb, tmp_path_factory):
    with Fleet(
        kafka.bootstrap, redis_server.clean_database(), mongodb.clean_database(), tmp_path_factory.mktemp("fleet"),
        {"history": {"mongodb": True}, "poll_interval_s": 0.1}, {},
    ) as made:  # fmt: skip
        made.serve()
        yield made


@pytest.mark.redis
def test_results_groups_and_a_chord_with_mongodb_as_the_primary_view(mongo_fleet):
    tasks = mongo_fleet.app
    assert tasks.add.delay(2, 3).get(timeout=SOON) == 5
    failed = tasks.fail.delay("broken")
    with pytest.raises(ValueError, match="broken"):
        failed.get(timeout=SOON)
    assert AsyncResult(failed.id, app=tasks.app).args == ["broken"]
    many = group(tasks.add.s(n, n) for n in range(20)).apply_async()
    many.save()
    assert many.get(timeout=SOON) == [2 * n for n in range(20)]
    deadline = time.monotonic() + SOON
    while (restored := GroupResult.restore(many.id, app=tasks.app)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [each.id for each in restored.results] == [each.id for each in many.results]
    body = chord([tasks.add.s(n, 0) for n in range(20)])(tasks.total.s())
    assert body.get(timeout=SOON) == 190
    many.forget()
    while many.results[0].state != "PENDING":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_mongod_killed_and_frozen_during_a_load_loses_nothing(kafka, topic_prefix, tmp_path):
    """Against what was produced: every document, side record and event is there, and the positions are the log's end."""
    from confluent_kafka import Producer  # noqa: PLC0415
    from confluent_kafka.admin import AdminClient, NewTopic  # noqa: PLC0415

    server = service.start()
    url = f"{server.clean_database()}?socketTimeoutMS=5000"
    topic = topics.task_events(topic_prefix)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    wanted = {topic: 2, topics.chords(topic_prefix): 2, topics.dead_letters(topic_prefix): 1}
    for created in admin.create_topics([NewTopic(name, count, 1) for name, count in wanted.items()]).values():
        created.result(30)
    tasks = {uuid.uuid4().hex: number for number in range(6_000)}
    producer = Producer(producer_config(materializing.settings(kafka.bootstrap, topic_prefix)))
    view = open_view(url, materializing.options(topic_prefix))
    with (tmp_path / "log").open("wb") as output:
        command = [sys.executable, "-m", "tests.integration.materializing", kafka.bootstrap, topic_prefix, url]
        process = native.popen(command, output=output)
    try:
        for task, number in tasks.items():
            for event in (sent(0, task=task), stated("SUCCESS", 10, task=task, value=number)):
                producer.produce(topic, codec.encode(event), task, headers=codec.headers(event))
        assert producer.flush(30) == 0

        def folded() -> int:
            try:
                return sum(view.positions().values())
            except Unavailable:
                return 0

        for hurt, heal in ((server.kill, server.restart), (server.freeze, server.thaw)):
            before = folded()
            deadline = time.monotonic() + SOON
            while folded() <= before < 2 * len(tasks):
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.01)
            hurt()
            time.sleep(0.7)
            heal()
        deadline = time.monotonic() + 2 * SOON
        while folded() < 2 * len(tasks):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        shown = view.shown(list(tasks))
        assert {task: found.document for task, found in shown.items()} == {
            task: stated("SUCCESS", 10, task=task, value=number).document for task, number in tasks.items()
        }
        assert all(found.side is not None and found.side.sent for found in shown.values())
        kinds = {codec.decode(value).kind for task in list(tasks)[::500] for value in view.history(task)}
        assert kinds == {events.SENT, events.SUCCESS}
        assert sum(row.table == "history" for row in view.rows()) == 2 * len(tasks)
    finally:
        native.end(process)
        view.close()
        server.stop()
