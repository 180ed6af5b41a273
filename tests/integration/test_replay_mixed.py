"""A log as the years leave it: every kind of event, of older and newer software, repeated, late, expired, unreadable.

However it is folded, the view is the same. ``make replay-long`` does it with a million events.
"""

from __future__ import annotations

import json
import os
import random
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from confluent_kafka import Producer

from celery_kafka_backend import codec, events, order, topics
from celery_kafka_backend.errors import UnknownVersion
from celery_kafka_backend.processors.crew import feed_all
from celery_kafka_backend.processors.plan import Target, begin, prepare
from celery_kafka_backend.processors.replay import Replayed, replay
from celery_kafka_backend.processors.verify import compare
from celery_kafka_backend.sinks.registry import open_view
from tests.integration.kafka_topics import must_arrive
from tests.patience import PATIENCE_S, until

from .materializing import options, settings
from .test_materializer import Log, Wrapped, caught_up, log, memory, running

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kafka]
__all__ = ["log"]  # a fixture

COUNT = int(os.environ.get("REPLAYED_EVENTS", "6000"))
GOLDEN = Path(__file__).parents[1] / "golden"
DAY_MS = 86_400_000
RANKS = {
    events.STARTED: order.Rank.UNREADY,
    events.STATE: order.Rank.UNREADY,
    events.RETRY: order.Rank.UNREADY,
    events.SUCCESS: order.Rank.SUCCEEDED,
    events.FAILURE: order.Rank.FAILED,
    events.REVOKED: order.Rank.GUESSED_REVOKED,
}
KINDS = [*RANKS, events.SENT, events.RECEIVED, events.REJECTED, events.FORGOTTEN, events.GROUP_SAVED, "a kind to come"]


class Written:
    """What was put into the log, by its number of records."""

    def __init__(self) -> None:
        self.readable = self.unreadable = self.newer = 0
        self.winners: dict[str, tuple[int, str]] = {}

    def note(self, event: events.Event) -> None:
        self.readable += 1
        if event.key:
            self.winners[event.task] = max(self.winners.get(event.task, (0, "")), (event.key, event.id))


def golden() -> Iterator[bytes]:
    """What older software wrote, to the byte; but not to expire while this test runs."""
    seen = set()
    for path in sorted(GOLDEN.glob("events-*.jsonl")):
        for line in path.read_bytes().splitlines():
            event = codec.decode(line)
            # Some lines are two forms of one event; in a log an id stands for one.
            if (event.task, event.id) not in seen:
                seen.add((event.task, event.id))
                yield re.sub(rb'"expires_at":\d+', b'"expires_at":4102444800000', line)


def mixed(count: int, written: Written, seed: int = 3) -> Iterator[tuple[bytes, bytes]]:
    rng = random.Random(seed)
    now = order.system_wall_ms()
    waiting: list[tuple[bytes, bytes]] = [(codec.decode(line).task.encode(), line) for line in golden()]
    for _, line in waiting:
        written.note(codec.decode(line))
    for number in range(count):
        task = f"{'group' if number % 11 == 0 else 'task'}-{rng.randrange(count // 4)}"
        life_ms = -1000 if hash_of(task) % 5 == 0 else DAY_MS
        event = made(rng, task, now - rng.randrange(3_600_000), now + life_ms)
        value = codec.encode(event)
        if number % 7 == 0:
            value = value[:-1] + b',"added":{"by":["a newer",1.5]}}'
        record = (task.encode(), value)
        if number % 97 == 0:
            record = (task.encode(), value.replace(b'"v":1', b'"v":2', 1))
            written.newer += 1
        elif number % 101 == 0:
            record = (task.encode(), b"neither JSON nor an event")
            written.unreadable += 1
        else:
            written.note(event)
        waiting.append(record)
        if number % 20 == 0 and record[1][:1] == b"{" and b'"v":2' not in record[1]:
            waiting.append(record)
            written.readable += 1
        if len(waiting) > 500:  # late, and in any order
            waiting[-1], at = waiting[i := rng.randrange(len(waiting))], waiting[-1]
            waiting[i] = at
            yield waiting.pop()
    rng.shuffle(waiting)
    yield from waiting


def hash_of(task: str) -> int:
    return uuid.uuid5(uuid.NAMESPACE_OID, task).int


def made(rng: random.Random, task: str, wall: int, expires_at: int) -> events.Event:
    is_group = task.startswith("group")
    kind = events.GROUP_SAVED if is_group else rng.choice([each for each in KINDS if each != events.GROUP_SAVED])
    run = order.run_at(wall)
    rank = order.Rank.UNREADY if is_group else RANKS.get(kind)
    key = order.forget_key(run) if kind == events.FORGOTTEN else 0 if rank is None else order.order_key(rank, wall, run)
    state = None if rank is None or is_group else kind.upper()
    document: dict[str, Any] = {}
    if is_group:
        document["doc"] = msgspec.Raw(json.dumps({"result": [[task, None], []]}).encode())
    elif state:
        meta = {
            "status": state,
            "result": rng.choice([None, [], {}, 2**70, 0.1, "ü"]),
            "traceback": None,
            "children": [],
        }
        encoded = json.dumps({**meta, "date_done": None, "task_id": task}).encode()
        opaque = events.Opaque(meta=b"\x80" + encoded, content_type="application/x-python-serialize", result=b"\x80r")
        document = {"opaque": opaque} if rng.random() < 0.1 else {"doc": msgspec.Raw(encoded)}
    return events.Event(
        id=uuid.UUID(int=rng.getrandbits(128)).hex, kind=kind, task=task, key=key, at=wall, hlc=wall, run=run, state=state,
        name=rng.choice(["shop.pay", None]), worker=rng.choice(["celery@a", "celery@b", None]), attempt=rng.randrange(3),
        sent_at=rng.choice([wall - 9, None]), started_at=rng.choice([wall, None]), expires_at=expires_at, **document,
    )  # fmt: skip


def fill(log: Log, count: int) -> Written:
    written = Written()
    producer = Producer(
        {
            "bootstrap.servers": log.bootstrap,
            "partitioner": "murmur2_random",
            "linger.ms": 20,
            "on_delivery": must_arrive,
        }
    )
    for key, value in mixed(count, written):
        while True:
            try:
                producer.produce(topics.task_events(log.prefix), value, key)
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    lines = (GOLDEN / "chords-v1.jsonl").read_text().splitlines()
    for key, value in map(json.loads, lines):
        producer.produce(topics.chords(log.prefix), value, key, partition=0)
    assert producer.flush(PATIENCE_S) == 0
    return written


def test_a_mixed_log_gives_the_same_view_in_every_way(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = fill(log, COUNT)
    config = settings(log.bootstrap, log.prefix)

    def target(name: str) -> Target:
        return Target(f"sqlite:///{tmp_path}/{name}.db", options(log.prefix))

    whole = target("whole")
    done = replay(config, whole)
    assert (done.events, done.poison) == (written.readable, written.unreadable + written.newer)
    assert done.expired > 0
    right = open_view(whole.url, whole.options)

    live = memory()
    with running(log, Wrapped(live, log.prefix, lambda _: None)):
        view, before = open_view(live, options(log.prefix)), None
        while not caught_up(view, log):  # for as long as it goes on
            until(lambda: view.positions() != before)  # noqa: B023 - called before the next round
            before = view.positions()
    assert_same(right, view)

    prepared = prepare(config, target("processes"))
    begin(target("processes"), prepared)
    together = feed_all(config, target("processes"), prepared.job.divided(3), lambda _: None)
    assert numbers(together) == numbers(done)
    assert_same(right, open_view(*target("processes")))

    thirds = [{at: end * n // 3 for at, (_, end) in prepared.extent.bounds.items()} for n in range(4)]
    for start, end in zip(reversed(thirds[:-1]), reversed(thirds[1:]), strict=True):  # the last third first
        replay(config, target("parts"), from_=start, until=end)
    assert_same(right, open_view(*target("parts")))

    shown = {row.key: (row.columns["k"], row.columns["event_id"]) for row in right.rows() if row.table == "side"}
    assert {task: shown[task] for task in shown if shown[task][0]} == {
        task: winner for task, winner in written.winners.items() if task in shown
    }
    assert len(shown) > COUNT // 10

    # An older and a newer processor by turns: what both know is as it was, what only the newer knows is there.
    newer, both = target("newer"), target("both")
    replay(config, both)
    with monkeypatch.context() as patched:
        patched.setattr(codec, "decode", _newer(codec.decode))
        upgraded = replay(config, newer)
        replay(config, both)
    replay(config, both)
    assert (upgraded.events, upgraded.poison) == (written.readable + written.newer, written.unreadable)
    assert_same(open_view(*newer), open_view(*both))


def _newer(decode: Any) -> Any:
    """Decode as software would that knows a version more."""

    def read(value: bytes | None) -> events.Event:
        try:
            return decode(value)
        except UnknownVersion:
            assert value is not None
            return decode(value.replace(b'"v":2', b'"v":1', 1))

    return read


def numbers(done: Replayed) -> tuple[int, ...]:
    return done.records, done.events, done.facts, done.poison, done.rejected, done.read, done.total


def assert_same(a: Any, b: Any) -> None:
    found = compare(a, b, limit=3)
    assert found.equal, found.differences
    assert {table.rows > 0 for table in found.a.values()} == {True}
