"""Which of several configured views a process reads: the first, until the cut-over pointer names another.

One decision per process, for all its threads: no two of them read different views. With a single configured view there
is nowhere to go, and none of this runs.

A process looks for the pointer when it reads, at most every `LOOK_S`. It **moves** only when the new view shows all that
the log held after its last read of the old one, so that nothing it has seen goes back: for that moment, bounded by
`AGREE_S`, its reads wait. A view that lags more is not moved to, and tried again; a forced pointer does without. Whoever
waits for a task when its process moves is registered with the new view and reads there at once (`reader.Ear`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from celery_kafka_backend import topics
from celery_kafka_backend.barrier import barrier_for
from celery_kafka_backend.errors import SettingsError, StoreError, Unsure
from celery_kafka_backend.pointer import pointers
from celery_kafka_backend.reader import Reader
from celery_kafka_backend.settings import SETTING
from celery_kafka_backend.sinks.patience import at_most
from celery_kafka_backend.sinks.registry import open_view

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from celery_kafka_backend.pointer import Pointer
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import StoreOptions, View

logger = logging.getLogger(__name__)

LOOK_S: Final = 2.0
"""How old the pointer may be that a read relies on."""
ANSWER_S: Final = 0.5
"""What a look may take of a read, per view."""
SILENT_S: Final = 10.0
"""A view that did not say where the pointer is, is not asked again for so long."""
AGREE_S: Final = 1.0
"""How long a process's reads may be held up by its move; and before that, how long the new view may take to be up to date."""
AGAIN_S: Final = 10.0
"""Pause after a move that did not come off."""


class Gate:
    """Reads go on beside each other; a move waits for those under way, and holds up new ones."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reading = 0
        self._moving = False
        self._here = threading.local()

    @property
    def inside(self) -> bool:
        """Whether this thread is reading already."""
        return bool(getattr(self._here, "depth", 0))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the view as it is; may be nested."""
        depth = getattr(self._here, "depth", 0)
        if not depth:
            with self._changed:
                if self._moving:  # bounded as the move itself is: no read hangs on it
                    self._changed.wait_for(lambda: not self._moving, at_most(3 * AGREE_S))
                self._reading += 1
        self._here.depth = depth + 1
        try:
            yield
        finally:
            self._here.depth = depth
            if not depth:
                with self._changed:
                    self._reading -= 1
                    if self._moving:
                        self._changed.notify_all()

    @contextmanager
    def moving(self, patience_s: float) -> Iterator[None]:
        """Have nobody read, except who has not come back within ``patience_s``: it hangs on a view that is away."""
        with self._changed:
            self._moving = True
            self._changed.wait_for(lambda: not self._reading, patience_s)
        try:
            yield
        finally:
            with self._changed:
                self._moving = False
                self._changed.notify_all()


class Primary:
    """The view that this process reads.

    Args:
        settings: The user's, with several views.
        options: What the store of each needs, by URL.

    Raises:
        SettingsError: The first view's driver is not installed, or refuses an option.
    """

    def __init__(self, settings: Settings, options: Mapping[str, StoreOptions]) -> None:
        self._settings = settings
        self._options = options
        self._urls = {topics.view_name(url): url for url in settings.views}
        self._views: dict[str, View] = {}
        self._home = self.name = topics.view_name(settings.views[0])
        self.moves = 0
        """How often another view has become the one that is read."""
        self._followed = 0
        """Time of the latest pointer that needs nothing more to be done."""
        self._looked_at = float("-inf")
        self._used = False
        self._silent: dict[str, float] = {}
        self._said: Pointer | None = None
        self._opened(self._home)
        self.after_fork()

    def after_fork(self) -> None:
        """Make what other threads of the parent may have held, and leave the parent its connections."""
        self._gate = Gate()
        self._looking = threading.Lock()
        for view in self._views.values():
            view.after_fork()

    @property
    def view(self) -> View:
        """The one that is read now."""
        return self._views[self.name]

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Look where to read, if that was a while ago, and stay there inside."""
        if not self._gate.inside:
            self._look()
        with self._gate.reading():
            yield

    def close(self) -> None:
        """Let go of the views; a later read connects anew."""
        for view in self._views.values():
            view.close()

    # -- looking -----------------------------------------------------------------------------

    def _look(self) -> None:
        if time.monotonic() < self._looked_at + LOOK_S or not self._looking.acquire(timeout=at_most(ANSWER_S)):
            return
        try:
            if (now := time.monotonic()) < self._looked_at + LOOK_S:
                return  # another thread has, meanwhile
            pointer = self._pointer()
            self._looked_at = now
            if pointer is not None and pointer.at > self._followed and not self._follow(pointer):
                self._looked_at += AGAIN_S - LOOK_S
            self._used = True
        finally:
            self._looking.release()

    def _pointer(self) -> Pointer | None:
        """Return the latest pointer that the first view and the one we read hold; of others if neither answers."""
        found: list[Pointer] = []
        asked = dict.fromkeys((self._home, self.name))
        answers = [self._ask(name) for name in asked]
        if all(answer is None for answer in answers):
            others = (self._ask(name) for name in self._urls if name not in asked)
            answers = [next((answer for answer in others if answer is not None), None)]
        for answer in answers:
            found += answer or ()
        return max(found, key=lambda one: one.at, default=None)

    def _ask(self, name: str) -> list[Pointer] | None:
        """Return the pointers that a view holds; None if it does not answer."""
        if time.monotonic() < self._silent.get(name, 0.0):
            return None
        try:
            view = self._opened(name)
            with view.within(at_most(ANSWER_S)):
                return pointers(self._settings.topic_prefix, view.positions())
        except (StoreError, SettingsError) as exc:
            logger.debug("%s does not say which view is to be read: %s", name, exc)
            self._silent[name] = time.monotonic() + SILENT_S
            return None

    def _opened(self, name: str) -> View:
        if name not in self._views:
            url = self._urls[name]
            self._views[name] = open_view(url, self._options[url])
        return self._views[name]

    # -- moving ------------------------------------------------------------------------------

    def _follow(self, pointer: Pointer) -> bool:
        """Go where a pointer says; return False if that is to be tried again."""
        if pointer.view != self.name:
            if pointer.view not in self._urls:
                self._stay(pointer, f"is none of {SETTING}['views'] here: add it, and restart this process")
            else:
                try:
                    if not self._moved(pointer, self._opened(pointer.view)):
                        self._stay(pointer, "is behind what is shown here; trying again")
                        return False
                except SettingsError as exc:
                    self._stay(pointer, f"cannot be read: {exc}")
                except StoreError as exc:
                    self._stay(pointer, f"does not answer ({exc}); trying again")
                    return False
        self._followed = pointer.at
        return True

    def _stay(self, pointer: Pointer, why: str) -> None:
        if self._said != pointer:
            logger.warning("readers are to read %s, which %s; still reading %s", pointer.view, why, self.name)
            self._said = pointer

    def _moved(self, pointer: Pointer, view: View) -> bool:
        # What has shown nobody anything yet can begin anywhere; so does a process that starts after the cut-over.
        sure = not self._used or pointer.forced
        with view.within(at_most(2 * AGREE_S)):
            if self._used:
                view.positions()  # forced or not: it has to be there
            if not sure and not self._agrees(view):
                return False
            with self._gate.moving(at_most(AGREE_S)):
                if not sure and not self._agrees(view):
                    return False
                before, self.name = self.name, pointer.view
                self.moves += 1
        logger.info("reading %s from now on, not %s: the views were cut over", self.name, before)
        return True

    def _agrees(self, new: View) -> bool:
        """Wait until a view shows all that the log holds now; without Kafka, all that the one that is read shows."""
        try:
            return barrier_for(self._settings).complete(new.positions, at_most(AGREE_S))
        except Unsure as exc:
            logger.debug("comparing the views' positions instead: %s", exc)
        try:
            old = self.view.positions()
        except StoreError:
            return True  # nobody can say what is missing, and the view that was read so far is of no use
        log, there = topics.task_events(self._settings.topic_prefix), new.positions()
        return all(there.get(at, 0) >= offset for at, offset in old.items() if at.topic == log)


class FollowingReader(Reader):
    """Reads the view that its process reads at the time.

    Args:
        primary: Which one that is.
        pauses_s: As `StoreOptions` has it.
    """

    def __init__(self, primary: Primary, pauses_s: tuple[float, ...]) -> None:
        self._primary = primary
        self._pauses_s = pauses_s

    @property
    def view(self) -> View:
        """The view that is read now."""
        return self._primary.view

    @property
    def moves(self) -> int:
        """How often that has become another one."""
        return self._primary.moves

    def live(self) -> View:
        """Return the view that is read now; of a fork all are told at once."""
        return self._primary.view

    def steady(self) -> AbstractContextManager[None]:
        """Look where to read, if that was a while ago, and stay there inside."""
        return self._primary.steady()

    def close(self) -> None:
        """Let go of the views."""
        self._primary.close()


def reader_of(settings: Settings, options: Mapping[str, StoreOptions]) -> Reader:
    """Return what reads the primary view: the only one, or the one that the pointer names.

    Args:
        settings: The user's.
        options: What the store of each view needs, by URL.

    Raises:
        SettingsError: The first view's driver is not installed, or refuses an option.
    """
    first = options[settings.views[0]]
    if len(settings.views) == 1:
        return Reader(settings.views[0], first)
    key = repr([msgspec.structs.asdict(each) for each in (settings, *options.values())])
    with _making:
        if key not in _primaries:
            _primaries[key] = Primary(settings, options)
    return FollowingReader(_primaries[key], first.pauses_s)


_making = threading.Lock()
_primaries: Final[dict[str, Primary]] = {}


def _after_fork() -> None:
    global _making  # noqa: PLW0603 - another thread of the parent may have held it
    _making = threading.Lock()
    for each in _primaries.values():
        each.after_fork()


os.register_at_fork(after_in_child=_after_fork)
