"""Resident memory of a materializer: 1 million events against 5 million, and once with results of 100 KB."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.stage import Progress, folded, say, view_of, wait_folded
from celery_kafka_backend import topics

if TYPE_CHECKING:
    from benchmarks.stage import Stage

LARGE = 100_000
MIB = 1 << 20


def run(stage: Stage) -> list[Row]:
    events = stage.size(5_000_000, 300_000)
    small = _measure(stage, events // load.PER_TASK, None, stage.size(60_000, 10_000))
    large = _measure(stage, stage.size(20_000, 2_000), LARGE, stage.size(2_000, 500))
    return [
        Row(
            what=f"materializer's memory at {events:,} events", unit="MiB", ours=[small[1] / MIB], peer=[small[0] / MIB],
            against=f"at {events // 5:,}", bound=Bound(most=1.1), note="resident; median of the last 5 % of the events up to there",
        ),
        Row(
            what=f"… with {LARGE // 1000} KB results, {stage.size(60_000, 6_000):,} events", unit="MiB",
            ours=[large[1] / MIB], peer=[large[0] / MIB], against="at a fifth of them", bound=Bound(most=1.1),
        ),
    ]  # fmt: skip


def _measure(stage: Stage, tasks: int, result_bytes: int | None, distance: int) -> tuple[float, float]:
    """Return the resident bytes after a fifth of the events, and after all of them."""
    cluster = stage.kafka(1)
    settings = stage.settings(cluster)
    topic = topics.task_events(settings.topic_prefix)
    progress = Progress("writing events", load.PER_TASK * tasks)
    count = load.fill(settings, topic, load.apart(load.Maker(result_bytes), tasks, distance), progress)
    progress.end()
    samples: list[tuple[int, int]] = []
    with stage.redis() as server:
        url = f"kafka://{cluster.bootstrap}/?view={server.url}"
        overrides = stage.overrides(cluster, settings.topic_prefix)
        view = view_of(settings, server.url)
        with stage.child("materializer_child", {"backend": url, "overrides": overrides}) as child:
            wait_folded(
                view, topic, count, child, "folding", lambda: samples.append((folded(view, topic), child.rss()))
            )
            samples.append((count, child.rss()))
        view.close()
    early, late = _around(samples, count // 5), _around(samples, count)
    for tenth in range(1, 11):
        upto = [rss for done, rss in samples if done <= tenth * count / 10]
        say(f"{tenth * count // 10:,} events: {upto[-1] / MIB:.0f} MiB, at most {max(upto) / MIB:.0f}" if upto else "")
    return early, late


def _around(samples: list[tuple[int, int]], count: int) -> float:
    """Return the median over the last 5 % of the way to ``count`` events; the nearest sample if there is none."""
    found = [rss for done, rss in samples if 0.95 * count <= done <= count]
    return median(found) if found else min((abs(done - count), rss) for done, rss in samples)[1]
