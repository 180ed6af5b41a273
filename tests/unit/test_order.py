"""The order key and the clock, at their edges."""

from __future__ import annotations

import threading

import pytest

from celery_kafka_backend.order import (
    EPOCH_MS,
    KEY_DIGITS,
    SKEW_LIMIT_MS,
    UNIT_MS,
    Clock,
    Rank,
    forget_key,
    key_text,
    order_key,
    run_at,
    run_of_key,
    run_start_ms,
    trusted_run,
)

NOW = 1_795_000_000_000
DAY = 86_400_000
YEAR = 365 * DAY
FAR = 4_070_908_800_000  # 2099
LAST_RUN = (1 << 28) - 1


def test_a_run_starts_with_its_eight_second_unit():
    """Two publishes in one unit are one run, one millisecond later they are two."""
    start = run_start_ms(run_at(NOW))
    assert start <= NOW < start + UNIT_MS
    assert run_at(start) == run_at(start + UNIT_MS - 1) == run_at(start - 1) + 1
    assert (start - EPOCH_MS) % UNIT_MS == 0


def test_a_publisher_before_2020_or_after_2088_still_has_a_run_in_28_bits():
    """A clock at 1970 gives the first run, one at 2099 the last."""
    assert run_at(0) == run_at(EPOCH_MS) == run_at(EPOCH_MS + 60_000)
    assert trusted_run(run_at(0), NOW) == run_at(0)
    assert run_at(FAR) == LAST_RUN


@pytest.mark.parametrize("run", [run_at(0), run_at(EPOCH_MS + 2_100_000), run_at(NOW), LAST_RUN])
def test_every_known_run_is_above_every_unknown_one(run: int):
    """Even the first run's weakest claim beats an unknown run's forget, and says which run it is of."""
    assert order_key(Rank.UNREADY, 0, run) > forget_key(None)
    assert forget_key(None) > max(order_key(rank, hlc, None) for rank in Rank for hlc in (0, EPOCH_MS, NOW, FAR))
    for key in (order_key(Rank.UNREADY, 0, run), order_key(Rank.SUCCEEDED, FAR, run), forget_key(run)):
        assert run_of_key(key) == run


def test_a_key_of_an_unknown_run_says_so():
    """`run_of_key` returns None for every key made without a run."""
    assert {run_of_key(order_key(rank, hlc, None)) for rank in Rank for hlc in (0, NOW, 1 << 60)} == {None}
    assert run_of_key(forget_key(None)) is None


@pytest.mark.parametrize("run", [None, run_at(0), run_at(NOW), LAST_RUN])
@pytest.mark.parametrize("hlc", [-(1 << 60), 0, EPOCH_MS, NOW, FAR, 1 << 60])
def test_a_key_is_positive_below_2_to_the_63_and_19_digits_wide(run: int | None, hlc: int):
    """Whatever the clocks say, it fits a signed 64-bit version, and its text compares like the number."""
    for key in (*(order_key(rank, hlc, run) for rank in Rank), forget_key(run)):
        assert 0 < key < 1 << 63
        assert len(key_text(key)) == KEY_DIGITS


def test_even_the_weakest_claim_has_a_key():
    """Key 0 means "touches no document": no clock and no missing run may produce it."""
    assert order_key(Rank.UNREADY, 0, None) > 0


def test_keys_compare_as_text():
    """Stores whose numbers are doubles compare the text."""
    keys = [order_key(rank, NOW + d, run) for rank in Rank for d in (0, 1, DAY) for run in (None, run_at(NOW))]
    assert sorted(keys) == [int(text) for text in sorted(map(key_text, keys))]


@pytest.mark.parametrize("run", [None, run_at(NOW)])
def test_ranks_are_ordered_whatever_the_clocks_say(run: int | None):
    """Unready < guessed < failed < succeeded < forgotten, the earliest after the latest."""
    strongest_last = [
        *(max(order_key(rank, hlc, run) for hlc in (0, NOW, FAR)) for rank in Rank),
        forget_key(run),
    ]
    weakest_next = [
        *(min(order_key(rank, hlc, run) for hlc in (0, NOW, FAR)) for rank in list(Rank)[1:]),
        forget_key(run),
    ]
    assert all(below < above for below, above in zip(strongest_last, weakest_next, strict=False))


def test_a_later_run_beats_the_forget_of_an_earlier_one():
    """The weakest claim of run + 1 is above the strongest of run."""
    run = run_at(NOW)
    assert order_key(Rank.UNREADY, 0, run + 1) > forget_key(run)


@pytest.mark.parametrize(("rank", "sign"), [(Rank.UNREADY, 1), (Rank.FAILED, 1), (Rank.SUCCEEDED, -1)])
def test_milliseconds_count_for_49_days_then_quarter_seconds_for_34_years(rank: Rank, sign: int):
    """Up to 2^32 ms every millisecond is distinct; beyond, steps of 256 ms, never backwards."""
    run = run_at(NOW)
    start = run_start_ms(run)

    def key(t: int) -> int:
        return sign * order_key(rank, start + t, run)

    fine = 1 << 32
    assert fine > 49 * DAY
    assert key(fine - 1) < key(fine) == key(fine + 255) < key(fine + 256)
    assert key(100 * DAY) < key(100 * DAY + 256)
    assert key(34 * YEAR) < key(34 * YEAR + 256)
    assert key(40 * YEAR) == key(FAR)


def test_before_the_unit_t_is_zero():
    """A clock behind the publisher's can tie, never go below the run."""
    run = run_at(NOW)
    start = run_start_ms(run)
    assert order_key(Rank.UNREADY, start - DAY, run) == order_key(Rank.UNREADY, start, run)


@pytest.mark.parametrize(
    ("run", "trusted"),
    [
        (None, False),
        (0, False),
        (-1, False),
        (1, False),
        (1 << 28, False),
        (run_at(NOW), True),
        (run_at(NOW + SKEW_LIMIT_MS), True),
        (run_at(NOW + SKEW_LIMIT_MS) + 1, False),
        (run_at(FAR), False),
        (run_at(NOW - 30 * YEAR), True),
    ],
)
def test_a_run_absurdly_far_ahead_or_out_of_range_is_unknown(run: int | None, trusted: bool):
    """Ten minutes are the limit; the past has none."""
    assert trusted_run(run, NOW) == (run if trusted else None)


class Wall:
    def __init__(self, now: int = NOW) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def test_the_clock_follows_the_wall_and_never_repeats_or_goes_back():
    """Not while the wall stands still, and not when it is set back."""
    wall = Wall()
    clock = Clock(wall)
    assert [clock.tick() for _ in range(3)] == [NOW, NOW + 1, NOW + 2]
    wall.now += 1000
    assert clock.tick() == NOW + 1000
    wall.now -= DAY
    assert clock.tick() == NOW + 1001


def test_the_clock_is_never_behind_what_it_has_seen():
    """A reading from a host ahead by less than ten minutes carries over."""
    clock = Clock(Wall())
    assert clock.observe(NOW + SKEW_LIMIT_MS)
    assert clock.tick() == NOW + SKEW_LIMIT_MS + 1
    assert clock.observe(NOW)
    assert clock.observe(None)
    assert clock.tick() == NOW + SKEW_LIMIT_MS + 2


def test_a_host_at_2099_does_not_move_the_clock():
    """Its reading is ignored, not clamped."""
    clock = Clock(Wall())
    assert not clock.observe(FAR)
    assert not clock.observe(NOW + SKEW_LIMIT_MS + 1)
    assert clock.tick() == NOW


def test_being_pulled_ahead_does_not_add_up():
    """Ten minutes are counted from the wall, not from the clock: hosts cannot push each other away."""
    clock = Clock(Wall())
    clock.observe(NOW + SKEW_LIMIT_MS)
    assert not clock.observe(clock.tick() + 1)


def test_threads_never_share_a_reading():
    """Eight threads, one clock, a wall that stands still: every reading is unique and each thread's rise."""
    clock = Clock(Wall())
    seen: list[list[int]] = [[] for _ in range(8)]
    start = threading.Barrier(len(seen))

    def run(mine: list[int]) -> None:
        start.wait()
        for i in range(2_000):
            mine.append(clock.tick())
            clock.observe(NOW + i)

    threads = [threading.Thread(target=run, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [reading for mine in seen for reading in mine]
    assert len(set(everything)) == len(everything)
    assert all(mine == sorted(mine) for mine in seen)


def test_a_lock_held_at_the_fork_is_replaced():
    """After `renew_lock` a reading needs no one to let go."""
    clock = Clock(Wall())
    clock._lock.acquire()
    clock.renew_lock()
    assert clock.tick() == NOW
