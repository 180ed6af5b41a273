"""What has expired and is left out by a replay, as long as it may still matter to what was said later.

A live view knows an expired result no more; but whatever came *before* it expired met its key and its side record.
A replay that left out everything expired would show the STARTED of a redelivery that came after the SUCCESS, and would
not know when a long task was sent. One that merged all that the log has would let a first success, long gone by then,
hide the second one that everybody saw. So a replay does as the live view did: of each task it takes the events since
it was last gone (nothing of it had an expiry later than the time at which the next event came), all of them if
anything of them still lives, else none.

A history with a retention of its own may outlive all that: an event that is left out is written into it all the same.

What is over now but was there when the batch in hand was written is kept in a file, until the log's time has passed
its expiry: at most what one span of `result_expires` holds.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from celery_kafka_backend import events
from celery_kafka_backend.changes import (
    GROUP,
    TASK,
    Change,
    Logged,
    Side,
    beats,
    history_expiry,
    later_expiry,
    merge_sides,
)
from celery_kafka_backend.events import Event
from celery_kafka_backend.processors.fold import fold

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHUNK: Final = 400
"""Subjects per statement, two values each."""
PRUNE_FROM: Final = 100_000
"""Rows below which nothing is looked through for what is out of date."""

Subject = tuple[str, str]
"""`TASK` or `GROUP`, and its id."""


class _Rest(msgspec.Struct, frozen=True, array_like=True):
    """What is left of something expired: enough to guard, and to be merged.

    Attributes:
        expires_at: When all of it was over, ms since 1970.
        winner: Order key, event id, kind and expiry of what was shown; None if nothing was.
        side: Its side record; None for a group.
    """

    expires_at: int
    winner: tuple[int, str, str, int] | None
    side: Side | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Rest).decode


class Bygone:
    """What has expired of the part of the log that was read so far. For one thread.

    Args:
        path: A file that is not there yet; "" for one that is removed by itself.
        history_retention_ms: As `history_expiry` has it.
    """

    def __init__(self, path: str = "", history_retention_ms: int | None = None) -> None:
        self._history_ms = history_retention_ms
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("PRAGMA cache_size = -16384")
        self._db.execute(
            "CREATE TABLE bygone (subject TEXT, id TEXT, x INTEGER, rest BLOB, PRIMARY KEY (subject, id)) WITHOUT ROWID"
        )
        self.kept_until_ms = 0
        """Until when something of the batch that was settled last is needed; 0: nothing is."""
        self._rows = 0
        self._prune_at = PRUNE_FROM

    def settle(
        self, logged: list[Logged], came: Callable[[], tuple[Sequence[int], int]], now_ms: int
    ) -> tuple[list[Change], list[Life], list[Change]]:
        """Return the changes of a batch that still matter, what is over of tasks and groups, and what history keeps of that.

        Of a task all may be over, or a part. What is over is to be told to a store where its task still lives: something
        of it without an expiry, or with a later one, is there already. It may be of a task that has a change, too.

        Args:
            logged: The batch's events, each partition's in the order of the log.
            came: Tells when the log got each of them, ms since 1970, and before when no later one came.
            now_ms: The wall clock.
        """
        over = {_subject(event) for event, _ in logged if (at := event.expires_at) and at <= now_ms}
        known = self._known({_subject(event) for event, _ in logged}) if self._rows else {}
        if not over and not known:
            self.kept_until_ms = 0
            return fold(logged), [], []
        times, horizon_ms = came()
        plain: list[Logged] = []
        stories: dict[Subject, list[tuple[Logged, int]]] = {}
        for each, at in zip(logged, times, strict=True):
            subject = _subject(each.event)
            if subject in over or subject in known:
                stories.setdefault(subject, []).append((each, at))
            else:
                plain.append(each)
        found = [_lives(subject, known.get(subject), story) for subject, story in stories.items()]
        lives = [last for last, _ in found]
        gone = [life for life in lives if 0 < life.expires_at <= now_ms]
        kept = [life for life in gone if life.expires_at > horizon_ms]
        self.kept_until_ms = max((life.expires_at for life in kept), default=0)
        self._replace(known, kept, horizon_ms)
        changes = [*fold(plain), *(life.change() for life in lives if not 0 < life.expires_at <= now_ms)]
        over_now = [(last, whole) for last, whole in found if whole is not last or 0 < last.expires_at <= now_ms]
        return changes, [whole for _, whole in over_now], self._history_of(over_now, now_ms)

    def _history_of(self, over: Sequence[tuple[Life, Life]], now_ms: int) -> list[Change]:
        """Return of each task, whose last life and whole story these are, what is in no change and yet in the history."""
        if self._history_ms is None:
            return []
        found = []
        for last, whole in over:
            gone = 0 < last.expires_at <= now_ms
            left_out = whole.logged if gone else whole.logged[: len(whole.logged) - len(last.logged)]
            kept = [each for each in left_out if not 0 < history_expiry(each.event, self._history_ms) <= now_ms]
            if kept:
                found.append(Change(*last.subject, winner=None, side=None, history=kept, only_history=True))
        return found

    def close(self) -> None:
        """Forget it all."""
        self._db.close()

    def _known(self, subjects: set[Subject]) -> dict[Subject, _Rest]:
        found: dict[Subject, _Rest] = {}
        asked = list(subjects)
        for start in range(0, len(asked), CHUNK):
            chunk = asked[start : start + CHUNK]
            query = f"SELECT subject, id, rest FROM bygone WHERE (subject, id) IN (VALUES {', '.join(['(?, ?)'] * len(chunk))})"  # noqa: S608
            with closing(self._db.execute(query, [each for pair in chunk for each in pair])) as rows:
                found.update(((subject, each), _decode(rest)) for subject, each, rest in rows)
        return found

    def _replace(self, known: dict[Subject, _Rest], kept: list[Life], horizon_ms: int) -> None:
        self._db.execute("BEGIN")
        self._db.executemany("DELETE FROM bygone WHERE subject = ? AND id = ?", known)
        self._db.executemany("INSERT INTO bygone VALUES (?, ?, ?, ?)", [life.row() for life in kept])
        self._rows += len(kept) - len(known)
        if self._rows > self._prune_at:
            self._rows -= self._db.execute("DELETE FROM bygone WHERE x <= ?", (horizon_ms,)).rowcount
            self._prune_at = max(2 * self._rows, PRUNE_FROM)
        self._db.execute("COMMIT")


def _subject(event: Event) -> Subject:
    return GROUP if event.kind in events.GROUP_KINDS else TASK, event.task


class Life(NamedTuple):
    """What a batch says of one task or group since it was last gone, and what is left of what earlier batches said.

    Attributes:
        subject: Whose.
        rest: Of earlier batches; None: nothing.
        logged: This batch's events, at least one.
        expires_at: When all of it is over; 0: never.
    """

    subject: Subject
    rest: _Rest | None
    logged: list[Logged]
    expires_at: int

    def change(self) -> Change:
        """Return all of it as one change."""
        (change,) = fold(self.logged)
        rest = self.rest
        if rest is None:
            return change
        if rest.side is not None and change.side is not None:
            change.side = merge_sides(rest.side, change.side)
        if rest.winner is not None:
            key, event_id, kind, expires_at = rest.winner
            earlier = Event(
                id=event_id, kind=kind, task=self.subject[1], key=key, at=0, hlc=0, expires_at=expires_at or None
            )
            if change.winner is None or beats(earlier, change.winner):
                change.winner = earlier
        return change

    def row(self) -> tuple[str, str, int, bytes]:
        """Return it as it is kept."""
        change = self.change()
        winner = change.winner
        shown = None if winner is None else (winner.key, winner.id, winner.kind, winner.expires_at or 0)
        return (*self.subject, self.expires_at, _encode(_Rest(self.expires_at, shown, change.side)))


def _lives(subject: Subject, rest: _Rest | None, story: list[tuple[Logged, int]]) -> tuple[Life, Life]:
    """Return what a batch says of a task since it was last gone, and all that it says; the same if that was not in it."""
    left, latest = rest, list[Logged]()
    expires_at = rest.expires_at if rest is not None else 0
    for each, at in story:
        if 0 < expires_at <= at:
            left, latest = None, []
        ends = each.event.expires_at or 0
        expires_at = ends if left is None and not latest else later_expiry(expires_at, ends)
        latest.append(each)
    last = Life(subject, left, latest, expires_at)
    return last, last if len(latest) == len(story) else Life(subject, rest, [each for each, _ in story], expires_at)
