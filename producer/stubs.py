"""A chord's body is in its declaration, once; what its members' messages carry of it is a stub.

Celery puts the whole body into the message of every member, and of every task before a member in its chain. A chain of
chords then grows with every step: celery#5000 and celery#10171 measured gigabytes.
"""

from __future__ import annotations

from typing import Any, Final

from celery_kafka_backend.producer import headers as names

_INNER: Final = {"group": ("tasks",), "chain": ("tasks",), "chord": ("header", "body")}


def stub(chord: dict[str, Any]) -> dict[str, Any]:
    """Return a valid signature that names a body and its declaration, and has no arguments.

    Args:
        chord: The body, as a member's ``chord``; a stub stays one.
    """
    options = chord.get("options") or {}
    kept = {name: options[name] for name in ("task_id", "root_id", names.GENERATION) if name in options}
    return {
        "task": chord.get("task"),
        "args": [],
        "kwargs": {},
        "options": kept,
        "subtask_type": None,
        "immutable": bool(chord.get("immutable")),
    }


def is_declared(chord: Any) -> bool:
    """Return whether a body is in a declaration of ours, so that a stub of it will do."""
    return isinstance(chord, dict) and names.GENERATION in (chord.get("options") or {})


def without_bodies(canvas: Any) -> Any:
    """Return a signature, or a list of them, in which every declared body is a stub. Copies what it changes."""
    if isinstance(canvas, (list, tuple)):
        return [without_bodies(one) for one in canvas]
    if not isinstance(canvas, dict):
        return canvas  # a generator: nothing of it is in a message yet
    options, kwargs = canvas.get("options") or {}, canvas.get("kwargs") or {}
    chord = options.get("chord")
    if isinstance(chord, dict):
        options = {**options, "chord": stub(chord) if is_declared(chord) else without_bodies(chord)}
    inner = _INNER.get(str(canvas.get("subtask_type")), ())
    held = {name: without_bodies(kwargs[name]) for name in inner if name in kwargs}
    return {**canvas, "options": options, "kwargs": {**kwargs, **held}}
