"""What partials say about one task name in one minute, of one partition of the log: each bucket once. Pure.

The figures are the sum, over buckets, of the fullest partial seen of each. That does not depend on the order in which
partials come, nor on how often: so neither a crash between the changelog and the commit, nor a partial that is read
again, late or from a zombie, changes them. A bucket that is whole is added up, and only its number is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from celery_kafka_backend.partials import Cell, Partial, merged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

AHEAD_MINUTES: Final = 10
"""A clock further ahead than this is not believed …"""
KEPT_MINUTES: Final = 120
"""… and what is older than this is in no window; both by the clock of Kafka, when it wrote the partial."""


class _Open(msgspec.Struct):
    upto: int
    cells: list[Cell]


class Minute(msgspec.Struct, omit_defaults=True):
    """One value of the table.

    Attributes:
        whole: Numbers of the buckets that are added up.
        sums: What they come to.
        open: The fullest partial of each other bucket.
    """

    whole: set[int] = set()
    sums: list[Cell] = []
    open: dict[int, _Open] = {}

    def take(self, partial: Partial) -> bool:
        """Take a partial of this minute, name and partition; return whether that changed anything."""
        held = self.open.get(partial.bucket)
        if partial.bucket in self.whole or (held is not None and held.upto >= partial.upto):
            return False
        if partial.whole:
            self.open.pop(partial.bucket, None)
            self.whole.add(partial.bucket)
            self._add_up(partial.cells)
        else:
            self.open[partial.bucket] = _Open(partial.upto, partial.cells)
        return True

    def _add_up(self, cells: Iterable[Cell]) -> None:
        # In place: to merge all into new cells took ten times as long, as there are many and a partial has few.
        sums = {(cell.queue, cell.worker): cell for cell in self.sums}
        for cell in cells:
            where = (cell.queue, cell.worker)
            if where not in sums:
                sums[where] = Cell(queue=cell.queue, worker=cell.worker)
                self.sums.append(sums[where])
            sums[where].add(cell)

    @property
    def cells(self) -> list[Cell]:
        """All figures, one cell per queue and worker."""
        return merged(self._cells())

    @property
    def version(self) -> int:
        """As of its `cells`."""
        return version(self._cells())

    def _cells(self) -> Iterator[Cell]:
        yield from self.sums
        for one in self.open.values():
            yield from one.cells


# Not JSON, as everything else: nobody else reads the table, and bins are numbers, for which it takes a third of the time.
encode: Final = msgspec.msgpack.Encoder().encode
_decoder: Final = msgspec.msgpack.Decoder(Minute)


def decode(value: bytes | None) -> Minute:
    """Return a value of the table; an empty one if there is none."""
    return Minute() if value is None else _decoder.decode(value)


def key(partial: Partial) -> bytes:
    """Return where in the table a partial belongs."""
    return key_of(partial.minute, partial.partition, partial.task)


def key_of(minute: int, partition: int, task: str) -> bytes:
    """Return a key of the table."""
    return b"%d/%d/%b" % (minute, partition, task.encode(errors="replace"))


def parse_key(found: bytes) -> tuple[int, int, str]:
    """Return minute, partition and task name."""
    minute, partition, task = found.split(b"/", 2)
    return int(minute), int(partition), task.decode()


def unbelievable(partial: Partial, written_minute: int) -> tuple[str, str] | None:
    """Return what is wrong with a partial's minute, judged by when Kafka wrote it, and why that may be; None if nothing."""
    if partial.minute > written_minute + AHEAD_MINUTES:
        return f"{partial.minute - written_minute} minutes ahead of Kafka's clock", "look at that host's clock"
    if partial.minute < written_minute - KEPT_MINUTES:
        return (
            f"{written_minute - partial.minute} minutes old",
            "no window shows them; they were told late, or that host's clock is wrong",
        )
    return None


def version(cells: Iterable[Cell]) -> int:
    """Return a number that grows with everything counted: of two states of one row the greater is the later one."""
    return sum(sum(cell.kinds.values()) + cell.begun + cell.over for cell in cells)
