"""How waiting works: Celery's result consumer on one `Ear`, heard by one thread for all."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from celery import states

from celery_kafka_backend import older
from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.parents import Parents, asks_for_parents, has_ended, members
from celery_kafka_backend.reader import Ear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


HEAR_SLICE_S: Final = 0.1
"""One thread hears for all that wait in its process; the others look at their own result this often."""

SHORTEST_PATIENCE_S: Final = 0.2
"""A waiter in its last moments gives a healthy store so long to answer, rather than hang up on it."""

LOOK_S: Final = 5.0
"""A first look that nobody waits for; what it did not find is heard of."""


class ResultConsumer(older.BaseResultConsumer):  # type: ignore[misc]
    """Celery's waiting machinery on one `Ear`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ear: Ear | None = None
        self._here = threading.local()
        self._begin()
        self.listener: Any = None
        """What `awaiting` has to hear with."""
        _consumers.add(self)

    def _begin(self) -> None:
        self._turn = threading.Condition()
        self._hearing: int | None = None
        """Which thread hears."""
        self._telling: set[int] = set()
        """Which threads tell what was heard: Celery calls a user's functions there, which may take long, wait and raise."""
        self._heard: deque[tuple[str, bytes]] = deque()
        """What nobody has been told yet."""

    @property
    def ear(self) -> Ear:
        """The process's ear."""
        if self._ear is None:
            self._ear = Ear(self.backend.reader, self.backend.settings.poll_interval_s)
        return self._ear

    def start(self, initial_task_id: str, **_: Any) -> None:
        """Start listening with a first task."""
        self.ear.add(initial_task_id)

    def consume_from(self, task_id: str) -> None:
        """Listen for a task."""
        self.ear.add(task_id)

    def cancel_for(self, task_id: str) -> None:
        """Stop listening for a task."""
        if self._ear is not None:
            self._ear.drop(task_id)

    def stop(self) -> None:
        """Stop listening."""
        if self._ear is not None:
            self._ear.close()

    def on_after_fork(self) -> None:
        """Start anew in a fork, where the thread whose turn it was is not."""
        self._ear = None
        self._begin()

    def drain_events(self, timeout: float | None = None) -> None:
        """Hear for a moment: one thread listens, the others wait for what it hears. Whoever is there tells it."""
        slice_s = HEAR_SLICE_S if timeout is None else min(timeout, HEAR_SLICE_S)
        try:
            if not self._takes_turn(slice_s):
                return
            if not self._heard:
                self._heard.extend(self.ear.hear(slice_s, self._patience_s()).items())
        finally:
            if self._hearing == threading.get_ident():  # also where a time limit came right after we had taken it
                self._hearing = None
        self._tell()

    def _takes_turn(self, slice_s: float) -> bool:
        """Wait for another thread's turn to end and return False, or take the turn."""
        me = threading.get_ident()
        with self._turn:
            # What another one tells may be all that we wait for. One that takes its time, for a user's function runs in it,
            # is not waited for again: it may itself wait for what we are to hear.
            if (self._elsewhere(me) or self._telling - {me}) and self._turn.wait(slice_s):
                return False
            if self._elsewhere(me):
                return False
            self._hearing = me
            return True

    def _elsewhere(self, me: int) -> bool:
        # Our own name there was left by an exception that came from outside, a time limit's for example.
        return self._hearing not in {None, me}

    def _tell(self, found: Mapping[str, bytes] | None = None) -> None:
        """Tell what was heard, in order; where that raises, have the rest read again."""
        me = threading.get_ident()
        within = me in self._telling
        try:
            self._telling.add(me)
            self._heard.extend((found or {}).items())
            while (told := self._next()) is not None:
                self._changed(*told)
        except BaseException:
            left = []
            while (told := self._next()) is not None:
                left.append(told[0])
            self.ear.again(left)
            raise
        finally:
            if not within:
                self._telling.discard(me)
            with self._turn:
                self._turn.notify_all()

    def _next(self) -> tuple[str, bytes] | None:
        try:
            return self._heard.popleft()
        except IndexError:
            return None

    def look(self) -> None:
        """Look once at what is there already of what is new to listen for."""
        self._tell(self.ear.meet([], LOOK_S))

    def _changed(self, task_id: str, document: bytes) -> None:
        meta = self.backend.decode_result(document)
        meta.setdefault("task_id", task_id)
        try:
            self.on_state_change(meta, None)
        except BaseException:
            self.ear.again([task_id])  # whoever else waits for it has not heard
            raise
        if meta["status"] in states.READY_STATES:
            self.cancel_for(task_id)

    def _wait_for_pending(
        self, result: Any, timeout: float | None = None, on_interval: Callable[[], Any] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Look once at what is there already, in the waiter's own thread, then wait for the rest of the timeout."""
        unknown = [one for one in members(result) if not has_ended(one)]
        if not all(one.id for one in unknown):
            self.backend.get_key_for_task("")  # says what is wrong with that, where waiting would have no end
        outer = getattr(self._here, "until", None)
        self._here.until = until = None if timeout is None else time.monotonic() + timeout
        # A group asks the backend of the thread that waits; its members know that of the thread that sent them.
        foreign = [one for one in unknown if one.backend is not self.backend]
        for one in foreign:
            self.backend.add_pending_result(one)
        try:
            self._tell(self.ear.meet([one.id for one in unknown], self._patience_s()))
            parents = None
            if on_interval is not None and asks_for_parents(result, on_interval):
                on_interval = parents = Parents(self.backend, result, on_interval)
            # Older versions of Celery take 0, what is left of a spent timeout, for no timeout at all.
            left = None if until is None else max(until - time.monotonic(), 0.01)
            yield from super()._wait_for_pending(
                result, timeout=left, on_interval=on_interval and _unless_away(on_interval), **kwargs
            )
            if parents is not None:
                with suppress(Unavailable):
                    parents.settle(until)
        finally:
            self._here.until = outer
            for one in foreign:
                self.backend.remove_pending_result(one)

    def _patience_s(self) -> float | None:
        """How long this thread's ``get`` may still wait for the store."""
        until: float | None = getattr(self._here, "until", None)
        return None if until is None else max(until - time.monotonic(), SHORTEST_PATIENCE_S)


_consumers: Final[WeakSet[ResultConsumer]] = WeakSet()


def _after_fork() -> None:
    for each in list(_consumers):
        each.on_after_fork()


# Not by the process id when next used: of two threads of the child, the second one would take the turn from the first.
os.register_at_fork(after_in_child=_after_fork)


def _unless_away(on_interval: Callable[[], Any]) -> Callable[[], None]:
    """Return what is called while one waits, where Celery looks whether a parent has failed: the view may be away."""

    def call() -> None:
        with suppress(Unavailable):
            on_interval()

    return call
