"""How long a thread may still wait for a store: a waiter's bound belongs to its call, a driver's to a connection."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, overload

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORTEST_S: Final = 0.01
"""A wait of 0 s would be none at all, not even for what is there."""

_here: Final = threading.local()


@contextmanager
def within(timeout_s: float) -> Iterator[None]:
    """Have every wait of this thread for a server end after so long in all; it is then `Unavailable`."""
    outer = getattr(_here, "until", None)
    _here.until = time.monotonic() + timeout_s
    try:
        yield
    finally:
        _here.until = outer


def left_s() -> float | None:
    """Return how long this thread may still wait, None if nobody bounds it."""
    until = getattr(_here, "until", None)
    return None if until is None else max(until - time.monotonic(), SHORTEST_S)


@overload
def at_most(limit_s: float) -> float: ...
@overload
def at_most(limit_s: float | None) -> float | None: ...
def at_most(limit_s: float | None) -> float | None:
    """Return a limit (None: for ever), or what is left of this thread's time if that is less."""
    left = left_s()
    if left is None:
        return limit_s
    return left if limit_s is None else min(left, limit_s)
