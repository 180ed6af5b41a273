"""MongoDB: the view that stock Celery clients of MongoDB read, with the whole history, searchable.

``mongodb://…`` or ``mongodb+srv://…``. Collections::

    celery_taskmeta        Celery's own; ours beside its fields, in ``ckb``:
                             k, e  order key and id of the event shown      u  shown until
                             d     the document, around the result's text   x  when the key may be forgotten
    celery_groupmeta       saved groups, likewise
    celery_kafka_side      side record of a task, also of one that is not shown
    celery_kafka_history   an event: _id {t task, h HLC, e event id}, kind, state, name, worker, at, value
    celery_kafka_chord     a fact about a chord: _id {g group, n name}, k, v; how long: celery_kafka_chord_expiry
    celery_kafka_position  next offset of a partition: _id {n namespace, t topic, p partition}

A task is written by one update whose pipeline compares and replaces inside the server; another
process cannot come between. What may no longer be shown, while its key must guard on, becomes a
PENDING document with every field that a stock client reads. Side records are merged by ``$max``,
``$min`` and ``$addToSet``, in a collection of their own: a task that was only sent has no document.

TTL indexes remove what has expired, by the minute; readers of ours do not see it from the
millisecond on. The index on ``date_done`` that Celery's backend makes stays as it is.

Guarantee: each task is written atomically, a batch at least once and in no order; what `write`
returned from is in the journal of a majority (``w: majority, j: true``). Any order, duplication or
zombie writer gives the same documents. Between a task's document and its side record a reader may
see the one without the other.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import bson
from bson.datetime_ms import DatetimeMS
from pymongo import InsertOne, UpdateOne, errors

from celery_kafka_backend.changes import GROUP, TASK, Side, history_expiry
from celery_kafka_backend.errors import Rejected, SettingsError
from celery_kafka_backend.order import Rank, rank_of_key, system_wall_ms
from celery_kafka_backend.sinks.contract import Sink, StoreOptions, View, id_refusal
from celery_kafka_backend.sinks.mongodb_native import NOTHING, beside, group_fields, task_fields
from celery_kafka_backend.sinks.mongodb_view import MongoView
from celery_kafka_backend.sinks.mongodb_wire import (
    CHORD,
    CHORD_EXPIRY,
    DUPLICATE,
    HISTORY,
    POSITION,
    REFUSED,
    SIDE,
    Place,
    expiry,
    translated,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pymongo import MongoClient
    from pymongo.collection import Collection

    from celery_kafka_backend.changes import Batch, Change, ChordFact
    from celery_kafka_backend.events import Event

MAX_BSON: Final = 16 * 1024 * 1024 - 64 * 1024
"""A document's limit, less what stands around the payload."""
SURELY_FITS: Final = 4 * 1024 * 1024
"""A document that is not JSON stands beside its result, and beside children and arguments of 1 MB each at most."""
CHUNK: Final = 1000
"""Writes per round trip: a slow server must answer within the socket's timeout, or the same batch comes for ever."""
SWEEP_EVERY_S: Final = 10.0
SWEEP_ROWS: Final = 2000
_TTL: Final = 0
_ENDS: Final = "ckb.x_1"


class Write(NamedTuple):
    """An operation, and the change that it belongs to."""

    id: str
    operation: Any


class MongoSink(Sink):
    """Writes a view in MongoDB."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._place = Place(url, options)
        self.url = self._place.url
        self._namespace = options.namespace
        self._history = options.history is not False
        self._history_ms = options.history_retention_ms
        self._limit = MAX_BSON
        self._client: MongoClient[dict[str, Any]] | None = None
        self._sweep_due = 0.0

    def open(self) -> None:
        """Connect, and make the indexes that are missing."""
        self.close()
        client = self._place.connect()
        try:
            with translated(self.url):
                self._make_indexes(client)
        except errors.OperationFailure as exc:
            client.close()
            said = (exc.details or {}).get("errmsg", exc)
            problem = f"{self.url}: somebody made a collection or an index differently: {said}"
            raise SettingsError("view", problem, "drop it, or name another database or collection") from exc
        except BaseException:
            client.close()
            raise
        self._client = client

    def _make_indexes(self, client: MongoClient[dict[str, Any]]) -> None:
        for subject in (TASK, GROUP):
            native = self._place.native(client, subject)
            native.create_index("ckb.x", name=_ENDS, expireAfterSeconds=_TTL)
            native.create_index("ckb.u", partialFilterExpression={"ckb.u": {"$exists": True}})
        for name in (SIDE, HISTORY):
            self._place.collection(client, name).create_index("x", expireAfterSeconds=_TTL)
        self._place.collection(client, HISTORY).create_index("at")
        self._place.collection(client, CHORD).create_index("_id.g")
        self._place.collection(client, CHORD_EXPIRY).create_index("x")

    def close(self) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def warnings(self) -> list[str]:
        """Say which index of somebody's deletes what guards the view."""
        found = []
        with translated(self.url), self._place.connect() as client:
            for subject in (TASK, GROUP):
                native = self._place.native(client, subject)
                found += [
                    f"index {index} of {native.name} deletes documents after {about['expireAfterSeconds']} s, with the keys that guard"
                    " them: an older event may show again; drop it, for what expires is removed by an index of ours"
                    for index, about in native.index_information().items()
                    if "expireAfterSeconds" in about and index != _ENDS
                ]
        return found

    def write(self, batch: Batch) -> None:
        """Write side records, then documents, history and facts; then the positions."""
        if self._client is None:
            self.open()
        now_ms = system_wall_ms()
        refused: list[tuple[str, str]] = []
        changes = []
        for change in batch.changes:
            reason = _refusal(change, self._limit, history=self._history)
            refused.append((change.id, reason)) if reason else changes.append(change)
        with translated(self.url):
            self._bury(changes, batch.chords, now_ms)
            said = [change for change in changes if not change.only_history]
            tasks = [change for change in said if change.subject == TASK]
            groups = [change for change in said if change.subject == GROUP]
            self._send(self._collection(SIDE), [_side_write(change) for change in tasks], refused)
            for subject, found in ((TASK, tasks), (GROUP, groups)):
                self._show(subject, found, now_ms, refused)
            if self._history:
                self._send(self._collection(HISTORY), _log_writes(changes, self._history_ms), refused)
            self._chords(batch.chords, refused)
            positions = [
                Write(
                    "", UpdateOne({"_id": {"n": self._namespace, "t": t, "p": p}}, {"$max": {"next": n}}, upsert=True)
                )
                for (t, p), n in batch.positions.items()
            ]
            unmoved: list[tuple[str, str]] = []
            self._send(self._collection(POSITION), positions, unmoved)
        if unmoved:
            raise SettingsError("view", f"{self.url} takes no positions: {unmoved[0][1]}", f"check who made {POSITION}")
        if refused:
            raise Rejected(refused)

    # -- documents -----------------------------------------------------------------------------

    def _show(self, subject: str, changes: Sequence[Change], now_ms: int, refused: list[tuple[str, str]]) -> None:
        native = self._native(subject)
        self._send(native, [_guarded(change, now_ms) for change in changes], refused)
        if subject == TASK:
            self._prolong(native, [change for change in changes if change.winner is not None])

    def _prolong(self, native: Collection[dict[str, Any]], winners: Sequence[Change]) -> None:
        """Let keys guard as long as their side records stay, which may have been told to stay longer before.

        No decision rests on what is read here: expiries only grow, and both are maxima.
        """
        least = {change.id: expiry(change.expires_at) for change in winners}
        found = self._collection(SIDE).find({"_id": {"$in": list(least)}}, {"x": 1})
        later = [
            Write(
                each["_id"], UpdateOne({"_id": each["_id"], "ckb.k": {"$exists": True}}, {"$max": {"ckb.x": each["x"]}})
            )
            for each in found
            if each["x"] > least[each["_id"]]
        ]
        self._send(native, later, [])

    # -- chords --------------------------------------------------------------------------------

    def _chords(self, facts: Sequence[ChordFact], refused: list[tuple[str, str]]) -> None:
        self._send(self._collection(CHORD), [_fact_write(fact) for fact in facts], refused)
        ends: dict[str, DatetimeMS] = {}
        for fact in facts:
            ends[fact.group] = max(expiry(fact.expires_at), ends.get(fact.group, DatetimeMS(0)))
        writes = [Write(g, UpdateOne({"_id": g}, {"$max": {"x": x}}, upsert=True)) for g, x in ends.items()]
        self._send(self._collection(CHORD_EXPIRY), writes, refused)

    # -- what has expired ----------------------------------------------------------------------

    def _bury(self, changes: Sequence[Change], facts: Sequence[ChordFact], now_ms: int) -> None:
        """Delete what has expired of this batch, for it counts as absent; and now and then some of the rest."""
        now = DatetimeMS(now_ms)
        side, chords = self._collection(SIDE), self._collection(CHORD_EXPIRY)
        ids = [change.id for change in changes if change.subject == TASK]
        if ids and side.find_one({"x": {"$lte": now}}, {"_id": 1}) is not None:
            side.delete_many({"_id": {"$in": ids}, "x": {"$lte": now}})
        groups = list({fact.group for fact in facts})
        if groups:
            self._bury_chords([each["_id"] for each in chords.find({"_id": {"$in": groups}, "x": {"$lte": now}})], now)
        if time.monotonic() >= self._sweep_due:
            self._sweep_due = time.monotonic() + SWEEP_EVERY_S
            for subject in (TASK, GROUP):
                kept = {**{name: f"$ckb.{name}" for name in "kex"}, "d": []}
                hidden = {"$mergeObjects": [{"_id": "$_id"}, {"$literal": NOTHING[subject]}, {"ckb": kept}]}
                expired = {"ckb.u": {"$lte": now}, "ckb.x": {"$gt": now}}
                self._native(subject).update_many(expired, [{"$replaceWith": hidden}])
            found = chords.find({"x": {"$lte": now}}, limit=SWEEP_ROWS)
            self._bury_chords([each["_id"] for each in found], now)

    def _bury_chords(self, groups: Sequence[str], now: DatetimeMS) -> None:
        """Facts first: a crash in between leaves what the next sweep finds."""
        if groups:
            self._collection(CHORD).delete_many({"_id.g": {"$in": groups}, "x": {"$lte": now}})
            self._collection(CHORD_EXPIRY).delete_many({"_id": {"$in": groups}, "x": {"$lte": now}})

    # -- the wire ------------------------------------------------------------------------------

    def _collection(self, name: str) -> Collection[dict[str, Any]]:
        assert self._client is not None
        return self._place.collection(self._client, name)

    def _native(self, subject: str) -> Collection[dict[str, Any]]:
        assert self._client is not None
        return self._place.native(self._client, subject)

    @staticmethod
    def _send(collection: Collection[dict[str, Any]], writes: Sequence[Write], refused: list[tuple[str, str]]) -> None:
        """Write all, in any order; add what the server will never take to ``refused``."""
        for start in range(0, len(writes), CHUNK):
            chunk = writes[start : start + CHUNK]
            try:
                collection.bulk_write([write.operation for write in chunk], ordered=False)
            except errors.BulkWriteError as exc:
                found = [error for error in exc.details["writeErrors"] if error["code"] != DUPLICATE]
                if exc.details.get("writeConcernErrors") or any(error["code"] not in REFUSED for error in found):
                    raise
                refused += [(chunk[error["index"]].id, error["errmsg"]) for error in found]


def _refusal(change: Change, limit: int, *, history: bool) -> str:
    if reason := id_refusal(change.id):
        return reason
    document = change.document or b""
    size = len(document)
    if change.winner is not None and SURELY_FITS < size <= limit:
        fields, pieces = _fields_of(change.subject, change.winner, document)
        size = len(bson.encode({**fields, "d": pieces}))
    if size > limit:
        return f"a document of {size} bytes; the limit is {limit}"
    largest = max((len(value) for _, value in change.history), default=0) if history else 0
    return f"an event of {largest} bytes; the limit is {limit}" if largest > limit else ""


def _fields_of(subject: str, event: Event, document: bytes) -> tuple[dict[str, Any], list[bytes]]:
    return (task_fields if subject == TASK else group_fields)(event, document)


def _guarded(change: Change, now_ms: int) -> Write:
    """Return the update that shows a change's winner, unless what is there is greater."""
    ends = expiry(change.expires_at)
    prolonged = {"x": {"$max": ["$ckb.x", ends]}}
    winner = change.winner
    if winner is None:
        return Write(change.id, UpdateOne({"_id": change.id, "ckb.k": {"$exists": True}}, {"$max": {"ckb.x": ends}}))
    document = change.document
    if 0 < (winner.expires_at or 0) <= now_ms:
        document = None
    guard: dict[str, Any] = {"k": winner.key, "e": winner.id, "d": []}
    if document is None:
        fields = NOTHING[change.subject]
    else:
        fields, guard["d"] = _fields_of(change.subject, winner, document)
        if winner.expires_at:
            guard["u"] = expiry(winner.expires_at)
    # A document without a key, or with one that has expired, is below every key: a missing field is below all dates.
    wins: dict[str, Any] = {
        "$or": [
            {"$lte": ["$ckb.x", DatetimeMS(now_ms)]},
            {"$lt": ["$ckb.k", winner.key]},
            {"$and": [{"$eq": ["$ckb.k", winner.key]}, {"$lt": ["$ckb.e", winner.id]}]},
        ]
    }
    stays: Any = "$$ROOT"
    if change.document is not None and change.subject == TASK:  # only a forget takes a stock SUCCESS away
        safe = ["SUCCESS", "FAILURE", "REVOKED"] if rank_of_key(winner.key) is Rank.UNREADY else ["SUCCESS"]
        stock = {"$and": [{"$in": ["$status", safe]}, {"$eq": [{"$type": "$ckb"}, "missing"]}]}
        wins = {"$and": [{"$not": [stock]}, wins]}
        stays = {"$cond": [stock, "$$ROOT", _with_ckb("$$ROOT", "$ckb", prolonged)]}
    else:
        stays = _with_ckb("$$ROOT", "$ckb", prolonged)
    shown = _with_ckb({"$literal": {"_id": change.id, **fields}}, {"$literal": guard}, prolonged)
    return Write(
        change.id, UpdateOne({"_id": change.id}, [{"$replaceWith": {"$cond": [wins, shown, stays]}}], upsert=True)
    )


def _with_ckb(fields: Any, ckb: Any, more: dict[str, Any]) -> dict[str, Any]:
    return {"$mergeObjects": [fields, {"ckb": {"$mergeObjects": [ckb, more]}}]}


def _side_write(change: Change) -> Write:
    side = change.side or Side(expires_at=change.expires_at)
    update: dict[str, Any] = {
        "$max": {"run": side.run, "seen": side.seen, "attempts": side.attempts, "x": expiry(side.expires_at)}
    }
    earliest = {"sent": side.sent, "received": side.received, "started": side.started}
    if known := {name: at for name, at in earliest.items() if at}:
        update["$min"] = known
    if side.workers:
        update["$addToSet"] = {"workers": {"$each": list(side.workers)}}
    return Write(change.id, UpdateOne({"_id": change.id}, update, upsert=True))


def _log_writes(changes: Iterable[Change], retention_ms: int | None) -> list[Write]:
    """Return inserts: an event that is there already is refused as a duplicate, which is what is wanted."""
    writes = []
    for change in changes:
        for e, value in change.history:
            entry = {"_id": {"t": change.id, "h": e.hlc, "e": e.id}, **beside(e), "at": DatetimeMS(e.at)}
            if expires_at := history_expiry(e, retention_ms):
                entry["x"] = expiry(expires_at)
            entry["value"] = bytes(value)
            writes.append(Write(change.id, InsertOne(entry)))
    return writes


def _fact_write(fact: ChordFact) -> Write:
    newer = {"$lt": [{"$ifNull": ["$k", -1]}, fact.order]}
    update = [
        {
            "$set": {
                "v": {"$cond": [newer, {"$literal": fact.value}, "$v"]},
                "k": {"$max": ["$k", fact.order]},
                "x": {"$max": ["$x", expiry(fact.expires_at)]},
            }
        }
    ]
    return Write(fact.group, UpdateOne({"_id": {"g": fact.group, "n": fact.name}}, update, upsert=True))


def sink(url: str, options: StoreOptions) -> Sink:
    """Return the write side of ``mongodb://…`` or ``mongodb+srv://…``."""
    return MongoSink(url, options)


def view(url: str, options: StoreOptions) -> View:
    """Return the read side of ``mongodb://…`` or ``mongodb+srv://…``."""
    return MongoView(url, options)
