"""The wire format of an event: one JSON value per Kafka record.

Record of ``<prefix>.task-events``::

    key       the task's id (for a group's kinds the group's id), UTF-8
    value     one JSON object, the fields of `events.Event` that are not at their default
    headers   k  the order key, decimal text of 19 digits (absent if it touches no document)
              e  the kind
              g  the group's id (absent outside groups)
              a  the app that the log belongs to

* ``v`` is the schema's version, 1 today, always written. A reader refuses a greater one
  (`UnknownVersion`: dead letters, and read again after an upgrade) and accepts unknown *fields*.
* Times are integers, ms since 1970, before the year 9999; what is to come (``expires_at``, ``eta``,
  ``message_expires``, ``due``) below 2**53. ``key`` is an integer below 2**63: a reader whose numbers are
  doubles takes it from the header.
* ``doc`` is the native document, embedded as JSON, byte for byte as the worker's serializer wrote
  it: large integers, key order and spacing survive. A document that is not JSON travels as
  ``opaque``, base64.
* A document over ``claim_check_bytes`` is not here: ``claim`` tells the path, size and sha256 of the object that
  is it, and ``doc`` is a stub, always JSON, that refers to it (`claims`). Added within version 1: a reader that
  does not know ``claim`` copies the stub.
* Text that is not Unicode (lone surrogates, as in the name of an undecodable file) is written as
  escapes; in ``args`` and ``kwargs``, NaN and infinities become null. Neither happens in a document.
* A version is never edited in place: tests/golden holds one file for each.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from celery_kafka_backend.errors import UnknownVersion, Unreadable
from celery_kafka_backend.events import NOTHING, Event, NativeParts
from celery_kafka_backend.order import key_text

VERSION: Final = 1

HEADER_KEY: Final = "k"
HEADER_KIND: Final = "e"
HEADER_GROUP: Final = "g"
HEADER_APP: Final = "a"


class _Probe(msgspec.Struct):
    v: int = 1


class _Stamps(msgspec.Struct):
    stamped_headers: list[str]
    stamps: dict[str, msgspec.Raw]


MAX_DEPTH: Final = 256
"""Of a document that is embedded: every reader must be able to decode it, whatever its own recursion limit."""

_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Event)
_probe = msgspec.json.Decoder(_Probe)
_parts = msgspec.json.Decoder(NativeParts)
_raw_map = msgspec.json.Decoder(dict[str, msgspec.Raw])


def encode(event: Event) -> bytes:
    """Return the record value of an event."""
    if event.doc is not NOTHING and not bytes(event.doc):
        # omit_defaults goes by identity here: any other empty Raw would be written as a field without a value.
        event = msgspec.structs.replace(event, doc=NOTHING)
    # omit_defaults leaves v out, as it is the default: a reader needs it, so it is put in front.
    try:
        body = _encoder.encode(event)
    except UnicodeEncodeError:
        body = _encoder.encode(_escaped(event))
    return b'{"v":%d,%s' % (event.v, body[1:]) if not body.startswith(b'{"v":') else body


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, msgspec.Struct):
        fields = {name: _escaped(getattr(value, name)) for name in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escaped(item) for item in value]
    return value


def headers(event: Event, app: str = "") -> list[tuple[str, bytes]]:
    """Return the record headers of an event, so that filters need no decode."""
    found = [(HEADER_KIND, event.kind.encode())]
    if event.key:
        found.append((HEADER_KEY, key_text(event.key).encode()))
    if event.group is not None:
        found.append((HEADER_GROUP, event.group.encode()))
    if app:
        found.append((HEADER_APP, app.encode()))
    return found


def decode(value: bytes | None) -> Event:
    """Return the event of a record value.

    Raises:
        UnknownVersion: It was written by a newer version.
        Unreadable: It is no event at all.
    """
    if value is None:
        raise Unreadable("a tombstone, where an event was expected")
    try:
        event = _decoder.decode(value)
        if not value.isascii():
            value.decode()  # msgspec does not look into a document, nor into fields that it does not know
    except _NOT_JSON as exc:
        raise _why(value, exc) from exc
    if event.v != VERSION:
        raise _not_ours(event.v)
    if not event.task or not event.id:
        raise Unreadable("an event without a task or without an id")
    doc = event.doc
    if doc is not NOTHING and (raw := bytes(doc)) and not raw.startswith(b"{"):
        raise Unreadable("a document that is not a JSON object")
    return event


def one_line(value: bytes) -> bytes:
    """Return a record's value without line breaks: in JSON they are space. Those that we write have none."""
    return value.replace(b"\n", b" ").replace(b"\r", b" ") if b"\n" in value or b"\r" in value else value


def _why(value: bytes, exc: Exception) -> Unreadable | UnknownVersion:
    try:
        version = _probe.decode(value).v
    except _NOT_JSON:
        version = VERSION
    return _not_ours(version) if version != VERSION else Unreadable(f"not an event: {exc}")


def _not_ours(version: int) -> Unreadable | UnknownVersion:
    if version > VERSION:
        return UnknownVersion(f"schema version {version}; this software reads up to {VERSION}")
    return Unreadable(f"schema version {version}, which never was")


def is_json_document(encoded: bytes) -> bool:
    """Return whether an encoded document can be embedded as it is (NaN, for one, cannot)."""
    try:
        value = msgspec.json.decode(encoded)
    except _NOT_JSON:
        return False
    return isinstance(value, dict) and not _too_deep(encoded, value)


def _too_deep(encoded: bytes, value: Any) -> bool:
    if encoded.count(b"[") + encoded.count(b"{") <= MAX_DEPTH:
        return False
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def native_parts(document: bytes) -> NativeParts:
    """Return the parts of a JSON document, each still encoded as in the document.

    Raises:
        Unreadable: It is not a native JSON document.
    """
    try:
        return _parts.decode(document)
    except _NOT_JSON as exc:
        raise Unreadable(f"not a native document: {exc}") from exc


def native_stamps(document: bytes, stamped_headers: list[str]) -> bytes:
    """Return what Celery's SQL backend keeps in its ``stamps`` column for a JSON document.

    Raises:
        Unreadable: It is not a native JSON document.
    """
    try:
        values = _raw_map.decode(document)
    except _NOT_JSON as exc:
        raise Unreadable(f"not a native document: {exc}") from exc
    found = {header: values[header] for header in stamped_headers if header in values}
    return _encoder.encode(_Stamps(stamped_headers=stamped_headers, stamps=found))
