"""What a run of the suite came to, and whether that will do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tests.conformance import suite

EXCEPTIONS = Path(__file__).with_name("exceptions.txt")
SKIPPED = Path(__file__).with_name("skipped.txt")
RACES = Path(__file__).with_name("races.txt")
NOTHING_COLLECTED = 5  # pytest's exit code: a module that skips itself as a whole
FINE = {"passed", "xfailed", "xpassed"}  # Celery's own expectations of failure are not strict
MOST_EXCEPTIONS = 12


def listed(file: Path) -> dict[str, str]:
    """A list of this folder, node id to reason: one per line, a space between."""
    lines = [line.partition(" ") for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return {test: reason for test, _, reason in lines}


class Tally:
    """The outcomes of a run, over all files."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.why: dict[str, str] = {}
        self.reruns: Counter[str] = Counter()
        self.broken: list[str] = []

    def read(self, report: Path, file: str, code: int) -> str:
        """Add one file's report; returns it in a line."""
        before = set(self.outcomes)
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        for line in lines:
            if "collected" in line:
                self.outcomes[line["collected"]] = "never ran"
            elif "module" in line and line["outcome"] == "failed":
                self.broken.append(f"{line['module']}: {line['why']}")
            elif line.get("outcome") == "rerun":
                self.reruns[line["test"]] += 1
                self.why.setdefault(line["test"], line["why"])
            elif "test" in line and not (self.outcomes.get(line["test"]) == "failed" and line["when"] == "teardown"):
                self.outcomes[line["test"]] = line["outcome"]
                self.why[line["test"]] = line["why"] or self.why.get(line["test"], "")
        if code not in {0, 1, NOTHING_COLLECTED}:
            self.broken.append(f"{file}: pytest ended with {code}")
        return self._counts(test for test in self.outcomes if test not in before)

    def summary(self) -> str:
        """The counts of all."""
        return self._counts(self.outcomes)

    def _counts(self, tests) -> str:
        tests = list(tests)
        counts = Counter(self.outcomes[test] for test in tests)
        found = [f"{len(tests)} collected", *(f"{number} {outcome}" for outcome, number in sorted(counts.items()))]
        reruns = sum(self.reruns[test] for test in tests)
        return ", ".join([*found, *([f"{reruns} reruns"] if reruns else [])])

    def raced(self) -> list[str]:
        """The tests of ``races.txt`` that ran again, a line each."""
        return [f"ran again, {self.reruns[test]} times: {test}" for test in listed(RACES) if self.reruns[test]]

    def verdict(self, *, ours: bool, whole: bool) -> list[str]:
        """Everything that is wrong, a line each.

        Args:
            ours: It ran on this project's backend, so the exceptions are allowed.
            whole: Every test was asked for.
        """
        found = list(self.broken)
        skipped, allowed = listed(SKIPPED), listed(EXCEPTIONS)
        if whole and len(self.outcomes) != suite.COLLECTED:
            found.append(f"{len(self.outcomes)} tests collected, {suite.COLLECTED} expected")
        if len(allowed) > MOST_EXCEPTIONS:
            found.append(f"{len(allowed)} exceptions are listed, {MOST_EXCEPTIONS} at most")
        for test, outcome in self.outcomes.items():
            fine = outcome in FINE or (outcome == "skipped" and test in skipped) or (ours and test in allowed)
            if not fine:
                found.append(f"{outcome}: {test}: {self.why.get(test, '')[:300]}")
            elif ours and test in allowed and outcome in FINE:
                found.append(f"{outcome}, and need not be listed in {EXCEPTIONS.name}: {test}")
        return found
