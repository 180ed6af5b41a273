"""Celery's own tables: what its SQL backend would have written into each column, and back."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgspec

from celery_kafka_backend import codec
from celery_kafka_backend.errors import CodecError
from celery_kafka_backend.sinks.splices import spliced

if TYPE_CHECKING:
    from celery_kafka_backend.events import Event


def _date(iso: str | None) -> str | None:
    """Return a time as SQLAlchemy writes it to SQLite: its fields, without the zone."""
    if not iso:
        return None
    try:
        found = datetime.fromisoformat(iso.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found.replace(tzinfo=None).isoformat(" ", "microseconds")


def group_row(event: Event, document: bytes) -> tuple[Any, ...]:
    """Return result and date_done; Celery's SQL backend keeps the result alone, without the dictionary around it."""
    result = event.opaque.result if event.opaque is not None else None
    if result is None:
        try:
            result = bytes(msgspec.json.decode(document, type=_Saved).result)
        except msgspec.DecodeError:
            result = document
    at = datetime.fromtimestamp(event.at / 1000, timezone.utc)
    return result, at.strftime("%Y-%m-%d %H:%M:%S.%f")


class _Saved(msgspec.Struct):
    result: msgspec.Raw


def task_row(event: Event, document: bytes) -> tuple[Any, ...]:
    """Return the values of the native columns, in the order of ``sqlite_statements.NATIVE``."""
    date_done = _date(event.date_done)
    if event.opaque is not None:
        o = event.opaque
        extended = o.args is not None or o.kwargs is not None
        about = (event.worker, event.attempt, event.queue) if extended else (None, None, None)
        name = event.name if extended else None
        return (event.state, o.result, date_done, o.traceback, o.children, name, o.args, o.kwargs, *about, o.stamps)
    try:
        p = codec.native_parts(document)
    except CodecError:
        return (event.state, document, date_done, *(None,) * 9)
    stamps = codec.native_stamps(document, p.stamped_headers) if p.stamped_headers else None
    children = bytes(p.children)
    return (
        p.status,
        bytes(p.result) or None,
        date_done,
        p.traceback,
        None if children in (b"", b"[]", b"null") else children,
        p.name,
        bytes(p.args) or None,
        bytes(p.kwargs) or None,
        p.worker,
        p.retries,
        p.queue,
        stamps,
    )


class _Stock(msgspec.Struct, omit_defaults=True):
    """A document in the order in which Celery's key-value backends write one."""

    status: str
    result: msgspec.Raw
    traceback: str | None = msgspec.field()
    children: msgspec.Raw
    date_done: str | None = msgspec.field()
    task_id: str
    name: str | None = None
    args: msgspec.Raw = msgspec.Raw(b"")
    kwargs: msgspec.Raw = msgspec.Raw(b"")
    worker: str | None = None
    retries: int | None = None
    queue: str | None = None


def beside(event: Event) -> dict[str, Any]:
    """Return what stands beside an event in the history."""
    return {"kind": event.kind, "state": event.state, "at": event.at}


def stock_group(result: bytes, serializer: str) -> bytes | None:
    """Return what a key-value backend would hold for a group that Celery's SQL backend saved; None: not by this serializer."""
    return spliced(serializer, {}, {"result": result})


def stock_document(
    task_id: str, status: str, result: Any, date_done: str | None, *columns: Any, serializer: str = "json"
) -> bytes | None:
    """Return what a key-value backend would hold for a row that Celery's SQL backend wrote; None: not by this serializer."""
    traceback, children, name, args, kwargs, worker, retries, queue, _ = columns
    done = f"{date_done.replace(' ', 'T')}+00:00" if date_done else None
    if serializer != "json":
        plain = {"status": status, "traceback": traceback, "date_done": done, "task_id": task_id}
        parts = {"result": result, "children": children}
        if args is not None or kwargs is not None:
            plain |= {"name": name, "worker": worker, "retries": retries, "queue": queue}
            parts |= {"args": args, "kwargs": kwargs}
        return spliced(serializer, plain, parts)
    raw = [msgspec.Raw(part or b"null") for part in (result, children or b"[]")]
    document = _Stock(
        status, raw[0], traceback, raw[1], done, task_id, name, worker=worker, retries=retries, queue=queue
    )
    if args is not None or kwargs is not None:
        document.args, document.kwargs = msgspec.Raw(args or b"null"), msgspec.Raw(kwargs or b"null")
    return msgspec.json.encode(document)
