"""The results of a fired chord's members, from the log: their parts are gone, the events that say the same are not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kombu.utils.encoding import ensure_bytes

from celery_kafka_backend import codec, events
from celery_kafka_backend.chord_records import Part
from celery_kafka_backend.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from celery_kafka_backend.chord_records import Choice, Decided
    from celery_kafka_backend.events import Event


def parts_of(
    backend: Any,
    decided: Decided,
    choices: Iterable[Choice],
    logged: Iterable[tuple[bytes | None, bytes | None]],
) -> dict[Choice, Part]:
    """Return the parts that a decision chose, as far as their events are found.

    Args:
        backend: The app's, which opens documents.
        decided: The decision.
        choices: Those of its members that are wanted.
        logged: Keys and values of records of the log; read no further than necessary.

    Raises:
        ClaimLost: The object that holds a member's result is gone.
        Unavailable: … its store does not answer.
    """
    left: dict[bytes, list[Choice]] = {}
    for choice in choices:
        left.setdefault(choice.task.encode(), []).append(choice)
    found: dict[Choice, Part] = {}
    for key, value in logged:
        if key not in left or value is None:
            continue
        try:
            event = codec.decode(value)
        except CodecError:
            continue
        for choice in [one for one in left[key] if one.id == event.id]:
            found[choice] = _part(backend, decided, choice, event)
            left[key].remove(choice)
        if not left[key]:
            del left[key]
            if not left:
                break
    return found


def _part(backend: Any, decided: Decided, choice: Choice, event: Event) -> Part:
    content_type = encoding = ""
    payload = b""
    if event.document is not None:
        value = backend.decode_result(event.document)["result"]
        content_type, encoding, encoded = backend._encode(value)  # noqa: SLF001 - as Celery's own backends do
        payload = bytes(ensure_bytes(encoded))
    stamps = event.stamps or {}
    return Part(
        group=decided.group,
        generation=decided.generation,
        task=choice.task,
        index=choice.index,
        id=choice.id,
        key=event.key,
        result=payload,
        content_type=content_type,
        content_encoding=encoding or "",
        ignored=event.kind == events.SUCCESS and not payload,
        root=event.root,
        parent=event.parent,
        priority=event.priority,
        stamps={"stamped_headers": list(stamps), **stamps} if stamps else None,
        at=event.at,
    )


def ordered(decided: Decided, slices: Sequence[Any]) -> list[Choice]:
    """Return a decision's members, with those that stand in its slices."""
    chosen = sorted(slices, key=lambda one: one.n)
    return [*decided.parts, *(choice for one in chosen for choice in one.parts)]
