"""What a user's worker imports is light: no store's driver, no tool of an operator."""

from __future__ import annotations

import subprocess
import sys

METRICS = ("prometheus_client", "celery_kafka_backend.board", "celery_kafka_backend.monitor")
HEAVY = ("redis", "sqlite3", "elasticsearch", "cassandra", "pymongo", "faust", "rich", *METRICS)
MODULES = ("settings", "codec", "order", "topics", "sinks.registry", "backend", "processors.materializer")
PROGRAM = f"""
import importlib, sys
for module in {MODULES!r}:
    importlib.import_module("celery_kafka_backend." + module)
    print(module, *(name for name in {HEAVY!r} if name in sys.modules), sep="|")
"""


def test_importing_them_loads_no_driver_and_nothing_for_metrics():
    """In a process of its own, one after the other: what stands behind a module, it or one before it loads."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == list(MODULES)
