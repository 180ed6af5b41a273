"""Events to measure with: what a worker appends for a task, about 400 bytes each, and a topic full of them.

Every task has three events: received (no document), started and success (each with its document), so that two of three
go through guard, document and notification.
"""

from __future__ import annotations

import random
import time
import uuid
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from confluent_kafka import Producer

from celery_kafka_backend import codec, events, order
from celery_kafka_backend.events import Event
from celery_kafka_backend.kafka import producer_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from celery_kafka_backend.settings import Settings

EVENT_BYTES = 400
KINDS = (events.RECEIVED, events.STARTED, events.SUCCESS)
PER_TASK = len(KINDS)

_TASK, _ID = "\x01T", "\x01I"
# Numbers that stand for the ones of each event; nothing else in a record looks like them.
_KEY, _HLC = 1_111_111_111_111_111_111, 1_222_222_222_222
_TEXT = "\x01X"


class Record(NamedTuple):
    """A record to produce."""

    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


class Maker:
    """Makes records of tasks by number; the same seed gives other ids, but the same sizes.

    Args:
        result_bytes: Size of a result; None: whatever makes the record ``EVENT_BYTES`` long.
    """

    def __init__(self, result_bytes: int | None = None, seed: int = 1) -> None:
        self._random = random.Random(seed)
        # Text that does not compress to nothing: half of its bytes remain under lz4, as with ids and numbers.
        size = 1 << 20
        self._pool = self._random.randbytes(size).hex().encode()
        self._wall = order.system_wall_ms()
        self._run = order.run_at(self._wall)
        self._tick = self._wall
        self._templates = [self._template(kind, result_bytes) for kind in KINDS]

    def task_ids(self, count: int) -> list[bytes]:
        getrandbits = self._random.getrandbits
        return [str(uuid.UUID(int=getrandbits(128), version=4)).encode() for _ in range(count)]

    def record(self, task_id: bytes, step: int) -> Record:
        """Return the record of a task's event number ``step``."""
        template, text_bytes, rank = self._templates[step]
        self._tick += 1
        key = 0 if rank is None else order.order_key(rank, self._tick, self._run)
        start = self._random.randrange(len(self._pool) - text_bytes)
        event_id = b"%032x" % self._random.getrandbits(128)
        text = self._pool[start : start + text_bytes]
        kind = KINDS[step].encode()
        if rank is None:
            value = template % (event_id, task_id, self._tick, text)
            return Record(task_id, value, [(codec.HEADER_KIND, kind), (codec.HEADER_APP, b"bench")])
        value = template % (event_id, task_id, key, self._tick, text, task_id)
        headers = [(codec.HEADER_KIND, kind), (codec.HEADER_KEY, b"%019d" % key), (codec.HEADER_APP, b"bench")]
        return Record(task_id, value, headers)

    def _template(self, kind: str, result_bytes: int | None) -> tuple[bytes, int, order.Rank | None]:
        rank = {events.STARTED: order.Rank.UNREADY, events.SUCCESS: order.Rank.SUCCEEDED}.get(kind)
        encoded = codec.encode(self._sample(kind, rank)).replace(b"%", b"%%")
        for mark in (_KEY, _HLC):
            encoded = encoded.replace(b"%d" % mark, b"%d")
        # As JSON escapes them.
        for mark in (_TASK, _ID, _TEXT):
            encoded = encoded.replace(msgspec.json.encode(mark)[1:-1], b"%b")
        filled = self._filled(encoded, rank, b"")
        text_bytes = max(EVENT_BYTES - len(filled), 8)
        if result_bytes is not None and kind == events.SUCCESS:
            text_bytes = result_bytes
        return encoded, text_bytes, rank

    def _filled(self, template: bytes, rank: order.Rank | None, text: bytes) -> bytes:
        ids = (b"0" * 32, b"0" * 36)
        return template % ((*ids, self._tick, text) if rank is None else (*ids, _KEY, self._tick, text, ids[1]))

    def _sample(self, kind: str, rank: order.Rank | None) -> Event:
        wall = self._wall
        common = {
            "id": _ID, "kind": kind, "task": _TASK, "at": wall, "hlc": _HLC, "run": self._run, "host": "w17", "pid": 4711,
            "name": "shop.price", "worker": "celery@w17", "expires_at": wall + 86_400_000,
        }  # fmt: skip
        if rank is None:
            return Event(**common, role=events.PARENT, sent_at=wall - 9, received_at=wall, args=_TEXT)
        state = "STARTED" if kind == events.STARTED else "SUCCESS"
        done = '"2026-01-01T00:00:00.000000+00:00"' if state == "SUCCESS" else "null"
        # A placeholder instead of the result keeps the pieces of the document in one known order.
        document = (
            f'{{"status": "{state}", "result": {msgspec.json.encode(_TEXT).decode()}, "traceback": null, "children": [], '
            f'"date_done": {done}, "task_id": {msgspec.json.encode(_TASK).decode()}}}'
        )
        return Event(**common, key=_KEY, state=state, doc=msgspec.Raw(document.encode()))


def adjacent(maker: Maker, tasks: int) -> Iterator[Record]:
    """Yield the records of tasks, a task's three side by side."""
    for task_id in maker.task_ids(tasks):
        for step in range(PER_TASK):
            yield maker.record(task_id, step)


def apart(maker: Maker, tasks: int, distance: int) -> Iterator[Record]:
    """Yield the records of tasks, a task's three at least ``distance`` apart; ``tasks`` is rounded up."""
    for _ in range(-(-tasks // distance)):
        ids = maker.task_ids(distance)
        for step in range(PER_TASK):
            for task_id in ids:
                yield maker.record(task_id, step)


def fill(
    settings: Settings, topic: str, records: Iterator[Record], tell: Callable[[int], None], per_s: float | None = None
) -> int:
    """Produce records, all of them acknowledged when this returns; return how many.

    Args:
        settings: Which Kafka.
        topic: Which topic.
        records: What.
        tell: Called now and then with how many were queued.
        per_s: At this rate; None: as fast as it goes.
    """
    producer = Producer(producer_config(settings) | {"linger.ms": 20, "batch.num.messages": 10_000})
    failed = 0

    def answered(error: object, _message: object) -> None:
        nonlocal failed
        failed += error is not None

    count = 0
    began = time.monotonic()
    for record in records:
        while True:
            try:
                producer.produce(topic, record.value, record.key, headers=record.headers, on_delivery=answered)
                break
            except BufferError:
                producer.poll(0.05)
        count += 1
        if count % 500 == 0:
            producer.poll(0)
            tell(count)
            if per_s and (ahead := count / per_s - (time.monotonic() - began)) > 0:
                time.sleep(ahead)
    left = producer.flush(120)
    if failed or left:
        raise RuntimeError(f"{failed + left} of {count} records did not reach {topic}")
    return count
