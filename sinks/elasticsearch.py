"""Elasticsearch: the view that stock Celery clients of Elasticsearch read, with the whole history, searchable.

``elasticsearch://host,host/index`` or ``elasticsearch+https://…``. Indices, for an index ``celery``::

    celery                        a task (celery-task-meta-<id>) or saved group: Celery's ``result`` and ``@timestamp``,
                                  missing if nothing is shown; and ours in ``ckb``:
                                    k, e  order key and id of the event shown      u  shown until
                                    x     when all of ours may be forgotten        t  the @timestamp that we wrote
                                    text, binary   the document, where ``result`` is not it
                                    run, seen, sent, received, started, attempts, workers   the side record
                                  the positions, in ``ckb.next``: who loses what they promise, loses them with it
    celery-kafka                  facts about chords, how long each chord's stay
    celery-kafka-history-<day>    an event, until its day: elasticsearch_indices says which

A task is one scripted update, which compares and replaces inside the server: `elasticsearch_merge.painless`. It is
compare-and-swap on the document's sequence number, so another process cannot come between. An external version could
not keep a SUCCESS of Celery's own, tell equal keys apart, or let a key expire (docs/adr/0016).

What has expired is removed by queries, some of it with every sweep, the history by dropping whole indices; readers of
ours do not see it from the millisecond on.

Guarantee: each task is written atomically, a batch at least once and in no order; what `write` returned from is in the
translog of every copy in sync (unless ``index.translog.durability`` says otherwise). Any order, duplication or zombie
writer gives the same documents. Documents are read as they are now; what is found by a search, as of a refresh.
"""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from elasticsearch import exceptions

from celery_kafka_backend.changes import history_expiry
from celery_kafka_backend.errors import Rejected, SettingsError, Unavailable
from celery_kafka_backend.order import Rank, rank_of_key, system_wall_ms
from celery_kafka_backend.sinks import elasticsearch_indices as indices
from celery_kafka_backend.sinks.contract import Sink, StoreOptions, View, id_refusal
from celery_kafka_backend.sinks.elasticsearch_indices import NEVER
from celery_kafka_backend.sinks.elasticsearch_native import beside, kept, native
from celery_kafka_backend.sinks.elasticsearch_view import MAX_ID_BYTES, ElasticView, chord_id, positions_id
from celery_kafka_backend.sinks.elasticsearch_wire import (
    WRITE_TIMEOUT_S,
    Failure,
    Place,
    denied,
    failures,
    reason,
    translated,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from elasticsearch import Elasticsearch

    from celery_kafka_backend.changes import Batch, Change, ChordFact, Partition
    from celery_kafka_backend.events import Event

MAX_BYTES: Final = 20_000_000
"""Of a document or an event: a server with half a gigabyte takes it, in a request of its own."""
BULK_BYTES: Final = 8_000_000
BULK_OPERATIONS: Final = 1_000
RETRIES: Final = 10
"""Of an update that another came between, in the server."""
SWEEP_EVERY_S: Final = 10.0
SWEEP_ROWS: Final = 2_000
SWEEP_TIMEOUT_S: Final = 60.0


def _compact(script: str) -> str:
    """Return a script without comments and indentation: it travels with every operation."""
    return re.sub(r"\s+", " ", re.sub(r"^\s*//.*$", "", script, flags=re.MULTILINE)).strip()


_MERGE: Final = _compact(Path(__file__).with_name("elasticsearch_merge.painless").read_text())
_FACT: Final = _compact("""
    def s = ctx._source;
    boolean there = s.k != null && s.x > params.born;
    def x = there && s.x > params.x ? s.x : params.x;
    if (!there || s.k < params.fact.k) { s.putAll(params.fact); }
    else if (s.x >= x) { ctx.op = 'none'; }
    s.x = x;
""")
_CHORD: Final = _compact("""
    def s = ctx._source;
    if (s.x == null || s.x <= params.now) { s.putAll(params.chord); s.born = params.now; }
    else if (s.x >= params.chord.x) { ctx.op = 'none'; }
    else { s.x = params.chord.x; }
""")
_POSITIONS: Final = _compact("""
    def s = ctx._source;
    if (s.ckb == null) { s.ckb = ['next': [:]]; }
    def next = s.ckb.next;
    for (each in params.next.entrySet()) {
      def old = next[each.key];
      if (old == null || old < each.value) { next[each.key] = each.value; }
    }
""")
_SWEEP: Final = _compact("""
    def s = ctx._source;
    def c = s.ckb;
    boolean ours = c.t != null && c.t == s['@timestamp'];
    if (c.x <= params.now) {
      if (ours || s.result == null) { ctx.op = 'delete'; } else { s.remove('ckb'); }
    } else if (ours && c.u != null && c.u <= params.now) {
      s.remove('result'); s.remove('@timestamp');
      for (name in ['t', 'u', 'text', 'binary']) { c.remove(name); }
    } else { c.remove('u'); }
""")


class Operation(NamedTuple):
    """One operation of a bulk, as it is sent, and the change that it belongs to."""

    id: str
    lines: bytes


class ElasticSink(Sink):
    """Writes a view in Elasticsearch."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._place = Place(url, options)
        self.url = self._place.url
        self._namespace = options.namespace
        self._history = options.history is not False
        self._history_ms = options.history_retention_ms
        self._limit = MAX_BYTES
        self._client: Elasticsearch | None = None
        self._partitions: set[str] = set()
        self._sweep_due = 0.0

    def open(self) -> None:
        """Connect, and make the indices that are missing."""
        self.close()
        client = self._place.connect(WRITE_TIMEOUT_S)
        try:
            with translated(self.url):
                indices.ensure(client, self._place)
                self._client = client
                self._try()
        except BaseException:
            client.close()
            self._client = None
            raise

    def _try(self) -> None:
        """Have an update with a script, which writes nothing, go all the way: what stops it would stop every task."""
        refused: list[tuple[str, str]] = []
        self._send([self._update("", "celery-kafka-probe", "ctx.op = 'none'", {}, self._place.native)], refused)
        for _, why in refused:
            raise SettingsError("view", f"{self.url} takes no update with a script: {why}", "allow inline scripts")

    def close(self) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self._partitions.clear()

    def warnings(self) -> list[str]:
        """Say which index confirms what it may lose."""
        with translated(self.url), self._place.connect(WRITE_TIMEOUT_S) as client:
            return indices.warnings(client, self._place)

    def write(self, batch: Batch) -> None:
        """Write tasks, groups, history and facts; then the positions."""
        if self._client is None:
            self.open()
        now_ms = system_wall_ms()
        refused: list[tuple[str, str]] = []
        operations: list[Operation] = []
        with translated(self.url):
            self._sweep(now_ms)
            for change in batch.changes:
                why = self._refusal(change)
                if why:
                    refused.append((change.id, why))
                else:
                    operations += self._operations(change, now_ms)
            self._send(operations, refused)
            if batch.chords:
                self._chords(batch.chords, now_ms, refused)
            if batch.positions:
                self._move(batch.positions)
        if refused:
            raise Rejected(refused)

    def _move(self, positions: Mapping[Partition, int]) -> None:
        ends = {f"{topic}:{number}": offset for (topic, number), offset in positions.items()}
        key, unmoved = positions_id(self._namespace), list[tuple[str, str]]()
        self._send([self._update("", key, _POSITIONS, {"next": ends}, self._place.native)], unmoved)
        if unmoved:
            raise SettingsError("view", f"{self.url} takes no positions: {unmoved[0][1]}", f"delete the document {key}")

    # -- tasks, groups, history ----------------------------------------------------------------

    def _refusal(self, change: Change) -> str:
        if reason := id_refusal(self._place.prefixes[change.subject] + change.id, MAX_ID_BYTES):
            return reason
        size = len(change.document or b"")
        if size > self._limit:
            return f"a document of {size} bytes; the limit is {self._limit}"
        largest = max((len(value) for _, value in change.history), default=0) if self._history else 0
        return f"an event of {largest} bytes; the limit is {self._limit}" if largest > self._limit else ""

    def _operations(self, change: Change, now_ms: int) -> Iterator[Operation]:
        if not change.only_history:
            key = self._place.prefixes[change.subject] + change.id
            yield self._update(change.id, key, _MERGE, self._merged(change, now_ms), self._place.native)
        if self._history:
            for event, value in change.history:
                expires_at = history_expiry(event, self._history_ms)
                if not 0 < expires_at <= now_ms:
                    yield self._logged(change.id, event, value, expires_at)

    def _merged(self, change: Change, now_ms: int) -> dict[str, Any]:
        """Return the parameters of the update."""
        params: dict[str, Any] = {"now": now_ms, "ends": change.expires_at or NEVER}
        winner, document = change.winner, change.document
        if winner is not None:
            params |= {"k": winner.key, "e": winner.id, "stays": _withstand(winner) if document is not None else ()}
            if document is not None and not 0 < (winner.expires_at or 0) <= now_ms:
                found = native(change.subject, winner, document, as_text=self._place.as_text)
                until = {"u": winner.expires_at} if winner.expires_at else {}
                params |= {"fields": found.fields, "own": {**found.kept, **until}}
        side = change.side
        if side is not None:
            earliest = {"sent": side.sent, "received": side.received, "started": side.started}
            params["most"] = {"run": side.run, "seen": side.seen, "attempts": side.attempts}
            params["least"] = {name: at for name, at in earliest.items() if at}
            params["workers"] = side.workers
        return params

    def _logged(self, task: str, event: Event, value: bytes, expires_at: int) -> Operation:
        """Return the creation of a history entry; one that is there already stays."""
        index = indices.partition(self._place, event.at, expires_at)
        if index not in self._partitions:
            assert self._client is not None
            indices.create(self._client, index, indices.HISTORY)
            self._partitions.add(index)
        entry: dict[str, Any] = {"task": task, "hlc": event.hlc, "event": event.id, **beside(event)}
        if expires_at:
            entry["x"] = expires_at
        entry |= kept(bytes(value))
        action = {"create": {"_index": index, "_id": _digest(task, str(event.hlc), event.id)}}
        return Operation(task, _lines(action, entry))

    # -- chords --------------------------------------------------------------------------------

    def _chords(self, facts: Sequence[ChordFact], now_ms: int, refused: list[tuple[str, str]]) -> None:
        """Write how long each chord's facts stay, then the facts: those from before it last expired are not there."""
        ends: dict[str, int] = {}
        for fact in facts:
            ends[fact.group] = max(fact.expires_at or NEVER, ends.get(fact.group, 0))
        unnameable = {group: reason for group in ends if (reason := id_refusal(chord_id(group), MAX_ID_BYTES))}
        refused += unnameable.items()
        for group in unnameable:
            del ends[group]
        chords = [
            self._update(g, chord_id(g), _CHORD, {"now": now_ms, "chord": {"what": "chord", "g": g, "x": x}}, born=True)
            for g, x in ends.items()
        ]
        born = dict(zip(ends, self._send(chords, refused), strict=True))
        self._send([self._fact(fact, born[fact.group]) for fact in facts if born.get(fact.group) is not None], refused)

    def _fact(self, fact: ChordFact, born: Any) -> Operation:
        found = {"what": "fact", "g": fact.group, "n": fact.name, "k": fact.order, **kept(bytes(fact.value))}
        params = {"born": born, "x": fact.expires_at or NEVER, "fact": found}
        return self._update(fact.group, _digest(fact.group, fact.name), _FACT, params)

    # -- what has expired ----------------------------------------------------------------------

    def _sweep(self, now_ms: int) -> None:
        """Remove some of what has expired; at once again, if there is more."""
        if time.monotonic() < self._sweep_due:
            return
        assert self._client is not None
        client = self._client.options(request_timeout=SWEEP_TIMEOUT_S)
        gone = {"range": {"ckb.x": {"lte": now_ms}}}, {"range": {"ckb.u": {"lte": now_ms}}}
        done = client.update_by_query(
            index=self._place.native,
            query={"bool": {"should": list(gone)}},
            script={"source": _SWEEP, "params": {"now": now_ms}},
            conflicts="proceed", max_docs=SWEEP_ROWS, scroll_size=SWEEP_ROWS, ignore_unavailable=True,
        )  # fmt: skip
        self._sweep_chords(client, now_ms)
        kept_indices = client.indices.get_settings(index=f"{self._place.history}-*", name="index.uuid")
        for name in kept_indices:
            if indices.expired(self._place, name, now_ms):
                client.indices.delete(index=name, ignore_unavailable=True)
                self._partitions.discard(name)
        self._sweep_due = time.monotonic() + (0.0 if done["total"] >= SWEEP_ROWS else SWEEP_EVERY_S)

    def _sweep_chords(self, client: Elasticsearch, now_ms: int) -> None:
        """Facts first: a crash in between leaves what the next sweep finds."""
        expired = {"range": {"x": {"lte": now_ms}}}
        chords = [{"term": {"what": "chord"}}, expired]
        found = client.search(
            index=self._place.beside, query={"bool": {"filter": chords}}, source_includes=["g"], size=SWEEP_ROWS // 4
        )
        groups = [hit["_source"]["g"] for hit in found["hits"]["hits"]]
        for what in ("fact", "chord") if groups else ():
            which = [{"term": {"what": what}}, {"terms": {"g": groups}}, expired]
            client.delete_by_query(
                index=self._place.beside, query={"bool": {"filter": which}}, conflicts="proceed", refresh=True
            )

    # -- the wire ------------------------------------------------------------------------------

    def _update(
        self, change: str, key: str, script: str, params: dict[str, Any], index: str = "", *, born: bool = False
    ) -> Operation:
        action = {"update": {"_index": index or self._place.beside, "_id": key, "retry_on_conflict": RETRIES}}
        body: dict[str, Any] = {"script": {"source": script, "params": params}, "scripted_upsert": True, "upsert": {}}
        if born:
            body["_source"] = ["born"]
        return Operation(change, _lines(action, body))

    def _send(self, operations: Sequence[Operation], refused: list[tuple[str, str]]) -> list[Any]:
        """Write all; add what the server will never take to ``refused``. Returns what each chord's ``born`` is."""
        born: list[Any] = []
        for chunk in _chunks(operations):
            born += self._bulk(chunk, refused)
        return born

    def _bulk(self, chunk: Sequence[Operation], refused: list[tuple[str, str]]) -> list[Any]:
        assert self._client is not None
        try:
            lines: list[Any] = [each.lines for each in chunk]  # the driver sends bytes as they are
            answer = self._client.bulk(
                operations=lines,
                filter_path="errors,items.*.status,items.*.error,items.*.get._source",
            ).body
        except exceptions.ApiError as exc:
            if exc.status_code != 413:
                raise
            if len(chunk) == 1:
                refused.append((chunk[0].id, "the server, or what stands before it, takes no request so large"))
                return [None]
            half = len(chunk) // 2
            return self._bulk(chunk[:half], refused) + self._bulk(chunk[half:], refused)
        for operation, failure in zip(chunk, failures(answer, len(chunk)), strict=True):
            if failure is not None:
                refused.append((operation.id, self._why(failure)))
        return [item.get("update", {}).get("get", {}).get("_source", {}).get("born") for item in answer["items"]]

    def _why(self, failure: Failure) -> str:
        if failure.away:
            self._partitions.clear()  # one may be gone
            raise Unavailable(f"{self.url}: {failure.status} {reason(failure.error)}")
        if failure.denied:
            raise denied(self.url, [failure])
        return reason(failure.error)


def _withstand(winner: Event) -> tuple[str, ...]:
    """Return in which states a document of Celery's own backend stays."""
    return ("SUCCESS", "FAILURE", "REVOKED") if rank_of_key(winner.key) is Rank.UNREADY else ("SUCCESS",)


def _lines(action: dict[str, Any], body: dict[str, Any]) -> bytes:
    return msgspec.json.encode(action) + b"\n" + msgspec.json.encode(body)


def _chunks(operations: Sequence[Operation]) -> Iterator[Sequence[Operation]]:
    start = size = 0
    for number, operation in enumerate(operations):
        if number > start and (size + len(operation.lines) > BULK_BYTES or number - start == BULK_OPERATIONS):
            yield operations[start:number]
            start, size = number, 0
        size += len(operation.lines)
    if start < len(operations):
        yield operations[start:]


def _digest(*parts: str) -> str:
    """Return a short id for what has none within the server's limit."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def sink(url: str, options: StoreOptions) -> Sink:
    """Return the write side of ``elasticsearch://…`` or ``elasticsearch+https://…``."""
    return ElasticSink(url, options)


def view(url: str, options: StoreOptions) -> View:
    """Return the read side of ``elasticsearch://…`` or ``elasticsearch+https://…``."""
    return ElasticView(url, options)
