"""What recording adds to ``delay()`` while no Kafka broker can be reached; and how long a short script takes to end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.figures import Bound, Row, percentile
from benchmarks.stage import say
from tests.services import ports

if TYPE_CHECKING:
    from benchmarks.stage import Stage

NOBODY = "disabled://"


def run(stage: Stage) -> list[Row]:
    calls = stage.size(5000, 500)
    (port,) = ports.free(1)  # and nobody listens
    gone = f"kafka://127.0.0.1:{port}/?view=redis://127.0.0.1:{port}/0"
    found: dict[str, list[list[float]]] = {gone: [], NOBODY: []}
    ends: dict[str, list[float]] = {gone: [], NOBODY: []}
    for number in range(stage.runs):
        for backend in (NOBODY, gone):
            latencies = stage.ask("delay_child", {"backend": backend, "calls": calls})["latencies_s"]
            found[backend].append([1000 * each for each in latencies])
            began = time.monotonic()
            stage.ask("delay_child", {"backend": backend, "calls": 1})
            ends[backend].append(time.monotonic() - began)
            say(
                f"run {number + 1} of {stage.runs}, {backend.partition(':')[0]}: p99 {percentile(found[backend][-1], 0.99):.3f} ms"
            )
    added = [
        [
            percentile(ours, share) - percentile(theirs, share)
            for ours, theirs in zip(found[gone], found[NOBODY], strict=True)
        ]
        for share in (0.5, 0.99)
    ]
    return [
        _row("p50", found, gone, 0.5),
        _row("p99", found, gone, 0.99),
        Row(what="delay(), brokers unreachable: added to the p50", unit="ms", ours=added[0]),
        Row(
            what="delay(), brokers unreachable: added to the p99",
            unit="ms",
            ours=added[1],
            bound=Bound("value", most=1.0),
        ),
        Row(
            what="a script of one delay(), brokers unreachable: added to its run",
            unit="s",
            ours=[ours - theirs for ours, theirs in zip(ends[gone], ends[NOBODY], strict=True)],
            note="it waits at most 1 s at its end; the rest is imports",
        ),
    ]


def _row(what: str, found: dict[str, list[list[float]]], gone: str, share: float) -> Row:
    return Row(
        what=f"delay(), brokers unreachable: {what}",
        unit="ms",
        ours=[percentile(each, share) for each in found[gone]],
        peer=[percentile(each, share) for each in found[NOBODY]],
        against="no result backend",
    )
