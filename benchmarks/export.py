"""Search and export of a history in SQLite: how fast, and whether memory stays flat."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import load
from benchmarks.figures import Bound, Row
from benchmarks.stage import Progress
from celery_kafka_backend import codec
from celery_kafka_backend.changes import Batch, Logged
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink

if TYPE_CHECKING:
    from benchmarks.stage import Stage

EVENTS = 1_000_000
BATCH = 9_000
FORMATS = ("jsonl", "cloudevents", "parquet")
NOWHERE = "kafka://127.0.0.1:1/?view="
"""An export from a view asks no Kafka."""


def run(stage: Stage) -> list[Row]:
    many = stage.size(EVENTS, 60_000)
    few = many // 4
    with tempfile.TemporaryDirectory() as folder:
        small, large = (_filled(f"sqlite:///{folder}/{count}.db", count) for count in (few, many))
        out = str(Path(folder, "out"))
        rows = []
        for form in FORMATS:
            words = ["export", "--view", "sqlite", "--format", form, "-o", out, "--quiet"]
            told = [stage.ask("export_child", {"backend": NOWHERE + url, "words": words}) for url in (small, large)]
            rows += [
                Row(what=f"export of {many:,} events as {form}", unit="events/s", ours=[many / told[1]["seconds"]]),
                Row(
                    what=f"… memory, {form}", unit="MiB", ours=[told[1]["rss"] / 2**20], peer=[told[0]["rss"] / 2**20],
                    against=f"of {few:,} events", bound=Bound(most=1.1),
                ),
            ]  # fmt: skip
        for what, asked in (
            ("the newest 50 of any kind", []),
            ("of a state that nothing is in, by SQL", ["--state", "NOSUCH"]),
            ("of a name that nothing has, out of each record", ["--name", "no.such"]),
            ("of a text that is nowhere", ["--text", "no such text"]),
        ):
            spent = [
                stage.ask(
                    "export_child",
                    {"backend": NOWHERE + large, "words": ["search", "--view", "sqlite", "--json", *asked]},
                )["seconds"]
                for _ in range(min(stage.runs, 3))
            ]
            rows.append(Row(what=f"search among {many:,} events: {what}", unit="s", ours=spent))
    return rows


def _filled(url: str, count: int) -> str:
    sink = open_sink(url, StoreOptions())
    sink.open()
    progress = Progress(f"writing {count:,} events", count)
    maker, written = load.Maker(), 0
    while written < count:
        found = [
            Logged(codec.decode(record.value), record.value) for record in load.adjacent(maker, BATCH // load.PER_TASK)
        ]
        sink.write(Batch(fold(found)))
        written += len(found)
        progress(written)
    sink.close()
    progress.end()
    return url
