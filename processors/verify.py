"""Whether two views hold the same: row by row, whatever the stores and the order they answer in.

Counts and an order-independent digest per table and partition; where views differ, the exact keys and columns. Memory
is flat: rows are compared by hashes, in files, and only what differs is read once more.

Knows nothing of the log. What views that are being written mean is `instant`.
"""

from __future__ import annotations

import re
import struct
import tempfile
from contextlib import ExitStack
from hashlib import blake2b
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec

from celery_kafka_backend import codec
from celery_kafka_backend.errors import CodecError
from celery_kafka_backend.order import system_wall_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from celery_kafka_backend.sinks.contract import Row

TABLES: Final = frozenset({"document", "side", "group", "group-side", "history", "chord"})
"""The tables that every store has."""
CHORD: Final = "chord"
HISTORY: Final = "history"

TTL_TOLERANCE_MS: Final = 1_000
"""Stores round expiry, some to whole seconds."""
EXPIRES_AT: Final = "expires_at"

KEEP: Final = 100_000
"""Rows that differ and are kept apart; beyond it they are only counted."""
_FILES: Final = 64
_IN_MEMORY: Final = 1 << 16
"""Bytes of each that are no file yet."""
_ENTRY: Final = struct.Struct(">16s16sq")
_FACT: Final = re.compile(r"(.*?)/\d+\|", re.DOTALL)

Key = tuple[str, str]
"""A row's table and key."""


class Readable(Protocol):
    """All that is asked of a view."""

    def rows(self) -> Iterator[Row]:
        """Return its rows."""


class Table(msgspec.Struct):
    """What one view has in one table, or in one partition of it.

    Attributes:
        rows: How many.
        digest: Sum of the rows' 128-bit hashes (key and columns, without expiry), modulo 2**128.
    """

    rows: int = 0
    digest: int = 0

    def add(self, digest: bytes) -> None:
        """Take in a row."""
        self.rows += 1
        self.digest = (self.digest + int.from_bytes(digest, "big")) % (1 << 128)


class Difference(NamedTuple):
    """One row that is not the same.

    Attributes:
        table: Its table.
        key: Its key.
        columns: The columns that differ, `EXPIRES_AT` among them; all, if a view has no such row.
        a: Those of these that the first view's row has, or None without the row.
        b: … in the second.
    """

    table: str
    key: str
    columns: tuple[str, ...]
    a: Mapping[str, Any] | None
    b: Mapping[str, Any] | None


class Comparison(msgspec.Struct):
    """The result.

    Attributes:
        a: The first view's tables.
        b: The second's.
        parts_a: The first's by table and partition.
        parts_b: The second's.
        different: How many rows are not the same.
        keys: The first `KEEP` of them.
        only_a: Those of these that the second view does not have.
        differences: The first of them, as many as were asked for, with their columns.
        expired: Rows that only one view still had, a moment after they had expired.
    """

    a: dict[str, Table] = {}
    b: dict[str, Table] = {}
    parts_a: dict[tuple[str, int], Table] = {}
    parts_b: dict[tuple[str, int], Table] = {}
    different: int = 0
    keys: list[Key] = []
    only_a: set[Key] = set()
    differences: list[Difference] = []
    expired: int = 0

    @property
    def equal(self) -> bool:
        """Whether every row is in both, with the same columns and an expiry within a second."""
        return not self.different


def compare(
    a: Readable,
    b: Readable,
    *,
    tables: Collection[str] = TABLES,
    limit: int = 100,
    only: Collection[Key] | None = None,
    partition: Callable[[str, str], int] = lambda _table, _subject: 0,
    history_expires: bool = False,
    wall_ms: Callable[[], int] = system_wall_ms,
) -> Comparison:
    """Compare two views, as they are.

    Args:
        a: One view.
        b: The other.
        tables: What to compare.
        limit: How many differences to describe, up to `KEEP`; all are counted.
        only: Only these rows.
        partition: Which partition a table's subject is in.
        history_expires: History has a retention of its own: its rows have the same expiry in every store. Else a store may
            decide how long one stays, and none of an event that has expired is compared.
        wall_ms: The wall clock, ms since 1970.
    """
    result = Comparison()

    def chosen(view: Readable) -> Iterator[Row]:
        now_ms = wall_ms()
        for row in view.rows():
            if row.table in tables and (only is None or (row.table, row.key) in only):
                if row.table != HISTORY or history_expires:
                    yield row
                elif not 0 < (said := _as_its_event_says(row)).expires_at <= now_ms + TTL_TOLERANCE_MS:
                    yield said

    with ExitStack() as stack:
        left = _Ledger(stack, chosen(a), result.a, result.parts_a, partition)
        right = _Ledger(stack, chosen(b), result.b, result.parts_b, partition)
        just_gone = wall_ms() + TTL_TOLERANCE_MS
        found: set[bytes] = set()
        for number in range(_FILES):
            result.expired += _compare_file(left.entries(number), right.entries(number), just_gone, found, result)
    if found:
        _describe(chosen(a), chosen(b), found, set(sorted(found)[:limit]), result)
    return result


def subject_of(table: str, key: str) -> str:
    """Return the id of the task or group that a row is about."""
    if table == HISTORY:
        return key.rsplit("/", 2)[0]
    if table == CHORD:
        found = _FACT.match(key)
        return found[1] if found else key
    return key


def _as_its_event_says(row: Row) -> Row:
    """Some stores let a history entry go when its event expires, others keep it as long as anything of its task."""
    try:
        return row._replace(expires_at=codec.decode(row.columns.get("value")).expires_at or 0)
    except (CodecError, TypeError):  # what is damaged is compared as it is
        return row._replace(expires_at=0)


class _Ledger:
    """A view's rows as hashes, in files by the hash of their key."""

    def __init__(
        self,
        stack: ExitStack,
        rows: Iterator[Row],
        tables: dict[str, Table],
        parts: dict[tuple[str, int], Table],
        partition: Callable[[str, str], int],
    ) -> None:
        self._files: list[IO[bytes]] = [
            stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY))  # noqa: SIM115 - the stack closes it
            for _ in range(_FILES)
        ]
        for row in rows:
            digest = row_digest(row)
            tables.setdefault(row.table, Table()).add(digest)
            at = (row.table, partition(row.table, subject_of(row.table, row.key)))
            parts.setdefault(at, Table()).add(digest)
            place = _place(row)
            self._files[place[0] % _FILES].write(_ENTRY.pack(place, digest, row.expires_at))

    def entries(self, number: int) -> bytes:
        """Return one of the files."""
        self._files[number].seek(0)
        return self._files[number].read()


def _place(row: Row) -> bytes:
    """Return 128 bits of a row's place."""
    return blake2b(f"{row.table}\0{row.key}".encode(errors="surrogatepass"), digest_size=16).digest()


def _compare_file(a: bytes, b: bytes, just_gone: int, found: set[bytes], result: Comparison) -> int:
    """Note what differs; return how many rows were gone from one of them a moment before the other."""
    only_a = {place: (digest, expires_at) for place, digest, expires_at in _ENTRY.iter_unpack(a)}
    missing: list[tuple[bytes, int]] = []
    different: list[bytes] = []
    for place, digest, expires_at in _ENTRY.iter_unpack(b):
        other = only_a.pop(place, None)
        if other is None:
            missing.append((place, expires_at))
        elif other[0] != digest or not same_expiry(other[1], expires_at):
            different.append(place)
    missing += [(place, expires_at) for place, (_, expires_at) in only_a.items()]
    lacking = [place for place, expires_at in missing if not 0 < expires_at <= just_gone]
    result.different += len(different) + len(lacking)
    found.update((different + lacking)[: max(KEEP - len(found), 0)])
    return len(missing) - len(lacking)


def row_digest(row: Row) -> bytes:
    """Return 128 bits of a row's key and columns; text and bytes are not the same. Damage may be of a driver's own type."""
    said = msgspec.msgpack.encode([row.key, sorted(row.columns.items())], enc_hook=repr)
    return blake2b(said, digest_size=16).digest()


def same_expiry(a: int, b: int) -> bool:
    """Return whether two stores mean the same moment, ms since 1970; 0: never."""
    return abs(a - b) <= TTL_TOLERANCE_MS if a and b else a == b


def _describe(a: Iterator[Row], b: Iterator[Row], found: set[bytes], wanted: set[bytes], into: Comparison) -> None:
    """Read the rows that differ once more, those that are to be described as a whole."""
    keys: list[set[Key]] = [set(), set()]
    rows: list[dict[Key, Row]] = [{}, {}]
    for known, mine, view in zip(keys, rows, (a, b), strict=True):
        for row in view:
            if (place := _place(row)) in found:
                known.add((row.table, row.key))
                if place in wanted:
                    mine[row.table, row.key] = row
    for table, key in sorted({*rows[0], *rows[1]}):
        ours, theirs = (_columns(mine.get((table, key))) for mine in rows)
        names = sorted({*(ours or ()), *(theirs or ())})
        if ours is not None and theirs is not None:
            names = [name for name in names if not _same(name, ours, theirs)]
        if names:
            into.differences.append(Difference(table, key, tuple(names), _only(ours, names), _only(theirs, names)))
        else:  # written in between, and the same now
            keys[0].discard((table, key))
            keys[1].discard((table, key))
            into.different -= 1
    into.keys, into.only_a = sorted(keys[0] | keys[1]), keys[0] - keys[1]


def _same(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    if not (name in ours and name in theirs):  # which is not the same as None
        return False
    a, b = ours[name], theirs[name]
    if name == EXPIRES_AT:
        return same_expiry(a, b)
    return bool(a == b) and type(a) is type(b)


def _columns(row: Row | None) -> dict[str, Any] | None:
    return None if row is None else {**row.columns, EXPIRES_AT: row.expires_at}


def _only(columns: Mapping[str, Any] | None, names: list[str]) -> dict[str, Any] | None:
    return None if columns is None else {name: columns[name] for name in names if name in columns}
