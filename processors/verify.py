"""Whether two views hold the same: row by row, whatever the stores and the order they answer in.

Counts and an order-independent digest per table; where they differ, the exact keys and columns.
Both views are read as they are at that moment, so compare them when nothing is being written, or
expect the tasks that changed meanwhile.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from celery_kafka_backend.order import system_wall_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from celery_kafka_backend.sinks.contract import Row, View

TABLES: Final = frozenset({"document", "side", "group", "group-side", "history", "chord"})
"""The tables that every store has; a store's own (``native`` …) say the same in other words."""

TTL_TOLERANCE_MS: Final = 1_000
"""Stores round expiry, some to whole seconds."""
_OWN_TTL: Final = frozenset({"history"})
"""Tables in which a store may decide how long a row stays."""

EXPIRES_AT: Final = "expires_at"


class Table(msgspec.Struct):
    """What one view has in one table.

    Attributes:
        rows: How many.
        digest: Sum of the rows' 128-bit hashes (key and columns, without expiry), modulo 2**128.
    """

    rows: int = 0
    digest: int = 0


class Difference(NamedTuple):
    """One row that is not the same.

    Attributes:
        table: Its table.
        key: Its key.
        columns: The columns that differ, `EXPIRES_AT` among them; all, if a view has no such row.
        a: These columns in the first view, or None without the row.
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
        different: How many rows are not the same.
        differences: The first of them, with their columns.
        expired: Rows that only one view still had, a moment after they had expired.
    """

    a: dict[str, Table]
    b: dict[str, Table]
    different: int
    differences: list[Difference]
    expired: int = 0

    @property
    def equal(self) -> bool:
        """Whether every row is in both, with the same columns and an expiry within a second."""
        return not self.different


def compare(
    a: View,
    b: View,
    *,
    tables: Collection[str] = TABLES,
    limit: int = 100,
    wall_ms: Callable[[], int] = system_wall_ms,
) -> Comparison:
    """Compare two views.

    Holds about 200 bytes per row of the first; the rows themselves are not kept.

    Args:
        a: One view.
        b: The other.
        tables: What to compare.
        limit: How many differences to describe; all are counted.
        wall_ms: The wall clock, ms since 1970.
    """
    in_a: dict[str, Table] = {}
    in_b: dict[str, Table] = {}
    only_a: dict[tuple[str, str], tuple[bytes, int]] = {}
    only_b: dict[tuple[str, str], int] = {}
    changed: set[tuple[str, str]] = set()
    for row in a.rows():
        if row.table in tables:
            only_a[row.table, row.key] = (_count(in_a, row), row.expires_at)
    for row in b.rows():
        if row.table in tables:
            digest = _count(in_b, row)
            other = only_a.pop((row.table, row.key), None)
            if other is None:
                only_b[row.table, row.key] = row.expires_at
            elif other[0] != digest or not _same_expiry(row.table, other[1], row.expires_at):
                changed.add((row.table, row.key))
    just_gone = wall_ms() + TTL_TOLERANCE_MS
    missing = {**{key: expiry for key, (_, expiry) in only_a.items()}, **only_b}
    expired = {key for key, expiry in missing.items() if 0 < expiry <= just_gone}
    wanted = (missing.keys() - expired) | changed
    return Comparison(
        a=in_a,
        b=in_b,
        different=len(wanted),
        differences=_describe(a, b, set(sorted(wanted)[:limit])),
        expired=len(expired),
    )


def _count(into: dict[str, Table], row: Row) -> bytes:
    digest = row_digest(row)
    table = into.setdefault(row.table, Table())
    table.rows += 1
    table.digest = (table.digest + int.from_bytes(digest, "big")) % (1 << 128)
    return digest


def row_digest(row: Row) -> bytes:
    """Return 128 bits of a row's key and columns; text and bytes are not the same."""
    return blake2b(msgspec.msgpack.encode([row.key, sorted(row.columns.items())]), digest_size=16).digest()


def _same_expiry(table: str, a: int, b: int) -> bool:
    if table in _OWN_TTL:
        return True
    return abs(a - b) <= TTL_TOLERANCE_MS if a and b else a == b


def _describe(a: View, b: View, wanted: set[tuple[str, str]]) -> list[Difference]:
    """Read the rows that differ once more, this time as a whole."""
    if not wanted:
        return []
    rows_a = {(row.table, row.key): row for row in a.rows() if (row.table, row.key) in wanted}
    rows_b = {(row.table, row.key): row for row in b.rows() if (row.table, row.key) in wanted}
    found = []
    for table, key in sorted(wanted):
        ours, theirs = _columns(rows_a.get((table, key))), _columns(rows_b.get((table, key)))
        names = sorted({*(ours or ()), *(theirs or ())})
        if ours is not None and theirs is not None:
            names = [name for name in names if not _same(table, name, ours.get(name), theirs.get(name))]
        found.append(Difference(table, key, tuple(names), _only(ours, names), _only(theirs, names)))
    return found


def _same(table: str, name: str, a: Any, b: Any) -> bool:
    return _same_expiry(table, a, b) if name == EXPIRES_AT else bool(a == b)


def _columns(row: Row | None) -> dict[str, Any] | None:
    return None if row is None else {**row.columns, EXPIRES_AT: row.expires_at}


def _only(columns: Mapping[str, Any] | None, names: list[str]) -> dict[str, Any] | None:
    return None if columns is None else {name: columns.get(name) for name in names}
