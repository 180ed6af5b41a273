"""Events, batches and documents for the contract's cases: deterministic, and readable in a failure.

Times are ms since `R`, the start of a run; ids are the names that a case gives.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import msgspec

from celery_kafka_backend import codec, events
from celery_kafka_backend.changes import Batch, Logged
from celery_kafka_backend.order import Rank, forget_key, imported_key, order_key, run_at, run_start_ms
from celery_kafka_backend.processors.fold import fold

NOON_2025 = 1_750_000_000_000
RUN = run_at(NOON_2025)
R = run_start_ms(RUN)
"""Start of the run that events have unless told otherwise."""
FAR = 4_102_444_800_000
"""2100-01-01: an expiry that no test will see."""

KINDS = {
    "STARTED": (events.STARTED, Rank.UNREADY),
    "RETRY": (events.RETRY, Rank.UNREADY),
    "SUCCESS": (events.SUCCESS, Rank.SUCCEEDED),
    "FAILURE": (events.FAILURE, Rank.FAILED),
    "REVOKED": (events.REVOKED, Rank.FAILED),
    "ABORTED": (events.STATE, Rank.UNREADY),
    "PROGRESS": (events.STATE, Rank.UNREADY),
}


def json_document(task: str, state: str, result: Any = None, **more: Any) -> bytes:
    """A document as Celery's key-value backends write it in JSON."""
    done = "2025-06-15T15:06:40.123456+00:00" if state in {"SUCCESS", "FAILURE", "REVOKED"} else None
    meta = {"status": state, "result": result, "traceback": None, "children": [], "date_done": done, **more}
    return json.dumps({**meta, "task_id": task}).encode()


def stated(
    state: str, at: int = 0, *, task: str = "t", run: int | None = RUN, rank: Rank | None = None, value: Any = None,
    document: bytes | None = None, name: str = "", expires_at: int | None = FAR, **more: Any,
) -> events.Event:  # fmt: skip
    """An event that a document may show; ``at`` is ms since `R`."""
    kind, usual = KINDS[state]
    hlc = R + at
    shown = document if document is not None else json_document(task, state, value)
    ready = state in {"SUCCESS", "FAILURE", "REVOKED"}
    return events.Event(
        id=more.pop("id", None) or event_id(name or f"{task} {state} {at} {run} {value!r}"),
        kind=kind,
        task=task,
        key=order_key(usual if rank is None else rank, hlc, run),
        at=hlc,
        hlc=hlc,
        run=run,
        state=state,
        **({"doc": msgspec.Raw(shown)} if "opaque" not in more else {}),
        date_done="2025-06-15T15:06:40.123456+00:00" if ready else None,
        expires_at=expires_at,
        **more,
    )


def imported(state: str, at: int = 0, *, task: str = "t", value: Any = None, **more: Any) -> events.Event:
    """What another store had, done at a time."""
    event = stated(state, at, task=task, run=None, value=value, name=f"{task} imported {state} {at}", **more)
    rank = KINDS[state][1]
    return msgspec.structs.replace(
        event,
        key=imported_key(rank, event.at if rank else None),
        imported=events.Imported("redis://there/1", R, "ann@desk"),
    )


def forgotten(at: int = 0, *, task: str = "t", run: int | None = RUN, expires_at: int | None = FAR) -> events.Event:
    """A forget."""
    return events.Event(
        id=event_id(f"{task} forgotten {at}"), kind=events.FORGOTTEN, task=task, key=forget_key(run), at=R + at,
        hlc=R + at, run=run, role=events.CLIENT, expires_at=expires_at,
    )  # fmt: skip


def sent(at: int = 0, *, task: str = "t", expires_at: int | None = FAR, **more: Any) -> events.Event:
    """An event that never touches a document."""
    return events.Event(
        id=event_id(f"{task} sent {at}"), kind=events.SENT, task=task, at=R + at, hlc=R + at, run=RUN,
        role=events.CLIENT, sent_at=R + at, expires_at=expires_at, **more,
    )  # fmt: skip


def group_saved(
    group: str = "g", at: int = 0, *, members: tuple[str, ...] = (), expires_at: int | None = FAR
) -> events.Event:
    """A saved group, its own wall clock as run."""
    result = [[group, None], [[[member, None], None] for member in members]]
    return events.Event(
        id=event_id(f"{group} saved {at}"), kind=events.GROUP_SAVED, task=group, at=R + at, hlc=R + at,
        key=order_key(Rank.UNREADY, R + at, run_at(R + at)), run=run_at(R + at), role=events.CLIENT,
        doc=msgspec.Raw(json.dumps({"result": result}).encode()), expires_at=expires_at,
    )  # fmt: skip


def group_deleted(group: str = "g", at: int = 0, *, expires_at: int | None = FAR) -> events.Event:
    """A deleted group."""
    return events.Event(
        id=event_id(f"{group} deleted {at}"), kind=events.GROUP_DELETED, task=group, at=R + at, hlc=R + at,
        key=forget_key(run_at(R + at)), run=run_at(R + at), role=events.CLIENT, expires_at=expires_at,
    )  # fmt: skip


def event_id(name: str) -> str:
    """A stable id that looks like the real ones."""
    return uuid.uuid5(uuid.NAMESPACE_OID, name).hex


def logged(event: events.Event) -> Logged:
    """The event with the bytes it would have been read from."""
    return Logged(event, codec.encode(event))


def batch(*found: events.Event, **more: Any) -> Batch:
    """One batch of these events."""
    return Batch(changes=fold(logged(event) for event in found), **more)
