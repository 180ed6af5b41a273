"""After an outage: how long until the view is up to date again, while the fleet works on."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from benchmarks import load
from benchmarks.figures import Row
from benchmarks.stage import LogEnd, Progress, cluster_cpu_s, folded, redis_cpu_s, say, view_of
from celery_kafka_backend import topics

if TYPE_CHECKING:
    from benchmarks.stage import Stage

TASKS_PER_S = 1000
OUTAGE_S = 600
CAUGHT_UP_S = 1.0
LIMIT_S = 600


def run(stage: Stage) -> list[Row]:
    cluster = stage.kafka(1)
    outage_s = stage.size(OUTAGE_S, 30)
    settings = stage.settings(cluster)
    topic = topics.task_events(settings.topic_prefix)
    missed = load.PER_TASK * TASKS_PER_S * outage_s
    progress = Progress("writing what the outage missed", missed)
    load.fill(settings, topic, load.apart(load.Maker(), TASKS_PER_S * outage_s, TASKS_PER_S), progress)
    progress.end()
    seconds, rates = [], []
    for number in range(min(stage.runs, 3)):
        overrides = stage.overrides(cluster, settings.topic_prefix)
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(stage.redis())
            url = f"kafka://{cluster.bootstrap}/?view={server.url}"
            working = {"backend": url, "overrides": overrides, "seed": number + 2}
            working |= {"tasks": TASKS_PER_S * LIMIT_S, "tasks_per_s": TASKS_PER_S}
            stack.enter_context(stage.child("load_child", working))
            view = view_of(settings, server.url)
            end = LogEnd(cluster.bootstrap, topic)
            stack.callback(end.close)
            stack.callback(view.close)
            before = cluster_cpu_s(cluster)
            began = time.monotonic()
            child = stack.enter_context(stage.child("materializer_child", {"backend": url, "overrides": overrides}))
            progress = Progress("catching up", missed)
            while (behind := end.records() - (done := folded(view, topic))) > load.PER_TASK * TASKS_PER_S * CAUGHT_UP_S:
                child.check()
                progress(missed - behind)
                time.sleep(0.1)
            progress.end()
            spent = time.monotonic() - began
            seconds.append(spent)
            rates.append(done / spent)
            say(
                f"run {number + 1}: caught up in {spent:.1f} s; CPU of the materializer {child.cpu_s():.1f} s, "
                f"of Redis {redis_cpu_s(server):.1f} s, of Kafka {cluster_cpu_s(cluster) - before:.1f} s"
            )
    what = f"catch-up after {outage_s // 60 or outage_s} {'min' if outage_s >= 60 else 's'} at {TASKS_PER_S:,} tasks/s"
    note = (
        f"{missed:,} events behind, one process from its start, until less than {CAUGHT_UP_S:g} s of events is missing; "
        "the fleet works on at the same rate"
    )
    return [
        Row(what=what, unit="s", ours=seconds, note=note),
        Row(what=f"{what}: rate", unit="events/s", ours=rates),
    ]
