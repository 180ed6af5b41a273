"""What a user's worker imports is light: no store's driver, no tool of an operator."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("redis", "sqlite3", "elasticsearch", "cassandra", "pymongo", "faust", "rich")


@pytest.mark.parametrize("module", ["settings", "codec", "order", "topics", "sinks.registry", "backend"])
def test_importing_it_loads_no_driver(module: str):
    """In a process of its own."""
    program = (
        f"import sys, celery_kafka_backend.{module}\nprint(*sorted(name for name in {HEAVY!r} if name in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
