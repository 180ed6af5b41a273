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
* Times are integers, ms since 1970. ``key`` is an integer below 2**63: a reader whose numbers are
  doubles takes it from the header.
* ``doc`` is the native document, embedded as JSON, byte for byte as the worker's serializer wrote
  it: large integers, key order and spacing survive. A document that is not JSON travels as
  ``opaque``, base64.
* A version is never edited in place: tests/golden holds one file for each.
"""

from __future__ import annotations

from typing import Final

import msgspec

from celery_kafka_backend.errors import Unreadable, UnknownVersion
from celery_kafka_backend.events import Event, NativeParts
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


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Event)
_probe = msgspec.json.Decoder(_Probe)
_parts = msgspec.json.Decoder(NativeParts)
_raw_map = msgspec.json.Decoder(dict[str, msgspec.Raw])


def encode(event: Event) -> bytes:
    """Return the record value of an event."""
    # omit_defaults leaves v out, as it is the default: a reader needs it, so it is put in front.
    body = _encoder.encode(event)
    return b'{"v":%d,%s' % (event.v, body[1:]) if not body.startswith(b'{"v":') else body


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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise _why(value, exc) from exc
    if event.v != VERSION:
        raise UnknownVersion(f"schema version {event.v}; this software reads up to {VERSION}")
    if not event.task or not event.id:
        raise Unreadable("an event without a task or without an id")
    if not 0 <= event.key < 1 << 63:
        raise Unreadable(f"an order key outside 63 bits: {event.key}")
    return event


def _why(value: bytes, exc: Exception) -> Unreadable | UnknownVersion:
    try:
        version = _probe.decode(value).v
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Unreadable(f"not JSON: {exc}")
    if version != VERSION:
        return UnknownVersion(f"schema version {version}; this software reads up to {VERSION}")
    return Unreadable(f"not an event: {exc}")


def is_json_document(encoded: bytes) -> bool:
    """Return whether an encoded document can be embedded as it is (NaN, for one, cannot)."""
    try:
        msgspec.json.decode(encoded, type=dict[str, msgspec.Raw])
        msgspec.json.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def native_parts(document: bytes) -> NativeParts:
    """Return the parts of a JSON document, each still encoded as in the document.

    Raises:
        Unreadable: It is not a native JSON document.
    """
    try:
        return _parts.decode(document)
    except msgspec.DecodeError as exc:
        raise Unreadable(f"not a native document: {exc}") from exc


def native_stamps(document: bytes, stamped_headers: list[str]) -> bytes:
    """Return what Celery's SQL backend keeps in its ``stamps`` column for a JSON document."""
    values = _raw_map.decode(document)
    found = {header: values[header] for header in stamped_headers if header in values}
    return _encoder.encode(_Stamps(stamped_headers=stamped_headers, stamps=found))
