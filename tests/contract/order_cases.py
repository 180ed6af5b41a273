"""What a view must show for real Celery sequences, in whatever order and how often the events come.

Each case is a function of a task id that returns the events, and the place of the one shown (None: nothing).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from celery_kafka_backend.order import Rank, run_at
from tests.contract.factories import RUN, R, forgotten, imported, sent, stated

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery_kafka_backend.events import Event

WEEK = 7 * 86_400_000


class Case(NamedTuple):
    """Events of one task, and which is shown."""

    events: Callable[[str], list[Event]]
    shown: int | None


def _later(ms: int) -> int:
    return run_at(R + ms)


CASES = {
    "the next attempt starts before RETRY is stored": Case(
        lambda t: [stated("STARTED", 20, task=t, attempt=1), stated("RETRY", 10, task=t)], 0
    ),
    "a redelivery runs twice, both succeed": Case(
        lambda t: [stated("SUCCESS", 10, task=t, value="a"), stated("SUCCESS", 12, task=t, value="b")], 0
    ),
    "the first attempt's late duplicate succeeds, then the retry chain": Case(
        lambda t: [stated("SUCCESS", 10, task=t), stated("SUCCESS", 30, task=t, attempt=1)], 0
    ),
    "published again after FAILURE, fails again": Case(
        lambda t: [stated("FAILURE", 10, task=t), stated("FAILURE", WEEK, task=t, run=_later(WEEK))], 1
    ),
    "published again within one unit after FAILURE: a new FAILURE wins, its STARTED stays hidden": Case(
        lambda t: [stated("FAILURE", 10, task=t), stated("STARTED", 20, task=t), stated("FAILURE", 30, task=t)], 2
    ),
    "published again within one unit after FAILURE: STARTED stays hidden": Case(
        lambda t: [stated("FAILURE", 10, task=t), stated("STARTED", 20, task=t), stated("RETRY", 30, task=t)], 0
    ),
    "published again a week after SUCCESS": Case(
        lambda t: [stated("SUCCESS", 10, task=t), stated("SUCCESS", WEEK, task=t, run=_later(WEEK))], 1
    ),
    "duplicated by the broker": Case(
        lambda t: [sent(0, task=t), stated("SUCCESS", 10, task=t), stated("SUCCESS", 11, task=t)], 1
    ),
    "published twice within one unit": Case(
        lambda t: [stated("SUCCESS", 10, task=t), stated("SUCCESS", 7_000, task=t)], 0
    ),
    "published twice, further apart": Case(
        lambda t: [stated("SUCCESS", 10, task=t), stated("SUCCESS", 20_000, task=t, run=_later(20_000))], 1
    ),
    "a chain's successor is sent twice": Case(
        lambda t: [stated("SUCCESS", 9, task=t), stated("STARTED", 20_000, task=t), stated("SUCCESS", 20_009, task=t)],
        0,
    ),
    "self.replace after retries": Case(
        lambda t: [
            stated("STARTED", 10, task=t, attempt=2),
            stated("RETRY", 20, task=t, attempt=2),
            stated("STARTED", 30, task=t),
            stated("SUCCESS", 40, task=t),
        ],
        3,
    ),
    "self.replace after retries, the replacement runs": Case(
        lambda t: [stated("STARTED", 10, task=t, attempt=2), stated("STARTED", 30, task=t)], 1
    ),
    "abort() with no request at hand": Case(
        lambda t: [stated("PROGRESS", 10, task=t), stated("ABORTED", 11, task=t)], 1
    ),
    "a cancelled attempt stores RETRY, then is redelivered": Case(
        lambda t: [stated("RETRY", 10, task=t), stated("STARTED", 20, task=t)], 1
    ),
    "every worker guesses REVOKED, the task fails": Case(
        lambda t: [
            stated("REVOKED", 50, task=t, rank=Rank.GUESSED_REVOKED, name=f"{t} guess 1"),
            stated("REVOKED", 60, task=t, rank=Rank.GUESSED_REVOKED, run=None, name=f"{t} guess 2"),
            stated("FAILURE", 20, task=t),
        ],
        2,
    ),
    "revoked while it waits for a retry": Case(
        lambda t: [stated("RETRY", 10, task=t), stated("REVOKED", 20, task=t)], 1
    ),
    "the parent stores FAILURE while the child's SUCCESS is in flight": Case(
        lambda t: [stated("FAILURE", 20, task=t), stated("SUCCESS", 15, task=t)], 1
    ),
    "_fail_chain guesses FAILURE for a task that runs": Case(
        lambda t: [stated("FAILURE", 20, task=t, run=None), stated("STARTED", 15, task=t)], 1
    ),
    "imported, then executed here again": Case(
        lambda t: [imported("SUCCESS", 10, task=t), stated("STARTED", 60_000, task=t, run=_later(60_000))], 1
    ),
    "imported, and executed here before": Case(
        lambda t: [stated("FAILURE", 10, task=t), imported("SUCCESS", 60_000, task=t)], 0
    ),
    "imported, and executed here from a message without headers": Case(
        lambda t: [imported("SUCCESS", 60_000, task=t), stated("FAILURE", 20, task=t, run=None)], 1
    ),
    "imported, and only started here from a message without headers": Case(
        lambda t: [imported("SUCCESS", 60_000, task=t), stated("STARTED", 20, task=t, run=None)], 1
    ),
    "imported twice, with another outcome later": Case(
        lambda t: [imported("FAILURE", 10, task=t), imported("SUCCESS", 60_000, task=t)], 1
    ),
    "imported while it ran, and then done": Case(
        lambda t: [imported("STARTED", 10, task=t), imported("FAILURE", 60_000, task=t)], 1
    ),
    "imported and forgotten": Case(lambda t: [imported("SUCCESS", 10, task=t), forgotten(20, task=t, run=None)], None),
    "forgotten, then a late duplicate": Case(
        lambda t: [stated("SUCCESS", 10, task=t), forgotten(20, task=t), stated("FAILURE", 30, task=t)], None
    ),
    "forgotten, then run again": Case(
        lambda t: [
            stated("SUCCESS", 10, task=t),
            forgotten(20, task=t),
            stated("STARTED", 60_000, task=t, run=_later(60_000)),
        ],
        2,
    ),
    "an expired duplicate while the first one runs": Case(
        lambda t: [stated("REVOKED", 5, task=t), stated("SUCCESS", 10, task=t)], 1
    ),
    "a host five minutes ahead": Case(lambda t: [stated("STARTED", 300_000, task=t), stated("SUCCESS", 50, task=t)], 1),
    "a publisher set to 2099, then a normal run": Case(
        lambda t: [
            stated("STARTED", 10, task=t, run=None),
            stated("SUCCESS", 20, task=t, run=None),
            stated("STARTED", 5, task=t),
        ],
        2,
    ),
    "a message without our headers": Case(
        lambda t: [
            stated("STARTED", 5, task=t, run=None),
            stated("SUCCESS", 10, task=t, run=None),
            stated("SUCCESS", 12, task=t, run=None),
        ],
        1,
    ),
    "a message without our headers, forgotten": Case(
        lambda t: [stated("SUCCESS", 10, task=t, run=None), forgotten(20, task=t, run=None)], None
    ),
    "forgotten and run again at once": Case(
        lambda t: [forgotten(10, task=t), stated("STARTED", 8_001, task=t, run=RUN + 1)], 1
    ),
    "a run older than 99 days": Case(
        lambda t: [stated("STARTED", 10, task=t), stated("SUCCESS", 99 * 86_400_000, task=t)], 1
    ),
    "abort from a clock a second behind": Case(
        lambda t: [stated("PROGRESS", 1_000, task=t), stated("ABORTED", 1_001, task=t)], 1
    ),
    "ignore_result": Case(lambda t: [sent(0, task=t)], None),
}
