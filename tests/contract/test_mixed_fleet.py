"""Stores that workers with Celery's own backend write beside ours, while a fleet is switched: whose document stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from celery_kafka_backend.order import Rank
from tests.contract.factories import RUN, batch, sent, stated

if TYPE_CHECKING:
    from tests.contract.conftest import Place

STORES = [
    pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("redis", "mongodb", "elasticsearch", "cassandra")
]
"""Those that docs/switching.md is about, and the stores of which that is tried here alone."""

pytestmark = pytest.mark.parametrize("place", STORES, indirect=True)
READY = ["SUCCESS", "FAILURE", "REVOKED"]
runs = pytest.mark.parametrize("run", [RUN, None], ids=["run", "no run"])


@runs
@pytest.mark.parametrize("state", READY)
@pytest.mark.parametrize("before", [[], [sent(0)]], ids=["nothing of ours", "a side record of ours"])
def test_what_is_ready_stays_against_what_is_not(place: Place, before: list, state: str, run: int | None) -> None:
    place.sink().write(batch(*before))
    place.stock("t", state)
    place.sink().write(batch(stated("RETRY", 10, run=run)))
    assert b'"stock"' in place.view().documents(["t"])["t"]


@runs
@pytest.mark.parametrize("state", READY)
def test_a_late_event_of_ours_does_not_undo_how_their_worker_ended_our_task(
    place: Place, state: str, run: int | None
) -> None:
    place.sink().write(batch(stated("STARTED", 10, run=run)))
    place.stock("t", state)
    place.sink().write(batch(stated("RETRY", 20, run=run)))
    assert b'"stock"' in place.view().documents(["t"])["t"]
    ours = stated("FAILURE", 30, run=run)
    place.sink().write(batch(ours))
    shown = place.view().documents(["t"])["t"]
    assert b'"stock"' in shown if state == "SUCCESS" else shown == ours.document


@runs
@pytest.mark.parametrize(
    ("state", "rank"),
    [("SUCCESS", None), ("FAILURE", None), ("REVOKED", None), ("REVOKED", Rank.GUESSED_REVOKED), ("RETRY", None)],
)
def test_a_document_of_ours_is_not_taken_for_theirs(
    place: Place, state: str, rank: Rank | None, run: int | None
) -> None:
    """A later run replaces it, however it ended."""
    place.sink().write(batch(stated(state, 10, rank=rank, run=run)))
    again = stated("STARTED", 10_000, run=RUN + 1)
    place.sink().write(batch(again))
    assert place.view().documents(["t"]) == {"t": again.document}
