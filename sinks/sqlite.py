"""SQLite: a view in one file, with the whole history (never cut: this is where one audits), and nothing to install.

``sqlite:///relative.db`` or ``sqlite:////absolute.db``. Celery's own tables (``celery_taskmeta``,
``celery_tasksetmeta``) stand beside ours (``ckb_*``, see sqlite.sql), so a stock
``db+sqlite:///`` backend reads the same file.

A batch is one transaction, positions included. Guards are in the statements, although SQLite has
one writer at a time: two processors on one file are slow, not wrong. What has expired is deleted
in small steps by the writes; readers do not see it from the moment it expires.

Celery's SQL backend reads no compressed documents; their parts are written as the worker sent them.

Guarantee: a batch is applied whole or not at all; what `write` returned from survives a crash of
the machine (WAL, ``synchronous=FULL``) as far as the disk keeps its promise. Nothing is
duplicated or reordered. The file must be on a local disk: SQLite's locks fail on NFS.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, cast

from celery_kafka_backend.changes import GROUP, TASK, Partition, Side, history_expiry
from celery_kafka_backend.errors import Rejected, SettingsError
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.sinks import sqlite_statements as statements
from celery_kafka_backend.sinks.contract import (
    DOCUMENTS,
    SIDES,
    Row,
    Shown,
    Sink,
    StoreOptions,
    View,
    document_row,
    history_row,
    id_refusal,
    or_unreadable,
    side_row,
)
from celery_kafka_backend.sinks.native_columns import wrong
from celery_kafka_backend.sinks.sqlite_native import beside, group_row, stock_document, stock_group, task_row
from celery_kafka_backend.sinks.sqlite_search import search_condition
from celery_kafka_backend.sinks.sqlite_wire import connect, path_of, timeout_of, translated

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from celery_kafka_backend.changes import Batch, Change
    from celery_kafka_backend.events import Event
    from celery_kafka_backend.query import Query

SCHEMA_VERSION: Final = 1
MAX_BLOB: Final = 1_000_000_000
CHUNK: Final = 500
"""Ids per statement of a read."""
SWEEP_EVERY_S: Final = 10.0
SWEEP_ROWS: Final = 2000
"""… of each table, at most, in one batch."""

_ADDED: Final = {"name": "VARCHAR(155)", "args": "BLOB", "kwargs": "BLOB", "worker": "VARCHAR(155)"} | {
    "retries": "INTEGER", "queue": "VARCHAR(155)", "stamps": "BLOB", "children": "BLOB"
}  # fmt: skip
"""Columns that Celery's tables may lack, when its backend made them without ``result_extended``."""


def _union(a: str, b: str) -> str:
    return "\n".join(sorted({*a.split("\n"), *b.split("\n")} - {""}))


class SqliteSink(Sink):
    """Writes a view in a file. ``options.options['timeout']`` bounds the wait for another writer, in seconds."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = url
        self._path = path_of(url)
        self._timeout_s = timeout_of(options)
        self._history = options.history is not False
        self._history_ms = options.history_retention_ms
        self._limit = MAX_BLOB
        self._db: sqlite3.Connection | None = None
        self._sweep_due = 0.0

    def open(self) -> None:
        self.close()
        if not self._path.absolute().parent.is_dir():
            raise SettingsError("view", f"the folder of {self._path} does not exist", "make it")
        with translated(self._path):
            db = connect(self._path, "rwc", self._timeout_s)
            try:
                self._prepare(db)
            except BaseException:
                db.close()
                raise
        self._db = db

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA wal_autocheckpoint = 8000")  # 32 MB: at the default, every large batch waits for one
        db.execute("PRAGMA cache_size = -32768")
        db.create_function("ckb_union", 2, _union, deterministic=True)
        db.execute("BEGIN IMMEDIATE")
        db.execute("CREATE TABLE IF NOT EXISTS ckb_schema (version INTEGER NOT NULL)")
        found = db.execute("SELECT max(version) FROM ckb_schema").fetchone()[0]
        if found is not None and found > SCHEMA_VERSION:
            problem = f"{self._path} has schema version {found}; this software knows up to {SCHEMA_VERSION}"
            raise SettingsError("view", problem, "upgrade, or replay into another file")
        script = resources.files(__package__).joinpath("sqlite.sql").read_text(encoding="utf-8")
        for statement in script.split(";\n"):
            db.execute(statement)
        present = {row[1] for row in db.execute("PRAGMA table_info(celery_taskmeta)")}
        for column, kind in _ADDED.items():
            if column not in present:
                db.execute(f"ALTER TABLE celery_taskmeta ADD COLUMN {column} {kind}")
        if found is None:
            db.execute("INSERT INTO ckb_schema VALUES (?)", (SCHEMA_VERSION,))
        db.execute("COMMIT")

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def write(self, batch: Batch) -> None:
        if self._db is None:
            self.open()
        db = self._db
        assert db is not None
        accepted, refused = [], []
        for change in batch.changes:
            reason = _refusal(change, self._limit)
            (refused.append((change.id, reason)) if reason else accepted.append(change))
        with translated(self._path):
            try:
                db.execute("BEGIN IMMEDIATE")
                self._apply(db, accepted, batch, system_wall_ms())
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        if refused:
            raise Rejected(refused)

    def _apply(self, db: sqlite3.Connection, changes: Sequence[Change], batch: Batch, now_ms: int) -> None:
        self._bury(db, changes, batch, now_ms)
        said = [change for change in changes if not change.only_history]
        tasks = [change for change in said if change.subject == TASK]
        groups = [change for change in said if change.subject == GROUP]
        db.executemany(statements.MERGE_SIDE, [_side_values(change) for change in tasks])
        db.executemany(statements.MERGE_GROUP, [(change.id, change.expires_at) for change in groups])
        for subject, found in ((TASK, tasks), (GROUP, groups)):
            winners = [(change.id, change.winner, _shown(change, now_ms)) for change in found if change.winner]
            db.executemany(
                statements.WIN_TASK if subject == TASK else statements.WIN_GROUP,
                [
                    {"id": i, "k": w.key, "e": w.id, "document": d, "until": (w.expires_at or 0) if d else 0}
                    for i, w, d in winners
                ],
            )
            row = task_row if subject == TASK else group_row
            db.executemany(
                statements.SHOW_TASK if subject == TASK else statements.SHOW_GROUP,
                [(i, *row(w, d), i, w.key, w.id) for i, w, d in winners if d is not None],
            )
            db.executemany(
                statements.HIDE_TASK if subject == TASK else statements.HIDE_GROUP,
                [(i, i, w.key, w.id) for i, w, d in winners if d is None],
            )
        if self._history:
            self._log(db, changes)
        db.executemany(statements.FACT, [(fact.group, fact.name, fact.order, fact.value) for fact in batch.chords])
        db.executemany(statements.FACT_EXPIRY, [(fact.group, fact.expires_at) for fact in batch.chords])
        db.executemany(
            statements.POSITION, [(topic, number, offset) for (topic, number), offset in batch.positions.items()]
        )

    def _log(self, db: sqlite3.Connection, changes: Iterable[Change]) -> None:
        entries = [
            (change.id, e.hlc, e.id, e.kind, e.state, e.at, bytes(value), history_expiry(e, self._history_ms))
            for change in changes
            for e, value in change.history
        ]
        db.executemany(statements.LOG, entries)

    def _bury(self, db: sqlite3.Connection, changes: Sequence[Change], batch: Batch, now_ms: int) -> None:
        """Delete what has expired: of this batch's ids everything, else a bounded number of rows now and then.

        With the next batch again, if there were as many: what comes in faster than it is deleted would stay for ever.
        """
        span = "BETWEEN 1 AND ?"
        sweeping, swept = time.monotonic() >= self._sweep_due, 0
        for subject, native, column in (
            (TASK, "celery_taskmeta", "task_id"),
            (GROUP, "celery_tasksetmeta", "taskset_id"),
        ):
            ours = f"ckb_{subject}"
            dead = f"(expires_at {span} OR shown_until {span})"
            query = f"SELECT EXISTS (SELECT 1 FROM {ours} WHERE expires_at {span}) OR EXISTS (SELECT 1 FROM {ours} WHERE shown_until {span})"  # noqa: S608
            if not db.execute(query, (now_ms, now_ms)).fetchone()[0]:
                continue
            ids = [change.id for change in changes if change.subject == subject]
            if sweeping:
                query = f"SELECT task_id FROM {ours} WHERE {dead} LIMIT ?"  # noqa: S608
                found = [row[0] for row in db.execute(query, (now_ms, now_ms, SWEEP_ROWS))]
                swept = max(swept, len(found))
                ids += found
            places = [(each, now_ms) for each in ids]
            db.executemany(
                f"DELETE FROM {native} WHERE {column} = ?1 AND EXISTS (SELECT 1 FROM {ours} WHERE task_id = ?1"  # noqa: S608
                f" AND document IS NOT NULL AND (expires_at BETWEEN 1 AND ?2 OR shown_until BETWEEN 1 AND ?2))",
                places,
            )
            db.executemany(f"DELETE FROM {ours} WHERE task_id = ? AND expires_at {span}", places)  # noqa: S608
            db.executemany(
                f"UPDATE {ours} SET document = NULL, shown_until = 0 WHERE task_id = ? AND shown_until {span}",  # noqa: S608
                places,
            )
        chords = [(fact.group, now_ms) for fact in batch.chords]
        if sweeping:
            gone = db.execute(
                f"DELETE FROM ckb_history WHERE (task_id, hlc, event_id) IN"  # noqa: S608
                f" (SELECT task_id, hlc, event_id FROM ckb_history WHERE expires_at {span} LIMIT ?)",
                (now_ms, SWEEP_ROWS),
            )
            again_s = 0.0 if max(swept, gone.rowcount) == SWEEP_ROWS else SWEEP_EVERY_S
            self._sweep_due = time.monotonic() + again_s
            query = f"SELECT group_id FROM ckb_chord_expiry WHERE expires_at {span} LIMIT ?"  # noqa: S608
            chords += [(row[0], now_ms) for row in db.execute(query, (now_ms, SWEEP_ROWS))]
        db.executemany(
            "DELETE FROM ckb_chord WHERE group_id = ?1 AND EXISTS"
            " (SELECT 1 FROM ckb_chord_expiry WHERE group_id = ?1 AND expires_at BETWEEN 1 AND ?2)",
            chords,
        )
        db.executemany(f"DELETE FROM ckb_chord_expiry WHERE group_id = ? AND expires_at {span}", chords)  # noqa: S608


def _refusal(change: Change, limit: int) -> str:
    if reason := id_refusal(change.id):
        return reason
    size = len(change.document or b"")
    return f"a document of {size} bytes; the limit is {limit}" if size > limit else ""


def _shown(change: Change, now_ms: int) -> bytes | None:
    expires_at = (change.winner.expires_at or 0) if change.winner else 0
    return None if 0 < expires_at <= now_ms else change.document


def _side_values(change: Change) -> tuple[Any, ...]:
    s = change.side or Side(expires_at=change.expires_at)
    workers = "\n".join(s.workers)
    return (change.id, s.expires_at, s.run, s.seen, s.sent, s.received, s.started, s.attempts, workers)


# -- the read side -----------------------------------------------------------------------------


class _Mine:
    """A thread's connection: closed with the view, or when the thread ends."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.pid = os.getpid()

    def close(self) -> None:
        if self.pid == os.getpid():
            self.connection.close()
        else:
            _parked.append(self.connection)  # closing it here would drop the parent's locks

    __del__ = close


_parked: Final[list[sqlite3.Connection]] = []


class SqliteView(View):
    """Reads a view in a file. It never makes the file: until a processor has, it is unavailable."""

    by_time = True

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = url
        self._path = path_of(url)
        self._timeout_s = timeout_of(options)
        self._serializer = options.serializer
        self.after_fork()

    def after_fork(self) -> None:
        self._pid = os.getpid()
        self._local = threading.local()
        self._all: weakref.WeakSet[_Mine] = weakref.WeakSet()

    def close(self) -> None:
        if self._pid == os.getpid():
            for mine in list(self._all):
                mine.close()
        self.after_fork()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if self._pid != os.getpid():
            self.after_fork()
        with translated(self._path):
            mine: _Mine | None = getattr(self._local, "mine", None)
            if mine is None:
                mine = self._local.mine = _Mine(connect(self._path, "rw", self._timeout_s))
                mine.connection.text_factory = _any_text
                self._all.add(mine)
            yield mine.connection

    def _select(self, query: str, ids: Sequence[str], *values: int) -> Iterator[tuple[Any, ...]]:
        """Run a query whose ``{}`` stands for a list of ids and which takes ``values`` behind them."""
        with self._reading() as db:
            for start in range(0, len(ids), CHUNK):
                chunk = ids[start : start + CHUNK]
                yield from db.execute(query.format(", ".join("?" * len(chunk))), (*chunk, *values))

    def documents(self, ids: Sequence[str]) -> dict[str, bytes]:
        found = {each: shown.document for each, shown in self.shown(ids).items()}
        return {each: document for each, document in found.items() if document is not None}

    def shown(self, ids: Sequence[str]) -> dict[str, Shown]:
        columns = f"task_id, k, event_id, document, shown_until, expires_at, {statements.SIDE_COLUMNS}"
        query = f"SELECT {columns} FROM ckb_task WHERE task_id IN ({{}}) AND expires_at NOT BETWEEN 1 AND ?"  # noqa: S608
        now_ms, found = system_wall_ms(), {}
        for task_id, key, event_id, document, until, expires_at, *side in self._select(query, ids, now_ms):
            shown = None if 0 < until <= now_ms else document
            found[task_id] = Shown(shown, key, event_id, _side(expires_at, *side))
        unkeyed = [each for each in ids if each not in found or not found[each].key]
        if unkeyed:
            # Beside a key of ours, also one that has expired and waits to be swept, the row is ours.
            query = (
                "SELECT task_id, " + statements.NATIVE + " FROM celery_taskmeta n WHERE task_id IN ({})"  # noqa: S608
                " AND NOT EXISTS (SELECT 1 FROM ckb_task WHERE ckb_task.task_id = n.task_id AND k > 0)"
            )
            for task_id, *values in self._select(query, unkeyed):
                document = stock_document(task_id, *values, serializer=self._serializer)
                found[task_id] = found.get(task_id, Shown(None, 0, "", None))._replace(document=document)
        return found

    def groups(self, ids: Sequence[str]) -> dict[str, bytes]:
        query = (
            "SELECT task_id, document FROM ckb_group WHERE task_id IN ({}) AND document IS NOT NULL"
            " AND expires_at NOT BETWEEN 1 AND ?1 AND shown_until NOT BETWEEN 1 AND ?1"
        ).replace("?1", str(system_wall_ms()))
        found = dict(self._select(query, ids))
        query = (
            "SELECT taskset_id, result FROM celery_tasksetmeta n WHERE taskset_id IN ({})"
            " AND NOT EXISTS (SELECT 1 FROM ckb_group WHERE ckb_group.task_id = n.taskset_id)"
        )
        for group, result in self._select(query, [each for each in ids if each not in found]):
            if document := stock_group(result, self._serializer):
                found[group] = document
        return found

    def history(self, task_id: str) -> list[bytes]:
        query = (
            "SELECT value FROM ckb_history WHERE task_id IN ({}) AND expires_at NOT BETWEEN 1 AND ?"
            " ORDER BY hlc, event_id"
        )
        return [value for (value,) in self._select(query, [task_id], system_wall_ms())]

    def candidates(self, query: Query) -> Iterator[bytes]:
        where, values = search_condition(query)
        direction = "DESC" if query.newest_first else "ASC"
        statement = (
            f"SELECT value FROM ckb_history WHERE {where} AND expires_at NOT BETWEEN 1 AND ? ORDER BY at {direction}"  # noqa: S608
        )
        with self._reading() as db:
            for (value,) in db.execute(statement, (*values, system_wall_ms())):
                yield value

    def chord(self, group_id: str) -> dict[str, bytes]:
        query = (
            "SELECT name, value FROM ckb_chord JOIN ckb_chord_expiry USING (group_id)"
            " WHERE group_id IN ({}) AND expires_at NOT BETWEEN 1 AND ?"
        )
        return dict(self._select(query, [group_id], system_wall_ms()))

    def positions(self) -> dict[Partition, int]:
        with self._reading() as db:
            return {Partition(t, p): offset for t, p, offset in db.execute("SELECT * FROM ckb_position")}

    def rows(self) -> Iterator[Row]:
        now_ms = system_wall_ms()
        alive = f"expires_at NOT BETWEEN 1 AND {now_ms}"
        shown = f"document IS NOT NULL AND shown_until NOT BETWEEN 1 AND {now_ms} AND {alive}"
        with self._reading() as db:
            for subject in (TASK, GROUP):
                yield from self._document_rows(db, subject, shown)
                more = ", " + statements.SIDE_COLUMNS if subject == TASK else ""
                query = f"SELECT task_id, k, event_id, expires_at{more} FROM ckb_{subject} WHERE {alive}"  # noqa: S608
                for each, *columns in db.execute(query):
                    yield from or_unreadable(SIDES[subject], each, _side_rows(subject, each, *columns))
            query = f"SELECT task_id, hlc, event_id, value, expires_at, kind, state, at FROM ckb_history WHERE {alive}"  # noqa: S608
            for each, hlc, event_id, value, expires_at, *columns in db.execute(query):
                found = dict(zip(("kind", "state", "at"), columns, strict=True))
                key = f"{each}/{hlc}/{event_id}"
                yield from or_unreadable("history", key, [history_row(key, value, expires_at, found, beside)])
            query = f"SELECT group_id, name, k, value, expires_at FROM ckb_chord JOIN ckb_chord_expiry USING (group_id) WHERE {alive}"  # noqa: S608
            for group_id, name, key, value, expires_at in db.execute(query):
                fact = Row("chord", f"{group_id}/{name}", {"k": key, "value": value}, expires_at)
                yield from or_unreadable("chord", fact.key, [fact])

    def _document_rows(self, db: sqlite3.Connection, subject: str, shown: str) -> Iterator[Row]:
        """Yield documents, each with what is wrong in Celery's own row beside it."""
        native, names, _ = _NATIVE[subject]
        columns = ", ".join(f"n.{name}" for name in names)
        query = (
            f"SELECT o.task_id, o.document, o.shown_until, o.event_id, {columns} FROM ckb_{subject} o"  # noqa: S608
            f" LEFT JOIN {native} = o.task_id WHERE {shown}"
        )
        for each, *columns in db.execute(query):
            yield from or_unreadable(DOCUMENTS[subject], each, _document_row(db, subject, each, *columns))


def _document_row(
    db: sqlite3.Connection, subject: str, each: str, document: bytes, until: int, event_id: str, *values: Any
) -> Iterator[Row]:
    _, names, row = _NATIVE[subject]

    def said(event: Event, shown: bytes) -> dict[str, Any]:
        return dict(zip(names, row(event, shown), strict=True))

    def history() -> list[bytes]:
        query = "SELECT value FROM ckb_history WHERE task_id = ? AND event_id = ?"
        return [value for (value,) in db.execute(query, (each, event_id))]

    bad = wrong(dict(zip(names, values, strict=True)), said, document, event_id, history)
    yield document_row(subject, each, document, until, bad)


_NATIVE: Final[dict[str, tuple[str, list[str], Callable[[Event, bytes], tuple[Any, ...]]]]] = {
    TASK: ("celery_taskmeta n ON n.task_id", statements.NATIVE.split(", "), task_row),
    GROUP: ("celery_tasksetmeta n ON n.taskset_id", ["result", "date_done"], group_row),
}
"""Celery's own table and which of its columns is our id, its columns, and what makes them."""


def _any_text(raw: bytes) -> str:
    """Return a text also of bytes that are none: one damaged value must not end what is asked of all."""
    return raw.decode(errors="backslashreplace")


def _side_rows(subject: str, each: str, key: int, event_id: str, expires_at: int, *side: Any) -> Iterator[Row]:
    record = _side(expires_at, *side) if side else Side(expires_at=expires_at)
    yield side_row(subject, each, key, event_id, record)


def _side(expires_at: int, *columns: Any) -> Side:
    *numbers, workers = columns
    names = tuple(workers.split("\n")) if workers else ()
    return Side(*cast("tuple[int, int, int, int, int, int]", numbers), names, expires_at)


def sink(url: str, options: StoreOptions) -> Sink:
    """Return the write side of ``sqlite:///file``."""
    return SqliteSink(url, options)


def view(url: str, options: StoreOptions) -> View:
    """Return the read side of ``sqlite:///file``."""
    return SqliteView(url, options)
