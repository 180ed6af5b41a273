"""The read side of the Elasticsearch store; indices and guarantee are in `elasticsearch`."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec
from elasticsearch import exceptions

from celery_kafka_backend.changes import GROUP, TASK, Partition, Side
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.sinks.contract import (
    DOCUMENTS,
    Row,
    Shown,
    StoreOptions,
    document_row,
    history_row,
    or_unreadable,
    side_row,
)
from celery_kafka_backend.sinks.elasticsearch_indices import NEVER
from celery_kafka_backend.sinks.elasticsearch_native import beside, native, stock_document, taken
from celery_kafka_backend.sinks.elasticsearch_wire import READ_TIMEOUT_S, Place, bounded, translated
from celery_kafka_backend.sinks.native_columns import wrong
from celery_kafka_backend.sinks.per_process import DriverView, PerProcess

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from elasticsearch import Elasticsearch

    from celery_kafka_backend.events import Event
    from celery_kafka_backend.query import Query

CHUNK: Final = 1000
"""Documents per round trip of a read."""
MAX_ID_BYTES: Final = 512
"""The server's limit."""
KEEP_ALIVE: Final = "2m"
_NOT_BESIDE: Final = frozenset({"task", "hlc", "event", "x", "text", "binary"})
_NOTHING: Final = Shown(None, 0, "", None)


def chord_id(group: str) -> str:
    """Return the id of what is known of a chord as a whole."""
    return f"chord-{group}"


def positions_id(namespace: str) -> str:
    """Return the id of the document with a pipeline's positions."""
    return f"celery-kafka-positions-{namespace}"


class ElasticView(DriverView["Elasticsearch"]):
    """Reads a view in Elasticsearch."""

    by_time = True

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._place = Place(url, options)
        self.url = self._place.url
        self._namespace = options.namespace
        self._serializer = options.serializer
        self._own = PerProcess(lambda: self._place.connect(READ_TIMEOUT_S), lambda client: client.close())

    @property
    def _client(self) -> Elasticsearch:
        return bounded(self._own.client)

    # -- by id: as of now, not of a refresh ----------------------------------------------------

    def documents(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read by id, a thousand at a time."""
        return self._documents(TASK, ids)

    def groups(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read by id, a thousand at a time."""
        return self._documents(GROUP, ids)

    def _documents(self, subject: str, ids: Sequence[str]) -> dict[str, bytes]:
        with translated(self.url):
            found = {each: shown.document for each, shown in self._find(subject, ids)}
        return {each: document for each, document in found.items() if document is not None}

    def shown(self, ids: Sequence[str]) -> dict[str, Shown]:
        """Read by id: the side record is in the same document."""
        with translated(self.url):
            return {each: shown for each, shown in self._find(TASK, ids) if shown != _NOTHING}

    def _find(self, subject: str, ids: Sequence[str]) -> Iterator[tuple[str, Shown]]:
        prefix = self._place.prefixes[subject]
        for start in range(0, len(ids), CHUNK):
            keys = [prefix + each for each in ids[start : start + CHUNK]]
            now_ms = system_wall_ms()
            for found in self._mget(self._place.native, keys):
                shown = _shown(found["_source"], now_ms, task=subject == TASK, serializer=self._serializer)
                yield found["_id"][len(prefix) :], shown

    def _mget(self, index: str, keys: Sequence[str]) -> list[Any]:
        """Return what there is; an index that nobody has made yet holds nothing."""
        docs = self._client.mget(index=index, ids=list(keys), filter_path="docs._id,docs.found,docs._source,docs.error")
        found = docs.body.get("docs", [])
        for each in found:
            error = each.get("error")
            if error is not None and error.get("type") != "index_not_found_exception":
                raise exceptions.TransportError(f"{error.get('type')}: {error.get('reason')}")
        return [each for each in found if each.get("found")]

    def positions(self) -> dict[Partition, int]:
        """Read all of this pipeline's, which are one document."""
        found: dict[Partition, int] = {}
        with translated(self.url):
            for document in self._mget(self._place.native, [positions_id(self._namespace)]):
                for name, offset in document["_source"]["ckb"]["next"].items():
                    topic, _, number = name.rpartition(":")
                    found[Partition(topic, int(number))] = offset
        return found

    # -- by search -----------------------------------------------------------------------------

    def history(self, task_id: str) -> list[bytes]:
        """Search the history's indices, refreshed."""
        if len(task_id.encode()) > MAX_ID_BYTES:
            return []
        with translated(self.url):
            pattern = f"{self._place.history}-*"
            found = self._search(pattern, {"term": {"task": task_id}}, [{"hlc": "asc"}, {"event": "asc"}])
            now_ms = system_wall_ms()
            return [_bytes(entry) for entry in _once(found) if entry.get("x", NEVER) > now_ms]

    def candidates(self, query: Query) -> Iterator[bytes]:
        """Search the history's indices by their fields, refreshed; text is left to `Query.matches`."""
        with translated(self.url):
            now_ms = system_wall_ms()
            wanted = {"bool": {"filter": list(_conditions(query))}}
            by_time = [{"at": "desc" if query.newest_first else "asc"}, {"event": "asc"}]
            for entry in _once(self._search(f"{self._place.history}-*", wanted, by_time)):
                if entry.get("x", NEVER) > now_ms:
                    yield _bytes(entry)

    def chord(self, group_id: str) -> dict[str, bytes]:
        """Search for all facts of a group that has not expired."""
        with translated(self.url):
            for chord in self._mget(self._place.beside, [chord_id(group_id)]):
                if chord["_source"]["x"] > system_wall_ms():
                    facts = self._facts([group_id], {group_id: chord["_source"]})
                    return {fact["n"]: _bytes(fact) for fact in facts}
        return {}

    def _facts(self, groups: Sequence[str], chords: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the facts that were not there before their chord last expired."""
        which = {"bool": {"filter": [{"term": {"what": "fact"}}, {"terms": {"g": list(groups)}}]}}
        for _, fact in self._search(self._place.beside, which):
            if fact["x"] > chords[fact["g"]]["born"]:
                yield fact

    def _search(
        self, index: str, query: dict[str, Any], sort: Sequence[dict[str, str]] = ({"_shard_doc": "asc"},)
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield id and source of all that matches, of one moment; nothing where there is no such index."""
        client = self._client
        try:
            client.indices.refresh(index=index, ignore_unavailable=True)
            moment = client.open_point_in_time(index=index, keep_alive=KEEP_ALIVE, ignore_unavailable=True)["id"]
        except exceptions.NotFoundError:
            return
        try:
            after = None
            while True:
                page = self._client.search(
                    pit={"id": moment, "keep_alive": KEEP_ALIVE}, query=query, sort=list(sort), size=CHUNK,
                    search_after=after, track_total_hits=False,
                )  # fmt: skip
                for hit in page["hits"]["hits"]:
                    yield hit["_id"], hit["_source"]
                    after = hit["sort"]
                if len(page["hits"]["hits"]) < CHUNK:
                    return
        finally:
            self._client.close_point_in_time(id=moment)

    # -- all of it -----------------------------------------------------------------------------

    def rows(self) -> Iterator[Row]:
        """Scan the indices; each is of one moment, together they are not."""
        with translated(self.url):
            now_ms = system_wall_ms()
            alive: dict[str, Any] = {"range": {"ckb.x": {"gt": now_ms}}}
            for key, source in self._search(self._place.native, alive):
                for subject, prefix in self._place.prefixes.items():
                    if key.startswith(prefix):
                        each = key[len(prefix) :]
                        made = self._native_rows(subject, each, source, now_ms)
                        yield from or_unreadable(DOCUMENTS[subject], each, made)
            for key, entry in self._search(f"{self._place.history}-*", {"match_all": {}}):
                where = f"{entry.get('task', key)}/{entry.get('hlc', 0)}/{entry.get('event', '')}"
                yield from or_unreadable("history", where, _history_rows(entry, now_ms))
            yield from self._chord_rows(now_ms)

    def _native_rows(self, subject: str, each: str, source: dict[str, Any], now_ms: int) -> Iterator[Row]:
        shown, ckb = _shown(source, now_ms, task=subject == TASK), source["ckb"]
        if shown.document is not None and shown.key:
            said = partial(_said, subject, as_text=not isinstance(source.get("result"), dict))
            found = {"result": source["result"]} if "result" in source else {}  # by @timestamp one knows whose it is
            bad = wrong(found, said, shown.document, shown.event_id, partial(self.history, each))
            yield document_row(subject, each, shown.document, ckb.get("u", 0), bad)
        side = shown.side or Side(expires_at=_expiry_ms(ckb["x"]))
        yield side_row(subject, each, ckb["k"], ckb["e"], side)

    def _chord_rows(self, now_ms: int) -> Iterator[Row]:
        alive = {"bool": {"filter": [{"term": {"what": "chord"}}, {"range": {"x": {"gt": now_ms}}}]}}
        for chunk in _chunks(chord for _, chord in self._search(self._place.beside, alive)):
            chords = {each["g"]: each for each in chunk}
            for fact in self._facts(list(chords), chords):
                key = f"{fact['g']}/{fact.get('n')}"
                yield from or_unreadable("chord", key, _fact_rows(key, fact, chords[fact["g"]]["x"]))


def _conditions(query: Query) -> Iterator[dict[str, Any]]:
    bounds = {"gte": query.since, "lt": query.until}
    if given := {name: at for name, at in bounds.items() if at is not None}:
        yield {"range": {"at": given}}
    if query.states:
        yield _any_of({"terms": {"state": list(query.states)}}, {"terms": {"kind": list(query.states)}})
    for field, pattern in (("name", query.name), ("worker", query.worker), ("queue", query.queue)):
        if pattern:
            yield _like(field, pattern)
    if query.exception:
        yield _any_of(_like("exception", query.exception), _like("exception", f"*.{query.exception}"))
    for field, value in (("root", query.root), ("group", query.group)):
        if value:
            yield _any_of({"term": {"task": value}}, {"term": {field: value}}, _too_long(field))
    if query.retries:
        yield {"range": {"attempt": {"gte": query.retries}}}
    lengths = {"gte": query.least_s, "lte": query.most_s}
    if given_s := {name: seconds for name, seconds in lengths.items() if seconds is not None}:
        yield {"range": {"runtime_s": given_s}}


def _once(found: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield each entry once: one that was written again when its retention had changed is in two indices, side by side."""
    before = ""
    for key, entry in found:
        if key != before:
            yield entry
        before = key


def _any_of(*conditions: dict[str, Any]) -> dict[str, Any]:
    return {"bool": {"should": list(conditions), "minimum_should_match": 1}}


def _like(field: str, pattern: str) -> dict[str, Any]:
    return _any_of({"wildcard": {field: {"value": pattern.replace("\\", "\\\\")}}}, _too_long(field))


def _too_long(field: str) -> dict[str, Any]:
    """Return the condition for entries whose value is too long for the index, which are left to `Query.matches`."""
    return {"term": {"_ignored": field}}


def _chunks(found: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    source = iter(found)
    while chunk := list(islice(source, CHUNK)):
        yield chunk


def _said(subject: str, event: Event, document: bytes, *, as_text: bool) -> dict[str, Any]:
    """Return Celery's ``result``, as it comes out of JSON."""
    fields = native(subject, event, document, as_text=as_text).fields
    return {name: msgspec.json.decode(msgspec.json.encode(fields[name])) for name in ("result",) if name in fields}


def _history_rows(entry: dict[str, Any], now_ms: int) -> Iterator[Row]:
    if entry.get("x", NEVER) > now_ms:
        where = f"{entry['task']}/{entry['hlc']}/{entry['event']}"
        found = {name: value for name, value in entry.items() if name not in _NOT_BESIDE}
        yield history_row(where, _bytes(entry), _expiry_ms(entry.get("x", 0)), found, beside)


def _fact_rows(key: str, fact: dict[str, Any], until: int) -> Iterator[Row]:
    yield Row("chord", key, {"k": fact["k"], "value": _bytes(fact)}, _expiry_ms(until))


def _shown(source: Mapping[str, Any], now_ms: int, *, task: bool, serializer: str = "json") -> Shown:
    """Return what one of Celery's documents shows now."""
    ckb = source.get("ckb") or {}
    ours = "t" in ckb and ckb["t"] == source.get("@timestamp")
    alive = ckb.get("x", 0) > now_ms
    side = _side(ckb) if alive and task and "seen" in ckb else None
    if not ours and "result" in source:
        return Shown(stock_document(source, serializer), 0, "", side)
    if not alive:
        return _NOTHING
    visible = ours and ckb.get("u", NEVER) > now_ms
    document = (taken(ckb) or str(source["result"]).encode()) if visible else None
    return Shown(document, ckb["k"], ckb["e"], side)


def _side(ckb: Mapping[str, Any]) -> Side:
    return Side(
        run=ckb["run"],
        seen=ckb["seen"],
        sent=ckb.get("sent", 0),
        received=ckb.get("received", 0),
        started=ckb.get("started", 0),
        attempts=ckb["attempts"],
        workers=tuple(sorted(ckb["workers"])),
        expires_at=_expiry_ms(ckb["x"]),
    )


def _bytes(entry: Mapping[str, Any]) -> bytes:
    return taken(entry) or b""


def _expiry_ms(stored: int) -> int:
    """Return an expiry, ms since 1970; 0: never."""
    return 0 if stored == NEVER else stored
