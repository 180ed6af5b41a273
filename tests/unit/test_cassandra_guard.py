"""What decides in Cassandra, without one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend.changes import Side
from celery_kafka_backend.order import Rank, order_key
from celery_kafka_backend.sinks.cassandra_guard import (
    NEVER,
    Guard,
    Ranked,
    Term,
    is_stock,
    merged,
    native_stamp,
    piece,
    stock_stays,
    ttl_s,
    winners,
)
from tests.examples import tried_on

NOW = 1_790_000_000_000
KEYS = st.integers(1, (1 << 63) - 1)
MS = st.integers(0, NEVER)


@tried_on()
@given(KEYS, KEYS)
def test_native_stamps_are_in_the_order_of_keys_and_below_every_clock(a: int, b: int) -> None:
    assert (a < b) == (native_stamp(a) < native_stamp(b))
    for each in (native_stamp(a) - 1, native_stamp(a)):
        assert each > -(1 << 63), "which is Cassandra's word for none"
        assert not is_stock(each)
    assert is_stock(NOW * 1000)


def test_a_key_of_an_unknown_run_is_still_above_the_least() -> None:
    assert native_stamp(order_key(Rank.UNREADY, 0, None)) - 1 > -(1 << 63)


@tried_on()
@given(MS, MS, st.integers(NOW, NOW + 10**9), st.integers(0, 10**9))
def test_the_later_end_stays_and_of_one_end_the_one_known_longer(a: int, b: int, since: int, later: int) -> None:
    first, second = Term(a, since), Term(b, since)
    assert 0 <= first.stamp < 1 << 63
    if min(a, b) < (1 << 42) - 1:
        assert (a < b) == (first.stamp < second.stamp)
    assert first.stamp >= Term(a, since + later).stamp
    assert Term.unpack(first.pack()) == first
    assert first.pack() >= Term(a, since + later).pack()
    assert Guard.unpack(Guard(first, b).pack()) == Guard(first, b)


def test_what_of_a_stock_worker_stays() -> None:
    unready, failed = order_key(Rank.UNREADY, NOW, None), order_key(Rank.FAILED, NOW, 30_000_000)
    assert [stock_stays(status, 0) for status in ("STARTED", "SUCCESS")] == [True, True]
    assert [stock_stays(status, unready) for status in ("RETRY", "FAILURE", "REVOKED", "SUCCESS")] == [False] + [
        True
    ] * 3
    assert [stock_stays(status, failed) for status in ("RETRY", "FAILURE", "REVOKED", "SUCCESS")] == [False] * 3 + [
        True
    ]


@pytest.mark.parametrize(
    ("expires_at", "expected"),
    [(NEVER, 0), (NOW + 1, 1), (NOW - 5, 1), (NOW + 1000, 1), (NOW + 1001, 2), (NOW + 86_400_000, 86_400),
     (2_147_483_647_000, 0), (4_102_444_800_000, 0)],
)  # fmt: skip
def test_times_to_live(expires_at: int, expected: int) -> None:
    assert ttl_s(expires_at, NOW) == expected


@tried_on()
@given(st.integers(NOW + 2_000, NOW + 10**9), st.integers(NOW, NOW + 1_999))
def test_one_expiry_ends_in_one_second_whenever_it_is_written(expires_at: int, now: int) -> None:
    assert ttl_s(expires_at, now) + now // 1000 == -(-expires_at // 1000)


def test_after_2038_what_a_newer_server_takes_still_ends() -> None:
    then = 2_200_000_000_000
    assert ttl_s(then + 60_000, then) == 60


def row(key: int, until: int, since: int, *, shown_until: int = 0, document: bytes | None = b"d") -> Ranked:
    return Ranked("", key, "e", Guard(Term(until, since), shown_until).pack(), document)


def test_the_greatest_key_counts_while_the_whole_lasts() -> None:
    found = winners([row(2, NOW - 5, NOW - 10, document=None), row(1, NEVER, NOW - 20)], Term(NEVER, NOW - 20), NOW)
    assert found[""].key == 2, "it guards although it has ended: the whole went on without a gap"
    found = winners([row(2, NOW - 5, NOW - 10), row(1, NEVER, NOW - 1)], Term(NEVER, NOW - 1), NOW)
    assert found[""].key == 1, "the whole had ended before it went on"
    assert winners([row(2, NOW - 5, NOW - 10)], Term(NOW - 5, NOW - 10), NOW) == {}
    assert winners([row(2, NEVER, 0, shown_until=NOW)], Term(NEVER, 0), NOW)[""].document is None


@tried_on()
@given(st.permutations(range(4)))
def test_side_records_are_merged_in_any_order(order: list[int]) -> None:
    sides = [
        Side(run=3, sent=5), Side(run=2, sent=4, received=9, workers=("a",)), Side(attempts=2, workers=("b",)),
        Side(started=7, workers=("a",)),
    ]  # fmt: skip
    expected = Side(3, 11, 4, 9, 7, 2, ("a", "b"), 0)
    assert merged([piece(sides[i]) for i in order], 11, NEVER) == expected
    assert merged([piece(sides[i]) for i in order], 11, NOW).expires_at == NOW
