"""Chords that outlive the results of their members, and members that are delivered again after they succeeded."""

from __future__ import annotations

import time

import pytest
from celery import chord

from tests.patience import PATIENCE_S

VISIBLE_S = 5

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.redis,
    pytest.mark.parametrize(
        "fleet",
        [
            {
                # A worker that cannot tell in time whether a task has succeeded runs it again.
                "settings": {"barrier_timeout_s": 60},
                "conf": {
                    "worker_deduplicate_successful_tasks": True,
                    "broker_transport_options": {"visibility_timeout": VISIBLE_S, "polling_interval": 0.01},
                },
            }
        ],
        indirect=True,
    ),
]


def test_results_may_expire_before_the_chord_is_complete(fleet):
    tasks = fleet.app
    result = chord([tasks.brief.s(2), tasks.nap.s(3)])(tasks.note.s())
    fleet.until("worker", "noted [2, 3]")
    assert result.parent.results[0].state == "PENDING", "it had expired, or this shows nothing"


def test_a_member_that_succeeded_and_is_delivered_again_counts_and_does_not_run_again(fleet, tmp_path):
    """The whole worker dies between the member's success and the broker's acknowledgement."""
    tasks = fleet.app
    path = tmp_path / "runs"
    # The other one's message is acknowledged late, too: a kill loses what Celery has acknowledged and not begun. And it
    # comes first: a kill also loses what kombu has just taken out of Redis, before it notes that it has.
    with fleet.paused():  # else the chord may fire, and its body run, before the kill
        chord([tasks.nap_late.s(0), tasks.stored_and_killed.s(str(path), parent=True)])(tasks.note.s())
        fleet.processes.pop("worker").wait(PATIENCE_S)
    # kombu looks for what a dead worker had when a worker starts, and then not for a long time.
    time.sleep(VISIBLE_S + 1)
    fleet.worker()
    fleet.until("worker", "noted [0, 'stored']")
    assert path.read_text() == "ran\n"
