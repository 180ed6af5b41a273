"""Celery's own columns, held against what we would write there: a store that keeps more of a document than its bytes.

What stands there is a function of the event that is shown. Its document alone says most of it where that is JSON; the
rest is in the event itself, which the store's history has.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from celery_kafka_backend import codec, events
from celery_kafka_backend.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from celery_kafka_backend.events import Event

PREFIX: Final = "native."
"""How a dump's row names one of Celery's own columns: stores share no names, and a document's row has its own."""
_DAY_MS: Final = 86_400_000
_SHORT: Final = 200


class _Said(msgspec.Struct):
    status: str | None = None
    date_done: str | None = None
    group_id: str | None = None
    parent_id: str | None = None


_decoder = msgspec.json.Decoder(_Said)


def wrong(
    found: Mapping[str, Any],
    said: Callable[[Event, bytes], Mapping[str, Any]],
    document: bytes,
    event_id: str,
    history: Callable[[], Sequence[bytes]],
    *,
    mixed: bool = False,
) -> dict[str, Any]:
    """Return of each of Celery's own columns that is not what the shown event says both, as text, for `document_row`.

    Without the event only those are known that follow from the document; none, if that is not JSON.

    Args:
        found: The columns as they are; {} if there is no such row.
        said: Returns what they are to be, of an event and its document.
        document: The document beside them.
        event_id: Id of the event that is shown.
        history: Returns the record values that the store has of its task or group. Asked only where the document does
            not say it all, or something is wrong.
        mixed: The store does not tell events of one order key apart in these columns: each may be of any of them.
    """
    alone = _alone(document)
    if alone is not None and not _differ(found, said(alone, document)):
        return {}
    recorded = list(_decoded(history()))
    for event in recorded:
        if event.id == event_id:
            right = dict(said(event, event.document or document))
            for other in recorded if mixed else ():
                if other.key == event.key and other.document is not None:
                    rival = said(other, other.document)
                    right |= {name: rival[name] for name in rival if _same(found.get(name), rival[name])}
            return differing(found, right)
    if alone is None or not codec.is_json_document(document):
        return {}
    right = dict(said(alone, document))
    another = msgspec.structs.replace(alone, at=alone.at + _DAY_MS, group="?", parent="?")
    unknown = _differ(right, said(another, document))
    return differing(
        *({name: value for name, value in columns.items() if name not in unknown} for columns in (found, right))
    )


def differing(found: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    """Return of each column that differs what it is and what it is to be, as text."""
    return {
        PREFIX + name: f"{_short(found.get(name))}, not {_short(right.get(name))}"
        for name in sorted(_differ(found, right))
    }


def _alone(document: bytes) -> Event | None:
    """Return the event of a document as far as that says it; None if it is not JSON."""
    try:
        said = _decoder.decode(document)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return events.Event(
        id="?", kind=events.STATE, task="?", at=0, hlc=0,
        state=said.status, date_done=said.date_done, group=said.group_id, parent=said.parent_id,
    )  # fmt: skip


def _decoded(values: Sequence[bytes]) -> Iterator[Event]:
    for value in values:
        with suppress(CodecError):
            yield codec.decode(value)


def _differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> set[str]:
    return {name for name in {*a, *b} if not _same(a.get(name), b.get(name))}


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"
