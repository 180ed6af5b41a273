"""Celery's own rows: what its Cassandra backend would have written into each column, and back."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

from celery_kafka_backend import codec, documents, events
from celery_kafka_backend.errors import CodecError
from celery_kafka_backend.sinks.splices import ENCODERS, spliced, uncompressed

if TYPE_CHECKING:
    from celery_kafka_backend.events import Event


class NativeRow(NamedTuple):
    """The columns of a row, beside the task's id."""

    status: str
    result: bytes | None
    date_done: int
    traceback: bytes | None
    children: bytes | None


def native_row(event: Event, document: bytes) -> NativeRow:
    """Return what Celery's backend would have written.

    ``date_done`` is a key, so every state has one: when there is none, the event's own time. A part that the event does
    not carry, and that we cannot say in its serializer, is left out; a stock client reads it as None.
    """
    done = _ms(event.date_done) or event.at
    if event.opaque is not None:
        o = event.opaque
        encode = ENCODERS.get(o.content_type, lambda _: None)
        children = o.children if o.children is not None else encode([])
        result = o.result if o.result is not None else encode(None)
        return NativeRow(event.state or "PENDING", result, done, encode(o.traceback), children)
    try:
        parts = codec.native_parts(document)
    except CodecError:
        return NativeRow(event.state or "PENDING", b"null", done, b"null", b"[]")
    traceback = json.dumps(parts.traceback).encode()
    return NativeRow(parts.status, bytes(parts.result) or b"null", done, traceback, bytes(parts.children) or b"[]")


def _ms(iso: str | None) -> int:
    """Return when that is; 0 of a date that drivers cannot read, nor then what is asked for together with it."""
    ms = documents.moment(iso) or 0
    return ms if 0 <= ms <= events.LATEST_MS else 0


# -- and back ------------------------------------------------------------------------------------


def stock_document(task_id: str, row: NativeRow, serializer: str) -> bytes | None:
    """Return the document that a key-value backend would hold for a row of Celery's backend.

    Put together from its encoded parts, of which none is decoded: unpickling is for who trusts the store. None where
    that cannot be: a serializer or a compression of one's own.
    """
    given = {"result": row.result, "traceback": row.traceback, "children": row.children}
    parts = {name: part and uncompressed(part) for name, part in given.items()}
    if any(part is None and given[name] is not None for name, part in parts.items()):
        return None
    done = datetime.fromtimestamp(row.date_done / 1000, timezone.utc).isoformat()
    plain = {"status": row.status, "date_done": done, "task_id": task_id}
    return spliced(serializer, plain, parts)
