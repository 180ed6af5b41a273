"""Threads in other people's processes: see `celery_kafka_backend.threads`."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from billiard.pool import Worker

import celery_kafka_backend
from celery_kafka_backend import threads
from tests.patience import PATIENCE_S


def test_a_thread_of_ours_takes_no_signal():
    def blocked() -> set[int]:
        return set(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    before, there = blocked(), []
    threads.start(lambda more: there.append(blocked() | {more}), "one", -1).join(PATIENCE_S)
    assert there[0] >= {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, -1}
    assert blocked() == before


def test_no_thread_is_started_in_another_way_where_workers_are():
    root = Path(celery_kafka_backend.__file__).parent
    files = [*root.glob("*.py"), *(root / "producer").glob("*.py")]
    assert [path.name for path in files if "Thread(" in path.read_text()] == ["threads.py"]


def test_a_pool_whose_child_is_told_to_end_goes_on():
    if "pthread_sigmask" not in inspect.getsource(Worker._do_exit):
        pytest.skip("this billiard lets SIGTERM end a child that has the lock of the queue")
    said = subprocess.run(
        [sys.executable, "-m", "tests.unit.ending_pool"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert said.stdout == "went on\n", said.stderr
