"""`verify` finds each single field that is wrong, in each kind of row; and nothing where views are written all the while."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

import msgspec
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from celery_kafka_backend import chord_records, events, order, topics
from celery_kafka_backend.errors import SettingsError
from celery_kafka_backend.processors.instant import LogSide, ViewSide, verify
from celery_kafka_backend.processors.plan import Target
from celery_kafka_backend.processors.replay import replay
from celery_kafka_backend.processors.verify import compare
from celery_kafka_backend.sinks.registry import open_sink, open_view
from tests.contract.factories import group_saved, sent, stated
from tests.patience import PATIENCE_S, until

from .materializing import options, settings
from .test_materializer import Log, Wrapped, caught_up, log, memory, mock_bootstrap, mock_log, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import Row, StoreOptions

__all__ = ["log", "mock_bootstrap", "mock_log"]  # fixtures

WRONG = [
    ("document", "document", "UPDATE ckb_task SET document = document || X'20' WHERE task_id = 't1'"),
    ("document", "expires_at", "UPDATE ckb_task SET shown_until = shown_until - 1001 WHERE task_id = 't1'"),
    *(
        ("side", column, f"UPDATE ckb_task SET {column} = {column} + 1 WHERE task_id = 't1'")
        for column in ("k", "run", "seen", "sent", "received", "started", "attempts")
    ),
    ("side", "event_id", "UPDATE ckb_task SET event_id = 'x' WHERE task_id = 't1'"),
    ("side", "workers", "UPDATE ckb_task SET workers = 'celery@elsewhere' WHERE task_id = 't1'"),
    ("side", "expires_at", "UPDATE ckb_task SET expires_at = expires_at + 1001 WHERE task_id = 't1'"),
    ("group", "document", "UPDATE ckb_group SET document = X'7B7D'"),
    ("group", "expires_at", "UPDATE ckb_group SET shown_until = 0"),
    ("group-side", "k", "UPDATE ckb_group SET k = k - 1"),
    ("group-side", "event_id", "UPDATE ckb_group SET event_id = 'x'"),
    ("group-side", "expires_at", "UPDATE ckb_group SET expires_at = expires_at + 1001"),
    ("history", "value", "UPDATE ckb_history SET value = value || X'20' WHERE rowid = 1"),
    ("chord", "value", "UPDATE ckb_chord SET value = X'7B7D'"),
    ("chord", "k", "UPDATE ckb_chord SET k = k + 1"),
    ("chord", "expires_at", "UPDATE ckb_chord_expiry SET expires_at = expires_at + 1001"),
    *(
        ("document", f"native.{column}", f"UPDATE celery_taskmeta SET {column} = 'wrong' WHERE task_id = 't1'")
        for column in ("status", "result", "date_done", "traceback", "children", "name", "args", "kwargs", "worker")
    ),
    ("document", "native.retries", "UPDATE celery_taskmeta SET retries = 77 WHERE task_id = 't1'"),
    ("document", "native.queue", "UPDATE celery_taskmeta SET queue = 'wrong' WHERE task_id = 't1'"),
    ("document", "native.stamps", "UPDATE celery_taskmeta SET stamps = 'wrong' WHERE task_id = 't1'"),
    ("group", "native.result", "UPDATE celery_tasksetmeta SET result = 'wrong'"),
    ("group", "native.date_done", "UPDATE celery_tasksetmeta SET date_done = '2001-01-01 00:00:00.000000'"),
    ("side", "unreadable", "UPDATE ckb_task SET workers = X'07' WHERE task_id = 't1'"),
]
GONE = [
    ("history", "DELETE FROM ckb_history WHERE rowid = 1"),
    ("group", "UPDATE ckb_group SET document = NULL"),
    ("chord", "DELETE FROM ckb_chord"),
    ("document", "UPDATE ckb_task SET document = NULL WHERE task_id = 't1'"),
    ("side", "DELETE FROM ckb_task WHERE task_id = 't2'"),
    ("side", "UPDATE ckb_task SET task_id = 't9' WHERE task_id = 't2'"),
]


def every_kind(log: Log) -> None:
    more = {"worker": "celery@a", "received_at": 5, "started_at": 6, "attempt": 1}
    log.put([sent(1, task="t1"), stated("STARTED", 2, task="t1", **more), stated("SUCCESS", 3, task="t1", value=[1])])
    log.put([sent(1, task="t2"), group_saved("g", 4, members=("t1", "t2"))])
    key, value = chord_records.encode(chord_records.Sized(group="g", generation=1, size=2, at=3))
    log.put_raw(value, 0, key=key, topic=topics.chords(log.prefix))


def view_of(log: Log, url: str) -> ViewSide:
    return ViewSide(open_view(url, options(log.prefix)))


def against_log(log: Log, url: str, folder: Path):
    side = LogSide(settings(log.bootstrap, log.prefix), Target(f"sqlite:///{folder}/folded.db", options(log.prefix)))
    try:
        return verify(settings(log.bootstrap, log.prefix), view_of(log, url), side)
    finally:
        side.close()
        for each in folder.glob("folded.db*"):
            each.unlink()


def test_every_single_field_that_is_wrong_is_found(mock_log: Log, tmp_path: Path) -> None:
    every_kind(mock_log)
    replay(
        settings(mock_log.bootstrap, mock_log.prefix),
        Target(f"sqlite:///{tmp_path}/right.db", options(mock_log.prefix)),
    )
    right = open_view(f"sqlite:///{tmp_path}/right.db", options(mock_log.prefix))
    assert {row.table for row in right.rows()} == {
        "document",
        "side",
        "group",
        "group-side",
        "history",
        "chord",
    }
    found = against_log(mock_log, f"sqlite:///{tmp_path}/right.db", tmp_path)
    assert found.found.equal, found.found.differences
    for number, (table, column, statement) in enumerate(WRONG):
        wrong = open_view(_spoilt(tmp_path, number, statement), options(mock_log.prefix))
        result = compare(right, wrong)
        (named,) = result.differences
        assert (named.table, column in named.columns) == (table, True), statement
        assert len(named.columns) == 1 or column == "unreadable", statement
        wrong.close()
    for number, (table, statement) in enumerate(GONE, len(WRONG)):
        wrong = open_view(_spoilt(tmp_path, number, statement), options(mock_log.prefix))
        missing = [each.table for each in compare(right, wrong).differences if each.b is None]
        assert table in missing, statement
        wrong.close()
    spoilt = against_log(mock_log, _spoilt(tmp_path, 99, WRONG[0][2]), tmp_path).found
    assert [(each.table, each.key, each.columns) for each in spoilt.differences] == [("document", "t1", ("document",))]
    at = ("document", topics.partition_of("t1", 4))
    assert spoilt.parts_a[at].digest != spoilt.parts_b[at].digest
    right.close()


def _spoilt(folder: Path, number: int, statement: str) -> str:
    path = folder / f"wrong{number}.db"
    with sqlite3.connect(folder / "right.db") as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(folder / "right.db", path)
    with sqlite3.connect(path) as db:
        assert db.execute(statement).rowcount > 0, statement
    return f"sqlite:///{path}"


def test_a_second_more_or_less_of_expiry_is_the_same(mock_log: Log, tmp_path: Path) -> None:
    every_kind(mock_log)
    replay(
        settings(mock_log.bootstrap, mock_log.prefix),
        Target(f"sqlite:///{tmp_path}/right.db", options(mock_log.prefix)),
    )
    near = _spoilt(tmp_path, 1, "UPDATE ckb_task SET expires_at = expires_at - 1000, shown_until = shown_until + 1000")
    assert compare(view_of(mock_log, f"sqlite:///{tmp_path}/right.db"), view_of(mock_log, near)).equal


class ReadLater(ViewSide):
    """Each of the first times its rows are read they show something newer than the other side's, which were read before."""

    def __init__(self, log: Log, url: str, times: int) -> None:
        super().__init__(open_view(url, options(log.prefix)))
        self._log = log
        self._times = times

    def rows(self) -> Iterator[Row]:
        if self._times:
            self._times -= 1
            at = len(self._log.events)
            self._log.put([stated("PROGRESS", at, task=f"busy{number}", value=at) for number in range(3)])
            ends = self._log.ends()
            until(lambda: not self.reach(ends, 1), "the view shows what was just written")
        yield from super().rows()


def own(log: Log, retention_ms: int | None) -> tuple[Settings, StoreOptions]:
    """Settings, and what a store is told, for a history with a retention of its own."""
    config = msgspec.structs.replace(settings(log.bootstrap, log.prefix), history_retention_ms=retention_ms)
    return config, msgspec.structs.replace(options(log.prefix), history_retention_ms=retention_ms)


def test_a_history_that_outlives_the_results_is_replayed_and_verified(mock_log: Log, tmp_path: Path) -> None:
    config, kept = own(mock_log, 90 * 86_400_000)
    live, copy = memory(), f"sqlite:///{tmp_path}/right.db"
    with running(mock_log, open_sink(live, kept)):
        mock_log.run_tasks(30, expires_in_ms=1)
        mock_log.run_tasks(10)
        until(lambda: caught_up(open_view(live, kept), mock_log))
    done = replay(config, Target(copy, kept))
    assert done.remembered > 0
    a, b = (ViewSide(open_view(url, kept)) for url in (live, copy))
    assert {row.table: row.expires_at for row in b.rows() if row.table == "history"}["history"] > 0
    found = verify(config, a, b).found
    assert found.equal, found.differences
    assert {name: table.rows for name, table in found.b.items()} == {"document": 10, "side": 10, "history": 120}
    with closing(LogSide(config, Target(f"sqlite:///{tmp_path}/folded.db", kept))) as fold:
        found = verify(config, a, fold).found
    assert found.equal, found.differences
    spoilt = _spoilt(tmp_path, 1, "UPDATE ckb_history SET expires_at = expires_at - 1001 WHERE rowid = 7")
    (wrong,) = verify(config, a, ViewSide(open_view(spoilt, kept))).found.differences
    assert (wrong.table, wrong.columns) == ("history", ("expires_at",))


def test_views_that_are_written_all_the_while_are_the_same_as_of_one_instant(mock_log: Log, tmp_path: Path) -> None:
    urls = memory(), memory()
    config = settings(mock_log.bootstrap, mock_log.prefix)
    mock_log.run_tasks(200)
    done = threading.Event()

    def write() -> None:
        while not done.wait(0.02):
            mock_log.put(a_task(mock_log))

    with (
        running(mock_log, Wrapped(urls[0], mock_log.prefix, lambda _: None), group=f"{mock_log.prefix}.a"),
        running(mock_log, Wrapped(urls[1], mock_log.prefix, lambda _: None), group=f"{mock_log.prefix}.b"),
    ):
        until(lambda: all(caught_up(open_view(url, options(mock_log.prefix)), mock_log) for url in urls))
        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(3):
                # A comparison that finds something reads twice: it looks at what differs once more.
                later = ReadLater(mock_log, urls[1], times=4)
                verdict = verify(config, view_of(mock_log, urls[0]), later, within_s=PATIENCE_S)
                assert verdict.found.equal, verdict.found.differences
                assert [bool(each.positions) for each in verdict.instants] == [True] * 3, "two were not enough"
            verdict = against_log(mock_log, urls[0], tmp_path)
            assert verdict.found.equal, verdict.found.differences
        finally:
            done.set()
            writer.join()


def a_task(log: Log) -> list[events.Event]:
    now = order.system_wall_ms()
    return [log.event(f"new{now}", events.SUCCESS, order.Rank.SUCCEEDED, order.run_at(now), 86_400_000, "x")]


def test_a_view_that_is_behind_is_named(mock_log: Log) -> None:
    config = settings(mock_log.bootstrap, mock_log.prefix)
    urls = memory(), memory()
    mock_log.run_tasks(20)
    for url in urls:
        replay(config, Target(url, options(mock_log.prefix)))
    mock_log.run_tasks(5)
    replay(config, Target(urls[1], options(mock_log.prefix)))
    verdict = verify(config, view_of(mock_log, urls[0]), view_of(mock_log, urls[1]), within_s=0.2)
    assert verdict.lacks == (15, 0)
    assert not verdict.found.equal
    assert verdict.changing == verdict.found.different


def test_a_view_that_promises_nothing_is_not_held_against_the_log(mock_log: Log, tmp_path: Path) -> None:
    mock_log.run_tasks(5)
    with pytest.raises(SettingsError, match="does not say how far it is"):
        against_log(mock_log, memory(), tmp_path)


@pytest.mark.kafka
@pytest.mark.parametrize(("retention_ms", "rows"), [(None, 5), (90 * 86_400_000, 3)])
def test_what_began_before_the_log_is_not_counted(
    log: Log, tmp_path: Path, retention_ms: int | None, rows: int
) -> None:
    """Kafka has deleted the first part of what a view shows, or of what only its history still knows."""
    config, kept = own(log, retention_ms)
    url = memory()
    view = open_view(url, kept)
    with running(log, open_sink(url, kept)):
        log.run_tasks(50, expires_in_ms=86_400_000 if retention_ms is None else 1)
        until(lambda: caught_up(view, log))
        deleted = log.ends()
        time.sleep(0.1)  # so that the first record that stays is later than all of these
        log.run_tasks(50)
        until(lambda: caught_up(view, log))
    admin = AdminClient({"bootstrap.servers": log.bootstrap})
    for answer in admin.delete_records([TopicPartition(*at, offset) for at, offset in deleted.items()]).values():
        answer.result(30)
    with closing(LogSide(config, Target(f"sqlite:///{tmp_path}/folded.db", kept))) as fold:
        verdict = verify(config, ViewSide(view), fold)
    assert verdict.found.equal, verdict.found.differences
    assert verdict.beyond == 50 * rows  # document, side record and three entries of history; or these alone
