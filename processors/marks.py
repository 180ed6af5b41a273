"""How far a replay is: kept in the store that it fills, so that another one can go on after a kill. Pure.

A view's position promises that all of the log below it is in the view. A replay of a part of the log may not say
that, and one into a view that is followed live finds it said already. So a replay keeps marks of its own, as
positions in topics that no log has::

    replay:next:<topic>   the next offset to read
    replay:end:<topic>    where to stop, unless that is the end of the log
    replay:start:<topic>  where it began, if it does not take all tasks
    replay:what           in partition 0 a digest of which tasks it takes, 0: all

A store lets no position go back, so each has the number of its replay above it, times 2**44: a new replay starts
anywhere. One store keeps the marks of its latest replay only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from celery_kafka_backend.changes import Partition
from celery_kafka_backend.pointer import is_pointer

if TYPE_CHECKING:
    from collections.abc import Mapping

BITS: Final = 44
_LIMIT: Final = 1 << BITS

PREFIX: Final = "replay:"
_NEXT: Final = f"{PREFIX}next:"
_END: Final = f"{PREFIX}end:"
_START: Final = f"{PREFIX}start:"
_WHAT: Final = Partition(f"{PREFIX}what", 0)


class Marks(msgspec.Struct, frozen=True):
    """What a store says about its latest replay.

    Attributes:
        number: Which one it was, from 1; 0: there was none.
        what: Digest of which tasks it takes; 0: all.
        next: The next offset to read of each partition.
        ends: Where to stop, of the partitions whose end was given.
        starts: Where it began, if it does not take all tasks.
    """

    number: int = 0
    what: int = 0
    next: Mapping[Partition, int] = msgspec.field(default_factory=dict)
    ends: Mapping[Partition, int] = msgspec.field(default_factory=dict)
    starts: Mapping[Partition, int] = msgspec.field(default_factory=dict)


def own(positions: Mapping[Partition, int]) -> dict[Partition, int]:
    """Return the positions that say how far a view is: neither a replay's marks nor a cut-over's pointer."""
    return {at: n for at, n in positions.items() if not (at.topic.startswith(PREFIX) or is_pointer(at))}


def read(positions: Mapping[Partition, int]) -> Marks:
    """Return the marks among a view's positions."""
    number, what = divmod(positions.get(_WHAT, 0), _LIMIT)
    return Marks(number, what, *(_of(positions, prefix, number) for prefix in (_NEXT, _END, _START)))


def _of(positions: Mapping[Partition, int], prefix: str, number: int) -> dict[Partition, int]:
    found = {
        Partition(at.topic.removeprefix(prefix), at.partition): divmod(value, _LIMIT)
        for at, value in positions.items()
        if at.topic.startswith(prefix)
    }
    return {at: offset for at, (owner, offset) in found.items() if owner == number}


def positions(marks: Marks) -> dict[Partition, int]:
    """Return marks as positions, for a store to keep."""
    ends, starts = _marked(_END, marks.number, marks.ends), _marked(_START, marks.number, marks.starts)
    return {**moved(marks.number, marks.next), **ends, **starts, _WHAT: marks.number * _LIMIT + marks.what}


def moved(number: int, to: Mapping[Partition, int]) -> dict[Partition, int]:
    """Return how far a replay is, as positions."""
    return _marked(_NEXT, number, to)


def _marked(prefix: str, number: int, offsets: Mapping[Partition, int]) -> dict[Partition, int]:
    return {Partition(prefix + at.topic, at.partition): number * _LIMIT + offset for at, offset in offsets.items()}
