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
from celery_kafka_backend.partials import BUCKET, Cell, Partial
from celery_kafka_backend.processors import minutes
from celery_kafka_backend.processors.insight import Insight, end_if_stuck
from celery_kafka_backend.sinks.insight import InsightStore, MinuteRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MINUTE = 29_000_000


class Table:
    """As much of Faust's as is used. The changelog takes so many records, then it is away."""

    def __init__(self, takes: int = 1_000) -> None:
        self.data: UserDict[bytes, bytes] = UserDict()
        self.changelog: list[tuple[bytes, bytes]] = []
        self.takes = takes

    def get(self, key: bytes) -> bytes | None:
        return self.data.get(key)

    async def send_changelog(self, _partition: int, key: bytes, value: bytes) -> None:
        if len(self.changelog) >= self.takes:
            raise KafkaTimeoutError
        self.changelog.append((key, value))


class Store(InsightStore):
    """A view that answers when it is told to."""

    def __init__(self) -> None:
        self.rows: list[MinuteRow] = []
        self.answers = threading.Event()
        self.answers.set()

    def open(self) -> None: ...

    def write(self, rows: Sequence[MinuteRow], at_ms: int) -> None:
        self.answers.wait(60)
        self.rows += rows

    def read(self, minutes: Iterable[int]) -> list[MinuteRow]:
        return self.rows

    def written_at(self) -> int:
        return 0

    def close(self) -> None: ...


def told(bucket: int, count: int) -> bytes:
    cell = Cell(kinds={"success": count})
    upto = (bucket + 1) * BUCKET
    return partials.encode(Partial(partition=0, bucket=bucket, minute=MINUTE, task="a", upto=upto, cells=[cell]))


def event(bucket: int, count: int, ack: Callable[[], object] = lambda: None) -> Any:
    message = SimpleNamespace(timestamp=MINUTE * 60.0, partition=0)
    return SimpleNamespace(value=told(bucket, count), message=message, ack=ack)


def successes(value: bytes) -> int:
    return sum(cell.kinds["success"] for cell in minutes.decode(value).cells)


def test_a_partition_is_marked_and_acknowledged_only_when_what_was_read_of_it_is_in_the_changelog():
    """Whoever finds the mark does not read the partials' topic again from its start."""

    async def scenario() -> None:
        table, acked = Table(takes=0), []
        work = Insight(table, Store())
        assert work.is_new(0)
        work.take(event(0, 5, lambda: acked.append(1)))
        assert not work.is_new(0), "it is being counted"
        await work.keep()
        assert (table.changelog, dict(table.data), acked) == ([], {}, [])
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
            work = Insight(table, Store())
            for bucket in range(last):
                work.take(event(bucket, 10))
            await work.keep()
            logs.append(next(value for key, value in table.changelog if not key.startswith(b"!")))
        older, newer = logs
        key = minutes.key_of(MINUTE, 0, "a")
        table = Table()
        work = Insight(table, Store())
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
        work = Insight(table, store)
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
