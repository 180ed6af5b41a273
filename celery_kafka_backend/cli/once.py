"""Each event of a stream once, in flat memory: Kafka may hold one twice, next to each other or days apart."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Final

from celery_kafka_backend.cli.exits import Exit, Stop

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from celery_kafka_backend.changes import Logged

CHUNK: Final = 1_000

_TAKE: Final = "INSERT OR IGNORE INTO seen VALUES (?, ?)"


def once(found: Iterable[Logged]) -> Iterator[Logged]:
    """Yield each event once, by id. What has been seen is in a temporary file: some 50 bytes per event.

    Its key begins with the event's time. Records of one event say the same, and come about as they happened: so rows go to
    the end of the file, and not anywhere in it.

    Raises:
        Stop: There is no room for it.
    """
    source = iter(found)
    with closing(sqlite3.connect("", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = MEMORY")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("CREATE TABLE seen (at INTEGER, id TEXT, PRIMARY KEY (at, id)) WITHOUT ROWID")
        while chunk := list(islice(source, CHUNK)):
            try:
                new = _new(db, chunk)
            except sqlite3.Error as exc:
                remedy = "name a folder with more room: SQLITE_TMPDIR=…"
                raise Stop(Exit.CONFIGURATION, f"the temporary file of what was read: {exc}", remedy) from exc
            yield from new


def _new(db: sqlite3.Connection, chunk: list[Logged]) -> list[Logged]:
    keys = [(event.at, event.id) for event, _ in chunk]
    before = db.total_changes
    db.execute("BEGIN")
    db.executemany(_TAKE, keys)
    if db.total_changes - before == len(chunk):
        db.execute("COMMIT")
        return chunk
    db.execute("ROLLBACK")
    db.execute("BEGIN")
    new = [logged for logged, key in zip(chunk, keys, strict=True) if db.execute(_TAKE, key).rowcount]
    db.execute("COMMIT")
    return new
