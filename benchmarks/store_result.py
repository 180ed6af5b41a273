"""``store_result(SUCCESS)`` in one process, against Celery's Redis backend and against a bare produce and acknowledge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.figures import Bound, Row
from benchmarks.stage import say
from benchmarks.store_child import METERED

if TYPE_CHECKING:
    from benchmarks.stage import Stage

REDIS = "Celery's Redis backend"
RAW = "bare produce and acknowledge"


def run(stage: Stage) -> list[Row]:
    with stage.redis() as server:
        one = _measured(stage, 1, server.clean_database(), ["redis", "buffered", METERED, "acknowledged", "raw"])
        three = _measured(stage, 3, server.clean_database(), ["acknowledged", "raw"])
    return [
        _row("buffered, mean of the calls", one, "buffered", "redis", Bound(most=0.125), "mean"),
        _row("buffered, until the last one is in Kafka", one, "buffered", "redis", None, "arrived"),
        _row("buffered, with metrics", one, METERED, "buffered", None, "mean"),
        _row("acknowledged, replication 1", one, "acknowledged", "redis", Bound(most=1.6)),
        _row("acknowledged, replication 1", one, "acknowledged", "raw", None),
        _row("acknowledged, replication 3", three, "acknowledged", "raw", Bound(most=1.3)),
    ]


def _measured(stage: Stage, brokers: int, url: str, what: list[str]) -> dict[str, list[dict[str, float]]]:
    cluster = stage.kafka(brokers)
    settings = stage.settings(cluster, url)
    arguments = {
        "what": what,
        "runs": stage.runs,
        "calls": stage.size(2000, 200),
        "redis": url,
        "kafka": f"kafka://{cluster.bootstrap}/?view={url}",
        "settings": stage.overrides(cluster, settings.topic_prefix),
    }
    found: dict[str, list[dict[str, Any]]] = stage.ask("store_child", arguments)
    for each, runs in found.items():
        shown = ", ".join(f"{1e6 * one['median']:.0f}" for one in runs)
        say(f"{each}, {brokers} broker{'s' if brokers > 1 else ''}: {shown} us")
    return found


def _row(
    what: str,
    found: dict[str, list[dict[str, float]]],
    ours: str,
    peer: str,
    bound: Bound | None,
    figure: str = "median",
) -> Row:
    return Row(
        what=f"store_result, {what}",
        unit="us/call",
        ours=[1e6 * one[figure] for one in found[ours]],
        peer=[1e6 * one[figure] for one in found[peer]],
        against={"redis": REDIS, "raw": RAW}.get(peer, peer),
        bound=bound,
        note="2,000 calls a run, in turn with the peer, same process" if peer == "redis" and bound else "",
    )
