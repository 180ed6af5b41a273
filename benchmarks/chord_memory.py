"""Resident memory of the chord processor with a chord of 100,000 members, and such a chord through a real worker."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING
from uuid import uuid4

from confluent_kafka import Producer

from benchmarks.chords import wait_for_body
from benchmarks.figures import Bound, Row
from benchmarks.fleet import OURS, fleet
from benchmarks.stage import say
from celery_kafka_backend import chord_records, topics
from celery_kafka_backend.chord_records import Declared, Part, Sized
from celery_kafka_backend.kafka import producer_config

if TYPE_CHECKING:
    from benchmarks.fleet import Fleet
    from benchmarks.stage import Child, Stage
    from celery_kafka_backend.chord_records import Record
    from celery_kafka_backend.settings import Settings

MIB = 1 << 20
SETTLE_S = 3.0


def run(stage: Stage) -> list[Row]:
    members = stage.size(100_000, 2_000)
    cluster = stage.kafka(1)
    rows = []
    with stage.redis() as server:
        for result_bytes in (100, 600):
            with fleet(stage, OURS, server, cluster, chords=True) as ours:
                rows += _written(ours, members, result_bytes)
        with fleet(stage, OURS, server, cluster, chords=True) as ours:
            rows += _worked(stage, ours, members)
    return rows


def _written(ours: Fleet, members: int, result_bytes: int) -> list[Row]:
    """A chord's records as workers write them, all but one; then that one."""
    assert ours.settings is not None
    assert ours.chords is not None
    group = str(uuid4())
    body = {"task": "benchmarks.celery_app.count", "args": [], "kwargs": {}, "options": {"task_id": str(uuid4())}}
    body |= {"subtask_type": None, "immutable": False}
    here = {"group": group, "generation": 1}
    time.sleep(SETTLE_S)
    before = ours.chords.rss()
    declared = Declared(**here, body=json.dumps(body).encode(), body_task_id=body["options"]["task_id"])  # type: ignore[arg-type, index]
    _write(ours.settings, [declared, Sized(**here, size=members)])  # type: ignore[arg-type]
    _write(ours.settings, [_part(here, n, result_bytes) for n in range(members - 1)])
    peak = _Peak(ours.chords)
    time.sleep(SETTLE_S)
    waiting = ours.chords.rss()
    _write(ours.settings, [_part(here, members - 1, result_bytes)])
    wait_for_body(ours.settings, group)
    firing = peak.end()
    payload = members * (result_bytes + 2)
    title = f"chord processor, {members:,} members with results of {result_bytes} bytes"
    say(
        f"{title}: {before / MIB:.0f} MiB, waiting {waiting / MIB:.0f}, firing {firing / MIB:.0f}; payload {payload / MIB:.0f}"
    )
    return [
        Row(what=f"{title}: waiting", unit="bytes/member", ours=[(waiting - before) / members]),
        Row(
            what=f"{title}: firing", unit="MiB", ours=[(firing - waiting) / MIB],
            note=f"above what it had while it waited; the results are {payload / MIB:.0f} MiB",
        ),
    ]  # fmt: skip


def _part(here: dict[str, object], number: int, result_bytes: int) -> Part:
    task, root, event = str(uuid4()), str(uuid4()), uuid4().hex
    return Part(
        **here, task=task, index=number, id=event, key=1 << 60, result=b'"' + b"x" * result_bytes + b'"',  # type: ignore[arg-type]
        content_type="application/json", content_encoding="utf-8", root=root, parent=root, priority=0, at=1,
        worker="kafka@bench",
    )  # fmt: skip


def _write(settings: Settings, records: list[Record]) -> None:
    topic = topics.chords(settings.topic_prefix)
    producer = Producer(producer_config(settings) | {"linger.ms": 20, "queue.buffering.max.messages": 500_000})
    for record in records:
        key, value = chord_records.encode(record)
        producer.produce(topic, value, key, partition=topics.chord_partition(record.group, settings.chord_partitions))
    producer.flush(60)


def _worked(stage: Stage, ours: Fleet, members: int) -> list[Row]:
    """A chord through client, worker and all."""
    assert ours.chords is not None
    peak = _Peak(ours.chords)
    report = stage.ask("client_child", {"mode": "chord", "members": members}, ours.env)
    (seconds,) = report.values()
    most = peak.end()
    say(f"a real chord of {members:,}: {seconds:.0f} s, the processor at most {most / MIB:.0f} MiB")
    return [
        Row(what=f"a real chord of {members:,}, from its sending to its body's result", unit="s", ours=[seconds]),
        Row(
            what="… memory of the chord processor, at most",
            unit="MiB",
            ours=[most / MIB],
            bound=Bound("value", most=512),
        ),
    ]


class _Peak:
    """The most memory that a process had, looked at all the time."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            self._most = max(self._most, self._child.rss())

    def end(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._most
