"""Times and time spans as people type them."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone

import click
import pytest

from celery_kafka_backend.cli.moment import Moment, Span, latest


def moment(text):
    return Moment().convert(text, None, None)


def test_a_date_is_local_unless_it_says_otherwise():
    assert moment("2026-01-31T12:00Z") == 1_769_860_800_000
    assert moment("2026-01-31T12:00+02:00") == 1_769_860_800_000 - 7_200_000
    assert moment("2026-01-31T12:00") == int(datetime(2026, 1, 31, 12).astimezone().timestamp() * 1000)


def test_so_long_ago():
    for text, seconds in (("90m", 5400), ("12h", 43_200), ("3d", 259_200), ("0s", 0), ("1.5s", 1.5)):
        assert abs(time.time() * 1000 - seconds * 1000 - moment(text)) < 5_000


def test_a_time_of_day_is_its_latest():
    now = datetime.now().astimezone()
    for ago in (timedelta(minutes=2), timedelta(hours=23, minutes=50)):
        then = (now - ago).replace(second=0, microsecond=0)
        assert moment(then.strftime("%H:%M")) == int(then.timestamp() * 1000)
    assert moment("3:05") <= now.timestamp() * 1000


@pytest.fixture
def new_york(monkeypatch):
    """A local zone whose clocks went back from 2:00 to 1:00 on 2026-11-01, and ahead from 2:00 to 3:00 on 2026-03-08."""
    monkeypatch.setenv("TZ", "EST5EDT,M3.2.0,M11.1.0")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("new_york")
@pytest.mark.parametrize(
    ("now", "clock", "then"),
    [
        ("2026-11-01T17:00", "23:30", "2026-11-01T03:30"),  # yesterday, by summer time
        ("2026-11-01T17:00", "01:30", "2026-11-01T06:30"),  # the second of two
        ("2026-11-01T06:00", "01:30", "2026-11-01T05:30"),  # the second is to come
        ("2026-11-01T05:00", "01:30", "2026-10-31T05:30"),
        ("2026-03-08T16:00", "23:30:15", "2026-03-08T04:30:15"),  # yesterday, by winter time
    ],
)
def test_a_time_of_day_is_its_latest_where_clocks_were_changed(now, clock, then):
    now, then = (datetime.fromisoformat(each).replace(tzinfo=timezone.utc) for each in (now, then))
    assert latest(clock, now.astimezone()) == then


@pytest.mark.parametrize("text", ["yesterday", "25:00", "2026-13-01", "", "5", "-3h"])
def test_anything_else_is_refused_with_examples(text):
    with pytest.raises(click.BadParameter, match="12h or 3d"):
        moment(text)


def test_a_span():
    assert [Span().convert(text, None, None) for text in ("250ms", "90s", "10m", "2h", "3d")] == [
        0.25,
        90,
        600,
        7200,
        259_200,
    ]
    assert [Span().convert(f"{ms}ms", None, None) for ms in range(20_000)] == [ms / 1000 for ms in range(20_000)]
    with pytest.raises(click.BadParameter, match="no length of time"):
        Span().convert("soon", None, None)
