"""Insight in SQLite: two tables beside those of a view, in the same file.

Guarantee: as in Redis. Rows are deleted when later ones are put, some hours after their minute by these rows' clock: one
of ours that jumps deletes nothing.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final

from celery_kafka_backend.sinks.insight import KEPT_S, InsightStore, MinuteRow
from celery_kafka_backend.sinks.sqlite_wire import connect, path_of, timeout_of, translated

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator, Sequence

    from celery_kafka_backend.sinks.contract import StoreOptions

_TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS ckb_insight
    (minute INTEGER, task TEXT, version INTEGER, cells BLOB, PRIMARY KEY (minute, task)) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS ckb_insight_writers (writer TEXT PRIMARY KEY, at INTEGER)",
)
_PUT: Final = (
    "INSERT INTO ckb_insight VALUES (?, ?, ?, ?) ON CONFLICT (minute, task) DO UPDATE"
    " SET version = excluded.version, cells = excluded.cells WHERE excluded.version >= version"
)


class SqliteInsight(InsightStore):
    """Insight in a file. A connection per call: a few calls per second, and none is left open across a fork."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._path = path_of(url)
        self._timeout_s = timeout_of(options)

    def open(self) -> None:
        with self._connected("rwc") as db:
            db.execute("PRAGMA journal_mode = WAL")
            for statement in _TABLES:
                db.execute(statement)

    def write(self, rows: Sequence[MinuteRow], at_ms: int, writer: str) -> int:
        with self._connected("rw") as db:
            db.execute("BEGIN IMMEDIATE")
            (before,) = db.execute("SELECT max(at) FROM ckb_insight_writers WHERE writer = ?", (writer,)).fetchone()
            db.executemany(_PUT, rows)
            # The writer of the last row wrote last.
            db.execute("INSERT OR REPLACE INTO ckb_insight_writers VALUES (?, ?)", (writer, at_ms))
            db.execute("DELETE FROM ckb_insight_writers WHERE at < ?", (at_ms - KEPT_S * 1_000,))
            if rows:
                db.execute(
                    "DELETE FROM ckb_insight WHERE minute < ?", (max(row.minute for row in rows) - KEPT_S // 60,)
                )
            db.execute("COMMIT")
        return before or 0

    def read(self, minutes: Iterable[int]) -> list[MinuteRow]:
        wanted = sorted(minutes)
        marks = ", ".join("?" * len(wanted))
        statement = f"SELECT minute, task, version, cells FROM ckb_insight WHERE minute IN ({marks})"  # noqa: S608
        with self._connected("rw") as db:
            return [MinuteRow(*row) for row in db.execute(statement, wanted)]

    def written_at(self) -> int:
        with self._connected("rw") as db:
            last = "SELECT at FROM ckb_insight_writers ORDER BY rowid DESC LIMIT 1"
            return int((db.execute(last).fetchone() or (0,))[0])

    @contextmanager
    def _connected(self, mode: str) -> Iterator[sqlite3.Connection]:
        with translated(self._path), closing(connect(self._path, mode, self._timeout_s)) as db:
            yield db

    def close(self) -> None:
        """Nothing is open."""


def store(url: str, options: StoreOptions) -> InsightStore:
    """Return the store for a URL."""
    return SqliteInsight(url, options)
