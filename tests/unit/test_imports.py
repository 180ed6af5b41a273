"""What a user's worker imports is light: no store's driver, no tool of an operator."""

from __future__ import annotations

import subprocess
import sys

import pytest

METRICS = ("prometheus_client", "celery_kafka_backend.board", "celery_kafka_backend.monitor")
HEAVY = ("redis", "sqlite3", "elasticsearch", "cassandra", "pymongo", "faust", "rich", *METRICS)


@pytest.mark.parametrize(
    "module", ["settings", "codec", "order", "topics", "sinks.registry", "backend", "processors.materializer"]
)
def test_importing_it_loads_no_driver_and_nothing_for_metrics(module: str):
    """In a process of its own."""
    program = (
        f"import sys, celery_kafka_backend.{module}\nprint(*sorted(name for name in {HEAVY!r} if name in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
