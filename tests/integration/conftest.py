"""A fleet as users run it: a prefork worker and `pipeline run`, each a process of its own, on real servers."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from celery_kafka_backend import codec
from tests.integration import locked_kafka
from tests.patience import PATIENCE_S, until
from tests.services import native
from tests.services.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from celery_kafka_backend.events import Event
    from tests.integration.locked_kafka import LockedKafka

HERE = Path(__file__).parent


class Fleet:
    """An app on its own topics and databases, and the processes that serve it; they end with the ``with`` block."""

    def __init__(
        self, kafka: str, broker: str, view: str, folder: Path, settings: dict[str, Any], conf: dict[str, Any]
    ):
        self.folder = folder
        self.view = view
        self.environment = {
            **os.environ,
            "FLEET_BROKER": broker,
            "FLEET_BACKEND": f"kafka://{kafka}/?view={view}",
            "FLEET_SETTINGS": json.dumps(
                {
                    "topic_prefix": f"f{secrets.token_hex(4)}",
                    "replication_factor": 1,
                    "min_insync_replicas": 1,
                    "partitions": 4,
                    "chord_partitions": 4,
                    "history": {"redis": True},
                    "publish_timeout_s": 60,
                    **settings,
                }
            ),
            "FLEET_CONF": json.dumps({"result_extended": True, **conf}),
            "PYTHONPATH": str(HERE),
            "PYTHONFAULTHANDLER": "1",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._app: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def celery(self, *arguments: str) -> list[str]:
        """The command line of `celery -A fleet_app …`."""
        return [sys.executable, "-m", "celery", "-A", "fleet_app", *arguments]

    def log(self, name: str) -> str:
        """What a process has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def start(self, name: str, *arguments: str, ready: str) -> None:
        """Start a process and wait for a line of its log."""
        output = (self.folder / f"{name}.log").open("wb")
        self.processes[name] = native.popen(self.celery(*arguments), output=output, env=self.environment)
        output.close()
        self.until(name, ready)

    def until(self, name: str, text: str) -> None:
        """Wait for a text in a process's log."""

        def said() -> bool:
            ended = self.processes[name].poll()
            if found := text in self.log(name):
                return found
            assert ended is None, f"{name} ended with {ended}:\n{self.log(name)[-3000:]}"
            return False

        until(said, lambda: f"{name} says {text!r}:\n{self.log(name)[-3000:]}")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `celery -A fleet_app …` to its end; it may fail, but not with a traceback."""
        done = subprocess.run(
            self.celery(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def init(self) -> None:
        """Create the topics."""
        done = self.run("pipeline", "init")
        assert done.returncode == 0, done.stdout + done.stderr

    def serve(self, *worker: str) -> None:
        """Create the topics, and start the processors and a worker with these arguments."""
        self.init()
        self.pipeline()
        self.worker(*worker)

    def worker(self, *arguments: str, name: str = "worker") -> None:
        """Start a prefork worker."""
        self.start(
            name,
            "worker",
            "-n",
            f"{name}@%h",
            "-c",
            "2",
            "-l",
            "INFO",
            "--without-gossip",
            "--without-mingle",
            *arguments,
            ready="ready.",
        )

    @staticmethod
    def node(name: str) -> str:
        """Node name of the worker of that name."""
        return f"{name}@{socket.gethostname()}"

    def pipeline(self) -> None:
        """Start the processors."""
        self.start("pipeline", "pipeline", "run", ready="assigned")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Freeze the processors meanwhile."""
        root = psutil.Process(self.processes["pipeline"].pid)
        tree = [root, *root.children(recursive=True)]
        for process in tree:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in tree:
                process.send_signal(signal.SIGCONT)

    @property
    def app(self) -> Any:
        """The client's app."""
        if self._app is None:
            for name in ("FLEET_BROKER", "FLEET_BACKEND", "FLEET_SETTINGS", "FLEET_CONF"):
                os.environ[name] = self.environment[name]
            sys.path.insert(0, str(HERE))
            try:
                sys.modules.pop("fleet_app", None)
                import fleet_app  # noqa: PLC0415 - reads the environment
            finally:
                sys.path.remove(str(HERE))
            self._app = fleet_app
        return self._app

    def history(self, task_id: str, *wanted: str) -> list[Event]:
        """A task's events in order, once there are those wanted, each as often as named: each process appends for itself."""

        def found() -> list[Event]:
            return [codec.decode(value) for value in self.app.app.backend.reader.history(task_id)]

        def enough() -> list[Event] | None:
            told = found()
            return None if Counter(wanted) - Counter(event.kind for event in told) else told

        if not wanted:
            return found()
        return until(enough, lambda: f"not {wanted}, but {[event.kind for event in found()]}")

    def last(self, task_id: str, kind: str) -> Event:
        """A task's last event of a kind, waited for."""
        return next(event for event in reversed(self.history(task_id, kind)) if event.kind == kind)

    def kinds(self, task_id: str) -> list[str]:
        """What kinds of events there are of a task by now, in order."""
        return [event.kind for event in self.history(task_id)]

    def stop(self) -> None:
        """End every process, the worker first."""
        for name, process in reversed(list(self.processes.items())):
            with contextlib.suppress(Exception):
                native.end(process)
            self.processes.pop(name, None)


@pytest.fixture(scope="session")
def locked() -> Iterator[LockedKafka]:
    """A Kafka that asks who you are and what you may do."""
    try:
        server = locked_kafka.start()
    except ServiceError as error:
        required = os.environ.get("REQUIRE_SERVICES", "").split(",")
        if "all" in required or "kafka" in required:
            pytest.fail(f"kafka is required (REQUIRE_SERVICES): {error}", pytrace=False)
        pytest.skip(f"kafka: {error}")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def fleet(
    kafka: Any, redis_server: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Fleet]:
    """A running fleet for a module; parametrize indirectly with {"settings": …, "conf": …} to change it."""
    more = getattr(request, "param", {})
    with Fleet(
        kafka.bootstrap,
        redis_server.clean_database(),
        redis_server.clean_database(),
        tmp_path_factory.mktemp("fleet"),
        more.get("settings", {}),
        more.get("conf", {}),
    ) as made:
        made.serve()
        yield made
