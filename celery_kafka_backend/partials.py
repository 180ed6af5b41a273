"""A partial statistic: what a stretch of the log says about one task name in one minute. The wire format, and merging.

Record of ``<prefix>.task-stats``::

    key       the task's name, UTF-8; empty for events that name none
    value     one JSON object, the fields of `Partial` that are not at their default

**A partial covers a fixed bucket**: the records of one partition of the log whose offset // `BUCKET` is ``bucket``, of
them those of one task name in one minute (of the event's own clock). It tells everything that the log says about these
from the bucket's first record up to, not including, offset ``upto``. So of two partials of one bucket the one with the
greater ``upto`` holds all that the other one does and *replaces* it; with the same ``upto`` they are equal. That is
all that a reader has to know: the figures of a stretch of time are the sum, over its buckets, of the fullest partial
of each, in whatever order, and however often, partials came.

* ``v`` is the version, 1 today, always written. A reader refuses another one, and accepts unknown fields.
* Durations are counted in bins of a DDSketch with a relative accuracy of 1 %: bin ``i`` counts durations of more than
  `GAMMA` ** (i - 1) and at most `GAMMA` ** i milliseconds, where `GAMMA` is 1.01 / 0.99; less than a microsecond counts
  as one, and more than some million years as the last one. Merging is adding, so merged quantiles are as accurate as
  those of a single sketch.
* A version is never edited in place: tests/golden holds one file for each.
"""

from __future__ import annotations

from math import ceil, log
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import msgspec

from celery_kafka_backend.errors import UnknownVersion, Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

VERSION: Final = 1
BUCKET: Final = 1_000
"""Offsets per bucket."""
MINUTE_MS: Final = 60_000

ACCURACY: Final = 0.01
GAMMA: Final = (1 + ACCURACY) / (1 - ACCURACY)
_BINS_PER_E: Final = 1 / log(GAMMA)
_LEAST_MS: Final = 0.001
MAX_BIN: Final = 2_000
_MOST_MS: Final = GAMMA ** (MAX_BIN - 1)
MAX_UPTO: Final = (1 << 63) - 1
MAX_BYTES: Final = BUCKET << 31
"""Of a bucket: no record is larger than Kafka can say."""

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Bin = Annotated[int, msgspec.Meta(ge=-345, le=MAX_BIN)]
_Key = TypeVar("_Key")


class Cell(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What happened to the tasks of one name, in one queue and on one worker. Adds up.

    Attributes:
        queue: The queue, or the routing key where only that is known; "" if unknown.
        worker: Node name; "" for what clients say.
        kinds: Events, by kind.
        errors: Failures, retries and lost workers, by class of exception.
        bytes: Size of the events' records.
        wait: From when a task could have started (sent, or its ``eta``) to when it did: bins of milliseconds.
        run: Run times of attempts that ended: bins of milliseconds.
        begun: Attempts that started in this minute.
        over: Attempts that started in this minute and have ended, whenever they did.
    """

    queue: str = ""
    worker: str = ""
    kinds: dict[str, _Count] = {}
    errors: dict[str, _Count] = {}
    bytes: _Count = 0
    wait: dict[_Bin, _Count] = {}
    run: dict[_Bin, _Count] = {}
    begun: _Count = 0
    over: _Count = 0

    def add(self, other: Cell) -> None:
        """Add another cell's figures to ours."""
        add_counts(self.kinds, other.kinds)
        add_counts(self.errors, other.errors)
        add_counts(self.wait, other.wait)
        add_counts(self.run, other.run)
        self.bytes += other.bytes
        self.begun += other.begun
        self.over += other.over


def add_counts(ours: dict[_Key, int], theirs: Mapping[_Key, int]) -> None:
    """Add counts to counts."""
    for key, count in theirs.items():
        ours[key] = ours.get(key, 0) + count


def merged(cells: Iterable[Cell]) -> list[Cell]:
    """Return one new cell per queue and worker, with the sum of all that are theirs; ordered by both."""
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        where = (cell.queue, cell.worker)
        if where not in found:
            found[where] = Cell(queue=cell.queue, worker=cell.worker)
        found[where].add(cell)
    return [found[where] for where in sorted(found)]


class Partial(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What one bucket says about one task name in one minute.

    Attributes:
        v: Version of the wire schema.
        partition: Of the log.
        bucket: Offset // `BUCKET`.
        minute: Minutes since 1970, UTC, by the clocks of those who said it.
        task: The task's name; "" for events that name none.
        upto: Offset up to which this tells, exclusive.
        cells: One per queue and worker.
    """

    v: int = VERSION
    partition: Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
    bucket: Annotated[int, msgspec.Meta(ge=0, le=MAX_UPTO // BUCKET)]
    minute: Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) // MINUTE_MS)]
    task: str
    upto: Annotated[int, msgspec.Meta(ge=0, le=MAX_UPTO)]
    cells: list[Cell]

    @property
    def whole(self) -> bool:
        """Whether it tells of its whole bucket: nothing will ever replace it."""
        return self.upto >= (self.bucket + 1) * BUCKET


class _Probe(msgspec.Struct):
    v: int


_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Partial)
_probe = msgspec.json.Decoder(_Probe)


def encode(partial: Partial) -> bytes:
    """Return the record value of a partial."""
    body = _encoder.encode(partial)
    # omit_defaults leaves v out, as it is the default.
    return b'{"v":%d,%s' % (partial.v, body[1:]) if partial.v == VERSION else body


def decode(value: bytes | None) -> Partial:
    """Return the partial of a record value.

    Raises:
        UnknownVersion: It was written by a newer version.
        Unreadable: It is no partial, or one that cannot be: a count below 0, more than a bucket holds, an offset
            outside its bucket.
    """
    if value is None:
        raise Unreadable("a tombstone, where a partial statistic was expected")
    try:
        version = _probe.decode(value).v
    except _NOT_JSON as exc:
        raise Unreadable(f"not a partial statistic: {exc}") from exc
    if version > VERSION:
        raise UnknownVersion(f"version {version} of a partial statistic; this software reads up to {VERSION}")
    if version != VERSION:
        raise Unreadable(f"version {version} of a partial statistic, which never was")
    try:
        partial = _decoder.decode(value)
    except _NOT_JSON as exc:
        raise Unreadable(f"not a partial statistic: {exc}") from exc
    if not partial.bucket * BUCKET < partial.upto <= (partial.bucket + 1) * BUCKET:
        raise Unreadable(f"offset {partial.upto} is outside bucket {partial.bucket}")
    # Sums of what cannot be would outgrow every number that a changelog or a view can hold.
    if any(_most(cell) > BUCKET or cell.bytes > MAX_BYTES for cell in partial.cells):
        raise Unreadable(f"it counts more than the {BUCKET} records of a bucket")
    return partial


def _most(cell: Cell) -> int:
    counts = (cell.kinds, cell.errors, cell.wait, cell.run)
    return max(cell.begun, cell.over, *(max(each.values(), default=0) for each in counts))


def bin_of(duration_ms: float) -> int:
    """Return the bin that counts a duration; a negative one, of clocks that differ, counts as none."""
    if _LEAST_MS < duration_ms < _MOST_MS:
        return ceil(log(duration_ms) * _BINS_PER_E)
    return MAX_BIN if duration_ms >= _MOST_MS else _LEAST_BIN


_LEAST_BIN: Final = ceil(log(_LEAST_MS) * _BINS_PER_E)
