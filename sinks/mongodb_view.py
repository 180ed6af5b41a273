"""The read side of the MongoDB store; collections and guarantee are in `mongodb`."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, cast

from bson.datetime_ms import DatetimeMS
from bson.int64 import Int64
from bson.max_key import MaxKey
from bson.min_key import MinKey
from pymongo import errors

from celery_kafka_backend.changes import GROUP, TASK, Partition, Side
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.query import expression
from celery_kafka_backend.sinks.contract import (
    DOCUMENTS,
    Page,
    Row,
    Shown,
    StoreOptions,
    Subscription,
    document_row,
    history_row,
    or_unreadable,
    side_row,
)
from celery_kafka_backend.sinks.mongodb_native import (
    NOTHING,
    beside,
    document_of,
    group_fields,
    stock_document,
    stock_group,
    task_fields,
)
from celery_kafka_backend.sinks.mongodb_stock import stock
from celery_kafka_backend.sinks.mongodb_stream import ChangeStream
from celery_kafka_backend.sinks.mongodb_wire import (
    AWAY,
    CHORD,
    CHORD_EXPIRY,
    HISTORY,
    POSITION,
    SIDE,
    Place,
    expiry_ms,
    translated,
)
from celery_kafka_backend.sinks.native_columns import differing, wrong
from celery_kafka_backend.sinks.per_process import DriverView, PerProcess

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pymongo import MongoClient
    from pymongo.client_session import ClientSession
    from pymongo.collection import Collection

    from celery_kafka_backend.events import Event
    from celery_kafka_backend.query import Query

CHUNK: Final = 1000
"""Ids per round trip of a read."""


def _now() -> DatetimeMS:
    return DatetimeMS(system_wall_ms())


class MongoView(DriverView["MongoClient[dict[str, Any]]"]):
    """Reads a view in MongoDB."""

    by_time = True

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._place = Place(url, options)
        self.url = self._place.url
        self._namespace = options.namespace
        self._serializer = options.serializer
        self._own = PerProcess(self._place.connect, lambda client: client.close())

    @property
    def _client(self) -> MongoClient[dict[str, Any]]:
        return self._own.client

    def _collection(self, name: str) -> Collection[dict[str, Any]]:
        return self._place.collection(self._client, name)

    def _native(self, subject: str) -> Collection[dict[str, Any]]:
        return self._place.native(self._client, subject)

    def _find(
        self, collection: Collection[dict[str, Any]], ids: Sequence[str], session: ClientSession | None = None
    ) -> Iterator[dict[str, Any]]:
        for start in range(0, len(ids), CHUNK):
            yield from collection.find({"_id": {"$in": list(ids[start : start + CHUNK])}}, session=session)

    def documents(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read by ``$in``, a thousand at a time."""
        return self._documents(TASK, ids)

    def groups(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read by ``$in``, a thousand at a time."""
        return self._documents(GROUP, ids)

    def _documents(self, subject: str, ids: Sequence[str], session: ClientSession | None = None) -> dict[str, bytes]:
        with translated(self.url):
            found = {
                each["_id"]: self._shown_of(each, subject) for each in self._find(self._native(subject), ids, session)
            }
        return {each: shown.document for each, shown in found.items() if shown.document is not None}

    def _shown_of(self, found: dict[str, Any], subject: str = TASK) -> Shown:
        """Return what one of Celery's documents shows now, without its side record."""
        ckb, now = found.get("ckb"), _now()
        if ckb is None:
            document = (stock_document if subject == TASK else stock_group)(found, self._serializer)
            return Shown(document, 0, "", None)
        if ckb["x"] <= now:
            return Shown(None, 0, "", None)
        visible = ckb["d"] and not ("u" in ckb and ckb["u"] <= now)
        return Shown(document_of(found) if visible else None, ckb["k"], ckb["e"], None)

    def shown(self, ids: Sequence[str]) -> dict[str, Shown]:
        """Read documents, then side records."""
        with translated(self.url):
            found = {each["_id"]: self._shown_of(each) for each in self._find(self._native(TASK), ids)}
            now = _now()
            for each in self._find(self._collection(SIDE), ids):
                if each["x"] > now:
                    found[each["_id"]] = found.get(each["_id"], Shown(None, 0, "", None))._replace(side=_side(each))
        return {each: shown for each, shown in found.items() if shown != Shown(None, 0, "", None)}

    def history(self, task_id: str) -> list[bytes]:
        """Read a range of the primary index."""
        first, last = ({"t": task_id, "h": end, "e": end} for end in (MinKey(), MaxKey()))
        with translated(self.url):
            found = self._collection(HISTORY).find({"_id": {"$gte": first, "$lte": last}}).sort("_id", 1)
            now = _now()
            return [bytes(each["value"]) for each in found if "x" not in each or each["x"] > now]

    def candidates(self, query: Query) -> Iterator[bytes]:
        """Find by the index on time, and by what an entry has beside its value; the rest is left to `Query.matches`."""
        with translated(self.url):
            now = _now()
            found = self._collection(HISTORY).find({"$and": [{}, *_conditions(query)]})
            for each in found.sort("at", -1 if query.newest_first else 1):
                if "x" not in each or each["x"] > now:
                    yield bytes(each["value"])

    def chord(self, group_id: str) -> dict[str, bytes]:
        """Read all facts of a group that has not expired."""
        with translated(self.url):
            if not self._collection(CHORD_EXPIRY).count_documents({"_id": group_id, "x": {"$gt": _now()}}, limit=1):
                return {}
            found = self._collection(CHORD).find({"_id.g": group_id})
            return {each["_id"]["n"]: bytes(each["v"]) for each in found}

    def positions(self) -> dict[Partition, int]:
        """Read all of this pipeline's."""
        with translated(self.url):
            found = self._collection(POSITION).find({"_id.n": self._namespace})
            return {Partition(each["_id"]["t"], each["_id"]["p"]): each["next"] for each in found}

    def watch(self, ids: Sequence[str]) -> Subscription | None:
        """Open a change stream; a standalone server has none, nor a user who may not."""
        with translated(self.url):
            try:
                return ChangeStream(self.url, self._native(TASK), ids, partial(self._documents, TASK))
            except errors.OperationFailure as exc:
                if exc.code in AWAY:
                    raise
        return None

    def stock(self, after: str = "") -> Iterator[Page]:
        """Read Celery's own collections by id."""
        return stock(self.url, self._native, after)

    def rows(self) -> Iterator[Row]:
        """Scan the collections; not a snapshot."""
        return (row._replace(columns=_plain(row.columns)) for row in self._rows())

    def _rows(self) -> Iterator[Row]:
        with translated(self.url):
            for subject in (TASK, GROUP):
                for each in self._native(subject).find({"ckb.x": {"$gt": _now()}}):
                    yield from or_unreadable(DOCUMENTS[subject], str(each["_id"]), self._native_rows(subject, each))
            yield from self._all_side_rows()
            for each in self._collection(HISTORY).find({"$or": [{"x": {"$exists": False}}, {"x": {"$gt": _now()}}]}):
                at = each.pop("_id")
                key = f"{at['t']}/{at['h']}/{at['e']}"
                yield from or_unreadable("history", key, _history_rows(key, each))
            yield from self._all_fact_rows()

    def _native_rows(self, subject: str, each: dict[str, Any]) -> Iterator[Row]:
        """Yield what one of Celery's documents shows, with what is wrong in it, and of a group its key."""
        name, ckb, until = each["_id"], each["ckb"], expiry_ms(each["ckb"].get("u"))
        if subject == GROUP:
            yield side_row(GROUP, name, ckb["k"], ckb["e"], Side(expires_at=expiry_ms(ckb["x"])))
        document = self._shown_of(each, subject).document
        columns = _plain({field: value for field, value in each.items() if field not in ("_id", "ckb")})
        if document is not None:
            bad = wrong(columns, _SAID[subject], document, ckb["e"], partial(self.history, name))
            yield document_row(subject, name, document, until, bad)
        elif not ckb["d"] and (bad := differing(columns, NOTHING[subject])):
            yield document_row(subject, name, None, until, bad)

    def _all_side_rows(self) -> Iterator[Row]:
        for chunk in _chunks(self._collection(SIDE).find({"x": {"$gt": _now()}})):
            natives = self._native(TASK).find(
                {"_id": {"$in": [each["_id"] for each in chunk]}}, {"ckb.d": 0, "result": 0}
            )
            keys = {each["_id"]: each["ckb"] for each in natives if "ckb" in each}
            for each in chunk:
                yield from or_unreadable("side", str(each["_id"]), _side_rows(each, keys.get(each["_id"])))

    def _all_fact_rows(self) -> Iterator[Row]:
        for chunk in _chunks(self._collection(CHORD_EXPIRY).find({"x": {"$gt": _now()}})):
            ends = {each["_id"]: expiry_ms(each["x"]) for each in chunk}
            for each in self._collection(CHORD).find({"_id.g": {"$in": list(ends)}}):
                group, name = each["_id"]["g"], each["_id"]["n"]
                key = f"{group}/{name}"
                yield from or_unreadable("chord", key, _fact_rows(key, each, ends[group]))


def _side_rows(each: dict[str, Any], ckb: dict[str, Any] | None) -> Iterator[Row]:
    if ckb is None or not ckb["x"] > _now():
        ckb = {"k": 0, "e": ""}
    yield side_row(TASK, each["_id"], ckb["k"], ckb["e"], _side(each))


def _history_rows(key: str, each: dict[str, Any]) -> Iterator[Row]:
    value, until = bytes(each.pop("value")), expiry_ms(each.pop("x", None))
    yield history_row(key, value, until, _plain(each), beside)


def _fact_rows(key: str, each: dict[str, Any], until: int) -> Iterator[Row]:
    yield Row("chord", key, {"k": each["k"], "value": bytes(each["v"])}, until)


def _plain_task(event: Event, document: bytes) -> dict[str, Any]:
    return cast("dict[str, Any]", _plain(task_fields(event, document)[0]))


def _plain_group(event: Event, document: bytes) -> dict[str, Any]:
    return cast("dict[str, Any]", _plain(group_fields(event, document)[0]))


_SAID: Final = {TASK: _plain_task, GROUP: _plain_group}
"""What Celery's fields are to be."""


def _plain(value: Any) -> Any:
    """Return a value without the driver's own types: numbers as numbers, times as ms since 1970."""
    if isinstance(value, (Int64, DatetimeMS)):
        return int(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _conditions(query: Query) -> Iterator[dict[str, Any]]:
    bounds = {"$gte": query.since, "$lt": query.until}
    if given := {name: DatetimeMS(at) for name, at in bounds.items() if at is not None}:
        yield {"at": given}
    if query.states:
        yield {"$or": [{"state": {"$in": list(query.states)}}, {"kind": {"$in": list(query.states)}}]}
    for field, pattern in (("name", query.name), ("worker", query.worker)):
        if pattern:
            yield _like(field, pattern)
    if query.exception:
        yield {"$or": [_like("exception", query.exception), _like("exception", f"*.{query.exception}")]}


def _like(field: str, pattern: str) -> dict[str, Any]:
    return {field: {"$regex": f"^(?:{expression(pattern)})\\z", "$options": "s"}}


def _chunks(found: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    source = iter(found)
    while chunk := list(islice(source, CHUNK)):
        yield chunk


def _side(found: dict[str, Any]) -> Side:
    return Side(
        run=found["run"],
        seen=found["seen"],
        sent=found.get("sent", 0),
        received=found.get("received", 0),
        started=found.get("started", 0),
        attempts=found["attempts"],
        workers=tuple(sorted(found.get("workers", ()))),
        expires_at=expiry_ms(found["x"]),
    )
