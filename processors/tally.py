"""The tally: counts the log by bucket, and says which partials have to be told (again). Pure; no I/O, no clock.

Whatever the batches are, what it holds of a bucket is a function of the bucket's records: so whoever counts a bucket
counts it from its first record on, and what is read twice is counted once. One `Tally` per partition of the log.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeAlias

from celery_kafka_backend import events
from celery_kafka_backend.partials import BUCKET, MINUTE_MS, Cell, Partial, bin_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from celery_kafka_backend.changes import Logged
    from celery_kafka_backend.events import Event

ENDS: Final = frozenset({events.SUCCESS, events.FAILURE, events.RETRY, events.WORKER_LOST, events.REVOKED})
"""Kinds that may end an attempt that had started."""
ERRORS: Final = frozenset({events.FAILURE, events.RETRY, events.WORKER_LOST})
CLASS_LENGTH: Final = 200
"""Of the name of an error's class."""
_bin_of_ms = lru_cache(1 << 14)(bin_of)
"""Waits are whole milliseconds, most of them few, so that looking up takes a third of the time."""

Where: TypeAlias = "tuple[int, str | None, str | None, str | None]"
"""Minute, name, queue, worker."""
Row: TypeAlias = "tuple[int, str]"
"""Minute and name: what one partial of a bucket is about."""


class Tally:
    """Counts one partition of the log.

    Args:
        partition: Which one.
        start: The offset from which on it counts: a bucket's first.
    """

    def __init__(self, partition: int, start: int) -> None:
        self.partition = partition
        self.next = start
        """The next offset: all before it is counted."""
        self._buckets: dict[int, _Bucket] = {}

    @property
    def settled(self) -> int:
        """The offset up to which everything is told and acknowledged, at the start of a bucket.

        Whoever counts on from here, after a crash, say, misses nothing.
        """
        return min(self._buckets, default=self.next // BUCKET) * BUCKET

    def add(self, first: int, logged: Sequence[Logged | None]) -> None:
        """Count the records from offset ``first`` on, one after the other; None is one that is no event.

        What is counted already is left out. Where ``first`` is after `next`, the log has nothing in between.
        """
        if first > self.next:
            self.next = first
            for bucket in self._buckets.values():
                if (bucket.number + 1) * BUCKET <= first:
                    bucket.close()
        end = first + len(logged)
        while self.next < end:
            start = self.next
            number = start // BUCKET
            until = min(end, (number + 1) * BUCKET)
            bucket = self._bucket(number)
            bucket.count(logged[start - first : until - first])
            self.next = until
            if until % BUCKET == 0:
                bucket.close()

    def _bucket(self, number: int) -> _Bucket:
        found = self._buckets.get(number)
        if found is None:
            for older in self._buckets.values():
                older.close()
            found = self._buckets[number] = _Bucket(number)
        return found

    def partials(self) -> Iterator[Partial]:
        """Yield what is to be told, and take it for told: say of each, by `delivered`, whether it arrived."""
        self._buckets = {number: bucket for number, bucket in self._buckets.items() if not bucket.is_settled}
        for bucket in self._buckets.values():
            yield from bucket.partials(self.partition, self.next)

    def delivered(self, partial: Partial, *, arrived: bool) -> None:
        """Take note of what became of a partial; one that did not arrive is told again."""
        bucket = self._buckets[partial.bucket]
        bucket.in_flight -= 1
        if not arrived:
            bucket.tell_again(partial.minute, partial.task)

    def __len__(self) -> int:
        """Return how many buckets are not settled."""
        return len(self._buckets)


class _Bucket:
    """What is counted of one bucket, and how much of it was told."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.in_flight = 0
        self._cells: dict[Where, Cell] = {}
        self._rows: dict[Row, list[Cell]] = {}
        self._closed = False
        # What its rows weighed when they were told, as long as it is open …
        self._told: dict[Row, int] = {}
        # … and what is to be told whatever it weighs.
        self._again: set[Row] = set()

    @property
    def is_settled(self) -> bool:
        """Whether it is whole, and everybody knows."""
        return self._closed and not self.in_flight and not self._again

    def close(self) -> None:
        """Take note that it is whole, which is to be told of each of its rows."""
        if not self._closed:
            self._closed = True
            self._again = set(self._rows)

    def count(self, logged: Iterable[Logged | None]) -> None:
        """Count events. The hot loop: it takes the interpreter from the materializer."""
        find = self._cells.get
        silent, began, ends, minute_ms = events.GROUP_KINDS, events.STARTED, ENDS, MINUTE_MS
        for one in logged:
            if one is None:
                continue
            event, raw = one
            kind = event.kind
            if kind in silent:
                continue
            where = (event.at // minute_ms, event.name, event.queue or event.routing_key, event.worker)
            cell = find(where) or self._cell(where)
            kinds = cell.kinds
            kinds[kind] = kinds.get(kind, 0) + 1
            cell.bytes += len(raw)
            if kind == began:
                self._began(where, cell, event)
            elif kind in ends:
                self._ended(where, cell, event)

    def _cell(self, where: Where) -> Cell:
        found = self._cells.get(where)
        if found is None:
            minute, name, queue, worker = where
            found = self._cells[where] = Cell(queue=queue or "", worker=worker or "")
            self._rows.setdefault((minute, name or ""), []).append(found)
        return found

    def _began(self, where: Where, cell: Cell, event: Event) -> None:
        started = event.started_at or event.at
        since, eta = event.sent_at or 0, event.eta
        if eta and eta > since:
            since = eta
        if since:
            number = _bin_of_ms(started - since)
            cell.wait[number] = cell.wait.get(number, 0) + 1
        minute = started // MINUTE_MS
        (cell if minute == where[0] else self._cell((minute, *where[1:]))).begun += 1

    def _ended(self, where: Where, cell: Cell, event: Event) -> None:
        if event.runtime_s is not None:
            number = bin_of(event.runtime_s * 1_000)
            cell.run[number] = cell.run.get(number, 0) + 1
        if event.exception and event.kind in ERRORS:  # a retry may be without one
            name = event.exception[:CLASS_LENGTH]
            cell.errors[name] = cell.errors.get(name, 0) + 1
        started = event.started_at
        if started is not None:  # there its beginning and its end meet
            minute = started // MINUTE_MS
            (cell if minute == where[0] else self._cell((minute, *where[1:]))).over += 1
        elif event.kind == events.WORKER_LOST:  # only the child knew when it had started: the sum is right, at least
            cell.over += 1

    def partials(self, partition: int, upto: int) -> Iterator[Partial]:
        """Yield the rows that are not told as they are now, and take them for told."""
        rows, self._again = self._again, set()
        if self._closed:
            upto = (self.number + 1) * BUCKET
        else:
            weights = {row: _weight(cells) for row, cells in self._rows.items()}
            rows |= {row for row, weight in weights.items() if weight != self._told.get(row)}
            self._told = weights
        for minute, name in rows:
            self.in_flight += 1
            cells = self._rows[minute, name]
            yield Partial(partition=partition, bucket=self.number, minute=minute, task=name, upto=upto, cells=cells)

    def tell_again(self, minute: int, name: str) -> None:
        """Tell a row once more."""
        self._again.add((minute, name))


def _weight(cells: Iterable[Cell]) -> int:
    """Return a number that grows with everything that is counted."""
    return sum(cell.bytes + cell.begun + cell.over for cell in cells)
