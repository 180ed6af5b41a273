"""A task's message as its ``sent`` event keeps it, so that an operator can have it sent again.

Celery tells its signals neither the serializer nor the bytes. So the body is encoded once more, by the task's own
serializer: the same bytes as the broker got, unless the call named another one or a compression. What redaction
touches is not kept, here or in any signature within: links, chains, chords.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from kombu.serialization import dumps
from kombu.utils import json as kombu_json
from kombu.utils.encoding import ensure_bytes

from celery_kafka_backend.events import Parcel
from celery_kafka_backend.producer.stubs import is_declared

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from celery_kafka_backend.producer.recorder import Recorder


def packed(recorder: Recorder, headers: Mapping[str, Any], body: Any, properties: Mapping[str, Any]) -> Parcel:
    """Return a message, or why it is not kept."""
    why = _why_not(recorder, str(headers.get("task")), body)
    if why:
        return Parcel(why_not=why)
    task = recorder.app.tasks.get(headers.get("task"))
    serializer = getattr(task, "serializer", None) or recorder.app.conf.task_serializer
    try:
        content_type, encoding, encoded = dumps(body, serializer=serializer)
        known = _as_json(headers), _as_json(properties)
    except Exception as exc:  # noqa: BLE001 - whatever a serializer says; the message itself was sent
        return Parcel(why_not=f"the serializer {serializer} cannot say it: {type(exc).__name__}: {exc}"[:200])
    encoded = bytes(ensure_bytes(encoded))
    most = recorder.settings.record_messages_bytes
    if len(encoded) > most:
        return Parcel(why_not=f"its body has {len(encoded)} bytes, over record_messages_bytes = {most}")
    return Parcel(encoded, content_type, encoding, *known)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(kombu_json.dumps(dict(values)))
    return found


def _why_not(recorder: Recorder, name: str, body: Any) -> str:
    if not (isinstance(body, tuple) and len(body) == 3 and isinstance(body[2], dict)):
        return "a message of Celery's first protocol"
    args, kwargs, embed = body
    chord = embed.get("chord")
    if chord and not is_declared(chord):
        return "a member of a chord that the view's store counts: it would count twice"
    if recorder.settings.redact:
        for each, its_args, its_kwargs in ((name, args, kwargs), *_signatures(embed)):
            if recorder.redacted(each, its_args, its_kwargs) != (its_args, its_kwargs):
                return "redact: arguments that may not be recorded"
    return ""


def _signatures(within: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, arguments and keyword arguments of every signature in links, chains and chords."""
    pending = [within]
    while pending:
        found = pending.pop()
        if isinstance(found, dict):
            if isinstance(found.get("task"), str):
                yield found["task"], found.get("args") or (), found.get("kwargs") or {}
            pending += found.values()
        elif isinstance(found, (list, tuple)):
            pending += found
