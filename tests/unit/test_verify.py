"""Two views are the same when every row is, in any order; else the exact keys and columns are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from celery_kafka_backend.cli.verify import _readable
from celery_kafka_backend.processors.verify import compare
from celery_kafka_backend.sinks.contract import Row

if TYPE_CHECKING:
    from celery_kafka_backend.sinks.contract import View

NOW = 1_000_000


def view(*rows: Row) -> View:
    """All that `compare` asks of a view."""

    class Rows:
        def rows(self) -> Any:
            return iter(rows)

    return cast("View", Rows())


def row(key: str, value: Any = b"v", expires_at: int = 0, table: str = "document") -> Row:
    return Row(table, key, {"value": value}, expires_at)


def test_order_does_not_matter() -> None:
    a, b = row("a"), row("b", 2)
    result = compare(view(a, b), view(b, a))
    assert result.equal
    assert result.a == result.b
    assert result.a["document"].rows == 2


def test_a_column_that_differs_is_named_with_both_values() -> None:
    result = compare(view(row("a", 1), row("b")), view(row("a", 2), row("b")))
    (found,) = result.differences
    assert (found.table, found.key, found.columns, found.a, found.b) == (
        "document",
        "a",
        ("value",),
        {"value": 1},
        {"value": 2},
    )
    assert result.a["document"].digest != result.b["document"].digest


def test_text_is_not_bytes() -> None:
    assert not compare(view(row("a", "v")), view(row("a", b"v"))).equal


def test_a_value_of_a_store_s_own_type_is_a_difference() -> None:
    strange = object()
    (found,) = compare(view(row("a", 1), row("b")), view(row("a", strange), row("b"))).differences
    assert (found.key, found.b) == ("a", {"value": strange})
    assert _readable(found.b) == {"value": repr(strange)}
    assert _readable({"text": b"a\xff", "none": None, "number": 1}) == {"text": "a\\xff", "none": None, "number": 1}


def test_a_missing_row_is_named_on_either_side() -> None:
    result = compare(view(row("a")), view(row("b")))
    assert [(d.key, d.a is None, d.b is None) for d in result.differences] == [("a", False, True), ("b", True, False)]


def test_expiry_may_differ_by_a_second_and_no_more() -> None:
    later = NOW + 60_000
    assert compare(view(row("a", 1, later)), view(row("a", 1, later + 1000))).equal
    (found,) = compare(view(row("a", 1, later)), view(row("a", 1, later + 1001))).differences
    assert found.columns == ("expires_at",)
    assert not compare(view(row("a", 1, later)), view(row("a", 1, 0))).equal


def test_a_store_may_keep_history_for_longer() -> None:
    assert compare(view(row("a", 1, 5, "history")), view(row("a", 1, 0, "history"))).equal


def test_history_with_a_retention_of_its_own_expires_alike_in_every_store() -> None:
    a, b = row("a/1/x", 1, NOW, "history"), row("a/1/x", 1, 0, "history")
    (found,) = compare(view(a), view(b), history_expires=True).differences
    assert (found.columns, found.a, found.b) == (("expires_at",), {"expires_at": NOW}, {"expires_at": 0})
    assert compare(view(a), view(a._replace(expires_at=NOW + 1_000)), history_expires=True).equal


def test_tables_that_are_not_asked_for_are_not_compared() -> None:
    assert compare(view(row("a", table="history")), view(), tables={"document"}).equal


def test_a_column_that_says_nothing_is_not_one_that_is_not_there() -> None:
    """A store names a column beside its rows only where that is wrong, and it may be wrong to be empty."""
    bare = row("a")
    (found,) = compare(view(bare), view(bare._replace(columns={**bare.columns, "name": None}))).differences
    assert (found.columns, found.a, found.b) == (("name",), {}, {"name": None})


def test_what_expires_while_we_look_is_no_difference() -> None:
    result = compare(view(row("a", 1, NOW)), view(), wall_ms=lambda: NOW)
    assert result.equal
    assert result.expired == 1


def test_all_differences_are_counted_and_the_first_described() -> None:
    result = compare(view(*(row(str(n)) for n in range(10))), view(), limit=3)
    assert (result.different, len(result.differences)) == (10, 3)
