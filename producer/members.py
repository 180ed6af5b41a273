"""What a canvas comes down to for the chord around it: the tasks that send its parts, and the errbacks that hear of it.

Works on signatures, their dicts, and Celery's request for a task that never ran. Knows neither Kafka nor the log.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from celery.app.task import Context
from celery.utils.functional import maybe_list

from celery_kafka_backend.producer.recorder import field

if TYPE_CHECKING:
    from collections.abc import Iterator


def last_tasks(canvas: Any) -> Iterator[Any]:
    """Yield the tasks whose ends are a canvas's end: every one of a group, the last one of a chain, a chord's body.

    Celery counts the same ones when it tells a chord's size.
    """
    kind, kwargs = field(canvas, "subtask_type"), field(canvas, "kwargs") or {}
    if kind == "group":
        for task in kwargs.get("tasks") or ():
            yield from last_tasks(task)
    elif kind == "chord":
        yield from last_tasks(kwargs.get("body") or {})
    elif kind == "chain":
        # An empty group or chain at the end ends nothing.
        ends = (list(last_tasks(task)) for task in reversed(kwargs.get("tasks") or ()))
        yield from next((found for found in ends if found), ())
    else:
        yield canvas


def members(request: Any) -> list[Any]:
    """Return the requests of a chord's members that a request stands for: itself, unless it is a canvas that never ran."""
    if not field(request, "subtask_type"):
        return [request]
    return [_member(task, request) for task in last_tasks(request)]


def _member(task: Any, canvas: Any) -> Context:
    options = dict(field(task, "options") or {})
    given = {
        "id": options.get("task_id"),
        "group": options.get("group_id") or field(canvas, "group"),
        "chord": options.get("chord") or field(canvas, "chord"),
    }
    return Context(options, root_id=field(canvas, "root_id"), parent_id=field(canvas, "parent_id"), **given)


def errbacks(canvas: Any) -> Iterator[Any]:
    """Yield every errback that hears of a failed canvas, those of a group's tasks included."""
    yield from maybe_list((field(canvas, "options") or {}).get("link_error")) or ()
    kind, kwargs = field(canvas, "subtask_type"), field(canvas, "kwargs") or {}
    if kind == "group":
        for task in kwargs.get("tasks") or ():
            yield from errbacks(task)
    elif kind == "chord":
        yield from errbacks(kwargs.get("body") or {})


def fingerprint(signature: Any) -> str:
    """Return what tells a signature from others, however often it was copied and encoded."""
    options = dict(field(signature, "options") or {})
    options.pop("immutable", None)  # Celery before 5.7 adds that to a group's errbacks
    text = json.dumps({**signature, "options": options}, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
