"""The order key: which of a task's events its document shows, and the clock behind it.

A view's document is a function of exactly one event, the one with the greatest order key. The
key travels in the event, so arrival order, batching, duplication and replay do not matter. It
fits 63 bits, because Elasticsearch's external versions and Cassandra's timestamps are 64-bit::

    known run     run (28) │ rank (2) │ t (33)
    unknown run                       rank (2) │ ms since 2020 (41)      below every known run
    imported                          4 s since 2020 (30) │ rank (2)     below every live event

``run`` is the publisher's wall clock, in units of 8 seconds since 2020: one incarnation of a task
id, with its retries and redeliveries. ``t`` is the hybrid logical clock (HLC) in milliseconds
since the start of that unit. Among successes it is inverted: the *first* success of a run stays.

Nothing here does I/O; the wall clock is a parameter.
"""

from __future__ import annotations

import threading
import time
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

EPOCH_MS = 1_577_836_800_000
"""2020-01-01T00:00:00Z in milliseconds since 1970."""

UNIT_MS = 8_000
"""Length of a run's unit."""

SKEW_LIMIT_MS = 600_000
"""A clock further ahead than this is ignored, not clamped: one host at 2099 must not poison a fleet."""

_T_BITS = 33
_T_MAX = (1 << _T_BITS) - 2
_FORGOTTEN_T = (1 << _T_BITS) - 1
_FINE = 1 << 32
"""Up to here (49 days after the unit's start) t counts single milliseconds …"""
_COARSE_MS = 256
"""… and beyond in these steps, which reaches 34 years."""
_RUN_MAX = (1 << 28) - 1
_RUN_MIN = 1 << 8
"""The first run whose keys are above every key of an unknown run: 34 minutes into 2020. A publisher
whose clock is before that (1970, most often) counts as started then."""

_GUESS_BITS = 41
_GUESS_MAX = (1 << _GUESS_BITS) - 2
_FORGOTTEN_GUESS = (1 << _GUESS_BITS) - 1

_IMPORT_UNIT_MS = 4_000
_IMPORT_BITS = 32
"""The key of an import is below 2**32, that of a live event above: 2**32 ms are the first 49 days of 2020."""

KEY_DIGITS = 19
"""Width of a key as decimal text; text of this width compares like the number."""


class Rank(IntEnum):
    """What kind of claim an event makes, weakest first."""

    UNREADY = 0
    GUESSED_REVOKED = 1
    """Revoked, said by a worker that had no request at hand."""
    FAILED = 2
    """Failed or revoked, said by an execution."""
    SUCCEEDED = 3
    """Also forgotten, which is the greatest of a run."""


_SUCCEEDED = Rank.SUCCEEDED
_RANKS = {"SUCCESS": Rank.SUCCEEDED, "FAILURE": Rank.FAILED, "REVOKED": Rank.FAILED}


def rank_of(state: str) -> Rank:
    """Return what an execution claims that says that its task is in this state."""
    return _RANKS.get(state, Rank.UNREADY)


def run_at(wall_ms: int) -> int:
    """Return the run that a publisher at this wall-clock time (ms since 1970) starts."""
    return min(max((wall_ms - EPOCH_MS) // UNIT_MS, _RUN_MIN), _RUN_MAX)


def run_start_ms(run: int) -> int:
    """Return when a run's unit starts, in ms since 1970."""
    return EPOCH_MS + run * UNIT_MS


def trusted_run(run: int | None, wall_ms: int) -> int | None:
    """Return ``run``, or None (unknown) if it is missing, no run at all, or absurdly far ahead of ``wall_ms``."""
    if run is None or not _RUN_MIN <= run <= _RUN_MAX or run_start_ms(run) > wall_ms + SKEW_LIMIT_MS:
        return None
    return run


def order_key(rank: Rank, hlc_ms: int, run: int | None) -> int:
    """Return the key of an event.

    Args:
        rank: What the event claims.
        hlc_ms: The event's HLC, ms since 1970.
        run: The run it belongs to (of `run_at` or `trusted_run`), or None when nobody knows.

    Returns:
        A positive integer below 2**63; of two events of one task the greater is shown.
    """
    if run is None:
        t = min(max(hlc_ms - EPOCH_MS, 1), _GUESS_MAX)  # 0 would be no key at all
        return (rank << _GUESS_BITS) | (_GUESS_MAX - t if rank is _SUCCEEDED else t)
    t = max(hlc_ms - run_start_ms(run), 0)
    if t > _FINE:
        t = min(_FINE + (t - _FINE) // _COARSE_MS, _T_MAX)
    if rank is _SUCCEEDED:
        t = _T_MAX - t
    return (run << (_T_BITS + 2)) | (rank << _T_BITS) | t


def forget_key(run: int | None) -> int:
    """Return the key of a forget: above everything of its run, below the next run."""
    if run is None:
        return (Rank.SUCCEEDED << _GUESS_BITS) | _FORGOTTEN_GUESS
    return (run << (_T_BITS + 2)) | (Rank.SUCCEEDED << _T_BITS) | _FORGOTTEN_T


def imported_key(rank: Rank, done_ms: int | None) -> int:
    """Return the key of what another store had: whatever happened here is shown instead, and of imports the latest.

    Args:
        rank: What it claims.
        done_ms: When it was done, ms since 1970; None: nobody knows, as of what is not ready.
    """
    t = 0 if done_ms is None else (done_ms - EPOCH_MS) // _IMPORT_UNIT_MS
    return (min(max(t, 1), (1 << _IMPORT_BITS - 2) - 1) << 2) | rank


def run_of_key(key: int) -> int | None:
    """Return the run inside a key, or None if it was made for an unknown run."""
    if key < 1 << (_GUESS_BITS + 2):
        return None
    return key >> (_T_BITS + 2)


def rank_of_key(key: int) -> Rank:
    """Return what the event of a key claims."""
    if key < 1 << _IMPORT_BITS:
        return Rank(key & 3)
    return Rank(key >> (_T_BITS if run_of_key(key) is not None else _GUESS_BITS) & 3)


def key_text(key: int) -> str:
    """Return a key as text that compares like the number (in stores whose numbers are doubles)."""
    return f"{key:0{KEY_DIGITS}d}"


def system_wall_ms() -> int:
    """Return the machine's wall clock, ms since 1970."""
    return time.time_ns() // 1_000_000


class Clock:
    """A hybrid logical clock: wall time, never behind anything this process has seen.

    Thread-safe. Strictly increasing within a process, so that two events of one process never
    tie; across a fork, two processes may tie, and event ids decide.

    Args:
        wall_ms: The wall clock, ms since 1970.
    """

    def __init__(self, wall_ms: Callable[[], int] = system_wall_ms) -> None:
        self.wall_ms = wall_ms
        self._last = 0
        self._lock = threading.Lock()

    def tick(self) -> int:
        """Return a new HLC reading, ms since 1970, greater than every earlier one."""
        wall = self.wall_ms()
        with self._lock:
            self._last = max(wall, self._last + 1)
            return self._last

    def observe(self, hlc_ms: int | None) -> bool:
        """Take note of a reading from elsewhere; return False if it was too far ahead and ignored."""
        if hlc_ms is None or hlc_ms <= self._last:
            return True
        if hlc_ms > self.wall_ms() + SKEW_LIMIT_MS:
            return False
        with self._lock:
            self._last = max(self._last, hlc_ms)
        return True

    def renew_lock(self) -> None:
        """Replace the lock after a fork, where another thread of the parent may have held it."""
        self._lock = threading.Lock()
