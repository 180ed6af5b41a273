"""What differs from the log, and is not left out as older than the log."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from celery_kafka_backend import settings
from celery_kafka_backend.processors import instant
from celery_kafka_backend.processors.verify import HISTORY, Comparison

if TYPE_CHECKING:
    from celery_kafka_backend.processors.instant import Side


@pytest.mark.parametrize("hlc", ["x", "inf", "1.5", "7"])
def test_a_history_entry_without_a_time_that_can_be_read_is_a_difference(hlc: str):
    side = cast("Side", SimpleNamespace(earliest=lambda _ids: {}))
    found = Comparison(different=1, keys=[(HISTORY, f"t/{hlc}/e")])
    verdict = instant.Verdict([], found)
    place: Any = lambda _table, _subject: 0  # noqa: E731
    instant._leave_out_older(settings.parse("kafka://x/?view=memory://x"), side, side, {}, place, verdict)
    assert (verdict.found.different, verdict.beyond) == (1, 0)
