"""``python -m benchmarks.run [NAME …] [--quick] [--long] [--runs N] [--brokers 3] [--json FILE]``: measure, and hold against the bounds.

Exit code 0 if every bound held, 1 if not, 2 if a bench could not measure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import figures
from benchmarks.stage import BenchError, Stage, machine, say, versions
from tests.services.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.figures import Row

BENCHES = {
    "fold_redis": "events per second into Redis, against Faust, memory and the ceiling",
    "round_trip": "delay().get(), against Celery's Redis backend",
    "under_load": "from a task's end until get() returns, while the log takes 2,000 tasks/s",
    "chords": "chords and groups of tasks that do nothing, against Celery's Redis backend",
    "worker_rate": "tasks per second of a worker, against Celery's Redis backend",
    "store_result": "what storing a result costs, against Celery's Redis backend and a bare produce",
    "delay": "what recording adds to delay() while Kafka is unreachable",
    "spool": "tasks per second of a worker with a spool, Kafka there and away",
    "storage": "bytes per task in Kafka and Redis, against Celery's Redis backend",
    "metrics_cost": "a fold and a worker with metrics, against the same without",
    "insight": "a fold with statistics, against the same without; one Faust worker merging them; how old `top` is",
    "catch_up": "how long the view lags after a ten-minute outage",
    "take_over": "until the view is up to date after kill -9 of a materializer (only with --long or by name)",
    "barrier": "a read that a lagging view does not fool, against a plain read",
    "waiting": "100,000 results waited for in one process, and 1,000 processes that wait, against Celery's Redis backend (only with --long or by name)",
    "history": "a task's history straight from the log, against bare consuming, and around a time",
    "export": "search and export of a history in SQLite, and memory while at it (only with --long or by name)",
    "replay": "the log into Redis and SQLite, against bare consuming, SQLite's bulk insert, and by two processes (only with --long or by name)",
    "process_model": "a producer per child against one publisher process per host (only with --long or by name)",
    "fold_mongodb": "events per second into MongoDB, from the log and from memory (only with --long or by name)",
    "fold_elasticsearch": "… into Elasticsearch (only with --long or by name)",
    "fold_cassandra": "… into Cassandra (only with --long or by name)",
    "chord_memory": "memory of the chord processor with 100,000 members, and such a chord (only with --long or by name)",
    "memory": "resident memory of a materializer from 1 to 5 million events (only with --long or by name)",
}
LONG = frozenset(
    {"fold_mongodb", "fold_elasticsearch", "fold_cassandra", "waiting", "export", "replay"}
    | {"memory", "chord_memory", "process_model", "take_over"}
)
RUNS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benches that were asked for."""
    arguments = _parse(argv)
    names = arguments.names or [name for name in BENCHES if arguments.long or name not in LONG]
    logging.basicConfig(level=logging.ERROR)
    report: dict[str, Any] = {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "machine": machine(),
        "versions": versions(),
        "settings": SETTINGS,
        "benches": {},
    }
    rows: list[Row] = []
    failed = False
    with Stage(
        arguments.runs or (1 if arguments.quick else RUNS), quick=arguments.quick, brokers=arguments.brokers
    ) as stage:
        for name in names:
            print(f"{name}: {BENCHES[name]}", file=sys.stderr, flush=True)
            began = time.monotonic()
            try:
                found = importlib.import_module(f"benchmarks.{name}").run(stage)
            except (BenchError, ServiceError) as exc:
                print(f"{name} failed: {exc}", file=sys.stderr)
                report["benches"][name] = {"failed": str(exc)}
                failed = True
                continue
            say(f"{name} took {time.monotonic() - began:.0f} s")
            report["benches"][name] = {
                "seconds": round(time.monotonic() - began, 1),
                "rows": [row.as_json() for row in found],
            }
            rows += found
            _save(arguments.json, report)
    print(_heading(report))
    print(figures.table(rows))
    if arguments.quick:
        print("\n--quick: one run of small sizes. It shows that the benches work; the figures mean little.")
    _save(arguments.json, report)
    return 2 if failed else 1 if any(row.holds is False for row in rows) else 0


SETTINGS = {
    "topics": "8 partitions, LogAppendTime; 1 broker: replication 1; 3 brokers: replication 3, min.insync.replicas 2",
    "brokers": "Kafka in KRaft mode on the same machine, 512 MB to 1 GB of heap, serial GC, no second compiler",
    "producer": "acks=all, idempotent, lz4; what lingers leaves when somebody waits",
    "redis": "Redis on the same machine, no persistence, noeviction",
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="benches:\n" + "\n".join(f"  {name:<18} {what}" for name, what in BENCHES.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benches to run; all but the long ones if none")
    parser.add_argument("--quick", action="store_true", help="one run of small sizes, to see that they work")
    parser.add_argument("--long", action="store_true", help="the long benches too")
    parser.add_argument("--runs", type=int, help=f"repetitions of what is compared; default {RUNS}, with --quick 1")
    parser.add_argument(
        "--brokers", type=int, choices=(1, 3), default=1, help="Kafka brokers behind the workers; default 1"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, each run's figure included")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in BENCHES]
    if unknown:
        parser.error(f"no such bench: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    if arguments.runs is not None and arguments.runs < 1:
        parser.error("--runs: at least 1")
    return arguments


def _heading(report: dict[str, Any]) -> str:
    lines = [f"{report['at']}  {key}: {_plain(report[key])}" if key == "machine" else f"{key}: {_plain(report[key])}"
             for key in ("machine", "versions", "settings")]  # fmt: skip
    return "\n".join(["", *lines, ""])


def _plain(values: dict[str, Any]) -> str:
    return "; ".join(f"{key} {value}" for key, value in values.items())


def _save(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
