"""Cassandra: the view that stock Celery clients of Cassandra read, with the whole history, by task and hour.

``cassandra://host,host:9042/keyspace``, or ``cassandra://`` and Celery's own ``cassandra_…``. Tables::

    tasks (cassandra_table)  Celery's own, as its backend makes it
    celery_kafka_view        a partition per task, saved group and chord; in it
                               expiry, seen, pieces          of the whole: until when, side record
                               hours                         hours with history, for as long as that stays
                               name, k, event_id             a claim on what is shown; the greatest (k, event_id) counts
                               guard, document               … until when, and the document
    celery_kafka_history     a partition per task and hour, by HLC and event id
    celery_kafka_position    next offset of a partition

What is shown is the first row of a partition's order, so nobody compares anything when writing: a stale write adds a
row further down. Each write deletes the rows below its own that would end before it. Every cell's write timestamp is
what the cell is the maximum of (`cassandra_guard`).

Celery's own table has ``date_done`` as part of its key, so a winner first deletes what lesser keys wrote there, by
write timestamps in the order of keys, and all below any clock: what Celery's own backend wrote stays as it is.

Guarantee: a task's rows in one table are written atomically; a batch at least once and in no order, with
``cassandra_write_consistency``. What was acknowledged survives SIGKILL as far as the cluster syncs its commit log
first (``commitlog_sync: periodic``, the default, does not on one node). Any order, duplication or zombie writer gives
the same documents to our readers. Of two events with one order key, a stock client may see the other one, or a mix.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from cassandra.query import UNSET_VALUE, BatchStatement, BatchType

from celery_kafka_backend.changes import TASK, Change, history_expiry, later_expiry, side_of
from celery_kafka_backend.errors import Rejected, Unavailable
from celery_kafka_backend.events import TOMBSTONES
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.sinks import cassandra_wire as wire
from celery_kafka_backend.sinks.cassandra_guard import (
    MARGIN_S,
    NEVER,
    Guard,
    Term,
    is_stock,
    native_stamp,
    piece,
    ttl_s,
)
from celery_kafka_backend.sinks.cassandra_native import native_row
from celery_kafka_backend.sinks.cassandra_place import Place
from celery_kafka_backend.sinks.cassandra_view import CHORD, MAX_KEY, STATES, CassandraView
from celery_kafka_backend.sinks.cassandra_wire import translated
from celery_kafka_backend.sinks.contract import Sink, StoreOptions, View, id_refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from celery_kafka_backend.changes import Batch, ChordFact, Logged, Partition
    from celery_kafka_backend.events import Event

MAX_BYTES: Final = 15 * 1024 * 1024
"""A mutation is at most half a segment of the commit log, 16 MB unless told otherwise, and so is a request."""
LOG_BYTES: Final = 64 * 1024
"""Of one task's events written together: thousands of one hour would be more than a mutation holds."""
BATCH_SHARE: Final = 0.8
"""Of what the servers take in one batch of several partitions without a warning, for they count more than we do."""
ROW_BYTES: Final = 64
"""What a statement costs beside the values that we measure."""
HOUR_MS: Final = 3_600_000
CHUNK: Final = 1000

WHOLE: Final = (
    "UPDATE {view} USING TTL ? AND TIMESTAMP ? SET expiry = ?, pieces = pieces + ?, hours = hours + ?"
    " WHERE subject = ? AND id = ?"
)
HOURS: Final = "UPDATE {view} USING TTL ? AND TIMESTAMP ? SET hours = hours + ? WHERE subject = ? AND id = ?"
SEEN: Final = "UPDATE {view} USING TTL ? AND TIMESTAMP ? SET seen = ? WHERE subject = ? AND id = ?"
CLAIM: Final = (
    "INSERT INTO {view} (subject, id, name, k, event_id, guard) VALUES (?, ?, ?, ?, ?, ?) USING TTL ? AND TIMESTAMP ?"
)
DOCUMENT: Final = (
    "UPDATE {view} USING TTL ? AND TIMESTAMP ? SET document = ?"
    " WHERE subject = ? AND id = ? AND name = ? AND k = ? AND event_id = ?"
)
PRUNE: Final = "DELETE FROM {view} USING TIMESTAMP ? WHERE subject = ? AND id = ? AND name = ? AND k < ?"
HIDE: Final = "DELETE FROM {native} USING TIMESTAMP ? WHERE task_id = ?"
SHOW: Final = (
    "INSERT INTO {native} (task_id, status, result, date_done, traceback, children) VALUES (?, ?, ?, ?, ?, ?)"
    " USING TTL ? AND TIMESTAMP ?"
)
UNSTOCK: Final = "DELETE FROM {native} USING TIMESTAMP ? WHERE task_id = ? AND date_done = ?"
LOG: Final = (
    "INSERT INTO {history} (task_id, hour, hlc, event_id, kind, state, name, worker, exception, at, expires_at, value)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) USING TTL ?"
)
POSITION: Final = "INSERT INTO {position} (namespace, topic, part, next) VALUES (?, ?, ?, ?) USING TIMESTAMP ?"


class Unit(NamedTuple):
    """Statements on one partition, written together, and the change that they belong to."""

    id: str
    statements: list[Any]
    size: int


class CassandraSink(Sink):
    """Writes a view in Cassandra."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._place = Place(url, options)
        self.url = self._place.url
        self._namespace = options.namespace
        self._history = options.history is not False
        self._history_ms = options.history_retention_ms
        self._limit = MAX_BYTES
        self._batch_bytes = self._batch_units = 0
        self._connection: wire.Connection | None = None

    def open(self) -> None:
        """Connect, and make the tables that are missing."""
        self.close()
        connection = wire.acquire(self._place)
        try:
            with translated(self.url):
                connection.make_tables()
                largest, self._batch_units = connection.batch_limits()
        except BaseException:
            wire.release(connection)
            raise
        self._batch_bytes = int(largest * BATCH_SHARE)
        self._connection = connection

    def close(self) -> None:
        """Disconnect."""
        if self._connection is not None:
            wire.release(self._connection)
            self._connection = None

    def write(self, batch: Batch) -> None:
        """Write tasks, groups, history and facts; then the positions."""
        if self._connection is None:
            self.open()
        now_ms = system_wall_ms()
        refused: dict[str, str] = {}
        changes = []
        for given in batch.changes:
            change = _retimed(given, self._place.entry_ttl_ms) if self._place.entry_ttl_ms else given
            reason = _refusal(change, self._limit, history=self._history)
            if reason:
                refused[change.id] = reason
            else:
                changes.append(change)
        with self._writing():
            self._send(self._units(changes, now_ms), refused)
            self._send(self._facts([fact for fact in batch.chords if not _unnameable(fact, refused)], now_ms), refused)
            self._send(self._unstocked(changes), refused)
            unmoved: dict[str, str] = {}
            self._send(self._moved(batch.positions), unmoved)
        if unmoved:  # there is nothing in them to refuse
            raise Unavailable(f"{self.url} takes no positions: {unmoved}")
        if refused:
            raise Rejected(list(refused.items()))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with translated(self.url):
            try:
                yield
            except wire.TablesGone:
                assert self._connection is not None
                self._connection.make_tables()
                raise

    def _units(self, changes: Iterable[Change], now_ms: int) -> Iterator[Unit]:
        for change in changes:
            if change.only_history:
                if self._history:
                    yield Unit(change.id, [self._hours(change, now_ms)], 0)
                    yield from self._log(change, now_ms)
                continue
            yield self._claims(change, now_ms)
            if change.subject == TASK and change.winner is not None:
                yield self._native(change, now_ms)
            if self._history:
                yield from self._log(change, now_ms)

    # -- our view ------------------------------------------------------------------------------

    def _claims(self, change: Change, now_ms: int) -> Unit:
        whole = Term(change.expires_at or NEVER, now_ms)
        apart = self._history_ms is not None  # else the history is over with the whole, and one statement says both
        hours = _hours(change) if self._history and not apart else set()
        statements = [self._whole(change.subject, change.id, whole, _pieces(change), hours)]
        if self._history and apart and change.history:
            statements.append(self._hours(change, now_ms))
        if change.side is not None:
            seen = change.side.seen
            statements.append(
                self._bound(SEEN, ttl_s(whole.until, now_ms, MARGIN_S), seen, seen, change.subject, change.id)
            )
        size = 0
        if change.winner is not None:
            shown = _shown(change, now_ms)
            until = change.winner.expires_at or 0
            at = (change.subject, change.id, "", change.winner.key, change.winner.id)
            statements += self._claim(at, Guard(whole, until), shown, ttl_s(until or NEVER, now_ms))
            size = len(shown or b"")
        return Unit(change.id, statements, size)

    def _whole(self, subject: str, each: str, term: Term, pieces: set[bytes], hours: set[int]) -> Any:
        ttl = ttl_s(term.until, term.since, MARGIN_S)
        return self._bound(WHOLE, ttl, term.stamp, term.pack(), pieces, hours, subject, each)

    def _hours(self, change: Change, now_ms: int) -> Any:
        """Return the statement that says in which hours there is history, for as long as any of it stays."""
        until = reduce(later_expiry, (history_expiry(event, self._history_ms) for event, _ in change.history))
        term = Term(until or NEVER, now_ms)
        ttl = ttl_s(term.until, now_ms, MARGIN_S)
        return self._bound(HOURS, ttl, term.stamp, _hours(change), change.subject, change.id)

    def _claim(self, at: tuple[str, str, str, int, str], guard: Guard, document: bytes | None, ttl: int) -> list[Any]:
        """Return the statements that put a row where it belongs, and delete those below that end before it would."""
        stamp = guard.term.stamp
        kept = ttl_s(guard.term.until, guard.term.since, MARGIN_S)
        statements = [self._bound(CLAIM, *at, guard.pack(), kept, stamp), self._bound(PRUNE, stamp, *at[:4])]
        if document is not None:
            statements.append(self._bound(DOCUMENT, ttl, stamp, document, *at))
        return statements

    def _facts(self, facts: Sequence[ChordFact], now_ms: int) -> Iterator[Unit]:
        for group, found in groupby(sorted(facts, key=lambda fact: fact.group), key=lambda fact: fact.group):
            own = list(found)
            whole = Term(max(fact.expires_at or NEVER for fact in own), now_ms)
            yield Unit(group, [self._whole(CHORD, group, whole, set(), set())], 0)
            for fact in own:
                term = Term(fact.expires_at or NEVER, now_ms)
                at = (CHORD, group, fact.name, fact.order, "")
                ttl = ttl_s(term.until, now_ms, MARGIN_S)
                yield Unit(group, self._claim(at, Guard(term, 0), bytes(fact.value), ttl), len(fact.value))

    # -- Celery's own table --------------------------------------------------------------------

    def _native(self, change: Change, now_ms: int) -> Unit:
        assert change.winner is not None
        stamp, shown = native_stamp(change.winner.key), _shown(change, now_ms)
        if shown is None:
            return Unit(change.id, [self._bound(HIDE, stamp, change.id)], 0)
        row = native_row(change.winner, shown)
        ttl = ttl_s(change.winner.expires_at or NEVER, now_ms)
        columns = (UNSET_VALUE if value is None else value for value in row)
        statements = [self._bound(HIDE, stamp - 1, change.id), self._bound(SHOW, change.id, *columns, ttl, stamp)]
        return Unit(change.id, statements, sum(len(part or b"") for part in (row.result, row.traceback, row.children)))

    def _unstocked(self, changes: Sequence[Change]) -> Iterator[Unit]:
        """Delete what Celery's own backend wrote of forgotten tasks: row by row, each as it was seen."""
        ids = [change.id for change in changes if change.subject == TASK and change.winner and change.document is None]
        assert self._connection is not None
        for start in range(0, len(ids), CHUNK):
            for row in self._connection.read(STATES, ids[start : start + CHUNK]):
                if row.stamp is not None and is_stock(row.stamp):
                    yield Unit(row.task_id, [self._bound(UNSTOCK, row.stamp, row.task_id, row.date_done)], 0)

    # -- history and positions -----------------------------------------------------------------

    def _log(self, change: Change, now_ms: int) -> Iterator[Unit]:
        for hour, found in groupby(sorted(change.history, key=_hour), key=_hour):
            statements: list[Any] = []
            size = 0
            for event, value in found:
                if size + len(value) > LOG_BYTES and statements:
                    yield Unit(change.id, statements, size)
                    statements, size = [], 0
                about = (event.kind, event.state, event.name, event.worker, event.exception)
                expires_at = history_expiry(event, self._history_ms)
                statements.append(
                    self._bound(
                        LOG, change.id, hour, event.hlc, event.id,
                        *(UNSET_VALUE if each is None else each for each in about),
                        event.at, expires_at, bytes(value), ttl_s(expires_at or NEVER, now_ms),
                    )
                )  # fmt: skip
                size += len(value)
            yield Unit(change.id, statements, size)

    def _moved(self, positions: Mapping[Partition, int]) -> Iterator[Unit]:
        statements = [self._bound(POSITION, self._namespace, t, p, n, n) for (t, p), n in positions.items()]
        if statements:
            yield Unit("", statements, 0)

    # -- the wire ------------------------------------------------------------------------------

    def _bound(self, text: str, *values: Any) -> Any:
        assert self._connection is not None
        return self._connection.statement(text).bind(values)

    def _send(self, units: Iterable[Unit], refused: dict[str, str]) -> None:
        """Write all, in any order; add what the servers will never take to ``refused``."""
        alone = []
        for units_sent, error in self._sent(self._batches(units)):
            if error is not None and len(units_sent) > 1:
                alone += units_sent
            elif error is not None:
                refused.setdefault(units_sent[0].id, str(error))
        for (unit,), error in self._sent([unit] for unit in alone):
            if error is not None:
                refused.setdefault(unit.id, str(error))

    def _sent(self, batches: Iterable[list[Unit]]) -> Iterator[tuple[list[Unit], Exception | None]]:
        assert self._connection is not None
        return self._connection.write((units, self._batch(units)) for units in batches)

    def _batch(self, units: Iterable[Unit]) -> BatchStatement:
        found = BatchStatement(BatchType.UNLOGGED, consistency_level=self._place.write_level)
        for unit in units:
            for statement in unit.statements:
                found.add(statement)
        return found

    def _batches(self, units: Iterable[Unit]) -> Iterator[list[Unit]]:
        """Gather units by the server that holds them."""
        assert self._connection is not None
        open_ones: dict[Any, tuple[list[Unit], int]] = {}
        for unit in units:
            owner = self._connection.owner(unit.statements[0])
            size = unit.size + ROW_BYTES * len(unit.statements)
            gathered, total = open_ones.get(owner, ([], 0))
            if gathered and (total + size > self._batch_bytes or len(gathered) >= self._batch_units):
                yield gathered
                gathered, total = [], 0
            gathered.append(unit)
            open_ones[owner] = (gathered, total + size)
        yield from (gathered for gathered, _ in open_ones.values())


def _refusal(change: Change, limit: int, *, history: bool) -> str:
    for name in (change.id, *(logged.event.id for logged in change.history)):
        if reason := id_refusal(name, MAX_KEY):
            return reason
    size = len(change.document or b"")
    if size > limit:
        return f"a document of {size} bytes; the limit is {limit}"
    largest = max((len(value) for _, value in change.history), default=0) if history else 0
    return f"an event of {largest} bytes; the limit is {limit}" if largest > limit else ""


def _unnameable(fact: ChordFact, refused: dict[str, str]) -> bool:
    reason = id_refusal(fact.group, MAX_KEY) or id_refusal(fact.name, MAX_KEY)
    if reason:
        refused[fact.group] = reason
    return bool(reason)


def _retimed(change: Change, ttl_ms: int) -> Change:
    """Return a change whose events last for ``cassandra_entry_ttl``; a tombstone guards for as long as it says."""

    def timed(event: Event) -> Event:
        return event if event.kind in TOMBSTONES else msgspec.structs.replace(event, expires_at=event.at + ttl_ms)

    history = [logged._replace(event=timed(logged.event)) for logged in change.history]
    side = change.side
    if side is not None and history:
        ends = reduce(later_expiry, (logged.event.expires_at or 0 for logged in history))
        side = msgspec.structs.replace(side, expires_at=ends)
    winner = change.winner and timed(change.winner)
    return msgspec.structs.replace(change, winner=winner, side=side, history=history)


def _shown(change: Change, now_ms: int) -> bytes | None:
    expires_at = (change.winner.expires_at or 0) if change.winner else 0
    return None if 0 < expires_at <= now_ms else change.document


def _pieces(change: Change) -> set[bytes]:
    if change.side is None:
        return set()
    return {piece(side_of(event)) for event, _ in change.history} or {piece(change.side)}


def _hour(logged: Logged) -> int:
    return logged.event.hlc // HOUR_MS


def _hours(change: Change) -> set[int]:
    return {_hour(logged) for logged in change.history}


def sink(url: str, options: StoreOptions) -> Sink:
    """Return the write side of ``cassandra://…``."""
    return CassandraSink(url, options)


def view(url: str, options: StoreOptions) -> View:
    """Return the read side of ``cassandra://…``."""
    return CassandraView(url, options)
