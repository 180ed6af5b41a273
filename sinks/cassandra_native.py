"""Celery's own rows: what its Cassandra backend would have written into each column, and back."""

from __future__ import annotations

import json
import pickle
import re
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from celery_kafka_backend import codec
from celery_kafka_backend.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery_kafka_backend.events import Event

JSON: Final = "application/json"
PICKLE: Final = "application/x-python-serialize"
MSGPACK: Final = "application/x-msgpack"
YAML: Final = "application/x-yaml"
_UNPRINTABLE: Final = re.compile("[\x7f-\x84\x86-\x9f\ufffe\uffff]")


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
        encode = _ENCODERS.get(o.content_type, lambda _: None)
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
    try:
        found = datetime.fromisoformat(iso.replace("Z", "+00:00")) if iso else None
    except ValueError:
        return 0
    if found is None:
        return 0
    if found.tzinfo is None:
        found = found.replace(tzinfo=timezone.utc)
    return int(found.timestamp() * 1000)


def _as_yaml(value: Any) -> bytes:
    """JSON is YAML, but for characters that YAML wants escaped, and pairs of escapes that it does not put together."""
    text = json.dumps(value, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


_ENCODERS: Final[dict[str, Callable[[Any], bytes | None]]] = {
    JSON: lambda value: json.dumps(value).encode(),
    PICKLE: pickle.dumps,
    MSGPACK: msgspec.msgpack.encode,
    YAML: _as_yaml,
}

# -- and back ------------------------------------------------------------------------------------


def stock_document(task_id: str, row: NativeRow, serializer: str) -> bytes | None:
    """Return the document that a key-value backend would hold for a row of Celery's backend.

    Put together from its encoded parts, of which none is decoded: unpickling is for who trusts the store. None where
    that cannot be: a serializer of one's own, or compressed parts.
    """
    splice = _SPLICES.get(serializer)
    parts = {"result": row.result, "traceback": row.traceback, "children": row.children}
    if splice is None or any(part is not None and part.startswith(b"\0celery-compressed\0") for part in parts.values()):
        return None
    done = datetime.fromtimestamp(row.date_done / 1000, timezone.utc).isoformat()
    plain = {"status": row.status, "date_done": done, "task_id": task_id}
    return splice(plain, parts)


def _json_splice(plain: dict[str, str], parts: dict[str, bytes | None]) -> bytes:
    return msgspec.json.encode({**plain, **{name: msgspec.Raw(part or b"null") for name, part in parts.items()}})


def _msgpack_splice(plain: dict[str, str], parts: dict[str, bytes | None]) -> bytes:
    return msgspec.msgpack.encode({**plain, **{name: msgspec.Raw(part or b"\xc0") for name, part in parts.items()}})


class _Pickled:
    """A value that is pickled already: loading the whole loads it."""

    def __init__(self, code: bytes) -> None:
        self._code = code

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self._code,)


def _pickle_splice(plain: dict[str, str], parts: dict[str, bytes | None]) -> bytes:
    return pickle.dumps({**plain, **{name: part and _Pickled(part) for name, part in parts.items()}})


def _yaml_splice(plain: dict[str, str], parts: dict[str, bytes | None]) -> bytes | None:
    lines = [f"{name}: {_as_yaml(value).decode()}" for name, value in plain.items()]
    for name, part in parts.items():
        try:
            text = (part or b"null").decode()
        except UnicodeDecodeError:
            return None
        lines.append(f"{name}:")
        lines += [f"  {line}" if line else "" for line in text.removesuffix("...\n").removesuffix("\n").split("\n")]
    return "\n".join([*lines, ""]).encode()


_SPLICES: Final[dict[str, Callable[[dict[str, str], dict[str, bytes | None]], bytes | None]]] = {
    "json": _json_splice,
    "pickle": _pickle_splice,
    "msgpack": _msgpack_splice,
    "yaml": _yaml_splice,
}
