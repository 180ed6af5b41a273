"""A polling reader: journals every change of every task's document that it sees, until SIGTERM.

It reads through the network as clients do, so that it is cut off with them.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_kafka_backend.sinks.redis_wire import unpack
from tests.faults.journal import Journal, digest

EVERY_S = 0.2
PREFIX = "celery-task-meta-"


def value_of(document: dict[str, Any]) -> str:
    """Return the value that a document shows, as tasks journal it."""
    result = document.get("result")
    if document["status"] == "FAILURE" and isinstance(result, dict) and "exc_type" in result:
        message = result.get("exc_message")
        text = message[0] if isinstance(message, list) and len(message) == 1 else message
        return f"{result['exc_type']}: {text}"
    return digest(result)


class Ids:
    """The ids that clients have written into their journals, as these grow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.all: list[str] = []

    def update(self) -> None:
        for path in self._folder.glob("client-*.jsonl"):
            with path.open("rb") as lines:
                lines.seek(self._read.get(path, 0))
                while (line := lines.readline()).endswith(b"\n"):
                    self._read[path] = lines.tell()
                    entry = json.loads(line)
                    if entry["what"] == "sending":
                        self.all += entry["tasks"]


def main() -> None:
    folder = Path(os.environ["FAULTS_JOURNAL"])
    journal, ids = Journal(folder, "watcher"), Ids(folder)
    store = redis.Redis.from_url(os.environ["FAULTS_VIEW"], socket_timeout=2, retry=Retry(NoBackoff(), 0))
    last: dict[str, tuple[bytes | None, bytes | None]] = {}
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    print("watching", flush=True)
    while not stopping:
        ids.update()
        changed = []
        try:
            keys = [f"{PREFIX}{one}" for one in ids.all]
            # In one command, so that they agree.
            both = store.mget([key for name in keys for key in (name, f"{{{name}}}:k")]) if keys else []
        except (redis.RedisError, OSError):
            both = []
        for task, *pair in zip(ids.all, both[::2], both[1::2], strict=False):
            if last.get(task, (None, None)) == tuple(pair):
                continue
            document, side = last[task] = tuple(pair)
            key, shown = unpack(side)[0] if side else 0, json.loads(document) if document else None
            facts = {"state": shown["status"], "value": value_of(shown)} if shown else {"state": None, "value": ""}
            changed.append(("saw", {"task": task, "key": key, **facts}))
        journal.note_all(changed)
        time.sleep(EVERY_S)


if __name__ == "__main__":
    main()
