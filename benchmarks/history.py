"""A task's history straight from the log: by its id alone, against bare consuming of its partition, and around a time."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.stage import BenchError, Progress, say
from celery_kafka_backend import topics
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.history import from_log
from celery_kafka_backend.kafka import consumer_config, producer_config
from celery_kafka_backend.past import BATCH

if TYPE_CHECKING:
    from benchmarks.stage import Stage
    from celery_kafka_backend.settings import Settings

EVENTS = 5_000_000
DAY_MS = 86_400_000
WINDOW_MS = 600_000
APP = "from celery import Celery\nimport json, os\napp = Celery('bench', broker='memory://', backend=os.environ['BENCH_BACKEND'])\napp.conf.kafka_backend_settings = json.loads(os.environ['BENCH_SETTINGS'])\n"


def run(stage: Stage) -> list[Row]:
    cluster = stage.kafka(1)
    settings = stage.settings(cluster)
    topic = topics.task_events(settings.topic_prefix)
    events = stage.size(EVENTS, 200_000)
    task, at_ms = _fill_a_day(settings, topic, events)
    ours, bare, around, typed = [], [], [], []
    overrides = stage.overrides(cluster, settings.topic_prefix)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bench_app.py").write_text(APP)
        backend = f"kafka://{cluster.bootstrap}/?view=memory://"
        environment = {
            **os.environ,
            "BENCH_BACKEND": backend,
            "BENCH_SETTINGS": json.dumps(overrides),
            "PYTHONPATH": folder,
        }
        _bare(settings, topic, task)  # the broker's page cache and ours, for both alike
        for number in range(stage.runs):
            for mine in (True, False) if number % 2 else (False, True):
                (ours if mine else bare).append(
                    _history(settings, task, None, None) if mine else _bare(settings, topic, task)
                )
            around.append(_history(settings, task, at_ms - WINDOW_MS, at_ms + WINDOW_MS))
            typed.append(_typed(stage, environment, task, at_ms))
            say(
                f"run {number + 1}: {ours[-1]:.2f} s, bare {bare[-1]:.2f} s, around {around[-1]:.3f} s, command {typed[-1]:.2f} s"
            )
    what = f"history of one task among {events:,} events in {settings.partitions} partitions"
    return [
        Row(
            what=f"{what}, by id alone", unit="s", ours=ours, peer=bare, against="bare consume of its partition",
            bound=Bound(most=1.2), note="in one process each; connecting, finding the partition and asking for its end included",
        ),
        Row(
            what=f"{what}, --around", unit="s", ours=around, bound=Bound(of="value", most=2.0),
            note="the log spans a day; ten minutes either side are read",
        ),
        Row(
            what=f"{what}, `pipeline history ID --log --around TIME`", unit="s", ours=typed, bound=Bound(of="value", most=2.0),
            note="the command from its start to its end: starting Celery's command line is most of it",
        ),
    ]  # fmt: skip


def _fill_a_day(settings: Settings, topic: str, events: int) -> tuple[str, int]:
    """Fill a topic as if over a day, by timestamps of our own; return a task of the middle, and its time."""
    from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource  # noqa: PLC0415

    admin = AdminClient({"bootstrap.servers": settings.bootstrap_servers})
    entry = ConfigEntry("message.timestamp.type", "CreateTime", incremental_operation=AlterConfigOpType.SET)
    wanted = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    for answer in admin.incremental_alter_configs([wanted]).values():
        answer.result(30)
    producer = Producer(producer_config(settings) | {"linger.ms": 20, "batch.num.messages": 10_000})
    progress = Progress("writing a day's events", events)
    begin = time.time_ns() // 1_000_000 - DAY_MS
    chosen, chosen_at = "", 0
    for number, record in enumerate(load.apart(load.Maker(), events // load.PER_TASK, 1_000)):
        at = begin + number * DAY_MS // events
        while True:
            try:
                producer.produce(
                    topic, record.value, record.key, headers=record.headers, timestamp=min(at, begin + DAY_MS)
                )
                break
            except BufferError:
                producer.poll(0.05)
        if number % 500 == 0:
            producer.poll(0)
            progress(number)
        if not chosen and number >= events // 2:
            chosen, chosen_at = record.key.decode(), at
    if producer.flush(120):
        raise BenchError("Kafka did not take everything")
    progress.end()
    return chosen, chosen_at


def _history(settings: Settings, task: str, since: int | None, until: int | None) -> float:
    began = time.monotonic()
    broker = Broker(settings, 30.0)
    try:
        found = from_log(broker, task, since, until)
    finally:
        broker.close()
    spent = time.monotonic() - began
    if len(found) != load.PER_TASK:
        raise BenchError(f"{len(found)} events of {task}, not {load.PER_TASK}")
    return spent


def _bare(settings: Settings, topic: str, task: str) -> float:
    """Consume the partition and look at nothing."""
    began = time.monotonic()
    consumer = Consumer({**consumer_config(settings, None), "enable.partition.eof": True})
    try:
        count = len(consumer.list_topics(topic, timeout=30).topics[topic].partitions)
        at = TopicPartition(topic, topics.partition_of(task, count))
        low, high = consumer.get_watermark_offsets(at, timeout=30)
        at.offset = low
        consumer.assign([at])
        read = 0
        while read < high - low:
            read += len(consumer.consume(BATCH, 0.2))
    finally:
        consumer.close()
    return time.monotonic() - began


def _typed(stage: Stage, environment: dict[str, str], task: str, at_ms: int) -> float:
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at_ms / 1000))
    words = ["-A", "bench_app", "pipeline", "history", task, "--log", "--around", at, "--json"]
    began = time.monotonic()
    with stage.program([sys.executable, "-m", "celery", *words], environment) as child:
        code = child.process.wait(60)
    if code:
        child.fail(f"ended with {code}")
    return time.monotonic() - began
