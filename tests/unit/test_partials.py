"""The wire format of partial statistics: golden bytes, what is refused, and the sketch's bins."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from ddsketch.mapping import LogarithmicMapping

from celery_kafka_backend.errors import UnknownVersion, Unreadable
from celery_kafka_backend.partials import ACCURACY, Cell, Partial, bin_of, decode, encode, merged

GOLDEN = Path(__file__).parents[1] / "golden" / "partials-v1.jsonl"

FULL = Partial(
    partition=3,
    bucket=17,
    minute=29_921_340,
    task="shop.tasks.pay",
    upto=17_345,
    cells=[
        Cell(
            queue="celery",
            worker="celery@a",
            kinds={"started": 2, "success": 1, "failure": 1},
            errors={"builtins.ValueError": 1},
            bytes=812,
            wait={230: 1, 231: 1},
            run={-345: 1, 400: 1},
            begun=2,
            over=1,
        ),
        Cell(kinds={"sent": 3}, bytes=300),
    ],
)
LEAST = Partial(partition=0, bucket=0, minute=0, task="", upto=1, cells=[])


def test_the_golden_file_is_read_and_written_for_ever():
    """Version 1 is never edited in place."""
    lines = GOLDEN.read_bytes().splitlines()
    assert [decode(line) for line in lines] == [FULL, LEAST]
    assert [encode(one) for one in (FULL, LEAST)] == lines


def test_unknown_fields_are_accepted():
    value = msgspec.json.decode(encode(LEAST)) | {"weather": "fine"}
    assert decode(msgspec.json.encode(value)) == LEAST


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cells": [{"kinds": {"success": -1}}]}, ">= 0"),
        ({"cells": [{"bytes": -5}]}, ">= 0"),
        ({"cells": [{"run": {"7": -1}}]}, ">= 0"),
        ({"cells": [{"run": {"99999": 1}}]}, "<= 2000"),
        ({"partition": -1}, ">= 0"),
        ({"minute": -1}, ">= 0"),
        ({"upto": 0}, "outside bucket"),
        ({"upto": 1_001}, "outside bucket"),
        ({"task": None}, "str"),
        ({"v": 0}, "never was"),
        ({"cells": [{"kinds": {"sent": 1_001}}]}, "more than the 1000 records"),
        ({"cells": [{"run": {"7": 1 << 60}}]}, "more than the 1000 records"),
        ({"cells": [{"begun": 1 << 70}]}, "more than the 1000 records"),
        ({"cells": [{"bytes": 1 << 53}]}, "more than the 1000 records"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], says: str):
    """A figure that is wrong is worse than none."""
    value = msgspec.json.encode(msgspec.json.decode(encode(LEAST)) | change)
    with pytest.raises(Unreadable, match=says):
        decode(value)


@pytest.mark.parametrize("value", [None, b"", b"{}", b"[]", b"\xff", b"[" * 100_000])
def test_rubbish_is_refused(value: bytes | None):
    with pytest.raises(Unreadable):
        decode(value)


def test_a_newer_version_says_so():
    """To be read again after an upgrade."""
    with pytest.raises(UnknownVersion, match="version 2"):
        decode(b'{"v":2,"anything":"else"}')


@pytest.mark.parametrize("duration_ms", [0.0011, 0.5, 1.0, 1.02, 17.0, 1_000.0, 86_400_000.0])
def test_the_bins_are_those_of_a_ddsketch(duration_ms: float):
    assert bin_of(duration_ms) == LogarithmicMapping(ACCURACY).key(duration_ms)


@pytest.mark.parametrize("duration_ms", [0, -1, -1e9, 0.0001])
def test_what_lasted_no_time_counts_as_a_microsecond(duration_ms: float):
    """Negative ones come from clocks that differ."""
    assert bin_of(duration_ms) == bin_of(0.001)


@pytest.mark.parametrize("duration_ms", [1e17, 1e25, 1e308, float("inf")])
def test_what_lasted_longer_than_the_last_bin_counts_there(duration_ms: float):
    """A run time of 1e308 s is a number like any other in an event; its bin is one that readers take."""
    partial = Partial(partition=0, bucket=0, minute=1, task="a", upto=1, cells=[Cell(run={bin_of(duration_ms): 1})])
    assert decode(encode(partial)) == partial


def test_merging_adds_cell_by_cell_and_touches_none_of_them():
    one, two = Cell(queue="q", kinds={"sent": 1}, run={1: 1}), Cell(queue="q", kinds={"sent": 2}, errors={"E": 1})
    other = Cell(queue="p", worker="w", begun=1)
    assert merged([one, other, two]) == [
        other,
        Cell(queue="q", kinds={"sent": 3}, run={1: 1}, errors={"E": 1}),
    ]
    assert one == Cell(queue="q", kinds={"sent": 1}, run={1: 1})
