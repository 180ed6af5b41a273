"""Where the tests run: Celery's Redis backend, or ours on a real Kafka, or ours on the embedded one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from celery_kafka_backend.embedded import FETCH_WAIT_MS, PARTITIONS, EmbeddedKafka
from tests.conformance import suite
from tests.services import kafka, native, redis
from tests.services.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterator

PEER = "redis"
STANDS = (PEER, "embedded", "kafka")
REPO = Path(__file__).parents[2]
READY_S = 90.0


class Stand:
    """A folder with Celery's tests, and what they need in their environment."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.folder = folder
        self.environment = environment

    @property
    def url(self) -> str:
        """The result backend under test."""
        return self.environment["TEST_BACKEND"]


@contextlib.contextmanager
def standing(name: str, scratch: Path) -> Iterator[Stand]:
    """Start a stand's servers; end them, and all that they held, on the way out."""
    folder = suite.copied(scratch / "suite")
    with contextlib.ExitStack() as running:
        server = redis.start()
        running.callback(server.stop)
        environment = {
            "TEST_BROKER": server.url,
            "TEST_BACKEND": server.url,
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(server.port),
            "PYTHONPATH": f"{folder}{os.pathsep}{REPO}",
            "WORKER_LOGLEVEL": "INFO",  # as in Celery's CI: some tests read the worker's log
            # Some tests run `celery` and `python` by name.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        stand = Stand(name, folder, environment)
        if name != PEER:
            settings = {
                "topic_prefix": f"c{secrets.token_hex(4)}",
                "partitions": PARTITIONS,
                "chord_partitions": PARTITIONS,
            }
            if name == "kafka":
                cluster = kafka.start()
                running.callback(cluster.stop)
                bootstrap = cluster.bootstrap
            else:
                bootstrap = running.enter_context(EmbeddedKafka()).bootstrap_servers
                settings["consumer"] = {"fetch.wait.max.ms": FETCH_WAIT_MS}
            settings |= {"replication_factor": 1, "min_insync_replicas": 1}
            environment["TEST_BACKEND"] = f"kafka://{bootstrap}/?view={server.clean_database()}"
            config = folder / "integration-tests-config.json"
            config.write_text(json.dumps({"kafka_backend_settings": settings}))
            if name == "kafka":
                _init(stand)
            running.enter_context(_processors(stand, scratch / "pipeline.log"))
        yield stand


def _celery(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "celery", "-A", "tests.conformance.proj", "pipeline", *arguments]


def _init(stand: Stand) -> None:
    done = subprocess.run(
        _celery("init"),
        cwd=stand.folder, env={**os.environ, **stand.environment}, capture_output=True, text=True, timeout=READY_S,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise ServiceError(f"pipeline init failed:\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def _processors(stand: Stand, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = native.popen(_celery("run"), output=output, env=stand.environment, cwd=stand.folder)
    deadline = time.monotonic() + READY_S
    while "assigned" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            native.end(process)
            raise ServiceError(f"no processor came up; its log:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)
    try:
        yield
    finally:
        native.end(process)
