"""What a client does with a view: get, wait, group, chord, history. Knows no Celery.

A waiter registers interest, *then* reads, *then* waits, so that nothing falls between. Everything
is bounded, and survives a view that goes away and comes back: after a reconnect all is read again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final, TypeVar
from uuid import uuid4

from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.sinks.patience import at_most
from celery_kafka_backend.sinks.registry import open_view

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from celery_kafka_backend.changes import Partition
    from celery_kafka_backend.sinks.contract import Shown, StoreOptions, Subscription, View

logger = logging.getLogger(__name__)

REGISTRATION_TTL_S: Final = 60.0
CHUNK: Final = 1000
RETRY_FIRST_S: Final = 0.05
RETRY_MAX_S: Final = 2.0
REREAD_FIRST_S: Final = 1.0
REREAD_MAX_S: Final = 25.0
"""Twice before a registration ends, for it is renewed at the same time."""
POLL_FIRST_S: Final = 0.005
WATCH_FROM_S: Final = 0.04
"""From such a pause on a view that is polled is asked to tell by itself: for whom nothing has been new for 0.1 s."""
WATCHED_MOST: Final = 10_000
"""Tasks; of more it is polled."""


_Found = TypeVar("_Found")


class Reader:
    """Reads one view, in any thread and on both sides of a fork.

    Args:
        url: The view's URL.
        options: What its store needs.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._view = open_view(url, options)
        self._pauses_s = options.pauses_s
        self._pid = os.getpid()

    @property
    def view(self) -> View:
        """The view."""
        return self._view

    @property
    def moves(self) -> int:
        """How often another view has taken its place."""
        return 0

    def live(self) -> View:
        """Return the view, told first if this process is a fork."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._view.after_fork()
        return self._view

    def steady(self) -> AbstractContextManager[None]:
        """Have no other view take its place inside."""
        return nullcontext()

    def _retrying(self, read: Callable[[View], _Found]) -> _Found:
        """Read from the view, again after short pauses if the store blinks.

        Raises:
            Unavailable: It did not come back: by default within about a second.
        """
        for pause in self._pauses_s:
            try:
                with self.steady():
                    return read(self.live())
            except Unavailable:
                if at_most(pause) < pause:  # whoever waits would not see the end of the pause
                    raise
                time.sleep(pause)
        with self.steady():
            return read(self.live())

    def documents(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Return the documents there are of these tasks."""
        found: dict[str, bytes] = {}
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            found.update(self._retrying(lambda view: view.documents(chunk)))  # noqa: B023 - called at once
        return found

    def groups(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Return the saved groups there are of these."""
        return self._retrying(lambda view: view.groups(ids))

    def shown(self, task_id: str) -> Shown | None:
        """Return all that the view has about a task."""
        return self._retrying(lambda view: view.shown([task_id])).get(task_id)

    def history(self, task_id: str) -> list[bytes]:
        """Return the record values of a task's events, oldest first; [] if the view keeps none."""
        return self._retrying(lambda view: view.history(task_id))

    def chord(self, group_id: str) -> dict[str, bytes]:
        """Return the facts about a chord by name."""
        return self._retrying(lambda view: view.chord(group_id))

    def positions(self) -> dict[Partition, int]:
        """Return the next offset of each partition that the view has not folded yet."""
        return self._retrying(lambda view: view.positions())

    def close(self) -> None:
        """Let go of the view."""
        self._view.close()


class Ear:
    """Hears of changes to the tasks that a process waits for: one per process and view.

    `add`, `drop` and `meet` may be called from any thread; `hear` by one at a time.

    Args:
        reader: Reads the view.
        poll_interval_s: Longest pause between two reads, on a view without push.
    """

    def __init__(self, reader: Reader, poll_interval_s: float) -> None:
        self._reader = reader
        self._poll_max_s = poll_interval_s
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._moves = self._reader.moves
        self._client = uuid4().hex
        self._lock = threading.Lock()
        self._subscribing = threading.Lock()
        self._ids: dict[str, int | None] = {}
        """Whom we wait for, and a hash of the document last seen of each."""
        self._new: set[str] = set()
        self._subscription: Subscription | None = None
        self._watched: frozenset[str] = frozenset()
        """Of whom a view that is polled tells by itself."""
        self._watchable = True
        self._reread_at = 0.0
        self._reread_pause = REREAD_FIRST_S
        self._poll_pause = POLL_FIRST_S
        self._retry_pause = RETRY_FIRST_S
        self._said_lost = False

    def _here(self) -> None:
        if self._pid != os.getpid():
            self._reset()

    def add(self, task_id: str) -> None:
        """Listen for a task from now on."""
        self._here()
        with self._lock:
            if task_id not in self._ids:
                self._ids[task_id] = None
                self._new.add(task_id)
                self._poll_pause = POLL_FIRST_S

    def drop(self, task_id: str) -> None:
        """Stop listening for a task. Safe from ``__del__``: takes no lock."""
        if self._pid == os.getpid():
            self._ids.pop(task_id, None)
            self._new.discard(task_id)

    def again(self, ids: Sequence[str]) -> None:
        """Have tasks read again that one listens for: what was heard of them has not arrived."""
        with self._lock:
            for each in ids:
                if each in self._ids:
                    self._ids[each] = None  # as if never seen: a view that is polled tells only what is not as it was
                    self._new.add(each)

    def meet(self, ids: Sequence[str], patience_s: float | None = None) -> dict[str, bytes]:
        """Listen for tasks and return the documents there are of them already.

        At once and in the caller's thread: whoever hears meanwhile would only do so after its turn.
        A store that is away, or silent for ``patience_s``, is left to `hear`, and this returns {}.
        """
        self._here()
        with self._lock:
            for each in ids:
                self._ids.setdefault(each, None)
            self._new.update(ids)
        try:
            with self._patient(patience_s), self._reader.steady():
                self._follow()
                return self._meet_pushed() if self._reader.view.push else self._reader.live().documents(ids)
        except Unavailable:
            return {}

    def hear(self, timeout_s: float, patience_s: float | None = None) -> dict[str, bytes]:
        """Return documents that are new or changed, {} if there are none within ``timeout_s``.

        A store that is away makes this wait and return {}; it never raises `Unavailable`. Reading what is new may take
        longer, but not longer than ``patience_s``.
        """
        self._here()
        try:
            with self._patient(patience_s), self._reader.steady():
                self._follow()
                found = self._hear_pushed(timeout_s) if self._reader.view.push else self._hear_asking(timeout_s)
        except Unavailable as exc:
            if not self._said_lost:
                logger.warning("the view is away, waiting for it: %s", exc)
                self._said_lost = True
            self._lose()
            time.sleep(min(self._retry_pause, timeout_s))
            self._retry_pause = min(self._retry_pause * 2, RETRY_MAX_S)
            return {}
        except BaseException:  # a time limit's, a key's: what it had heard is not known
            self._lose()
            self.again(list(self._ids))
            raise
        if self._said_lost:
            logger.warning("the view is back")
            self._said_lost = False
        self._retry_pause = RETRY_FIRST_S
        return found

    def _patient(self, patience_s: float | None) -> AbstractContextManager[None]:
        return nullcontext() if patience_s is None else self._reader.live().within(patience_s)

    def _follow(self) -> None:
        """Begin anew with all that wait, if another view is read from now on: the old one will tell nobody of them."""
        with self._subscribing:
            if self._moves != self._reader.moves:
                self._moves = self._reader.moves
                self._watchable = True
                self._lose()

    def _lose(self) -> None:
        self._unsubscribe()
        with self._lock:
            self._new.update(self._ids)  # registered and read again after the reconnect

    def _take_new(self) -> list[str]:
        with self._lock:
            new, self._new = [one for one in self._new if one in self._ids], set()
        return new

    def _subscribed(self) -> Subscription:
        with self._subscribing:
            if self._subscription is None:
                self._subscription = self._reader.live().subscribe(self._client)
                self._reread_pause = REREAD_FIRST_S
                self._reread_at = time.monotonic() + self._reread_pause
            return self._subscription

    def _meet_pushed(self) -> dict[str, bytes]:
        """Register who is new, which reads them too: what comes later is heard."""
        self._subscribed()
        new = self._take_new()
        try:
            return self._register(new) if new else {}
        except BaseException:
            with self._lock:
                self._new.update(new)
            raise

    def _hear_pushed(self, timeout_s: float) -> dict[str, bytes]:
        if found := self._meet_pushed():
            return found
        now = time.monotonic()
        if now >= self._reread_at and self._ids:
            return self._reread(now)
        heard = {each: said for each, said in self._subscribed().wait(timeout_s).items() if each in self._ids}
        told = {each: document for each, document in heard.items() if document}
        return told | self._reader.documents([each for each in heard if each not in told])

    def _register(self, ids: Sequence[str]) -> dict[str, bytes]:
        return self._reader.live().register(self._client, ids, REGISTRATION_TTL_S)

    def _reread(self, now: float) -> dict[str, bytes]:
        """Renew and read everything, slower and slower: a publish to a dying connection is lost silently."""
        self._postpone_reread(now)
        return self._register(list(self._ids))

    def _postpone_reread(self, now: float) -> None:
        self._reread_pause = min(self._reread_pause * 2, REREAD_MAX_S)
        self._reread_at = now + self._reread_pause

    def _hear_asking(self, timeout_s: float) -> dict[str, bytes]:
        """Poll, until the view tells by itself of all that wait, if it can."""
        new = self._take_new()  # of whom nobody has looked what is there already
        if not new and self._watched and self._watched.issuperset(list(self._ids)):
            return self._listen(timeout_s)
        if changed := self._news(self._reader.documents(list(self._ids))):
            self._poll_pause = POLL_FIRST_S
            return changed
        if self._poll_pause >= WATCH_FROM_S and self._watch():
            return {}
        pause = min(self._poll_pause, timeout_s, self._poll_max_s)
        self._poll_pause = min(self._poll_pause * 1.5, self._poll_max_s)
        time.sleep(pause)
        return {}

    def _watch(self) -> bool:
        """Have the view tell of all that wait now; return False if it cannot."""
        ids = list(self._ids)
        if not self._watchable or not 0 < len(ids) <= WATCHED_MOST:
            return False
        self._unsubscribe()
        self._subscription = self._reader.live().watch(ids)
        self._watchable = self._subscription is not None
        if self._watchable:
            self._watched = frozenset(ids)
            self._reread_pause = REREAD_FIRST_S
            self._reread_at = time.monotonic() + self._reread_pause
        return self._watchable

    def _listen(self, timeout_s: float) -> dict[str, bytes]:
        assert self._subscription is not None
        if (now := time.monotonic()) >= self._reread_at:
            self._postpone_reread(now)
            return self._news(self._reader.documents(list(self._ids)))
        return self._news(self._subscription.wait(timeout_s))

    def _news(self, found: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return what is not as it was seen last; one batched read per tick is for all that wait."""
        changed = {}
        for task_id, document in found.items():
            seen = hash(document)
            if self._ids.get(task_id, seen) != seen:
                self._ids[task_id] = seen
                changed[task_id] = document
        return changed

    def _unsubscribe(self) -> None:
        subscription, self._subscription = self._subscription, None
        self._watched = frozenset()
        if subscription is not None:
            subscription.close()

    def close(self) -> None:
        """Stop hearing."""
        if self._pid == os.getpid():
            self._unsubscribe()
