"""How long a test waits for a fact, and what it says when it has waited in vain.

Generous on purpose: patience costs nothing where the fact comes, and a machine that runs tests is a busy one. Bounds on
speed are in ``benchmarks/``; what must *not* happen is not waited for with this.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Final, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

PATIENCE_S: Final = 180.0


def until(ask: Callable[[], T], what: str | Callable[[], object] = "", *, every_s: float = 0.05) -> T:
    """Ask until the answer is true, and return it.

    Args:
        ask: The fact.
        what: It in words, or what tells in the end how things stand.
        every_s: How often to ask. It is asked once more when the time is over: one slow answer is not the end.
    """
    deadline = time.monotonic() + PATIENCE_S
    over = False
    while not (answer := ask()):
        if over:
            told = what() if callable(what) else what
            pytest.fail(f"not within {PATIENCE_S:g} s: {told or 'what is asked for here'}\n{_meanwhile()}")
        time.sleep(every_s)
        over = time.monotonic() > deadline
    return answer


def _meanwhile() -> str:
    """What the other threads of this process are at: processors run in some."""
    frames = sys._current_frames()
    others = [one for one in threading.enumerate() if one is not threading.current_thread() and one.ident in frames]
    return "\n".join(f"{one.name} is at:\n{''.join(traceback.format_stack(frames[one.ident]))}" for one in others)
