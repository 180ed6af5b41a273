"""What another store had, as an event of ours. Pure: the same document always makes the same event.

So a repeated import appends what the log and every view has already. The event has no run, nor anything of the process
that imports; its time is the document's. Its key is below every live event's (`order.imported_key`).
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from celery import states
from kombu.compression import decompress

from celery_kafka_backend import codec, documents, events, order
from celery_kafka_backend.changes import GROUP
from celery_kafka_backend.errors import Unreadable
from celery_kafka_backend.events import Event, Opaque
from celery_kafka_backend.order import Rank
from celery_kafka_backend.producer.recorder import MESSAGE_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery_kafka_backend.documents import Said
    from celery_kafka_backend.events import Imported
    from celery_kafka_backend.sinks.contract import Stock

_COMPRESSED: Final = b"\x00celery-compressed\x00"
"""Celery's own mark; the content type of the compression and a NUL follow."""
_TEXTS: Final = {"name": "name", "worker": "worker", "queue": "queue", "group": "group_id", "parent": "parent_id"}


class Arriving(NamedTuple):
    """How documents become events.

    Attributes:
        imported: Where from, when and by whom.
        kept_ms: How long a result is kept where its store does not say; 0: for ever.
        redact: What may be recorded of a task's name, arguments and keyword arguments; None: all.
    """

    imported: Imported
    kept_ms: int
    redact: Callable[[str, Any, Any], tuple[Any, Any]] | None = None


def event_of(found: Stock, how: Arriving) -> Event | None:
    """Return what a document says, as an event; None if it is ours.

    Raises:
        Unreadable: Nobody can tell what it says, or it holds arguments that are to be redacted and cannot be.
    """
    if found.document is None:
        raise Unreadable(found.problem)
    said = documents.read(_decompressed(found.document))
    return _group(found, said, how) if found.subject == GROUP else _task(found, said, how)


def _decompressed(document: bytes) -> bytes:
    if not document.startswith(_COMPRESSED):
        return document
    content_type, _, body = document[len(_COMPRESSED) :].partition(b"\x00")
    try:
        return bytes(decompress(body, content_type.decode()))
    except Exception as exc:  # each method has errors of its own
        raise Unreadable(f"cannot be decompressed ({content_type[:40]!r}): {type(exc).__name__}: {exc}") from exc


def _task(found: Stock, said: Said, how: Arriving) -> Event | None:
    state = said.fields.get("status")
    if not isinstance(state, str) or "result" not in said.fields:
        raise Unreadable("no status and result in it")
    rank = order.rank_of(state)
    if found.key and order.rank_of_key(found.key) >= rank:
        return None
    document, said = _redacted(found, said, how)
    done_ms = found.done if found.done is not None else documents.moment(said.fields.get("date_done"))
    done = said.fields.get("date_done")
    return _event(
        found,
        document,
        said,
        how,
        done_ms if rank else None,
        kind=events.kind_of(state),
        key=order.imported_key(rank, done_ms if rank else None),
        state=state,
        date_done=done if isinstance(done, str) else None,
        **_about(said),
    )


def _group(found: Stock, said: Said, how: Arriving) -> Event:
    try:
        members = said.fields["result"][1]
        children = [[[str(one[0][0]), None], None] for one in members]
    except (LookupError, TypeError) as exc:
        raise Unreadable("no members in it") from exc
    document = found.document or b""
    return _event(
        found,
        document,
        said,
        how,
        found.done,
        kind=events.GROUP_SAVED,
        key=order.imported_key(Rank.UNREADY, found.done),
        group=found.id,
        plain={"children": children},
    )


def _event(
    found: Stock, document: bytes, said: Said, how: Arriving, done_ms: int | None, /, plain: Any = None, **more: Any
) -> Event:
    at = how.imported.at if done_ms is None else max(done_ms, 0)
    expires_at = found.expires_at if found.expires_at is not None else how.kept_ms and at + how.kept_ms
    name = hashlib.sha256(f"{found.subject}\n{found.id}\n".encode(errors="backslashreplace") + document)
    return Event(
        id=name.hexdigest()[:32],
        task=found.id,
        at=at,
        hlc=at,
        role=events.OPERATOR,
        expires_at=expires_at or None,
        imported=how.imported,
        **_documents(document, said, plain),
        **more,
    )


def _documents(document: bytes, said: Said, plain: dict[str, Any] | None) -> dict[str, Any]:
    """Return a document as events carry it: embedded JSON, or opaque with its parts."""
    if said.content_type == documents.JSON and codec.is_json_document(document):
        return {"doc": msgspec.Raw(document)}

    def part(name: str) -> bytes | None:
        return said.part(name) if said.fields.get(name) is not None else None

    traceback = said.fields.get("traceback")
    return {
        "opaque": Opaque(
            meta=document,
            content_type=said.content_type,
            result=said.part("result"),
            traceback=traceback if isinstance(traceback, str) else None,
            children=part("children"),
            args=part("args"),
            kwargs=part("kwargs"),
            plain=plain or _plain(said),
        )
    }


def _plain(said: Said) -> dict[str, Any] | None:
    found = {}
    for name in ("children", "args", "kwargs"):
        if said.fields.get(name):
            with suppress(TypeError, ValueError, RecursionError):
                found[name] = msgspec.json.decode(msgspec.json.encode(said.fields[name]))
    return found or None


def _about(said: Said) -> dict[str, Any]:
    """Return what else a task's document knows, under the names of `Event`; only what is of its type."""
    fields = said.fields
    found: dict[str, Any] = {
        name: fields[theirs] for name, theirs in _TEXTS.items() if isinstance(fields.get(theirs), str)
    }
    retries = fields.get("retries")
    if isinstance(retries, int) and 0 <= retries < 1 << 31:
        found["attempt"] = retries
    for name in ("args", "kwargs"):
        if fields.get(name) is not None:
            with suppress(TypeError, ValueError, RecursionError):
                found[name] = msgspec.json.decode(msgspec.json.encode(fields[name]))
    if fields["status"] in states.EXCEPTION_STATES and (raised := documents.exception(fields["result"])):
        found["exception"], found["message"] = raised[0], raised[1][:MESSAGE_LIMIT]
    return found


def _redacted(found: Stock, said: Said, how: Arriving) -> tuple[bytes, Said]:
    """Return a document without the arguments that may not be recorded."""
    document = found.document or b""
    fields = said.fields
    if how.redact is None or not (fields.get("args") or fields.get("kwargs")):
        return document, said
    if said.content_type != documents.JSON:
        raise Unreadable(f"redact is set, and arguments cannot be taken out of {said.content_type}")
    args, kwargs = how.redact(str(fields.get("name") or ""), fields.get("args"), fields.get("kwargs"))
    document = json.dumps({**fields, "args": args, "kwargs": kwargs}).encode()
    return document, documents.read(document)
