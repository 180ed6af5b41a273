"""A materializer as a process of its own, which says where it is, so that a test can kill it exactly there.

``python -m tests.integration.materializing BOOTSTRAP PREFIX VIEW [HANG_AT]``. The points are in the sink, a wrapper;
the product has no hooks. Lines on stdout::

    consumed N        a batch with N changes is about to be written
    mid-write N       … half of it is
    written N         … all of it is, and nothing of it is committed
    wrote ID ID …     the events of a batch that was written

At ``HANG_AT`` it says so and waits to be killed. The log goes to stderr.
"""

from __future__ import annotations

import logging
import signal
import sys
import time

from celery_kafka_backend import settings as settings_module
from celery_kafka_backend import topics
from celery_kafka_backend.changes import Batch
from celery_kafka_backend.kafka import producer_config
from celery_kafka_backend.processors.deadletters import DeadLetters
from celery_kafka_backend.processors.materializer import Materializer
from celery_kafka_backend.sinks.contract import Sink, StoreOptions
from celery_kafka_backend.sinks.registry import open_sink, open_view

POINTS = ("consumed", "mid-write", "written")


def options(prefix: str) -> StoreOptions:
    return StoreOptions(namespace=prefix, history=True, history_limit=0, options={})


def settings(bootstrap: str, prefix: str, view: str = "memory://none") -> settings_module.Settings:
    return settings_module.parse(f"kafka://{bootstrap}/?view={view}", {"topic_prefix": prefix})


class Announcing(Sink):
    """A sink that tells what happens to it."""

    def __init__(self, inner: Sink, hang_at: str) -> None:
        self.url = inner.url
        self._inner = inner
        self._hang_at = hang_at

    def open(self) -> None:
        self._inner.open()

    def write(self, batch: Batch) -> None:
        if not batch.changes:
            self._inner.write(batch)
            return
        self._at("consumed", batch)
        if self._hang_at == "mid-write":
            half = (len(batch.changes) + 1) // 2
            self._inner.write(Batch(batch.changes[:half]))
            self._at("mid-write", batch)
        self._inner.write(batch)
        self._at("written", batch)
        print("wrote", *(logged.event.id for change in batch.changes for logged in change.history), flush=True)

    def close(self) -> None:
        self._inner.close()

    def _at(self, point: str, batch: Batch) -> None:
        print(point, len(batch.changes), flush=True)
        if point == self._hang_at:
            time.sleep(600)


def main(bootstrap: str, prefix: str, view: str, hang_at: str = "") -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = settings(bootstrap, prefix, view)
    group = topics.group_id(prefix, topics.view_name(view))
    work = Materializer(
        config,
        Announcing(open_sink(view, options(prefix)), hang_at),
        open_view(view, options(prefix)),
        group=group,
        dead_letters=DeadLetters(producer_config(config), topics.dead_letters(prefix), by=group),
    )
    signal.signal(signal.SIGTERM, lambda *_: work.stop())
    work.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
