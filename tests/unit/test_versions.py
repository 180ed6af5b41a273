"""What pyproject.toml claims is what `make versions` runs with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

VERSIONS = Path(__file__).parents[1] / "versions"


def pins(name):
    lines = (VERSIONS / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def floors():
    """Floors of what users install: what the benchmarks, the tests and the linters need comes after that."""
    text = (VERSIONS.parents[1] / "pyproject.toml").read_text()
    users = text[text.index("\ndependencies = [") : text.index("\nbench = [")]
    return re.findall(r'"([\w.-]+)>=([\d.]+)', users)


def padded(version, parts=2):
    return (*map(int, version.split(".")), 0)[:parts]


def test_the_oldest_environment_has_the_floor_of_each():
    oldest = pins("oldest")
    found = dict(floors())
    assert {"celery", "confluent-kafka", "redis", "cassandra-driver", "fsspec"} <= set(found)
    for name, floor in found.items():
        parts = max(floor.count(".") + 1, 2)
        assert padded(oldest[name], parts) == padded(floor, parts), name


@pytest.mark.parametrize("name", [path.stem for path in VERSIONS.glob("*.txt")])
def test_no_environment_is_older_than_what_we_claim(name):
    pinned, claimed = pins(name), dict(floors())
    assert pinned["celery"]
    assert all(padded(pinned[one], 3) >= padded(floor, 3) for one, floor in claimed.items() if one in pinned)
