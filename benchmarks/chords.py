"""Chords and groups of tasks that do nothing, against Celery's Redis backend; and how soon a body follows its last member."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

from confluent_kafka import Consumer, TopicPartition

from benchmarks.figures import Bound, Row, percentile
from benchmarks.fleet import CHILDREN, OURS, STOCK, fleet
from benchmarks.stage import BenchError, say
from celery_kafka_backend import chord_records, topics
from celery_kafka_backend.chord_records import Decided, Fired, Part
from celery_kafka_backend.kafka import consumer_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.stage import Stage
    from celery_kafka_backend.settings import Settings

WARM_UP = 2_000
"""Members of a group that nobody times: the first chord of 1,000 took Kafka twice the CPU of the next."""
SMALL = 4
"""Members of the chords whose bodies are timed one by one."""


def run(stage: Stage) -> list[Row]:
    cluster = stage.kafka(stage.brokers)
    sizes = [stage.size(1_000, 100), stage.size(10_000, 300)]
    members = stage.size(5_000, 200)
    tasks = [{"mode": "chord", "members": size} for size in sizes] + [{"mode": "group", "members": members}]
    found: dict[tuple[str, str], list[float]] = {}
    delays: list[list[float]] = []
    with (
        stage.redis() as server,
        fleet(stage, OURS, server, cluster, chords=True) as ours,
        fleet(stage, STOCK, server, cluster) as stock,
    ):
        assert ours.settings is not None
        for one in (stock, ours):  # processes and servers that have not worked yet; Kafka's JVM compiles by use
            stage.ask("client_child", {"mode": "group", "members": stage.size(WARM_UP, 100)}, one.env)
        for number in range(stage.runs):
            for task in tasks:
                for backend, one in ((STOCK, stock), (OURS, ours)):
                    report = stage.ask("client_child", task, one.env)
                    for what, seconds in report.items():
                        found.setdefault((what, backend), []).append(seconds)
                    shown = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in report.items())
                    say(f"run {number + 1} of {stage.runs}, {backend}: {shown}")
            asked = {"mode": "chords", "chords": stage.size(300, 30), "members": SMALL}
            groups = stage.ask("client_child", asked, ours.env)["groups"]
            delays.append(_delays(ours.settings, set(groups)))
            say(f"last part to body: p50 {median(delays[-1]):.0f} ms, p99 {percentile(delays[-1], 0.99):.0f} ms")
    rows = [
        Row(
            what=what, unit="s", ours=found[what, OURS], peer=found[what, STOCK], against="Celery's Redis backend",
            bound=Bound(most=1.0),
            note=f"worker of {CHILDREN} children, Redis as broker; brokers: {stage.brokers}" if not n else "",
        )
        for n, what in enumerate(dict.fromkeys(what for what, _ in found))
    ]  # fmt: skip
    for share, most in ((0.5, 10.0), (0.99, 50.0)):
        rows.append(
            Row(
                what=f"last part written to body sent, p{100 * share:.0f}", unit="ms",
                ours=[percentile(each, share) for each in delays], bound=Bound("value", most=most),
                note=f"chords of {SMALL}, one after the other; from Kafka's time of the part to the processor's after the broker has the body"
                if share == 0.5 else "",
            )
        )  # fmt: skip
    return rows


def _delays(settings: Settings, groups: set[str]) -> list[float]:
    """Return for each chord the milliseconds from Kafka's time of its last part to the processor's time of `fired`."""
    last: dict[str, int] = {}
    decided: set[str] = set()
    found: dict[str, float] = {}
    for written, record in _records(settings):
        match record:
            case Part() if record.group in groups and record.group not in decided:
                last[record.group] = written
            case Decided() if record.group in groups:
                decided.add(record.group)
            case Fired() if record.group in groups:
                found[record.group] = float(record.at - last[record.group])
    if len(found) != len(groups):
        raise BenchError(f"{len(groups) - len(found)} of {len(groups)} chords are not fired in the log")
    return list(found.values())


def wait_for_body(settings: Settings, group: str, timeout_s: float = 300) -> None:
    """Return once a chord is fired."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if any(isinstance(record, Fired) and record.group == group for _, record in _records(settings)):
            return
    raise BenchError(f"chord {group} was not fired within {timeout_s:g} s")


def _records(settings: Settings) -> Iterator[tuple[int, object]]:
    topic = topics.chords(settings.topic_prefix)
    consumer = Consumer(consumer_config(settings, None) | {"enable.partition.eof": True})
    try:
        count = len(consumer.list_topics(topic, timeout=20).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, n, 0) for n in range(count)])
        left, deadline = count, time.monotonic() + 60
        while left and time.monotonic() < deadline:
            for message in consumer.consume(2_000, 0.2):
                if message.error() is not None:
                    left -= 1
                elif message.value() is not None:
                    yield message.timestamp()[1], chord_records.decode(message.key(), message.value())
    finally:
        consumer.close()
