"""Whether a parent of an awaited result has failed, asked for all of them at once.

While ``get()`` waits for a chord's body, or for the end of a chain, Celery looks after each moment whether one of the
parents has failed: by a read for each that has not ended. For a header of some thousand tasks these reads never ended, and
took the core that its tasks needed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from celery import states
from celery.exceptions import ChordError
from celery.result import AsyncResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from celery_kafka_backend.reads import Reads

SHARE: Final = 0.05
"""Of the time that one waits, what is spent on looking at parents."""
SETTLE_S: Final = 1.0
"""How long after a failed chord's end its members' ends are still looked for."""
SETTLE_PAUSE_S: Final = 0.01


def asks_for_parents(result: Any, on_interval: Any) -> bool:
    """Return whether what Celery calls while it waits for a result looks at that one's parents."""
    # A promise of Celery's; whoever does not want parents to be followed, or calls us directly, has none with a function.
    follows = getattr(on_interval, "fun", None) is not None
    return follows and isinstance(result, AsyncResult) and result.parent is not None


class Parents:
    """The parents of one result, for one ``get()``.

    Args:
        backend: Reads them.
        result: Whose.
        look: Celery's own: raises what a parent has failed with, and calls what the user wants called.
    """

    def __init__(self, backend: Reads, result: AsyncResult, look: Callable[[], Any]) -> None:
        self._backend = backend
        self._result = result
        self._left = [member for parent in _parents(result) for member in members(parent)]
        self._look: Callable[[], Any] | None = look
        self._next = 0.0

    def __call__(self) -> None:
        """Read those that have not ended, now and then; raise what one has failed with.

        Raises:
            Unavailable: The view does not answer.
        """
        began = time.monotonic()
        if began < self._next:
            return
        waiting = [one for one in self._left if not has_ended(one)]
        self._ask(waiting)
        left = []
        for one in self._left:
            if not has_ended(one):
                left.append(one)
            elif one.state in states.PROPAGATE_STATES:
                one.maybe_throw()
        self._left = left
        if self._look is not None:  # for what the user wants called, which Celery does once
            look, self._look = self._look, None
            with self._backend.pending({one.id for one in left}):
                look()
        now = time.monotonic()
        self._next = now + (now - began) / SHARE

    def settle(self, until: float | None) -> None:
        """Raise what a member has failed with, when all that the result says is that its chord failed.

        A part of a chord is in Kafka before its task's end is: a view may show the chord's end a moment earlier.

        Args:
            until: When to give up at the latest, monotonic.

        Raises:
            Unavailable: The view does not answer.
        """
        if not (has_ended(self._result) and isinstance(self._result.result, ChordError)):
            return
        deadline = time.monotonic() + SETTLE_S
        deadline = deadline if until is None else min(deadline, until)
        while self._left:
            self._next = 0.0
            self()
            if time.monotonic() >= deadline:
                return
            time.sleep(SETTLE_PAUSE_S)

    def _ask(self, waiting: list[AsyncResult]) -> None:
        found = self._backend.documents([one.id for one in waiting])
        for one in waiting:
            document = found.get(one.id)
            if document is not None:
                one._maybe_set_cache(self._backend.decode_result(document))  # noqa: SLF001 - as whoever hears of it does


def _parents(result: Any) -> list[Any]:
    """Return a result's parents, the first one first: the order in which Celery asks."""
    found = []
    while (result := result.parent) is not None:
        found.append(result)
    return found[::-1]


def members(result: Any) -> Iterator[AsyncResult]:
    """Yield a result, or the members of a group of groups."""
    if (inside := getattr(result, "results", None)) is None:
        yield result
    else:
        for each in inside:
            yield from members(each)


def has_ended(result: AsyncResult) -> bool:
    """Return whether the end of a task is known here."""
    return result._cache is not None  # noqa: SLF001 - as Celery's own `ResultSet` asks
