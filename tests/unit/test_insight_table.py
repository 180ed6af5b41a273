"""The insight processor's table and changelog, in the order in which a crash, a rebalance or a zombie meets them. No Kafka."""

from __future__ import annotations

import asyncio
import threading
from collections import UserDict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import KafkaTimeoutError

from celery_kafka_backend import partials
from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.partials import BUCKET, Cell, Partial
from celery_kafka_backend.processors import minutes
from celery_kafka_backend.processors.insight import Insight, end_if_crashed, end_if_stuck
from celery_kafka_backend.sinks.insight import InsightStore, MinuteRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MINUTE = 29_000_000
MAX_BYTES = 4_000
MARK = b"!0"


class Table:
    """As much of Faust's as is used. The changelog takes so many records, then it is away."""

    def __init__(self, takes: int = 1_000) -> None:
        self.data: UserDict[bytes, bytes] = UserDict()
        self.changelog: list[tuple[bytes, bytes | None]] = []
        self.takes = takes

    def get(self, key: bytes) -> bytes | None:
        return self.data.get(key)

    async def send_changelog(self, partition: int, key: bytes, value: bytes | None) -> Any:
        if len(self.changelog) >= self.takes:
            raise KafkaTimeoutError
        self.changelog.append((key, value))
        return SimpleNamespace(partition=partition, offset=len(self.changelog) - 1)


class Store(InsightStore):
    """A view that answers when it is told to."""

    def __init__(self) -> None:
        self.rows: list[MinuteRow] = []
        self.at = 0
        self.answers = threading.Event()
        self.answers.set()

    def open(self) -> None: ...

    def write(self, rows: Sequence[MinuteRow], at_ms: int, writer: str) -> int:
        self.answers.wait(60)
        self.rows += rows
        before, self.at = self.at, at_ms
        return before

    def read(self, minutes: Iterable[int]) -> list[MinuteRow]:
        return self.rows

    def written_at(self) -> int:
        return 0

    def close(self) -> None: ...


def told(bucket: int, count: int, **fields: Any) -> bytes:
    upto = (bucket + 1) * BUCKET
    said = {"partition": 0, "minute": MINUTE, "task": "a", "cells": [Cell(kinds={"success": count})], **fields}
    return partials.encode(Partial(bucket=bucket, upto=upto, **said))


def event(
    bucket: int, count: int, ack: Callable[[], object] = lambda: None, minute: int = MINUTE, **fields: Any
) -> Any:
    """A partial, written in that minute."""
    message = SimpleNamespace(timestamp=minute * 60.0, partition=0)
    return SimpleNamespace(value=told(bucket, count, minute=minute, **fields), message=message, ack=ack)


def successes(value: bytes | None) -> int:
    return sum(cell.kinds["success"] for cell in minutes.decode(value).cells)


def test_a_partition_is_marked_and_acknowledged_only_when_what_was_read_of_it_is_in_the_changelog():
    """Whoever finds the mark does not read the partials' topic again from its start."""

    async def scenario() -> None:
        table, store, acked = Table(takes=0), Store(), []
        work = Insight(table, store, MAX_BYTES)
        assert work.is_new(0)
        work.take(event(0, 5, lambda: acked.append(1)))
        assert not work.is_new(0), "it is being counted"
        await work.keep()
        assert (table.changelog, dict(table.data), acked) == ([], {}, [])
        assert [row.task for row in store.rows] == ["a"], "windows go on"
        table.takes = 1  # the row, not the mark
        await work.keep()
        assert len(table.changelog) == 1
        assert acked == []
        work.reassigned()
        assert work.is_new(0)
        table.takes = 1_000
        work.take(event(0, 5, lambda: acked.append(2)))
        await work.keep()
        assert [key.startswith(b"!") for key, _ in table.changelog][1:] == [True], "a row that is there goes once"
        assert acked == [2]

    asyncio.run(scenario())


@pytest.mark.parametrize("known", [False, True])
def test_what_a_zombie_logs_last_does_not_win(known: bool):
    """It was frozen, its successor went on, it logged what it had, and the successor died."""

    async def scenario() -> None:
        logs = []
        for last in (2, 4):
            table = Table()
            work = Insight(table, Store(), MAX_BYTES)
            for bucket in range(last):
                work.take(event(bucket, 10))
            await work.keep()
            logs.append(next(value for key, value in table.changelog if not key.startswith(b"!")))
        older, newer = logs
        key = minutes.key_of(MINUTE, 0, "a")
        table = Table()
        work = Insight(table, Store(), MAX_BYTES)
        if known:  # it is a member that stayed: it reads on from where it was
            table.data[key] = newer
        for value in (older,) if known else (newer, older):
            work.heard(key, value, 0)
        table.data[key] = older  # as Faust does: the last one
        work.recovered()
        assert successes(table.data[key]) == 40
        work.take(event(9, 1))
        await work.keep()
        assert successes(dict(table.changelog)[key]) == 41, "logged again, for whoever comes next"

    asyncio.run(scenario())


def test_a_view_that_does_not_answer_holds_up_no_rebalance():
    """Faust waits for `hand_over`, and the group for Faust."""

    async def scenario() -> None:
        table, store, acknowledged = Table(), Store(), asyncio.Event()
        work = Insight(table, store, MAX_BYTES)
        store.answers.clear()
        work.take(event(0, 5, acknowledged.set))
        keeping = asyncio.create_task(work.keep())
        await acknowledged.wait()
        work.take(event(1, 5))
        await asyncio.wait_for(work.hand_over(), 30)
        assert not keeping.done()
        assert successes(table.data[minutes.key_of(MINUTE, 0, "a")]) == 10
        store.answers.set()
        await keeping

    asyncio.run(scenario())


def test_what_could_not_be_logged_when_partitions_came_or_went_is_forgotten_and_read_again():
    """Who waited for a changelog that is gone, and heard of a rebalance meanwhile, ended with a KeyError."""

    class Slow(Table):
        asked, over = asyncio.Event(), asyncio.Event()

        async def send_changelog(self, partition: int, key: bytes, value: bytes | None) -> Any:
            self.asked.set()
            await self.over.wait()
            return await super().send_changelog(partition, key, value)

    async def scenario() -> None:
        table, acked = Slow(takes=0), []
        work = Insight(table, Store(), MAX_BYTES)
        work.take(event(0, 5, lambda: acked.append(1)))
        keeping = asyncio.create_task(work.keep())
        await table.asked.wait()
        work.reassigned()
        table.over.set()
        await keeping
        table.takes = 1_000
        await work.keep()
        assert (table.changelog, acked) == ([], [])
        work.take(event(0, 5, lambda: acked.append(2)))
        await work.keep()
        assert successes(table.data[minutes.key_of(MINUTE, 0, "a")]) == 5
        assert acked == [2]

    asyncio.run(scenario())


def test_rows_are_forgotten_by_kafkas_clock():
    """Ours is far ahead of it here. And what cannot be logged meanwhile is kept."""

    async def scenario() -> None:
        table = Table()
        work = Insight(table, Store(), MAX_BYTES)
        work.take(event(0, 5))
        await work.keep()
        work.take(event(1, 5, minute=MINUTE + minutes.KEPT_MINUTES))
        table.takes = 0
        await work.keep()
        await work.clean()
        table.takes = 1_000
        await work.keep()
        assert len(work._rows()) == 2
        work.take(event(2, 5, minute=MINUTE + minutes.KEPT_MINUTES + 1))
        await work.keep()
        await work.clean()
        assert sorted(minutes.parse_key(key)[0] - MINUTE for key in work._rows()) == [120, 121]
        work.take(event(3, 7, minute=MINUTE + minutes.KEPT_MINUTES + 1))
        await work.keep()
        key = minutes.key_of(MINUTE + minutes.KEPT_MINUTES + 1, 0, "a")
        assert successes(table.data[key]) == 12, "counted on from its bytes"

    asyncio.run(scenario())


def test_a_row_too_large_for_the_changelog_holds_up_no_other():
    """Faust ends at such a record. It is counted; whoever comes next reads the partials again, and so has it, too."""

    async def scenario() -> None:
        table, store, acked = Table(), Store(), []
        work = Insight(table, store, MAX_BYTES)
        work.take(event(0, 5, task="small"))
        await work.keep()
        cells = [Cell(worker=f"celery@host{n}", kinds={"success": 1}) for n in range(200)]
        work.take(event(1, 0, lambda: acked.append(1), task="large", cells=cells))
        work.take(event(2, 6, lambda: acked.append(2), task="small"))
        await work.keep()
        assert acked == [1, 2]
        last = dict(table.changelog)
        assert successes(last[minutes.key_of(MINUTE, 0, "small")]) == 11
        assert minutes.key_of(MINUTE, 0, "large") not in last
        assert last[MARK] is None
        assert {row.task for row in store.rows} == {"small", "large"}
        assert not work.is_new(0), "we have it"
        work.take(event(3, 1, minute=MINUTE + 119))  # the mark is due again
        await work.keep()
        assert dict(table.changelog)[MARK] is None, "a window may still show what it lacks"
        work.take(event(4, 1, minute=MINUTE + 240))
        await work.keep()
        assert dict(table.changelog)[MARK] is not None

    asyncio.run(scenario())


def test_a_changelog_that_was_made_anew_has_no_mark():
    """It was deleted while we wrote it: what was logged before is missing there."""

    async def scenario() -> None:
        table = Table()
        work = Insight(table, Store(), MAX_BYTES)
        for bucket in range(2):
            work.take(event(bucket, 5))
            await work.keep()
        table.changelog.clear()
        work.take(event(2, 5, minute=MINUTE + 90))
        await work.keep()
        assert dict(table.changelog)[MARK] is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (minutes.key_of(MINUTE, 0, "a"), b"\xff"), (b"nonsense", minutes.encode(minutes.Minute())), (b"", b""),
        (None, b"x"), (MARK, b"soon"),
    ],
)  # fmt: skip
def test_what_nobody_can_read_in_the_changelog_is_counted_again(key: Any, value: bytes):
    async def scenario() -> None:
        table, store = Table(), Store()
        work = Insight(table, store, MAX_BYTES)
        good = minutes.key_of(MINUTE, 0, "b")
        row = minutes.Minute()
        row.take(partials.decode(told(0, 3)))
        for each, held in ((MARK, b"123"), (good, minutes.encode(row)), (key, value)):
            work.heard(each, held, 0)
            table.data[each] = held  # as Faust does
        work.recovered()
        assert list(table.data) == [good]
        assert work.is_new(0)
        work.take(event(0, 5))
        await work.keep()
        assert {row.task for row in store.rows} == {"a", "b"}

    asyncio.run(scenario())


def test_a_view_that_was_emptied_is_written_again():
    async def scenario() -> None:
        store = Store()
        work = Insight(Table(), store, MAX_BYTES)
        for name in "abc":
            work.take(event(0, 5, task=name))
        await work.keep()
        store.rows.clear()
        await work.keep()
        assert store.rows == []
        store.at = 0
        work.take(event(1, 5, task="c"))
        await work.keep()
        await work.keep()
        assert {row.task for row in store.rows} == {"a", "b", "c"}

    asyncio.run(scenario())


@pytest.mark.parametrize("arrived", [False, True])
def test_a_view_that_was_away_has_lost_nothing_by_that(caplog: pytest.LogCaptureFixture, arrived: bool):
    """A write failed: what was put before is there, and perhaps that, too."""

    class Away(Store):
        away = False

        def write(self, rows: Sequence[MinuteRow], at_ms: int, writer: str) -> int:
            before = self.at if self.away and not arrived else super().write(rows, at_ms, writer)
            if self.away:
                raise Unavailable("away")
            return before

    async def scenario() -> None:
        store = Away()
        work = Insight(Table(), store, MAX_BYTES)
        for name in "abc":
            work.take(event(0, 5, task=name))
        await work.keep()
        store.away = True
        work.take(event(1, 5, task="c"))
        for _ in range(2):
            await asyncio.sleep(0.002)  # a write is known by its millisecond
            await work.keep()
        store.away = False
        store.rows.clear()
        for _ in range(2):
            await work.keep()
        assert {row.task for row in store.rows} == {"c"}
        assert "has lost" not in caplog.text

    asyncio.run(scenario())


def test_a_partial_of_a_partition_that_is_not_there_takes_no_time():
    async def scenario() -> None:
        store = Store()
        work = Insight(Table(), store, MAX_BYTES)
        work.take(event(0, 5, partition=(1 << 31) - 1))
        await work.keep()
        assert [row.task for row in store.rows] == ["a"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("left", "ends"),
    [([7, 7], True), ([0, 0], True), ([9, 8, 7, 6], False)],
    ids=["nothing comes", "nobody noticed that all is there", "it comes"],
)
def test_a_worker_whose_table_does_not_come_back_ends(left: list[int], ends: bool):
    """Else it would keep its partitions, and count nothing."""
    crashes: list[Exception] = []

    async def crash(reason: Exception) -> None:
        crashes.append(reason)

    def remaining() -> int:
        app.tables.actives_ready = len(left) == 1
        return left.pop(0)

    tables = SimpleNamespace(actives_ready=False, recovery=SimpleNamespace(active_remaining_total=remaining))
    app = SimpleNamespace(consumer_generation_id=3, tables=tables, crash=crash)
    asyncio.run(end_if_stuck(app, stuck_s=0.001))
    assert bool(crashes) == ends


def test_a_worker_of_which_the_next_rebalance_has_begun_is_given_time_again():
    """That rebalance has a watch of its own."""

    def remaining() -> int:
        app.consumer_generation_id += 1
        return 7

    tables = SimpleNamespace(actives_ready=False, recovery=SimpleNamespace(active_remaining_total=remaining))
    app = SimpleNamespace(consumer_generation_id=3, tables=tables)
    asyncio.run(end_if_stuck(app, stuck_s=0.001))


def test_a_worker_that_crashed_and_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch):
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    app = SimpleNamespace(crashed=False)
    watching = threading.Thread(target=end_if_crashed, args=(app, 0.0), daemon=True)
    watching.start()
    assert watching.is_alive()
    assert ended == []
    app.crashed = True
    watching.join(60)
    assert ended == [1]
