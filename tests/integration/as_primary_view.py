"""What every store on disk must do as the primary view of a fleet, and while it is killed and frozen under load."""

from __future__ import annotations

import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from celery import chord, group
from celery.result import AsyncResult, GroupResult

from celery_kafka_backend import codec, events, topics
from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.kafka import producer_config
from celery_kafka_backend.sinks.registry import open_view
from tests.contract.factories import sent, stated
from tests.integration import materializing
from tests.integration.kafka_topics import create, must_arrive
from tests.patience import PATIENCE_S
from tests.services import native

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.conftest import Fleet
    from tests.services.server import OneServer


def results_groups_and_a_chord(fleet: Fleet) -> None:
    """Get a result, an error, a saved group and a chord; forget the group."""
    tasks: Any = fleet.app
    assert tasks.add.delay(2, 3).get(timeout=PATIENCE_S) == 5
    failed = tasks.fail.delay("broken")
    with pytest.raises(ValueError, match="broken"):
        failed.get(timeout=PATIENCE_S)
    assert AsyncResult(failed.id, app=tasks.app).args == ["broken"]
    many = group(tasks.add.s(n, n) for n in range(20)).apply_async()
    many.save()
    assert many.get(timeout=PATIENCE_S) == [2 * n for n in range(20)]
    deadline = time.monotonic() + PATIENCE_S
    while (restored := GroupResult.restore(many.id, app=tasks.app)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [each.id for each in restored.results] == [each.id for each in many.results]
    body = chord([tasks.add.s(n, 0) for n in range(20)])(tasks.total.s())
    assert body.get(timeout=PATIENCE_S) == 190
    many.forget()
    while many.results[0].state != "PENDING":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def killed_and_frozen_during_a_load(server: OneServer, url: str, bootstrap: str, prefix: str, folder: Path) -> None:
    """Against what was produced: every document, side record and event is there, and the positions are the log's end."""
    from confluent_kafka import Producer  # noqa: PLC0415
    from confluent_kafka.admin import AdminClient, NewTopic  # noqa: PLC0415

    topic = topics.task_events(prefix)
    wanted = {topic: 2, topics.chords(prefix): 2, topics.dead_letters(prefix): 1}
    create(AdminClient({"bootstrap.servers": bootstrap}), *(NewTopic(name, count, 1) for name, count in wanted.items()))
    tasks = {uuid.uuid4().hex: number for number in range(6_000)}
    producer = Producer({**producer_config(materializing.settings(bootstrap, prefix)), "on_delivery": must_arrive})
    view = open_view(url, materializing.options(prefix))
    log = folder / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "tests.integration.materializing", bootstrap, prefix, url]
        process = native.popen(command, output=output)
    try:
        for task, number in tasks.items():
            for event in (sent(0, task=task), stated("SUCCESS", 10, task=task, value=number)):
                producer.produce(topic, codec.encode(event), task, headers=codec.headers(event))
        assert producer.flush(PATIENCE_S) == 0

        def folded() -> int:
            try:
                return sum(view.positions().values())
            except Unavailable:
                return 0

        for hurt, heal in ((server.kill, server.restart), (server.freeze, server.thaw)):
            before = folded()
            deadline = time.monotonic() + PATIENCE_S
            while folded() <= before < 2 * len(tasks):
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
            hurt()
            time.sleep(0.7)
            heal()
        deadline = time.monotonic() + 2 * PATIENCE_S
        while folded() < 2 * len(tasks):
            assert time.monotonic() < deadline, log.read_text()
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
