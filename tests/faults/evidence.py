"""Collects what the checker looks at: the journals, the view, the log. With plain clients, not with the product's."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import redis
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from celery_kafka_backend.sinks.redis_wire import unpack
from tests.faults import journal as journals
from tests.faults.checker import Chord, Evidence, Execution, Get, LogEvent, Sending, Shown
from tests.faults.schedule import BEHEAD, KILL
from tests.faults.watcher import PREFIX, value_of
from tests.faults.world import TOPIC_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from confluent_kafka import Message

    from tests.faults.world import Exit, World

EVENTS: Final = f"{TOPIC_PREFIX}.task-events"
DEAD_LETTERS: Final = f"{TOPIC_PREFIX}.dead-letters"
CHORDS: Final = f"{TOPIC_PREFIX}.chords"
READ_S: Final = 180.0


def collect(world: World, *, exits: list[Exit], stuck: list[str], calm: bool) -> Evidence:
    """Return everything that is known when a run is over; the servers must be up."""
    store = redis.Redis(host="127.0.0.1", port=world.view.port)
    has_log = world.backend == "kafka"
    log = list(_log(world.bootstrap)) if has_log else None
    tasks = {event.task for event in log or ()}
    return Evidence(
        **_journal(world.journal),
        view=_view(store),
        log=tuple(log) if log is not None else None,
        history=_history(store, tasks),
        letters=frozenset(_letters(world.bootstrap)) if has_log else frozenset(),
        exits=tuple(exits),
        stuck=tuple(stuck),
        calm=calm,
    )


def _journal(folder: Path) -> dict[str, Any]:
    clients = list(journals.read(folder, "client"))
    tasks = list(journals.read(folder, "task"))
    seen: dict[str, list[Shown]] = defaultdict(list)
    for line in journals.read(folder, "watcher"):
        seen[line["task"]].append(Shown(line["state"], line["value"], line["key"]))
    return {
        "executions": tuple(_executions(tasks)),
        "began": Counter(line["task"] for line in tasks if line["what"] == "began"),
        "bodies": _bodies(tasks),
        "sendings": tuple(
            Sending(line["kind"], tuple(line["tasks"]), line["took_s"], line["stalled_s"], line["error"])
            for line in clients
            if line["what"] == "sent"
        ),
        "gets": tuple(
            Get(
                tuple(line["tasks"]),
                line["timeout_s"],
                line["took_s"],
                line["stalled_s"],
                line["outcome"],
                tuple(line.get("values", ())),
                line.get("error", ""),
            )
            for line in clients
            if line["what"] == "got"
        ),
        "chords": tuple(_chords(clients)),
        "seen": {task: tuple(states) for task, states in seen.items()},
        "deaths": tuple(_deaths(folder)),
    }


def _deaths(folder: Path) -> Iterator[float]:
    for line in journals.read(folder, "nemesis"):
        if line["what"] == "fault" and line["target"].startswith("worker-") and line["verb"] in {KILL, BEHEAD}:
            yield line["at"]


def _executions(lines: list[dict[str, Any]]) -> Iterator[Execution]:
    stored = {(line["task"], line["value"]) for line in lines if line["what"] == "stored"}
    last_begin = {_who(line): number for number, line in enumerate(lines) if line["what"] == "began"}
    for number, line in enumerate(lines):
        if line["what"] == "ended":
            yield Execution(
                line["task"],
                line["state"],
                line["value"],
                ignored=line["ignored"],
                stored=(line["task"], line["value"]) in stored,
                survived=last_begin.get(_who(line), -1) > number,
            )


def _who(line: dict[str, Any]) -> tuple[int, int]:
    """Whoever notes another begin has come back from storing what he ended before: a process, a thread or a greenlet."""
    return line["pid"], line["thread"]


def _bodies(lines: list[dict[str, Any]]) -> dict[str, tuple[tuple[int, ...], ...]]:
    found: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for line in lines:
        if line["what"] == "ended" and "got" in line:
            found[line["task"]].append(tuple(line["got"]))
    return {task: tuple(got) for task, got in found.items()}


def _chords(lines: list[dict[str, Any]]) -> Iterator[Chord]:
    applied = {line["body"] for line in lines if line["what"] == "applied"}
    for line in lines:
        if line["what"] == "chord":
            yield Chord(line["body"], tuple(line["members"]), tuple(line["values"]), line["body"] in applied)


# -- the view ------------------------------------------------------------------------------------


def _view(store: redis.Redis) -> dict[str, Shown]:
    found = {}
    for name in store.scan_iter(match=f"{PREFIX}*", count=1000):
        document, side = store.mget([name, b"{%b}:k" % name])
        shown = json.loads(document)
        task = name.decode().removeprefix(PREFIX)
        found[task] = Shown(shown["status"], value_of(shown), unpack(side)[0] if side else 0)
    return found


def _history(store: redis.Redis, tasks: set[str]) -> dict[str, frozenset[str]]:
    return {
        task: frozenset(json.loads(event)["id"] for event in store.zrange(f"{{{PREFIX}{task}}}:h", 0, -1))
        for task in tasks
    }


# -- the log -------------------------------------------------------------------------------------


def _log(bootstrap: str) -> Iterator[LogEvent]:
    for message in read(bootstrap, EVENTS):
        event = json.loads(message.value())
        document = event.get("doc")
        yield LogEvent(
            id=event["id"],
            task=event["task"],
            kind=event["kind"],
            state=document["status"] if document else None,
            value=value_of(document) if document else "",
            key=event.get("key", 0),
            partition=message.partition() or 0,
            offset=message.offset() or 0,
            at=message.timestamp()[1] / 1000,
        )


def _letters(bootstrap: str) -> Iterator[tuple[int, int]]:
    for message in read(bootstrap, DEAD_LETTERS):
        headers = dict(message.headers() or [])
        if headers["topic"] == EVENTS.encode():
            yield int(headers["partition"]), int(headers["offset"])


def read(bootstrap: str, topic: str) -> Iterator[Message]:
    """Yield every record of a topic."""
    consumer = _consumer(bootstrap)
    partitions = list(consumer.list_topics(topic, timeout=READ_S).topics[topic].partitions)
    consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
    unfinished, deadline = set(partitions), time.monotonic() + READ_S
    while unfinished:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{topic} could not be read within {READ_S:g} s")
        for message in consumer.consume(1000, 0.2):
            error = message.error()
            if error is None:
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:
                unfinished.discard(message.partition())
    consumer.close()


def ends(bootstrap: str, topic: str) -> dict[tuple[str, int], int]:
    """Return where each partition of a topic ends."""
    consumer = _consumer(bootstrap)
    try:
        partitions = consumer.list_topics(topic, timeout=READ_S).topics[topic].partitions
        return {(topic, number): _end(consumer, TopicPartition(topic, number)) for number in partitions}
    finally:
        consumer.close()


def _end(consumer: Consumer, at: TopicPartition) -> int:
    """Return where a partition ends; a leader that has just been elected says for a moment that it does not know."""
    deadline = time.monotonic() + READ_S
    while True:
        try:
            return consumer.get_watermark_offsets(at, timeout=READ_S)[1]
        except KafkaException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _consumer(bootstrap: str) -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"checker-{uuid4().hex}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "log_level": 3,
        }
    )


def positions(store: redis.Redis) -> dict[tuple[str, int], int]:
    """Return how far the view has come, by topic and partition."""
    found = {}
    for field, offset in store.hgetall(f"celery-kafka:{TOPIC_PREFIX}:positions").items():
        topic, _, partition = field.decode().rpartition(":")
        found[topic, int(partition)] = int(offset)
    return found
