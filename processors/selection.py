"""Which tasks a replay takes, when it is not to take all: by name, and by the state that they are in.

**Whole tasks, never single events.** A view of only some of a task's events would show a wrong state: of the STARTED
ones, that everything runs. So the log is read twice. First all of it, to find the tasks of whose events one has the
name, and whose state at the end of the range is one of those asked for; then all events of these. What is shown of
such a task is what a view of everything shows. Saved groups and chords' facts are of no single task, and left out.

What the first reading finds is in a file, for there may be millions.
"""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Final

import msgspec

from celery_kafka_backend import events
from celery_kafka_backend.changes import TASK
from celery_kafka_backend.query import like

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from confluent_kafka import Message

    from celery_kafka_backend.changes import Change

PENDING: Final = "PENDING"
"""The state of a task of which nothing is shown: sent or received and no more, rejected, or with an ignored result."""
CHUNK: Final = 500

_SEEN: Final = "CREATE TABLE seen (id TEXT PRIMARY KEY, k INTEGER, e TEXT, state TEXT, named INTEGER)"
_NOTE: Final = (
    "INSERT INTO seen VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET named = max(named, excluded.named),"
    " state = CASE WHEN (excluded.k, excluded.e) > (k, e) THEN excluded.state ELSE state END,"
    " e = CASE WHEN (excluded.k, excluded.e) > (k, e) THEN excluded.e ELSE e END, k = max(k, excluded.k)"
)


class Wanted(msgspec.Struct, frozen=True):
    """Which tasks.

    Attributes:
        name: Pattern of the task's name, as `query` has them; "": any.
        states: One of the states that they are in at the end of the range; () any.
    """

    name: str = ""
    states: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether that is not all of them."""
        return bool(self.name or self.states)

    @property
    def digest(self) -> int:
        """A number that stands for it, below 2**44; 0: all."""
        text = msgspec.json.encode((self.name, sorted(set(self.states))))
        return 1 + int.from_bytes(hashlib.sha256(text).digest()[:5], "big") if self else 0


ALL: Final = Wanted()


class Survey:
    """The first reading: looks at every task, and tells in the end which are wanted.

    Args:
        path: A file that is not there yet.
        wanted: Which tasks.
    """

    def __init__(self, path: Path, wanted: Wanted) -> None:
        self._wanted = wanted
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute(_SEEN)

    def look(self, changes: Iterable[Change]) -> None:
        """Take note of what a batch says, as `fold` gives it."""
        self._db.execute("BEGIN")
        self._db.executemany(_NOTE, [self._noted(change) for change in changes if change.subject == TASK])
        self._db.execute("COMMIT")

    def _noted(self, change: Change) -> tuple[str, int, str, str, bool]:
        named = not self._wanted.name or any(like(self._wanted.name, each.event.name) for each in change.history)
        winner = change.winner
        if winner is None:
            return change.id, 0, "", PENDING, named
        state = "" if winner.kind in events.TOMBSTONES else winner.state or PENDING
        return change.id, winner.key, winner.id, state, named

    def finish(self) -> int:
        """Keep which tasks are wanted, for `Chosen`; return how many."""
        states = self._wanted.states
        among = f"AND state IN ({', '.join('?' * len(states))})" if states else ""
        self._db.execute("CREATE TABLE chosen (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._db.execute(f"INSERT INTO chosen SELECT id FROM seen WHERE named {among} ORDER BY id", states)  # noqa: S608
        self._db.execute("DROP TABLE seen")
        count: int = self._db.execute("SELECT count(*) FROM chosen").fetchone()[0]
        self._db.close()
        return count


class Chosen:
    """The second reading: which records are of a wanted task. For one thread.

    Args:
        path: What `Survey` left.
    """

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)

    def among(self, messages: list[Message]) -> list[Message]:
        """Return those of these records whose key is the id of a wanted task."""
        keys = {bytes(message.key() or b"") for message in messages}
        ids = [key.decode(errors="replace") for key in keys]
        found: set[bytes] = set()
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            query = f"SELECT id FROM chosen WHERE id IN ({', '.join('?' * len(chunk))})"  # noqa: S608
            with closing(self._db.execute(query, chunk)) as rows:
                found.update(each.encode() for (each,) in rows)
        return [message for message in messages if message.key() in found]

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()
