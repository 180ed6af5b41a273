"""Records that Kafka did not take, in one bounded file of this host: append, read in order, remove. Pure storage.

One SQLite file serves every process of every worker on a host that has the same ``topic_prefix`` and servers. What
`Spool.append` has returned for survives a kill -9 and a power cut: a rollback journal and ``synchronous=FULL``. Not
WAL: up to SQLite 3.51.2 two processes that write and checkpoint at once can lose a committed transaction
(https://sqlite.org/wal.html#walresetbug), and it was 0.5 instead of 0.75 ms a record, both small beside a task.

All that touches the file goes through `Spool._run`: one thread of a process, one process of the host at a time (a
lock file, given up by the system when its holder dies), and never across a fork. So a damaged or emptied file can be
moved or deleted: the next to enter sees that the name stands for another file, and opens that.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import sqlite3
import tempfile
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, TypeVar

import msgspec

from celery_kafka_backend.errors import SpoolError
from celery_kafka_backend.producer.publisher import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

BUSY_S: Final = 5.0
"""What one process waits for the others' turns, a few milliseconds each."""
DAMAGED: Final = "damaged"

_VERSION: Final = 1
_RESERVE: Final = 1 << 18
_TURN_S: Final = 0.0005
_CHUNK: Final = 500
_SCHEMA: Final = """
BEGIN;
CREATE TABLE spool (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival
    at INTEGER NOT NULL,                    -- ms since 1970
    pid INTEGER NOT NULL,                   -- who
    task TEXT,                              -- of an event; NULL for a record of a chord
    record BLOB NOT NULL,                   -- topic, key, value, headers, group; msgpack
    sum INTEGER NOT NULL,                   -- CRC-32 of record
    aside TEXT                              -- why it is not drained; NULL: it is
);
CREATE INDEX spool_task ON spool (task, pid);
-- No file ever has another one's places: whoever drains may remove by place what was in a file that is gone.
INSERT INTO sqlite_sequence (name, seq) VALUES ('spool', (random() & 0x3ffffffffff) << 20);
PRAGMA user_version = 1;               -- _VERSION
COMMIT;
"""

_entrance: Final = threading.Lock()
"""One thread of a process at a time; held while the process forks."""
_open: Final[dict[Path, tuple[sqlite3.Connection, int]]] = {}
"""The process's connection to each file, with the inode that it was opened as."""
_claims: Final[set[int]] = set()


class Spooled(NamedTuple):
    """A record in the spool.

    Attributes:
        seq: Its place.
        record: As it is to be published.
    """

    seq: int
    record: Record


Row: TypeAlias = tuple[int, int, "str | None", bytes, int]
"""At, pid, task, record, sum: a line of the table without its place."""


class State(NamedTuple):
    """What a spool holds.

    Attributes:
        records: How many wait to be drained.
        size: Bytes of the file that are in use.
        limit: Bytes that it may grow to.
        oldest_ms: When the oldest of them was spooled, ms since 1970; None if there is none.
        pids: How many of them each process has spooled.
        aside: How many are set aside, by reason; they are not drained.
        files: Damaged or retired files beside it, which the next drain reads.
    """

    records: int
    size: int
    limit: int
    oldest_ms: int | None
    pids: dict[int, int]
    aside: dict[str, int]
    files: list[Path]


def spool_for(settings: Settings) -> Spool:
    """Return the spool that settings name: of this host, these servers and this prefix."""
    servers = ",".join(sorted(settings.bootstrap_servers.split(",")))
    cluster = hashlib.sha256(servers.encode()).hexdigest()[:8]
    folder = Path(settings.spool).absolute()
    return Spool(folder / f"{settings.topic_prefix}-{cluster}.spool", settings.spool_max_bytes)


class Spool:
    """A bounded, durable queue of records, shared by the processes of a host.

    Args:
        path: Its file; the folder is made if need be.
        max_bytes: What the file may grow to.

    Every method raises `SpoolError` if the file cannot be used.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        _close_before_forks()

    # -- the worker --------------------------------------------------------------------------

    def append(self, record: Record) -> None:
        """Take a record; it is on disk when this returns.

        Raises:
            SpoolError: It is not there: the spool is full, the disk is, or the folder cannot be written.
        """
        row = _row(record)
        self._run(lambda connection: connection.execute(_INSERT, row))

    def empty(self) -> bool:
        """Return whether nothing waits to be drained; cheap, for an emptied spool has no file."""
        return not self.oldest(most=1) and not self.retired()

    def holding(self, task_id: str) -> list[Record]:
        """Return the events of a task that are spooled on this host, oldest first."""
        if not self.path.exists():
            return []
        rows = self._run(
            lambda connection: connection.execute(
                "SELECT seq, record, sum FROM spool WHERE task = ? ORDER BY seq", (task_id,)
            ).fetchall(),
            absent=list,
        )
        return [record for _, blob, total in rows if (record := record_of(blob, total)) is not None]

    # -- whoever drains ----------------------------------------------------------------------

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Be the one on this host who drains; False if somebody else is, until he ends or dies."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._beside(".drain"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise self._unusable(exc) from exc
        _claims.add(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        try:
            yield mine
        finally:
            _claims.discard(fd)
            os.close(fd)

    def oldest(self, after: int = 0, *, most: int = _CHUNK, most_bytes: int = 1 << 22) -> list[Spooled]:
        """Return the oldest records after a place, in order; at least one if there is one.

        Args:
            after: A `Spooled.seq`; 0 from the start.
            most: At most so many.
            most_bytes: No more once they have so many bytes together.
        """
        if not self.path.exists():
            return []
        found, damaged = self._run(lambda connection: _oldest(connection, after, most, most_bytes), lambda: ([], []))
        for seq in damaged:
            logger.error("record %d of %s is damaged and set aside", seq, self.path)
            self.set_aside(seq, DAMAGED)
        return found if found or not damaged else self.oldest(damaged[-1], most=most, most_bytes=most_bytes)

    def remove(self, places: Iterable[int]) -> None:
        """Forget records that are in Kafka."""
        gone = [(seq,) for seq in places]

        def work(connection: sqlite3.Connection) -> None:
            try:
                with _transaction(connection):
                    connection.executemany(_DELETE, gone)
            except sqlite3.OperationalError:  # the disk is full: `_RESERVE` has room for one at a time
                for one in gone:
                    connection.execute(_DELETE, one)
            if not connection.execute("SELECT 1 FROM spool LIMIT 1").fetchone():
                self._close()
                for suffix in ("", "-journal"):
                    self._beside(suffix).unlink(missing_ok=True)

        if gone:
            self._run(work, absent=lambda: None)

    def set_aside(self, seq: int, why: str) -> None:
        """Keep a record, but drain it no more."""
        self._run(lambda connection: connection.execute("UPDATE spool SET aside = ? WHERE seq = ?", (why, seq)))

    def take_back(self) -> int:
        """Drain again what was set aside; return how many."""
        return self._run(
            lambda connection: (
                connection.execute("UPDATE spool SET aside = NULL WHERE aside != ?", (DAMAGED,)).rowcount
            ),
            absent=int,
        )

    def retired(self) -> list[Path]:
        """Return the files that were moved aside, damaged or by hand, and not read yet."""
        return sorted(self.path.parent.glob(f"{self.path.name}.aside-*[0-9]"))

    def retire(self) -> None:
        """Move the file aside; the next record starts a new one."""
        with self._turn():
            self._move_aside()

    def insert(self, rows: Sequence[Row]) -> None:
        """Take rows of another file, as they are."""

        def work(connection: sqlite3.Connection) -> None:
            with _transaction(connection):
                connection.executemany(_INSERT, rows)

        self._run(work)

    # -- whoever looks -----------------------------------------------------------------------

    def state(self) -> State:
        """Return what it holds."""

        def work(connection: sqlite3.Connection) -> State:
            pids = dict(connection.execute("SELECT pid, count(*) FROM spool GROUP BY pid"))
            aside = dict(connection.execute("SELECT aside, count(*) FROM spool WHERE aside IS NOT NULL GROUP BY aside"))
            oldest = connection.execute("SELECT at FROM spool WHERE aside IS NULL ORDER BY seq LIMIT 1").fetchone()
            records = sum(pids.values()) - sum(aside.values())
            return State(records, _size(connection), self._max_bytes, oldest and oldest[0], pids, aside, self.retired())

        return self._run(work, absent=lambda: State(0, 0, self._max_bytes, None, {}, {}, self.retired()))

    def check(self) -> None:
        """Return if a record could be appended now; for the start of a worker."""
        self._run(lambda connection: connection.execute("SELECT 1 FROM spool LIMIT 1"), absent=lambda: None)
        with self._turn(), tempfile.TemporaryFile(dir=self.path.parent) as file:
            file.write(bytes(4096))  # only a write tells whether there is room
            file.flush()
            os.fsync(file.fileno())

    # -- one at a time -----------------------------------------------------------------------

    def _run(self, work: Callable[[sqlite3.Connection], T], absent: Callable[[], T] | None = None) -> T:
        """Do something with the file, in this process's turn; with a new file if this one proves damaged.

        Args:
            work: What.
            absent: What to return where there is no file; None: one is made.
        """
        with self._turn():
            if absent is not None and not self.path.exists():
                return absent()
            try:
                return work(self._connection())
            except sqlite3.DatabaseError as exc:
                self._close()
                if not _is_damage(exc):
                    raise self._unusable(exc) from exc
                logger.error("%s is damaged (%s): moved aside; what can be read of it will be drained", self.path, exc)  # noqa: TRY400 - no bug of ours
            try:
                self._move_aside()
                return work(self._connection())
            except sqlite3.DatabaseError as exc:
                self._close()
                raise self._unusable(exc) from exc

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with _entrance:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(self._beside(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                raise self._unusable(exc) from exc
            try:
                self._wait_for_turn(fd)
                yield
            except OSError as exc:
                self._close()
                raise self._unusable(exc) from exc
            finally:
                os.close(fd)

    def _wait_for_turn(self, fd: int) -> None:
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SpoolError(f"the spool {self.path} is in use by another process for {BUSY_S:g} s") from None
                time.sleep(_TURN_S)
            else:
                return

    def _connection(self) -> sqlite3.Connection:
        found = _open.get(self.path)
        if found is not None:
            connection, inode = found
            with suppress(FileNotFoundError):
                there = self.path.stat()
                if there.st_ino == inode and there.st_size:
                    return connection
            self._close()
        # Results may be confidential.
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        inode = self.path.stat().st_ino
        connection = _connected(self.path)
        _open[self.path] = connection, inode
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if not version:
            connection.executescript(_SCHEMA)
        elif version != _VERSION:
            self._close()
            raise SpoolError(f"the spool {self.path} was written by another version of this package ({version})")
        page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {max(self._max_bytes // page_bytes, 1)}")
        self._reserve()
        return connection

    def _reserve(self) -> None:
        """Keep room for removing records on a full disk: SQLite needs its journal for that, and uses what is there."""
        with self._beside("-journal").open("ab") as journal, suppress(OSError):
            journal.write(bytes(max(_RESERVE - journal.tell(), 0)))
            journal.flush()

    def _close(self) -> None:
        found = _open.pop(self.path, None)
        if found is not None:
            with suppress(sqlite3.Error):
                found[0].close()

    def _move_aside(self) -> None:
        self._close()
        aside = self._beside(f".aside-{time.time_ns() // 1_000_000}")
        for suffix in ("-journal", ""):  # an unfinished transaction is rolled back by whoever opens the file
            with suppress(FileNotFoundError):
                self._beside(suffix).rename(f"{aside}{suffix}")

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.name}{suffix}")

    def _unusable(self, exc: Exception) -> SpoolError:
        if "full" in str(exc):  # Python 3.10 does not tell SQLite's code; the bound's is the same as the disk's
            with suppress(OSError):
                disk = os.statvfs(self.path.parent)
                if disk.f_bavail * disk.f_frsize > self._max_bytes - self.path.stat().st_size:
                    return SpoolError(f"the spool {self.path} is full: spool_max_bytes = {self._max_bytes}")
        return SpoolError(f"the spool {self.path} cannot be used: {exc}")


_DELETE: Final = "DELETE FROM spool WHERE seq = ?"
_INSERT: Final = "INSERT INTO spool (at, pid, task, record, sum) VALUES (?, ?, ?, ?, ?)"


def _row(record: Record) -> Row:
    blob = msgspec.msgpack.encode(record)
    task = None if record.group else record.key.decode(errors="replace")
    return time.time_ns() // 1_000_000, os.getpid(), task, blob, zlib.crc32(blob)


def record_of(blob: object, total: object) -> Record | None:
    """Return a row's record, None if it is damaged."""
    if not isinstance(blob, bytes) or zlib.crc32(blob) != total:
        return None
    topic, key, value, headers, group = msgspec.msgpack.decode(blob)
    return Record(topic, key, value, [(name, content) for name, content in headers], group)


def _oldest(connection: sqlite3.Connection, after: int, most: int, most_bytes: int) -> tuple[list[Spooled], list[int]]:
    found: list[Spooled] = []
    damaged: list[int] = []
    for seq, blob, total in connection.execute(
        "SELECT seq, record, sum FROM spool WHERE seq > ? AND aside IS NULL ORDER BY seq LIMIT ?", (after, most)
    ):
        record = record_of(blob, total)
        if record is None:
            damaged.append(seq)
            continue
        found.append(Spooled(seq, record))
        most_bytes -= len(blob)
        if most_bytes <= 0:
            break
    return found, damaged


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = PERSIST")  # a third cheaper than to delete it each time
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cell_size_check = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with suppress(sqlite3.Error):  # SQLite has rolled back by itself after some errors
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _size(connection: sqlite3.Connection) -> int:
    pages, free, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * page_bytes)


def _is_damage(exc: sqlite3.DatabaseError) -> bool:
    """Whether SQLite found something else than its own pages; Python raises the bare class for that alone."""
    return type(exc) is sqlite3.DatabaseError


# -- forks -----------------------------------------------------------------------------------
# SQLite keeps a process's locks in memory: a child that inherits a connection inherits the belief that it holds them.


@functools.cache
def _close_before_forks() -> None:
    os.register_at_fork(before=_before_fork, after_in_parent=_entrance.release, after_in_child=_in_child)


def _before_fork() -> None:
    _entrance.acquire()
    for connection, _ in _open.values():
        connection.close()
    _open.clear()


def _in_child() -> None:
    for fd in _claims:  # the parent's; held here too, it would outlive him
        os.close(fd)
    _claims.clear()
    _entrance.release()
