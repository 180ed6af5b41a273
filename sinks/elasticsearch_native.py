"""Celery's own documents: what its Elasticsearch backend would have written under ``result``, and back.

Celery keeps the whole encoded document as text (`elasticsearch_save_meta_as_text`, its default), or as an object whose
``result`` and ``traceback`` are encoded text. It never compresses there, so a compressed document is put together again
from its parts. Elasticsearch holds JSON, hence no bytes: Celery's own backend fails on pickle and msgpack. A pickle is
written as text that unpickles to the same, so that a stock client can read it; msgpack can not be said in text.
"""

from __future__ import annotations

import base64
import json
import pickle
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from celery_kafka_backend import codec
from celery_kafka_backend.changes import GROUP
from celery_kafka_backend.errors import CodecError
from celery_kafka_backend.sinks.splices import spliced

if TYPE_CHECKING:
    from collections.abc import Mapping

    from celery_kafka_backend.events import Event, Opaque

COMPRESSED: Final = b"\0celery-compressed\0"
"""How a compressed document of Celery's begins."""
JSON: Final = "application/json"
YAML: Final = "application/x-yaml"
PICKLE: Final = "application/x-python-serialize"

SEARCHED_CHARS: Final = 8_192
"""So much of arguments and messages can be searched; all of it is in the event."""
_ENCODED: Final = ("result", "traceback")
"""What Celery keeps as encoded text in a document that is an object."""
_FALSY: Final = frozenset({b"null", b"false", b"0", b"0.0", b"-0.0", b'""', b"[]", b"{}"})

_raw_map = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Native(NamedTuple):
    """A document for Elasticsearch.

    Attributes:
        fields: ``result`` and ``@timestamp``, as Celery's backend has them.
        kept: The document as the other stores have it, under ``text`` or ``binary``; {} if ``result`` is it.
    """

    fields: dict[str, Any]
    kept: dict[str, str]


def native(subject: str, event: Event, document: bytes, *, as_text: bool) -> Native:
    """Return what to write for an event's document."""
    result = _text(subject, event, document) if as_text else _object(subject, event, document)
    fields: dict[str, Any] = {"@timestamp": timestamp(event.at)}
    if result is not None:
        fields["result"] = result
    return Native(fields, {} if isinstance(result, str) and result.encode() == document else kept(document))


def timestamp(ms: int) -> str:
    """Return a time, ms since 1970, as Celery's backend writes it."""
    at = datetime.fromtimestamp(ms // 1000, timezone.utc)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"


def kept(value: bytes) -> dict[str, str]:
    """Return bytes as a document can hold them."""
    try:
        return {"text": value.decode()}
    except UnicodeDecodeError:
        return {"binary": base64.b64encode(value).decode()}


def taken(found: Mapping[str, Any]) -> bytes | None:
    """Return what `kept` was given, or None if there is nothing."""
    if "text" in found:
        return str(found["text"]).encode()
    return base64.b64decode(found["binary"]) if "binary" in found else None


def beside(event: Event) -> dict[str, Any]:
    """Return what stands beside an event in the history, to search by."""
    about = ("state", "name", "worker", "exception", "queue", "host", "group", "root", "runtime_s")
    said = {
        "kind": event.kind,
        "at": event.at,
        **{name: getattr(event, name) for name in about},
        "attempt": event.attempt,
    }
    said |= {name: _searchable(getattr(event, name)) for name in ("args", "kwargs", "message")}
    return {name: value for name, value in said.items() if value not in (None, "")}


def _searchable(value: Any) -> str:
    if not value:
        return ""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text[:SEARCHED_CHARS]


# -- as text -----------------------------------------------------------------------------------


def _text(subject: str, event: Event, document: bytes) -> str | None:
    """Return the whole document, encoded by the app's serializer and not compressed."""
    opaque = event.opaque
    if opaque is None:
        return document.decode(errors="replace")
    if not document.startswith(COMPRESSED):
        return _encoded_text(document, opaque.content_type)
    if subject == GROUP:
        return _plain_text({"result": _group_tuple(event, opaque)}, opaque.content_type)
    fields = _task_fields(event, opaque)
    if opaque.content_type == PICKLE:
        items = "".join(_pickled(name) + _pickled(value) + "s" for name, value in fields.items())
        return f"(d{items}."
    if opaque.content_type == YAML:
        return "".join(f"{name}:{_indented(_as_text(value))}\n" for name, value in fields.items())
    if opaque.content_type == JSON:
        return "{" + ", ".join(f'"{name}": {_as_text(value)}' for name, value in fields.items()) + "}"
    return None


def _task_fields(event: Event, opaque: Opaque) -> dict[str, Any]:
    """Return Celery's fields in Celery's order; what is encoded already as bytes."""
    plain = opaque.plain or {}

    def part(name: str) -> Any:
        encoded = getattr(opaque, name)
        return plain.get(name) if encoded is None else encoded

    fields = {
        "status": event.state,
        "result": opaque.result,
        "traceback": opaque.traceback,
        "children": part("children") or [],
        "date_done": event.date_done,
    }
    if event.group:
        fields["group_id"] = event.group
    if event.parent:
        fields["parent_id"] = event.parent
    if opaque.args is not None or opaque.kwargs is not None or plain.get("args") or plain.get("kwargs"):
        fields |= {"name": event.name, "args": part("args"), "kwargs": part("kwargs"), "worker": event.worker}
        fields |= {"retries": event.attempt, "queue": event.queue}
    return fields | {"task_id": event.task}


def _as_text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else json.dumps(value)


def _indented(yaml: str) -> str:
    """Return a YAML document as the value of a key."""
    return "\n  " + yaml.removesuffix("...\n").rstrip("\n").replace("\n", "\n  ")


def _encoded_text(encoded: bytes, content_type: str) -> str | None:
    if content_type == PICKLE:
        return _pickled(encoded) + "."
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        return None


def _plain_text(value: Any, content_type: str) -> str | None:
    if content_type == PICKLE:
        return _pickled(pickle.dumps(value, protocol=2)) + "."
    return json.dumps(value) if content_type in (JSON, YAML) else None  # JSON is YAML, too


def _pickled(value: Any) -> str:
    """Return opcodes in ASCII that push a value; bytes are a pickle, and what it holds is pushed."""
    if isinstance(value, bytes):
        return f"cpickle\nloads\n(c_codecs\nencode\n({_pickled(value.decode('latin-1'))}Vlatin-1\ntRtR"
    if isinstance(value, str):
        # The escapes of pickle's own protocol 0, of which only these two are in ASCII already.
        escaped = value.replace("\\", "\\u005c").replace("\n", "\\u000a").replace("\r", "\\u000d")
        escaped = escaped.replace("\0", "\\u0000").replace("\x1a", "\\u001a")
        safe = escaped.encode("raw-unicode-escape").decode("latin-1")
        return "V" + "".join(each if each < "\x7f" else f"\\u{ord(each):04x}" for each in safe) + "\n"
    if isinstance(value, int):
        return f"L{value}L\n"
    return "N" if value is None else _pickled(pickle.dumps(value, protocol=2))


# -- as an object ------------------------------------------------------------------------------


def _object(subject: str, event: Event, document: bytes) -> dict[str, Any] | None:
    """Return the document with ``result`` and ``traceback`` encoded, if they are anything."""
    opaque = event.opaque
    if opaque is not None:
        if subject == GROUP:
            return {"result": _plain_text(_group_tuple(event, opaque), opaque.content_type)}
        fields = _task_fields(event, opaque) | {name: value for name, value in (opaque.plain or {}).items() if value}
        if opaque.result is not None:
            fields["result"] = _encoded_text(opaque.result, opaque.content_type)
        if opaque.traceback:
            fields["traceback"] = _plain_text(opaque.traceback, opaque.content_type)
        return {name: None if isinstance(value, bytes) else value for name, value in fields.items()}
    try:
        found: dict[str, Any] = _raw_map.decode(document)
    except (msgspec.MsgspecError, RecursionError):
        return None
    for name in ("result", "traceback"):
        encoded = bytes(found.get(name, b"null"))
        if encoded not in _FALSY:
            found[name] = encoded.decode()
    return found


def _group_tuple(event: Event, opaque: Opaque) -> list[Any]:
    return [[event.task, None], (opaque.plain or {}).get("children") or []]


# -- and back ----------------------------------------------------------------------------------


def stock_document(source: Mapping[str, Any], serializer: str) -> bytes | None:
    """Return what a key-value backend would hold for a document that Celery's own backend wrote."""
    result = source.get("result")
    if isinstance(result, str):
        return result.encode(errors="replace")
    if not isinstance(result, dict):
        return None
    if serializer != "json":
        texts = {name: result[name] for name in _ENCODED if name in result}
        encoded = {name: str(text).encode(errors="replace") if text else None for name, text in texts.items()}
        plain = {name: value for name, value in result.items() if name not in encoded}
        return spliced(serializer, plain, encoded)
    meta = dict(result)
    for name in _ENCODED:
        if isinstance(meta.get(name), str) and meta[name]:
            meta[name] = msgspec.Raw(meta[name].encode(errors="replace"))
    try:
        document = msgspec.json.encode(meta)
        codec.native_parts(document)
    except (CodecError, TypeError, ValueError):
        return None  # another serializer's: it cannot be put together without it
    return document
