"""The conformance run notices what it is there to notice."""

from __future__ import annotations

import json

import pytest

from tests.conformance import tally
from tests.conformance.plugin import Lifted
from tests.conformance.tally import EXCEPTIONS, MOST_EXCEPTIONS, RACES, SKIPPED, Tally, listed


@pytest.fixture
def read(tmp_path):
    def reading(*lines, code=0):
        report = tmp_path / "report.jsonl"
        report.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = Tally()
        found.read(report, "test_it.py", code)
        return found

    return reading


def ran(test, outcome, when="call", why=""):
    return {"test": test, "when": when, "outcome": outcome, "why": why, "seconds": 1.0}


def test_a_test_that_fails_never_ran_or_skips_itself_is_named(read):
    found = read({"collected": "a"}, {"collected": "b"}, {"collected": "c"}, {"collected": "d"},
                 ran("a", "passed"), ran("b", "failed", why="no"), ran("c", "skipped", "setup"))  # fmt: skip
    assert found.verdict(ours=True, whole=False) == ["failed: b: no", "skipped: c: ", "never ran: d: "]
    assert found.summary() == "4 collected, 1 failed, 1 never ran, 1 passed, 1 skipped"


def test_a_teardown_that_fails_after_the_test_passed_is_a_failure(read):
    found = read({"collected": "a"}, ran("a", "passed"), ran("a", "failed", "teardown"))
    assert found.outcomes == {"a": "failed"}


def test_a_rerun_is_counted(read):
    found = read({"collected": "a"}, ran("a", "rerun"), ran("a", "passed"))
    assert found.verdict(ours=True, whole=False) == []
    assert found.summary() == "1 collected, 1 passed, 1 reruns"
    assert found.raced() == []


def test_a_race_that_was_lost_is_named_and_one_that_is_lost_each_time_is_a_failure(read):
    (race,) = listed(RACES)
    found = read({"collected": race}, ran(race, "rerun", why="late"), ran(race, "passed"))
    assert found.raced() == [f"ran again, 1 times: {race}"]
    assert found.verdict(ours=True, whole=False) == []
    found = read({"collected": race}, *[ran(race, "rerun", why="late")] * 5, ran(race, "failed", why="late"))
    assert found.verdict(ours=True, whole=False) == [f"failed: {race}: late"]


def test_an_exception_is_one_on_ours_alone_and_only_while_it_fails(read, monkeypatch):
    monkeypatch.setattr(tally, "listed", lambda file: {"a": "looks"} if file == EXCEPTIONS else {})
    failed, passed = read({"collected": "a"}, ran("a", "failed")), read({"collected": "a"}, ran("a", "passed"))
    assert failed.verdict(ours=True, whole=False) == []
    assert failed.verdict(ours=False, whole=False) == ["failed: a: "]
    assert passed.verdict(ours=False, whole=False) == []
    assert passed.verdict(ours=True, whole=False) == ["passed, and need not be listed in exceptions.txt: a"]


def test_a_crash_of_pytest_and_a_suite_that_is_not_whole_are_said(read):
    found = read({"module": "m", "outcome": "failed", "why": "no azure"}, code=2)
    assert found.verdict(ours=True, whole=True) == [
        "m: no azure",
        "test_it.py: pytest ended with 2",
        "0 tests collected, 409 expected",
    ]


def test_the_lists_are_well_formed():
    assert len(listed(EXCEPTIONS)) <= MOST_EXCEPTIONS
    assert all(test.startswith("t/integration/test_") and why for test, why in listed(EXCEPTIONS).items())
    assert all(listed(SKIPPED).values())
    assert all(listed(RACES).values())
    assert not listed(EXCEPTIONS).keys() & (listed(SKIPPED).keys() | listed(RACES).keys())


def test_the_gates_are_lifted_and_nothing_else_is():
    url = Lifted("kafka://127.0.0.1:9092/?view=redis://x/1")
    assert url.startswith("redis")
    assert url.startswith("redis://")
    assert url.startswith(("redis", "rpc"))
    assert url.startswith("kafka://")
    assert not url.startswith("rpc")
    assert not url.startswith("redis+socket")
