"""What statistics cost the materializer, whether one Faust worker keeps up with them, and how old `top` is."""

from __future__ import annotations

import random
import time
import uuid
from itertools import islice
from typing import TYPE_CHECKING, Any

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.fold_redis import DISTANCE, once
from benchmarks.stage import BenchError, LogEnd, Progress, say
from celery_kafka_backend import codec, events, topics
from celery_kafka_backend.events import Event
from celery_kafka_backend.insight import Insight
from celery_kafka_backend.kafka import producer_config
from celery_kafka_backend.processors.emitting import STATS
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.insight import open_insight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.stage import Stage
    from celery_kafka_backend.settings import Settings

NAMES, WORKERS = 20, 10
LOOKS = 20


def run(stage: Stage) -> list[Row]:
    return [*_cost(stage), *_age(stage)]


def _cost(stage: Stage) -> list[Row]:
    settings = stage.settings(stage.kafka(1))
    tasks = stage.size(2 * DISTANCE, 30_000)
    progress = Progress("writing events", load.PER_TASK * tasks)
    log, stats = topics.task_events(settings.topic_prefix), topics.task_stats(settings.topic_prefix)
    count = load.fill(settings, log, _rich(tasks), progress)
    progress.end()
    found: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    merged, told = 0.0, 0.0
    for number in range(stage.runs):
        for on in (True, False) if number % 2 else (False, True):
            report = once(stage, settings.topic_prefix, "fold_child", "materializer", count, insight=on)
            if on:
                _forget_statistics(settings)
            found[on].append(report["rate"])
            cpu[on].append(1e6 * report["cpu_s"] / report["events"])
            say(
                f"fold, run {number + 1} of {stage.runs}, {'with' if on else 'without'} statistics: {report['rate']:,.0f}/s"
            )
            if on and not told:  # what later runs tell replaces it, and merging that is cheaper
                end = LogEnd(settings.bootstrap_servers, stats)
                partials = end.records()
                end.close()
                told = partials / report["seconds"]
                say(f"{count:,} events made {partials:,} partials: one for {count / partials:.0f} events")
                merged = _merge(stage, settings.topic_prefix, partials)
    return [
        Row(
            what="fold into Redis with statistics", unit="events/s", ours=found[True], peer=found[False],
            against="without", bound=Bound(least=0.95), note=f"1 process, {NAMES} task names, {WORKERS} workers, adjacent",
        ),
        Row(what="… its CPU", unit="us/event", ours=cpu[True], peer=cpu[False], against="without"),
        Row(
            what="one Faust worker merges", unit="partials/s", ours=[merged], peer=[told],
            against="what that materializer tells", bound=Bound(least=1.0), note="in memory, changelog in Kafka",
        ),
    ]  # fmt: skip


def _forget_statistics(settings: Settings) -> None:
    """Have the next materializer count all of the log: what is told and acknowledged is not counted again."""
    admin = AdminClient({"bootstrap.servers": settings.bootstrap_servers})
    for done in admin.delete_consumer_groups([topics.group_id(settings.topic_prefix, STATS)]).values():
        done.result()


def _rich(tasks: int) -> Iterator[load.Record]:
    """Events with what a real worker's say of time and place: the same in all three of a task."""
    draw = random.Random(1)
    wall = time.time_ns() // 1_000_000
    records = load.adjacent(load.Maker(), tasks)
    while task := list(islice(records, load.PER_TASK)):
        name, worker = b"shop.price%d" % draw.randrange(NAMES), b"celery@w%d" % draw.randrange(WORKERS)
        started = wall - draw.randrange(2_000)
        more = b',"queue":"q%d","sent_at":%d,"started_at":%d' % (
            draw.randrange(3),
            started - draw.randrange(5_000),
            started,
        )
        for record in task:
            value = record.value[:-1].replace(b"shop.price", name).replace(b"celery@w17", worker)
            if b'"kind":"success"' in value:
                value += b',"runtime_s":%.6f' % draw.expovariate(10)
            yield record._replace(value=value + more + b"}")


def _merge(stage: Stage, prefix: str, partials: int) -> float:
    cluster = stage.kafka(1)
    with stage.redis() as server:
        report = stage.ask(
            "insight_child",
            {
                "backend": f"kafka://{cluster.bootstrap}/?view={server.url}",
                "overrides": stage.overrides(cluster, prefix),
                "partials": partials,
            },
        )
    rate: float = report["partials"] / report["seconds"]
    say(f"Faust: {rate:,.0f} partials/s, {1e6 * report['cpu_s'] / report['partials']:.0f} us of CPU each")
    return rate


def _age(stage: Stage) -> list[Row]:
    cluster = stage.kafka(1)
    with stage.redis() as server:
        settings = stage.settings(cluster, server.url)
        arguments = {
            "backend": f"kafka://{cluster.bootstrap}/?view={server.url}",
            "overrides": stage.overrides(cluster, settings.topic_prefix),
        }
        with stage.child("materializer_child", arguments), stage.child("insight_child", {**arguments, "partials": 0}):
            insight = Insight(open_insight(server.url, StoreOptions(namespace=settings.topic_prefix)))
            producer = Producer(producer_config(settings))
            ages = [_seen(insight, producer, topics.task_events(settings.topic_prefix)) for _ in range(LOOKS + 1)]
            insight.close()
    return [
        Row(
            what="from an event until `top` can show it", unit="s", ours=ages[1:], bound=Bound("value", most=2.0),
            note="nothing else is going on",
        )
    ]  # fmt: skip


def _seen(insight: Insight, producer: Any, topic: str) -> float:
    name, task, now = uuid.uuid4().hex, str(uuid.uuid4()), time.time_ns() // 1_000_000
    event = Event(id=task, kind=events.SENT, task=task, at=now, hlc=now, name=name)
    began = time.monotonic()
    producer.produce(topic, codec.encode(event), task.encode())
    producer.flush(10)
    while not any(one.name == name for one in insight.window("1m", task=name)):
        if time.monotonic() > began + 60:
            raise BenchError("an event did not show in the insight view within 60 s")
        time.sleep(0.02)
    return time.monotonic() - began
