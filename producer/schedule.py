"""Which entry of its schedule beat is sending: Celery tells no signal, and puts no name into the message."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


def entry() -> str | None:
    """Return the name of the schedule's entry that is being sent by the caller's callers; None if beat is not among them.

    Looked for on the stack: the backend is often made by beat's first message, too late to wrap anything for that one.
    """
    beat = sys.modules.get("celery.beat")
    if beat is None:
        return None
    sends = beat.Scheduler.apply_async.__code__
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the interpreter's own way
    while frame is not None and frame.f_code is not sends:
        frame = frame.f_back
    return getattr(frame.f_locals.get("entry"), "name", None) if frame is not None else None
