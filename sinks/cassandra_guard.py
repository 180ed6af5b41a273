"""What decides in Cassandra: write timestamps, times to live, and which row of a partition counts. No I/O.

Cassandra knows one comparison: of two writes of one cell the greater ``USING TIMESTAMP`` stays. So each cell's timestamp
is made from what the cell must be the maximum of; where two such maxima meet, they are two cells.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from celery_kafka_backend.changes import Side, merge_sides
from celery_kafka_backend.order import Rank, rank_of_key

if TYPE_CHECKING:
    from collections.abc import Iterable

NEVER: Final = 1 << 53
"""An expiry later than all: a maximum of expiries needs no special case."""
MARGIN_S: Final = 86_400
"""So much longer than it counts is kept what guards: a day later an event may still say that it counts longer."""

_ENDED: Final = frozenset({"FAILURE", "REVOKED"})
_HOUR_MS: Final = 3_600_000
_LATEST: Final = (1 << 42) - 1  # the year 2109
_HOURS: Final = (1 << 21) - 1
_TWENTY_YEARS_S: Final = 630_720_000
_Y2038_S: Final = (1 << 31) - 2
_EPOCH_MS: Final = 1_577_836_800_000
_TURNED: Final = (1 << 63) - 1


def native_stamp(key: int) -> int:
    """Return the write timestamp of a row that shows an event, in Celery's own table.

    In the order of keys, and below every clock: what Celery's own backend writes and deletes there, with the wall clock
    in µs, is never undone by us. ``native_stamp(key) - 1`` is one too.
    """
    return key - _TURNED


def is_stock(stamp: int) -> bool:
    """Whether a row of Celery's own table was written by another than us."""
    return stamp > 0


def stock_stays(status: str, key: int) -> bool:
    """Whether what Celery's own backend says of a task is what it shows, beside a row of ours with this key; 0: none."""
    if status == "SUCCESS" or not key:
        return True
    return status in _ENDED and rank_of_key(key) is Rank.UNREADY


def ttl_s(expires_at: int, now_ms: int, margin_s: int = 0) -> int:
    """Return the time to live of what expires then, in s; 0: none.

    Made so that the same expiry ends in the same second, whenever it is written: of two cells with one timestamp, the
    one that ends later would stay.
    """
    if expires_at >= NEVER:
        return 0
    now_s = now_ms // 1000
    ends_s = -(-expires_at // 1000) + margin_s
    # Cassandra refuses more than 20 years; and what ends after 2038, unless told that no older version is near.
    if ends_s - now_s > _TWENTY_YEARS_S or now_s < _Y2038_S < ends_s:
        return 0
    return max(ends_s - now_s, 1)


class Term(NamedTuple):
    """Until when something counts, and since when that is known; ms since 1970.

    Attributes:
        until: `NEVER`, or when.
        since: When it was first written.
    """

    until: int
    since: int

    @property
    def stamp(self) -> int:
        """The write timestamp of a term: the later end stays, and of one end the term that is known longer."""
        hours = max(self.since - _EPOCH_MS, 0) // _HOUR_MS
        return min(self.until, _LATEST) << 21 | max(_HOURS - hours, 0)

    def pack(self) -> bytes:
        """Return it as bytes, the earlier ``since`` being the greater: Cassandra's last resort is to compare values."""
        return _TERM.pack(self.until, _TURNED - self.since)

    @staticmethod
    def unpack(packed: bytes) -> Term:
        """Return what was packed."""
        until, turned = _TERM.unpack_from(packed)
        return Term(until, _TURNED - turned)

    def lapsed(self, whole: Term, now_ms: int) -> bool:
        """Whether this one's claim is over, although the partition's goes on until the end of ``whole``.

        It goes on with the whole, unless that was only prolonged when there was nothing left to prolong.
        """
        return self.until <= now_ms and whole.since > max(self.until, self.since)


_TERM: Final = struct.Struct(">QQ")
_GUARD: Final = struct.Struct(">Q")


class Guard(NamedTuple):
    """What a row says beside its key: until when it counts, and until when its document is shown (0: never ends)."""

    term: Term
    shown_until: int

    def pack(self) -> bytes:
        """Return it as bytes."""
        return self.term.pack() + _GUARD.pack(self.shown_until)

    @staticmethod
    def unpack(packed: bytes) -> Guard:
        """Return what was packed."""
        return Guard(Term.unpack(packed), _GUARD.unpack_from(packed, _TERM.size)[0])


class Ranked(NamedTuple):
    """A row of a partition: a claim on what is shown."""

    name: str
    key: int
    event_id: str
    guard: bytes | None
    document: bytes | None


def winners(rows: Iterable[Ranked], whole: Term, now_ms: int) -> dict[str, Ranked]:
    """Return by name the row that counts, its document None if it is not to be shown.

    Args:
        rows: Of one partition, the greatest (key, event id) of each name first.
        whole: The partition's own term.
        now_ms: ms since 1970.
    """
    found: dict[str, Ranked] = {}
    if whole.until <= now_ms:
        return found
    for row in rows:
        if row.name in found or row.guard is None:
            continue
        guard = Guard.unpack(row.guard)
        if not guard.term.lapsed(whole, now_ms):
            hidden = 0 < guard.shown_until <= now_ms
            found[row.name] = row._replace(document=None) if hidden else row
    return found


# -- side records --------------------------------------------------------------------------------


def piece(side: Side) -> bytes:
    """Return what an event adds to a side record, without the two fields that grow with every event."""
    return msgspec.msgpack.encode((side.run, side.sent, side.received, side.started, side.attempts, side.workers))


def merged(pieces: Iterable[bytes], seen: int, until: int) -> Side:
    """Return a side record from its pieces."""
    side = Side(seen=seen)
    for each in pieces:
        run, sent, received, started, attempts, workers = msgspec.msgpack.decode(each)
        side = merge_sides(
            side,
            Side(run=run, sent=sent, received=received, started=started, attempts=attempts, workers=tuple(workers)),
        )
    return msgspec.structs.replace(side, expires_at=0 if until >= NEVER else until)
