"""The benches' app, with its producer in this process or, if ``BENCH_SOCKET`` is set, in the publisher process."""

from __future__ import annotations

import os
from typing import Any

from celery import signals

from benchmarks.celery_app import app
from benchmarks.publisher_process import SocketPublisher
from celery_kafka_backend.producer.courier import Courier

__all__ = ["app"]


@signals.worker_init.connect
def choose(**_: Any) -> None:
    path = os.environ.get("BENCH_SOCKET")
    if path:
        recorder = app.backend.recorder
        recorder.publisher = SocketPublisher(recorder.settings, path)
        recorder.courier = Courier(recorder.publisher)
