"""The read side of the Cassandra store; tables and guarantee are in `cassandra`."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timezone
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Final

import cassandra

from celery_kafka_backend.changes import GROUP, TASK, Partition, Side
from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.sinks import cassandra_wire as wire
from celery_kafka_backend.sinks.cassandra_guard import (
    NEVER,
    Guard,
    Ranked,
    Term,
    is_stock,
    merged,
    stock_stays,
    winners,
)
from celery_kafka_backend.sinks.cassandra_native import NativeRow, native_row, stock_document
from celery_kafka_backend.sinks.cassandra_place import Place
from celery_kafka_backend.sinks.cassandra_wire import translated
from celery_kafka_backend.sinks.contract import (
    SIDES,
    Row,
    Shown,
    StoreOptions,
    document_row,
    history_row,
    or_unreadable,
    side_row,
)
from celery_kafka_backend.sinks.native_columns import wrong
from celery_kafka_backend.sinks.per_process import DriverView, PerProcess

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from celery_kafka_backend.events import Event
    from celery_kafka_backend.query import Query

CHORD: Final = "chord"
CHUNK: Final = 1000
"""Ids per query."""
MAX_KEY: Final = 65_000
"""Bytes of a part of a key; all of a key together has 65,535."""
_NOTHING: Final = Shown(None, 0, "", None)

ROWS: Final = "SELECT id, name, k, event_id, guard, document, expiry, seen, pieces, hours FROM {view} WHERE subject = ? AND id IN ?"
STATES: Final = "SELECT task_id, date_done, status, writetime(status) AS stamp FROM {native} WHERE task_id IN ?"
NATIVE: Final = "SELECT task_id, status, result, date_done, traceback, children, writetime(status) AS stamp FROM {native} WHERE task_id IN ?"
STOCK: Final = "SELECT status, result, date_done, traceback, children FROM {native} WHERE task_id = ? AND date_done = ?"
HISTORY: Final = "SELECT hlc, event_id, value, expires_at FROM {history} WHERE task_id = ? AND hour IN ?"
POSITIONS: Final = "SELECT topic, part, next FROM {position} WHERE namespace = ?"
ALL_ROWS: Final = "SELECT subject, id, name, k, event_id, guard, document, expiry, seen, pieces, hours FROM {view}"
ALL_HISTORY: Final = "SELECT task_id, hlc, event_id, value, expires_at FROM {history}"
BESIDE: Final = ("kind", "state", "name", "worker", "exception", "at")
WHOLE_HISTORY: Final = (
    "SELECT task_id, hlc, event_id, value, expires_at, kind, state, name, worker, exception, at FROM {history}"
)


class Cell:
    """One partition of the view: a task, a saved group or a chord, as it is now."""

    def __init__(self, rows: list[Any], now_ms: int) -> None:
        first = rows[0]
        self.id: str = first.id
        self.until = 0
        self.alive = False
        self.hours = sorted(first.hours or ())
        self.winners: dict[str, Ranked] = {}
        if first.expiry is None:
            return
        whole = Term.unpack(first.expiry)
        if whole.until <= now_ms:
            return
        self.alive = True
        self.until = 0 if whole.until >= NEVER else whole.until
        self._side = (first.pieces or (), first.seen or 0, whole.until)
        ranked = (
            Ranked(row.name, row.k, row.event_id, row.guard, row.document) for row in rows if row.name is not None
        )
        self.winners = winners(ranked, whole, now_ms)

    @property
    def side(self) -> Side | None:
        """The side record."""
        return merged(*self._side) if self.alive else None

    @property
    def winner(self) -> Ranked | None:
        """The row that counts, of a task or group."""
        return self.winners.get("")


class CassandraView(DriverView[wire.Connection]):
    """Reads a view in Cassandra."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._place = Place(url, options)
        self.url = self._place.url
        self._namespace = options.namespace
        self._serializer = options.serializer
        self._own = PerProcess(lambda: wire.acquire(self._place), wire.release)

    @property
    def _connection(self) -> wire.Connection:
        return self._own.client

    # -- tasks and groups ----------------------------------------------------------------------

    def documents(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read by ``IN``, a thousand at a time, our rows and Celery's at once."""
        return {each: shown.document for each, shown in self._shown(ids).items() if shown.document is not None}

    def shown(self, ids: Sequence[str]) -> dict[str, Shown]:
        """Read by ``IN``, a thousand at a time, our rows and Celery's at once."""
        return {each: shown for each, shown in self._shown(ids).items() if shown != _NOTHING}

    def groups(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read by ``IN``, a thousand at a time."""
        found = {}
        with self._reading():
            for cell in self._cells(GROUP, ids):
                if cell.winner is not None and cell.winner.document is not None:
                    found[cell.id] = bytes(cell.winner.document)
        return found

    def _shown(self, ids: Sequence[str]) -> dict[str, Shown]:
        found: dict[str, Shown] = {}
        with self._reading():
            for chunk in _chunks(ids):
                rows, states = self._connection.read_all([(ROWS, (TASK, chunk)), (STATES, (chunk,))])
                for cell in _cells(rows):
                    found[cell.id] = _shown_of(cell)
                for task_id, date_done, status in _latest_stock(states):
                    shown = found.get(task_id, _NOTHING)
                    if stock_stays(status, shown.key):
                        document = self._stock(task_id, date_done)
                        found[task_id] = Shown(document, 0, "", shown.side)
        return found

    def _stock(self, task_id: str, date_done: Any) -> bytes | None:
        for row in self._connection.read(STOCK, task_id, date_done):
            return stock_document(task_id, NativeRow(*row)._replace(date_done=_ms(row.date_done)), self._serializer)
        return None

    def _cells(self, subject: str, ids: Sequence[str]) -> Iterator[Cell]:
        for chunk in _chunks(ids):
            yield from _cells(self._connection.read(ROWS, subject, chunk))

    # -- the rest ------------------------------------------------------------------------------

    def history(self, task_id: str) -> list[bytes]:
        """Read the hours in which something happened."""
        with self._reading():
            cells = [cell for subject in (TASK, GROUP) for cell in self._cells(subject, [task_id])]
            hours = sorted({hour for cell in cells for hour in cell.hours})
            now_ms = system_wall_ms()
            found: list[Any] = []
            for start in range(0, len(hours), CHUNK):
                found += self._connection.read(HISTORY, task_id, hours[start : start + CHUNK])
        found.sort(key=lambda row: (row.hlc, row.event_id))
        return [bytes(row.value) for row in found if not 0 < row.expires_at <= now_ms]

    def chord(self, group_id: str) -> dict[str, bytes]:
        """Read a chord's partition."""
        with self._reading():
            return {
                name: bytes(row.document or b"")
                for cell in self._cells(CHORD, [group_id])
                for name, row in cell.winners.items()
            }

    def positions(self) -> dict[Partition, int]:
        """Read all of this pipeline's."""
        with self._reading():
            return {
                Partition(row.topic, row.part): row.next for row in self._connection.read(POSITIONS, self._namespace)
            }

    def rows(self) -> Iterator[Row]:
        """Scan the tables; not a snapshot."""
        with self._reading():
            source = _partitions(self._connection.read(ALL_ROWS))
            while chunk := list(islice(source, CHUNK)):
                tasks = [rows[0].id for rows in chunk if rows[0].subject == TASK]
                natives = self._connection.read(NATIVE, tasks) if tasks else ()
                beside = {task_id: list(rows) for task_id, rows in groupby(natives, key=lambda row: row.task_id)}
                for rows in chunk:
                    subject, each = rows[0].subject, rows[0].id
                    table = SIDES.get(subject, CHORD)
                    yield from or_unreadable(table, each, self._dumped(subject, each, rows, beside.get(each, [])))
            now_ms = system_wall_ms()
            for row in self._connection.read(WHOLE_HISTORY):
                key = f"{row.task_id}/{row.hlc}/{row.event_id}"
                yield from or_unreadable("history", key, _history_rows(key, row, now_ms))

    def _dumped(self, subject: str, each: str, rows: list[Any], natives: list[Any]) -> Iterator[Row]:
        cell = Cell(rows, system_wall_ms())
        if subject == CHORD:
            for name, row in cell.winners.items():
                columns = {"k": row.key, "value": bytes(row.document or b"")}
                yield Row("chord", f"{each}/{name}", columns, cell.until)
            return
        if not cell.alive:
            return
        winner = cell.winner
        if winner is not None and any(stock_stays(status, winner.key) for _, _, status in _latest_stock(natives)):
            winner = None
        if winner is not None and winner.document is not None and winner.guard is not None:
            document, until = bytes(winner.document), Guard.unpack(winner.guard).shown_until
            bad = {}
            if subject == TASK:
                recorded = partial(self._recorded, each, cell.hours)
                bad = wrong(_ours(natives), _said, document, winner.event_id, recorded, mixed=True)
            yield document_row(subject, each, document, until, bad)
        key, event_id = (winner.key, winner.event_id) if winner is not None else (0, "")
        yield side_row(subject, each, key, event_id, cell.side or Side())

    def _recorded(self, task_id: str, hours: list[int]) -> list[bytes]:
        """Return what the history has of a task in these hours, expired or not, in any order."""
        found: list[Any] = []
        for start in range(0, len(hours), CHUNK):
            found += self._connection.read(HISTORY, task_id, hours[start : start + CHUNK])
        return [bytes(row.value) for row in found]

    def candidates(self, query: Query) -> Iterator[bytes]:  # noqa: ARG002 - by its partitions, which are tasks'
        """Read the whole history: nothing but a task and its hours can be looked up here."""
        with self._reading():
            now_ms = system_wall_ms()
            for row in self._connection.read(ALL_HISTORY):
                if not 0 < row.expires_at <= now_ms:
                    yield bytes(row.value)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with translated(self.url):
            try:
                yield
            except cassandra.InvalidRequest as exc:
                raise Unavailable(f"{self.url}: {exc} (a processor makes the tables when it starts)") from exc


def _beside(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in BESIDE}


def _history_rows(key: str, row: Any, now_ms: int) -> Iterator[Row]:
    if not 0 < row.expires_at <= now_ms:
        found = {name: getattr(row, name) for name in BESIDE} | {"at": row.at and _ms(row.at)}
        yield history_row(key, bytes(row.value), row.expires_at, found, _beside)


def _ours(natives: Sequence[Any]) -> dict[str, Any]:
    """Return what a stock client reads of the row that we wrote; {} if there is none."""
    for row in natives:  # the latest first
        if row.stamp is None or not is_stock(row.stamp):
            return {name: getattr(row, name) for name in NativeRow._fields} | {"date_done": _ms(row.date_done)}
    return {}


def _said(event: Event, document: bytes) -> dict[str, Any]:
    return native_row(event, document)._asdict()


def _chunks(ids: Sequence[str]) -> Iterator[list[str]]:
    """Yield the ids that servers can be asked for: of the others there is nothing, and one would fail the whole query."""
    askable = [each for each in ids if 0 < len(each.encode()) <= MAX_KEY]
    for start in range(0, len(askable), CHUNK):
        yield askable[start : start + CHUNK]


def _partitions(rows: Iterable[Any]) -> Iterator[list[Any]]:
    for _, found in groupby(rows, key=lambda row: (row.subject, row.id)):
        yield list(found)


def _cells(rows: Iterable[Any]) -> Iterator[Cell]:
    now_ms = system_wall_ms()
    for _, found in groupby(rows, key=lambda row: row.id):
        yield Cell(list(found), now_ms)


def _shown_of(cell: Cell) -> Shown:
    winner = cell.winner
    if winner is None:
        return _NOTHING._replace(side=cell.side)
    document = None if winner.document is None else bytes(winner.document)
    return Shown(document, winner.key, winner.event_id, cell.side)


def _latest_stock(states: Iterable[Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield task, date_done and status of what Celery's own backend says of each, if it does."""
    for task_id, rows in groupby(states, key=lambda row: row.task_id):
        for row in rows:  # the latest first
            if row.stamp is not None and is_stock(row.stamp):
                yield task_id, row.date_done, row.status
                break


def _ms(moment: Any) -> int:
    """The driver's moments are UTC and do not say so."""
    ms: int = round(moment.replace(tzinfo=timezone.utc).timestamp() * 1000)
    return ms
