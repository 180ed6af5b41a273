"""Loaded into Celery's tests: lifts their gates for Redis, marks those that race with themselves, and writes down what really ran.

Many tests skip themselves unless the backend's URL starts with "redis", because Redis is where Celery's chords are at
home. Here the URL of our backend answers that question with yes, and is otherwise itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conformance.tally import RACES, listed

GATED = {"redis", "redis://"}


class Lifted(str):
    """A result backend's URL that says it starts with ``redis`` or ``redis://`` when it is asked for just that."""

    __slots__ = ()

    def startswith(self, prefix, *bounds):
        prefixes = prefix if isinstance(prefix, tuple) else (prefix,)
        return any(one in GATED for one in prefixes) or super().startswith(prefix, *bounds)


def pytest_configure(config):
    conftest = sys.modules["t.integration.conftest"]
    conftest.TEST_BACKEND = Lifted(conftest.TEST_BACKEND)


def pytest_collection_modifyitems(items):
    races = listed(RACES)
    for item in items:
        if item.nodeid in races:
            item.add_marker(pytest.mark.flaky(reruns=5, reruns_delay=2))  # as Celery marks its own


def pytest_collection_finish(session):
    for item in session.items:
        _write(collected=item.nodeid)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if outcome == "skipped" else "xpassed"
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if outcome in {"failed", "rerun"}:
            why = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr))
        _write(test=report.nodeid, when=report.when, outcome=outcome, why=why[:2000], seconds=round(report.duration, 2))


def pytest_collectreport(report):
    if report.failed or report.skipped:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _write(module=report.nodeid, outcome=report.outcome, why=why[:2000])


def _write(**line):
    with Path(os.environ["CONFORMANCE_REPORT"]).open("a") as report:
        report.write(json.dumps(line) + "\n")
