"""PostgreSQL: a view in a database, as an example of a store that lives outside celery-kafka-backend.

``postgresql://user:password@host/database``, as psycopg takes it. Celery's own tables stand beside ours (``ckb_*``), so
a stock ``db+postgresql+psycopg://`` backend reads the same database.

The entry point in pyproject.toml makes the scheme known; `sink` and `view` at the end are all that it needs. What a sink
owes its host is in ``celery_kafka_backend.sinks.contract``; the guards are in the statements.

Guarantee: a batch is one transaction, positions included: applied whole or not at all, and durable as PostgreSQL's
``synchronous_commit`` says. Two processors at once are right, and may wait for each other; rows are locked in the order of
their ids.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import ckb_postgresql_statements as statements
import psycopg

from celery_kafka_backend.changes import GROUP, TASK, Batch, Partition, Side, history_expiry
from celery_kafka_backend.errors import Rejected, SettingsError, Unavailable
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.contract import (
    Row,
    Shown,
    Sink,
    StoreOptions,
    View,
    document_row,
    history_row,
    id_refusal,
    side_row,
)
from celery_kafka_backend.sinks.native_columns import wrong
from celery_kafka_backend.sinks.per_process import PerProcess
from celery_kafka_backend.sinks.sqlite_native import beside, group_row, stock_document, stock_group, task_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from celery_kafka_backend.changes import Change
    from celery_kafka_backend.events import Event

MAX_BYTES: Final = 256 << 20
"""PostgreSQL takes a value of 1 GB, and several copies of it on the way."""
MAX_NATIVE_CHARS: Final = 155
"""Of ids and names in Celery's own tables."""
OF_THE_VALUES: Final = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)
"""What the database will never take: not text, too long for an index, against a constraint that somebody made."""
SWEEP_EVERY_S: Final = 10.0
SWEEP_ROWS: Final = 2_000
DEFAULTS: Final = {"connect_timeout": 5, "options": "-c statement_timeout=30000", "application_name": "celery-kafka"}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn psycopg's errors into ours."""
    try:
        yield
    except OF_THE_VALUES:  # whoever wrote them knows what to do
        raise
    except psycopg.errors.UndefinedTable as exc:
        raise Unavailable(f"{url}: no processor has made the tables yet: {exc}") from exc
    except psycopg.ProgrammingError as exc:
        raise SettingsError("view", f"{url}: {exc}", "check the rights, and who made these tables") from exc
    except psycopg.OperationalError as exc:
        if any(word in str(exc) for word in ("authentication failed", "does not exist", "no pg_hba.conf entry")):
            raise SettingsError("view", f"{url} refuses us: {exc}", "check user, password and database") from exc
        raise Unavailable(f"{url}: {exc}") from exc
    except (psycopg.InterfaceError, psycopg.errors.TransactionRollback) as exc:
        raise Unavailable(f"{url}: {exc}") from exc


def _connect(url: str, options: StoreOptions, **more: Any) -> psycopg.Connection[Any]:
    with _translated(mask(url)):
        return psycopg.connect(url, **{**DEFAULTS, **options.options, **more})


def _version(db: psycopg.Connection[Any]) -> int | None:
    """Return the version of the tables that are there, None if there are none."""
    (there,) = cast("tuple[Any]", db.execute("SELECT to_regclass('ckb_schema')").fetchone())
    if there is None:
        return None
    (found,) = cast("tuple[Any]", db.execute("SELECT max(version) FROM ckb_schema").fetchone())
    return cast("int | None", found)


class PostgresSink(Sink):
    """Writes a view in a database."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = mask(url)
        self._given = url
        self._options = options
        self._history = options.history is not False
        self._limit = MAX_BYTES
        self._db: psycopg.Connection[Any] | None = None
        self._sweep_due = 0.0

    def open(self) -> None:
        """Connect, and make what is missing."""
        self.close()
        db = _connect(self._given, self._options)
        try:
            with _translated(self.url), db.transaction():
                self._prepare(db)
        except BaseException:
            db.close()
            raise
        self._db = db

    def _prepare(self, db: psycopg.Connection[Any]) -> None:
        found = _version(db)
        if found is None:
            # Two processors that start together both find nothing. The one that comes second must not make anything:
            # CREATE … IF NOT EXISTS locks table after table, which the first writes to in an order of its own.
            db.execute("SELECT pg_advisory_xact_lock(hashtext('celery-kafka-backend'))")
            found = _version(db)
        if found is None:
            db.execute(statements.TABLES)
            db.execute("INSERT INTO ckb_schema VALUES (%s)", (statements.SCHEMA_VERSION,))
        elif found > statements.SCHEMA_VERSION:
            problem = f"{self.url} has schema version {found}, newer than this software"
            raise SettingsError("view", problem, "upgrade, or replay into another database")

    def close(self) -> None:
        """Disconnect."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def write(self, batch: Batch) -> None:
        """Apply a batch in one transaction."""
        if self._db is None:
            self.open()
        db = cast("psycopg.Connection[Any]", self._db)
        refused = {change.id: why for change in batch.changes if (why := _refusal(change, self._limit))}
        changes = sorted((each for each in batch.changes if each.id not in refused), key=lambda each: each.id)
        fit = Batch(changes, batch.chords, batch.positions)
        try:
            with _translated(self.url):
                try:
                    self._apply(db, fit)
                except OF_THE_VALUES:
                    refused |= self._apply_each(db, fit)
        except BaseException:
            self.close()
            raise
        if refused:
            raise Rejected(list(refused.items()))

    def _apply_each(self, db: psycopg.Connection[Any], batch: Batch) -> dict[str, str]:
        """Apply what can be, each change and fact by itself; return why the others cannot."""
        refused = {}
        units = [(change.id, Batch([change])) for change in batch.changes]
        units += [(fact.group, Batch([], chords=[fact])) for fact in sorted(batch.chords)]
        with db.transaction():
            for subject, unit in units:
                try:
                    self._apply(db, unit)
                except OF_THE_VALUES as exc:
                    refused[subject] = str(exc).partition("\n")[0]
            self._apply(db, Batch([], positions=batch.positions))
        return refused

    def _apply(self, db: psycopg.Connection[Any], batch: Batch) -> None:
        with db.transaction(), db.cursor() as cursor:
            self._execute(cursor, batch, _now_ms())

    def _execute(self, cursor: psycopg.Cursor[Any], batch: Batch, now_ms: int) -> None:
        changes = batch.changes
        self._bury(cursor, batch, now_ms)
        cursor.executemany(statements.MERGE_SIDE, [_side_values(each) for each in changes if not each.only_history])
        winners = [_winner(change, now_ms) for change in changes if change.winner is not None]
        cursor.executemany(statements.WIN, winners)
        for subject, renew, show, hide in (
            (TASK, statements.RENEW_TASK, statements.SHOW_TASK, statements.HIDE_TASK),
            (GROUP, statements.RENEW_GROUP, statements.SHOW_GROUP, statements.HIDE_GROUP),
        ):
            mine = [one for one in winners if one["subject"] == subject]
            shown = [one for one in mine if one["document"] is not None]
            cursor.executemany(renew, shown)
            cursor.executemany(show, shown)
            cursor.executemany(hide, [one for one in mine if one["document"] is None])
        if self._history:
            cursor.executemany(statements.LOG, list(_entries(changes, self._options.history_retention_ms)))
        facts = sorted(batch.chords)
        cursor.executemany(statements.FACT, [(one.group, one.name, one.order, one.value) for one in facts])
        cursor.executemany(statements.FACT_EXPIRY, [(one.group, one.expires_at) for one in facts])
        namespace = self._options.namespace
        cursor.executemany(statements.POSITION, [(namespace, *at, to) for at, to in sorted(batch.positions.items())])

    def _bury(self, cursor: psycopg.Cursor[Any], batch: Batch, now_ms: int) -> None:
        """Delete what has expired: of this batch's ids everything, else a bounded number of rows now and then."""
        dead = {(change.subject, change.id) for change in batch.changes}
        chords = {fact.group for fact in batch.chords}
        if time.monotonic() >= self._sweep_due:
            bound = {"now": now_ms, "limit": SWEEP_ROWS}
            found = cursor.execute(statements.EXPIRED, bound).fetchall()
            dead |= set(found)
            chords |= {group for (group,) in cursor.execute(statements.EXPIRED_CHORDS, bound).fetchall()}
            swept = max(len(found), cursor.execute(statements.SWEEP_HISTORY, bound).rowcount)
            # With the next batch again, if there were as many: what comes in faster than it is deleted would stay for ever.
            self._sweep_due = time.monotonic() + (0.0 if swept == SWEEP_ROWS else SWEEP_EVERY_S)
        for statement in statements.BURY:
            cursor.executemany(statement, [{"subject": s, "id": i, "now": now_ms} for s, i in sorted(dead)])
        for statement in statements.BURY_CHORD:
            cursor.executemany(statement, [{"id": group, "now": now_ms} for group in sorted(chords)])


def _refusal(change: Change, limit: int) -> str:
    if reason := id_refusal(change.id):
        return reason
    if "\0" in change.id:
        return "PostgreSQL takes no NUL in an id"
    if len(change.id) > MAX_NATIVE_CHARS:
        return f"an id of {len(change.id)} characters; Celery's tables take {MAX_NATIVE_CHARS}"
    size = max([len(change.document or b""), *(len(logged.value) for logged in change.history)])
    return f"{size} bytes; the limit is {limit}" if size > limit else ""


def _side_values(change: Change) -> tuple[Any, ...]:
    s = change.side or Side(expires_at=change.expires_at)
    numbers = (s.run, s.seen, s.sent, s.received, s.started, s.attempts)
    return (change.subject, change.id, s.expires_at, *numbers, "\n".join(s.workers))


def _winner(change: Change, now_ms: int) -> dict[str, Any]:
    event = cast("Event", change.winner)
    expires_at = event.expires_at or 0
    document = None if 0 < expires_at <= now_ms else change.document
    found = {
        "subject": change.subject, "id": change.id, "k": event.key, "e": event.id, "document": document,
        "until": expires_at if document else 0,
    }  # fmt: skip
    return found if document is None else found | _native(change.subject, event, document)


def _native(subject: str, event: Event, document: bytes) -> dict[str, Any]:
    """Return the values of Celery's own columns."""
    if subject == GROUP:
        return dict(zip(statements.BESIDE[GROUP], group_row(event, document), strict=True))
    found = dict(zip(statements.BESIDE[TASK], map(_text, task_row(event, document)), strict=True))
    return found | {name: (found[name] or "")[:MAX_NATIVE_CHARS] or None for name in ("name", "worker", "queue")}


def _text(value: Any) -> Any:
    """Return a value for a native column: text without NUL, which PostgreSQL does not take."""
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value


def _entries(changes: Sequence[Change], retention_ms: int | None) -> Iterator[tuple[Any, ...]]:
    for change in changes:
        for event, value in change.history:
            expires_at = history_expiry(event, retention_ms)
            yield change.id, event.hlc, event.id, event.kind, event.state, event.at, bytes(value), expires_at


class PostgresView(View):
    """Reads a view in a database, over one connection per process."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = mask(url)
        self._serializer = options.serializer
        self._namespace = options.namespace
        self._asking = threading.Lock()
        self._own = PerProcess(lambda: _connect(url, options, autocommit=True), lambda db: db.close())

    def after_fork(self) -> None:
        """Leave the parent its connection."""
        self._asking = threading.Lock()
        self._own.after_fork()

    def close(self) -> None:
        """Disconnect; a later read connects anew."""
        self._own.close()

    def _ask(self, query: str, **values: Any) -> list[tuple[Any, ...]]:
        with self._asking, _translated(self.url):
            try:
                return self._own.client.execute(query, {"now": _now_ms(), **values}).fetchall()
            except (psycopg.OperationalError, psycopg.InterfaceError):
                self._own.close()  # the next one connects anew
                raise

    def documents(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read all at once."""
        found = {each: shown.document for each, shown in self.shown(ids).items()}
        return {each: document for each, document in found.items() if document is not None}

    def shown(self, ids: Sequence[str]) -> dict[str, Shown]:
        """Read all at once; then the rows that Celery's own backend wrote."""
        now_ms, found = _now_ms(), {}
        for task_id, key, event_id, document, until, expires_at, *side in self._ask(statements.READ, ids=_askable(ids)):
            shown = None if 0 < until <= now_ms else document
            found[task_id] = Shown(shown, key, event_id, _side(expires_at, *side))
        unkeyed = [each for each in ids if each not in found or not found[each].key]
        if unkeyed:
            for task_id, status, result, done, *columns in self._ask(statements.READ_STOCK, ids=_askable(unkeyed)):
                date_done = done.isoformat(" ", "microseconds") if isinstance(done, datetime) else None
                document = stock_document(task_id, status, result, date_done, *columns, serializer=self._serializer)
                found[task_id] = found.get(task_id, Shown(None, 0, "", None))._replace(document=document)
        return found

    def groups(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read all at once."""
        found = dict(cast("list[tuple[str, bytes]]", self._ask(statements.READ_GROUPS, ids=_askable(ids))))
        others = [each for each in _askable(ids) if each not in found]
        for group, result in self._ask(statements.READ_STOCK_GROUPS, ids=others):
            if document := stock_group(result, self._serializer):
                found[group] = document
        return found

    def history(self, task_id: str) -> list[bytes]:
        """Read by the primary key."""
        return [value for each in _askable([task_id]) for (value,) in self._ask(statements.READ_HISTORY, id=each)]

    def chord(self, group_id: str) -> dict[str, bytes]:
        """Read by the primary key."""
        return dict(pair for each in _askable([group_id]) for pair in self._ask(statements.READ_CHORD, id=each))

    def positions(self) -> dict[Partition, int]:
        """Read all of this pipeline's."""
        found = self._ask(statements.READ_POSITIONS, namespace=self._namespace)
        return {Partition(topic, number): offset for topic, number, offset in found}

    def rows(self) -> Iterator[Row]:
        """Read the tables one after the other; not a snapshot."""
        for subject in (TASK, GROUP):
            for each, document, until, event_id, *values in self._ask(statements.ROWS_DOCUMENT[subject]):
                found = dict(zip(statements.BESIDE[subject], map(_plain, values), strict=True))
                bad = wrong(found, partial(_native, subject), document, event_id, partial(self.history, each))
                yield document_row(subject, each, document, until, bad)
        for subject, each, key, event_id, expires_at, *side in self._ask(statements.ROWS_SIDE):
            yield side_row(subject, each, key, event_id, _side(expires_at, *side))
        for each, hlc, event_id, value, expires_at, *columns in self._ask(statements.ROWS_HISTORY):
            found = dict(zip(("kind", "state", "at"), columns, strict=True))
            yield history_row(f"{each}/{hlc}/{event_id}", value, expires_at, found, beside)
        for group_id, name, key, value, expires_at in self._ask(statements.ROWS_CHORD):
            yield Row("chord", f"{group_id}/{name}", {"k": key, "value": value}, expires_at)


def _askable(ids: Sequence[str]) -> list[str]:
    """Return the ids that PostgreSQL can be asked for; of the others it has nothing."""
    return [each for each in ids if "\0" not in each and _encodable(each)]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> Any:
    return value.isoformat(" ", "microseconds") if isinstance(value, datetime) else value


def _side(expires_at: int, *columns: Any) -> Side:
    *numbers, workers = columns
    names: tuple[str, ...] = tuple(workers.split("\n")) if workers else ()
    return Side(*cast("tuple[int, int, int, int, int, int]", tuple(numbers)), names, expires_at)


sink: Callable[[str, StoreOptions], Sink] = PostgresSink
view: Callable[[str, StoreOptions], View] = PostgresView
