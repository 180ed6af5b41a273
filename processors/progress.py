"""What a view shows of a chord: one small fact per record, without any task's result. Pure."""

from __future__ import annotations

from functools import partial
from typing import Final

import msgspec

from celery_kafka_backend.changes import ChordFact
from celery_kafka_backend.chord_records import (
    Cancelled,
    Chosen,
    Decided,
    Declared,
    Extended,
    Fired,
    Gone,
    Part,
    Record,
    Resent,
    Sized,
)

_FIRST_WINS: Final = 1 << 62


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """The value of a chord's fact: small, and without any task's result."""

    kind: str
    generation: int
    at: int = 0
    task: str | None = None
    index: int | None = None
    state: str | None = None
    exception: str | None = None
    ignored: bool = False
    worker: str | None = None
    size: int | None = None
    delta: int | None = None
    replaces: str | None = None
    by: str | None = None
    body: str | None = None
    name: str | None = None
    run: int | None = None
    root: str | None = None
    parent: str | None = None
    owner: str | None = None
    outcome: str | None = None
    failed: str | None = None
    found: bool = False
    host: str | None = None
    pid: int | None = None
    reason: str | None = None
    deadline: int | None = None
    fire: bool = False
    done: int | None = None
    why: str | None = None


_encoder = msgspec.json.Encoder()


def facts(record: Record | Gone, offset: int, expires_at: int) -> list[ChordFact]:
    """Return what a view shows of a record, none for what is not shown.

    Args:
        record: A record of the chords' topic.
        offset: Its offset.
        expires_at: When the view may drop it, ms since 1970; 0: never.
    """
    if isinstance(record, Gone | Chosen):
        return []  # a view expires by itself: the log forgets a chord long before people do
    kind = str(record.__struct_config__.tag)
    name, order = f"{record.generation}|{kind}", offset
    progress = partial(Progress, kind, record.generation, record.at)
    match record:
        case Declared():
            shown = progress(
                body=record.body_task_id,
                name=record.body_name or None,
                root=record.root,
                parent=record.parent,
                host=record.host or None,
                pid=record.pid or None,
                deadline=record.deadline,
            )
        case Sized():
            shown = progress(size=record.size)
        case Extended():
            name += f"|{record.task}"
            shown = progress(
                task=record.task,
                index=record.index,
                delta=record.delta,
                replaces=record.replaces,
                by=record.by,
            )
        case Part():
            # Without the event id: a member is shown once, as its best part.
            name += f"|{record.task}|{'-' if record.index is None else record.index}"
            order = record.key
            shown = progress(
                task=record.task,
                index=record.index,
                state=record.state,
                exception=record.exception[:200] or None,
                ignored=record.ignored,
                worker=record.worker or None,
            )
        case Decided():
            order = _FIRST_WINS - offset
            shown = progress(
                owner=record.owner,
                outcome=record.outcome,
                body=record.body_task_id,
                run=record.body_run,
                size=record.size,
                failed=record.failed,
                why=record.why or None,
            )
        case Fired():
            order = _FIRST_WINS - offset
            shown = progress(
                owner=record.owner,
                outcome=record.outcome,
                body=record.body_task_id,
                found=record.found,
            )
        case Cancelled():
            name += f"|{record.id}"
            shown = progress(
                by=record.by or None,
                reason=record.reason or None,
                fire=record.fire,
            )
        case Resent():
            name += f"|{record.id}"
            shown = progress(
                by=record.by or None,
                reason=record.reason or None,
                done=record.done or None,
                owner=record.owner or None,
                outcome=record.outcome or None,
                run=record.run,
                found=record.found,
                why=record.why or None,
            )
    return [ChordFact(record.group, name, order, _encoder.encode(shown), expires_at)]
