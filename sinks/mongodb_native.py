"""Celery's own documents: what its MongoDB backend would have written into each field, and back."""

from __future__ import annotations

import contextlib
import json
import pickle
from typing import TYPE_CHECKING, Any, Final

import bson
import msgspec
from bson.datetime_ms import DatetimeMS

from celery_kafka_backend import codec, documents
from celery_kafka_backend.changes import GROUP, TASK
from celery_kafka_backend.errors import CodecError, Unreadable
from celery_kafka_backend.sinks.splices import COMPRESSED, ENCODERS, spliced, uncompressed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from celery_kafka_backend.events import Event

TEXT: Final = frozenset({"application/json", "application/x-yaml"})
"""Content types whose payload Celery keeps as text; all others are binary."""
_KINDS: Final = {
    documents.JSON: "json", documents.YAML: "yaml", documents.PICKLE: "pickle", documents.MSGPACK: "msgpack"
}  # fmt: skip
LARGE: Final = 1 << 20
"""Arguments that take more than this as BSON stay JSON text."""
DEEP: Final = 100
"""MongoDB takes 180 levels, ours included."""

_LATEST_MS: Final = 253_402_300_799_999
"""The end of 9999: whoever reads a document with a later time by pymongo gets an error, stock clients too."""

HIDDEN: Final[dict[str, Any]] = {
    "status": "PENDING", "result": None, "traceback": None, "children": [], "date_done": None
}  # fmt: skip
"""A task of which nothing is to be shown: every field that the stock backend reads is there, and says that."""
EMPTY_GROUP: Final[dict[str, Any]] = {"result": "[]", "date_done": None}
"""A group that was deleted: the stock backend restores a group of no tasks."""
NOTHING: Final = {TASK: HIDDEN, GROUP: EMPTY_GROUP}


def _date(iso: str | None) -> DatetimeMS | None:
    ms = documents.moment(iso)
    return DatetimeMS(ms) if ms is not None and 0 <= ms <= _LATEST_MS else None


def _payload(encoded: bytes | None, content_type: str) -> str | bytes | None:
    if encoded is None or content_type not in TEXT:
        return encoded
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        return encoded


def _decoded(raw: msgspec.Raw) -> Any:
    return msgspec.json.decode(raw) if bytes(raw) else None


def _plain(value: Any) -> Any:
    """Return a value that MongoDB can keep: itself, or its JSON text where BSON has no way to say it."""
    if not value:
        return value
    text = msgspec.json.encode(value)
    if len(text) <= LARGE and text.count(b"[") + text.count(b"{") <= DEEP and b'"$' not in text:
        with contextlib.suppress(bson.errors.BSONError, OverflowError):
            if len(bson.encode({"": value})) <= LARGE:
                return value
    return text.decode()


def task_fields(event: Event, document: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return Celery's fields, and the document as what stands before and behind the ``result`` field's text.

    A document that does not contain that field byte for byte comes whole.
    """
    if event.opaque is not None:
        o = event.opaque
        extended: Any = (event.name, event.worker, event.attempt, event.queue) if o.args or o.kwargs else None
        fields = _fields(event, event.state, _payload(o.result, o.content_type), o.traceback, o.plain or {}, extended)
        return fields, [document]
    try:
        p = codec.native_parts(document)
    except CodecError:
        return {**HIDDEN, "status": event.state, "date_done": _date(event.date_done)}, [document]
    raw = bytes(p.result)
    extended = (p.name, p.worker, p.retries, p.queue) if bytes(p.args) or bytes(p.kwargs) or p.name else None
    parts = {name: _decoded(getattr(p, name)) for name in ("children", "args", "kwargs")}
    fields = _fields(event, p.status, raw.decode() or None, p.traceback, parts, extended)
    start = document.find(raw) if raw else -1
    return fields, [document] if start < 0 else [document[:start], document[start + len(raw) :]]


def _fields(
    event: Event, status: str | None, result: Any, traceback: str | None, parts: dict[str, Any], extended: Any
) -> dict[str, Any]:
    fields = {
        "status": status,
        "result": result,
        "traceback": traceback,
        "children": _plain(parts.get("children")) or [],
        "date_done": _date(event.date_done),
    }
    if event.group:
        fields["group_id"] = event.group
    if event.parent:
        fields["parent_id"] = event.parent
    if extended is not None:
        fields["name"], fields["worker"], fields["retries"], fields["queue"] = extended
        fields["args"], fields["kwargs"] = _plain(parts.get("args")), _plain(parts.get("kwargs"))
    return fields


def group_fields(event: Event, document: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return Celery's fields of a saved group, which keep the members' ids alone, and the whole document."""
    try:
        if event.opaque is not None:
            kind = event.opaque.content_type
            members = (event.opaque.plain or {})["children"]
        else:
            kind = "application/json"
            members = msgspec.json.decode(document)["result"][1]
        ids = [member[0][0] for member in members]
    except (msgspec.MsgspecError, LookupError, TypeError):
        return {**EMPTY_GROUP, "date_done": DatetimeMS(event.at)}, [document]
    return {"result": _encoded_ids(ids, kind), "date_done": DatetimeMS(event.at)}, [document]


def _encoded_ids(ids: Sequence[str], content_type: str) -> str | bytes:
    if content_type == "application/x-python-serialize":
        return pickle.dumps(ids, protocol=2)
    if content_type == "application/x-msgpack":
        return msgspec.msgpack.encode(ids)
    return json.dumps(ids)  # which is YAML too


def beside(event: Event) -> dict[str, Any]:
    """Return what stands beside an event in the history, to search by; times in ms since 1970."""
    about = {"state": event.state, "name": event.name, "worker": event.worker, "exception": event.exception}
    return {"kind": event.kind, "at": event.at, **{name: value for name, value in about.items() if value is not None}}


def document_of(found: dict[str, Any]) -> bytes:
    """Return the bytes of a document of ours."""
    pieces = found["ckb"]["d"]
    if len(pieces) == 1:
        return bytes(pieces[0])
    return bytes(pieces[0]) + str(found["result"]).encode() + bytes(pieces[1])


def stock_document(found: dict[str, Any], serializer: str = "") -> bytes | None:
    """Return what a key-value backend would hold for a document that Celery's backend wrote.

    Its result, which is encoded already, is spliced in. None where that cannot be: with the serializer ``bson``, or one
    of somebody's own.

    Args:
        found: The document.
        serializer: The reader's, None if the result is of another one; "": the one that it looks like.
    """
    encoded, done = found.get("result"), found.get("date_done")
    result = _plain_result(encoded, serializer)
    if encoded is not None and (result is None or not _fits(_serializer(result), serializer)):
        return None
    plain = {
        "status": found.get("status"),
        "traceback": found.get("traceback"),
        "children": found.get("children") or [],
        "date_done": done.as_datetime().isoformat() if isinstance(done, DatetimeMS) else done,
        "task_id": found["_id"],
    }
    extended = ("name", "args", "kwargs", "worker", "retries", "queue", "group_id", "parent_id")
    plain |= {name: found[name] for name in extended if name in found}
    try:
        parts = {"result": result.encode() if isinstance(result, str) else result}
        return spliced(serializer or _serializer(result), plain, parts)
    except (TypeError, ValueError):
        return None


def stock_group(found: dict[str, Any], serializer: str = "") -> bytes | None:
    """Likewise of a saved group, of which this store has the members' ids."""
    result = _plain_result(found.get("result"), serializer)
    try:
        content_type, ids = documents.decode(result.encode() if isinstance(result, str) else result)
        members = [[[str(each), None], None] for each in ids]
    except (Unreadable, AttributeError, TypeError):
        return None
    if not _fits(_KINDS[content_type], serializer):
        return None
    return ENCODERS[content_type]({"result": [[found["_id"], None], members]})


def _plain_result(encoded: Any, serializer: str) -> Any:
    """Return an encoded result as it was before it was compressed: text, or bytes; None if that cannot be told."""
    if not isinstance(encoded, bytes) or not encoded.startswith(COMPRESSED):
        return encoded
    result = uncompressed(encoded)
    if result is None or (not serializer and len(result) == 1 and result.isdigit()):  # JSON's 5 is MessagePack's 53
        return None
    is_text = serializer in {"json", "yaml"} if serializer else len(result) > 1 and result[:1] < b"\x80"
    return result.decode(errors="replace") if is_text else result


def _fits(kind: str, serializer: str) -> bool:
    """Whether what one serializer wrote is read by another: JSON is YAML."""
    return not serializer or kind == serializer or (kind, serializer) == ("json", "yaml")


def _serializer(result: Any) -> str:
    """Return the serializer of an encoded result, by what it looks like; "" if it is not encoded."""
    if isinstance(result, bytes):
        return "pickle" if result.startswith(b"\x80") and result.endswith(b".") else "msgpack"
    if result is not None and not isinstance(result, str):
        return ""
    try:
        json.loads(result or "null")
    except ValueError:
        return "yaml"
    return "json"
