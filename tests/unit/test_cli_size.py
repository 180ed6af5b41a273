"""The arithmetic of `pipeline size`."""

from __future__ import annotations

import pytest

from celery_kafka_backend.cli import figures
from celery_kafka_backend.cli.size import Load, needs

DAY_S = 86_400
LOAD = Load(
    tasks_per_day=1_000_000,
    events_per_task=4,
    result_bytes=400,
    peak=5,
    retention_s=7 * DAY_S,
    expires_s=DAY_S,
    replication=3,
    history=False,
    history_s=DAY_S,
)


def test_twice_the_tasks_need_twice_the_room():
    once, twice = needs(LOAD), needs(LOAD._replace(tasks_per_day=2_000_000))
    for field in ("log_bytes", "redis_bytes", "mean_events_per_s", "peak_events_per_s"):
        assert getattr(twice, field) == pytest.approx(2 * getattr(once, field))


def test_disk_grows_with_retention_and_copies():
    assert needs(LOAD).log_bytes == pytest.approx(needs(LOAD).log_bytes_per_day * 7 * 3)


def test_at_the_peak_no_process_is_more_than_half_busy():
    for tasks in (1e5, 1e7, 1e9):
        found = needs(LOAD._replace(tasks_per_day=tasks))
        assert found.peak_events_per_s <= found.processes * figures.FOLD_EVENTS_PER_S / 2
        assert found.partitions >= found.processes
        assert 0 < found.catch_up_s <= 600


def test_the_figures_give_back_what_was_measured():
    small = LOAD._replace(tasks_per_day=8_000, replication=1, retention_s=DAY_S, result_bytes=16)
    for load, log, redis in (
        (small, 1552, 701),
        (small._replace(result_bytes=400), 1809, 1144),
        (small._replace(result_bytes=400, history=True), 1809, 5519),
    ):
        found = needs(load)
        assert found.log_bytes / 8_000 == pytest.approx(log, rel=0.02)
        assert found.redis_bytes / 8_000 == pytest.approx(redis, rel=0.02)


def test_history_takes_room_for_as_long_as_it_is_kept():
    none, day, month = (needs(LOAD._replace(history=s > 0, history_s=s * DAY_S)).redis_bytes for s in (0, 1, 30))
    assert month - none == pytest.approx(30 * (day - none))
