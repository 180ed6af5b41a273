"""Shared memory with a seat per process: exact sums, whoever dies, and no room for the dead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from celery_kafka_backend.board import Board
from celery_kafka_backend.metrics import Layout, Metric
from tests.patience import PATIENCE_S

BUCKETS = (1.0, 2.0)


def in_a_fork(work) -> int:
    """Run it in a fork that then dies by SIGKILL; return its pid."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    return pid


def test_a_thousand_killed_processes_are_counted_and_leave_nothing_behind():
    """One after another they need one seat, no descriptor and no memory. In a process of its own: forks of this are slow."""
    done = subprocess.run(
        [sys.executable, "-c", A_THOUSAND], capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr


A_THOUSAND = """
import os, resource, signal
from celery_kafka_backend.board import Board

board = Board(seats=8, cells=2, text_bytes=0)

def one():
    pid = os.fork()
    if not pid:
        try:
            seat = board.take(clear=[1])
            seat.add(0)
            seat.put(1, 7.0)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

def held():
    return len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

one()
files, memory = held()
for _ in range(999):
    one()
(reading,) = board.read()
assert reading.cells == (1000.0, 7.0), reading
assert not reading.alive
now, most = held()
assert now == files
assert most - memory < 2048, f"{most - memory} KiB"
"""


def test_processes_that_live_at_once_sit_apart_and_one_more_gets_no_seat():
    board = Board(seats=3, cells=1, text_bytes=0)
    mine = board.take()
    assert mine is not None
    assert board.take() is mine, "the same with every call"
    context = multiprocessing.get_context("fork")
    seated, leave = context.Queue(), context.Event()

    def sit():
        seat = board.take()
        if seat is not None:
            seat.add(0)
        seated.put(None if seat is None else seat.number)
        leave.wait(PATIENCE_S)

    others = [context.Process(target=sit) for _ in range(3)]
    for other in others:
        other.start()
    numbers = [seated.get(timeout=PATIENCE_S) for _ in others]
    assert sorted(n for n in numbers if n is not None) == [1, 2]
    assert numbers.count(None) == 1
    for _ in range(2):  # a look takes nobody's seat, not even the reader's
        assert [(one.number, one.alive) for one in board.read()] == [(0, True), (1, True), (2, True)]
    leave.set()
    for other in others:
        other.join(PATIENCE_S)
    assert [one.alive for one in board.read()] == [True, False, False]
    assert sum(one.cells[0] for one in board.read()) == 2


def test_a_seat_that_is_taken_over_keeps_counters_and_forgets_the_rest():
    board = Board(seats=2, cells=2, text_bytes=16)

    def first():
        seat = board.take()
        seat.add(0, 5)
        seat.put(1, 5)
        seat.say(b"first")

    in_a_fork(first)
    assert next(board.read()).text == b"first"
    seat = board.take(clear=[1])
    assert (seat.get(0), seat.get(1), seat.text()) == (5.0, 0.0, b"")


def test_words_are_replaced_whole_and_have_a_bound():
    seat = Board(seats=1, cells=0, text_bytes=8).take()
    for said in (b"", b"one", b"eight bt", b"x"):
        seat.say(said)
        assert seat.text() == said
    with pytest.raises(ValueError, match="too long"):
        seat.say(b"nine byte")
    assert seat.text() == b"x"


def test_values_are_counted_in_the_bucket_whose_bound_they_do_not_exceed():
    seat = Board(seats=1, cells=4, text_bytes=0).take()
    for value in (0.5, 1.0, 1.5, 99.0):
        seat.observe(0, BUCKETS, value)
    assert seat.numbers() == (2.0, 1.0, 1.0, 102.0)


def _count(board: Board) -> None:
    seat = board.take(1)
    assert seat is not None
    seat.add(0, 3)


def test_a_spawned_process_writes_on_the_board_that_it_is_given():
    board = Board(seats=2, cells=1, text_bytes=0)
    process = multiprocessing.get_context("spawn").Process(target=_count, args=(board,))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert [(one.number, one.cells) for one in board.read()] == [(1, (3.0,))]


def test_a_layout_has_a_place_for_every_series_and_no_two_share_one():
    metrics = (
        Metric("a_total", "counter", "", ("why",), ("x", "y")),
        Metric("b_seconds", "histogram", "", buckets=BUCKETS),
        Metric("c", "gauge", ""),
    )
    layout = Layout(metrics, ["since"])
    places = [(where.start, where.stop) for _, _, where in layout.series()]
    assert places == [(0, 1), (1, 2), (2, 6), (6, 7)]
    assert layout.gauges == (6,)
    assert layout.at("since") == 7
    assert layout.size == 8
