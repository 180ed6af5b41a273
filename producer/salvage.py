"""What can still be read of a spool's file that was moved aside, taken over by the spool."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from celery_kafka_backend.producer.spool import record_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery_kafka_backend.producer.spool import Row, Spool

_CHUNK: Final = 500


def adopt(spool: Spool, file: Path) -> tuple[int, bool]:
    """Take every readable record of a retired file, and put the file away.

    A crash in between takes some of them twice, as the same records.

    Returns:
        How many, and whether these are all; if not, the file is kept beside, its name ending in ``.read``.

    Raises:
        SpoolError: The spool cannot take them; the file stays where it is.
    """
    taken, whole, last = 0, True, 0
    for order in ("ASC", "DESC"):  # from both ends, up to what cannot be read
        stop = last
        try:
            for rows in _chunks(file, order):
                fresh = [row for seq, row in rows if not stop or seq > stop]
                good = [row for row in fresh if record_of(row[3], row[4]) is not None]
                whole = whole and len(good) == len(fresh)
                spool.insert(good)
                taken += len(good)
                if order == "ASC":
                    last = rows[-1][0]
                elif len(fresh) < len(rows):
                    break
        except sqlite3.Error:
            whole = False
        else:
            break
    journal = Path(f"{file}-journal")
    if whole:
        file.unlink(missing_ok=True)
    else:
        file.rename(f"{file}.read")
    journal.unlink(missing_ok=True)
    return taken, whole


def _chunks(file: Path, order: str) -> Iterator[list[tuple[int, Row]]]:
    """Yield places and rows, up to the first that cannot be read.

    Raises:
        sqlite3.DatabaseError: There is one.
    """
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")  # or SQLite would not look into a file that was cut off
        cursor = connection.execute(f"SELECT seq, at, pid, task, record, sum FROM spool ORDER BY seq {order}")  # noqa: S608 - ASC or DESC
        end: sqlite3.DatabaseError | None = None
        while end is None:
            rows: list[tuple[int, Row]] = []
            try:
                rows.extend((row[0], row[1:]) for row in islice(cursor, _CHUNK))
            except sqlite3.DatabaseError as exc:
                end = exc
            if not rows:
                break
            yield rows
        if end is not None:
            raise end
