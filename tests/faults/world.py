"""Everything that a run consists of, and how each part is hurt and healed.

What ends is started again, as a service manager would, unless a fault keeps it down.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from tests.faults import schedule
from tests.services import kafka, native, ports, redis
from tests.services.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.schedule import Fault

ROOT = Path(__file__).parents[2]
READY_S = 180.0
EXIT_S = 90.0
"""What a process may take to end when asked: a worker finishes its tasks, a processor its batch."""
PLACES = {"gevent": 30, "eventlet": 30}
"""Of a worker's pool. Celery's loop for greenlets takes so many late-acknowledged tasks in two seconds, and no more."""
PATIENCE_S = 40.0
"""The longest timeout of a client's ``get``."""
TOPIC_PREFIX = "faults"
COPIES = {"replication_factor": 3, "min_insync_replicas": 2, "partitions": 4, "chord_partitions": 4}


class Exit(NamedTuple):
    """How a process ended when asked to; no code: not within `EXIT_S`."""

    name: str
    code: int | None
    took_s: float


class Service:
    """A process that is kept running.

    Args:
        name: For its log.
        command: What to run.
        world: Where.
        ready: A text of its log.
    """

    def __init__(self, name: str, command: list[str], world: World, ready: str) -> None:
        self.name = name
        self.ready = ready
        self.is_down = False
        """A fault keeps it so."""
        self.is_done = False
        """It has ended as it should, and is not started again."""
        self.starts = 0
        self._command = command
        self._world = world
        self._lives: list[subprocess.Popen[bytes]] = []

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self._lives[-1]

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    @property
    def _log_path(self) -> Path:
        return self._world.folder / f"{self.name}.log"

    def start(self) -> None:
        self.starts += 1
        with self._log_path.open("ab") as output:
            self._lives.append(
                native.popen(
                    self._command, output=output, env=self._world.environment | {"FAULTS_ME": self.name}, cwd=ROOT
                )
            )

    def wait(self) -> None:
        deadline = time.monotonic() + READY_S
        while self.ready not in self.log:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start:\n{self.log[-3000:]}")
            time.sleep(0.05)

    def keep(self) -> None:
        """Start it again if it has ended."""
        if not self.is_down and not self.is_done and self.process.poll() is not None:
            self.start()

    def kill(self) -> None:
        self.is_down = True
        native.end(self.process)

    def behead(self) -> None:
        """Kill its main process alone; its children have to see for themselves."""
        self.is_down = True
        self.process.kill()
        self.process.wait()

    def revive(self) -> None:
        self.is_down = False
        self.start()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def ask_to_end(self) -> float:
        self.is_done = True
        self.process.send_signal(signal.SIGTERM)
        return time.monotonic()

    def ended(self, asked_at: float) -> Exit:
        try:
            code: int | None = self.process.wait(max(asked_at + EXIT_S - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            code = None
            self.signal(signal.SIGABRT)  # each of its processes says in the log where it stands
        return Exit(self.name, code, time.monotonic() - asked_at)

    def end(self) -> None:
        """SIGKILL every life that it has had, with what that left behind."""
        for life in self._lives:
            native.end(life)


class World:
    """The servers and processes of one run.

    Args:
        backend: ``kafka``, or ``redis`` for Celery's own.
        folder: For journals and logs.
        seed: Of the clients' work.
        seconds: How long clients work.
        spool: Whether the workers' host keeps what Kafka does not take.
        pool: The workers'.
    """

    def __init__(
        self, backend: str, folder: Path, seed: int, seconds: float, *, spool: bool = True, pool: str = "prefork"
    ) -> None:
        self.backend = backend
        self.folder = folder
        self.journal = folder / "journal"
        self.journal.mkdir(parents=True, exist_ok=True)
        self.seed = seed
        self.seconds = seconds
        self.spool = folder / "spool" if spool else None
        self.pool = pool
        self.environment: dict[str, str] = {}
        self.services: dict[str, Service] = {}
        self._proxies: dict[str, Proxy] = {}
        self._stack = contextlib.ExitStack()
        self.brokers: list[native.Process] = []
        self.view: redis.RedisServer
        self.queue: redis.RedisServer

    def close(self) -> None:
        """End everything, and throw the servers' data away."""
        self._stack.close()

    # -- starting --------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything but the clients.

        Raises:
            ServiceError: A server is missing, or does not start.
        """
        self.queue = redis.start()
        self._stack.callback(self.queue.stop)
        self.view = redis.start(appendonly=True)
        self._stack.callback(self.view.stop)
        view = f"redis://{ports.HOST}:{self._proxy('redis', self.view.port)}/0"
        conf: dict[str, Any] = {}
        url = view
        if self.backend == "kafka":
            cluster = kafka.start(3, advertise=lambda port: self._proxy(f"broker-{len(self._proxies)}", port))
            self._stack.callback(cluster.stop)
            self.brokers = [node for node in cluster.brokers if isinstance(node, native.Process)]
            self.cluster = cluster
            url = f"kafka://{self.bootstrap}/?view={view}"
            # Histories must not be cut: the checker looks for every event.
            conf["kafka_backend_settings"] = {
                "topic_prefix": TOPIC_PREFIX, "history": {"redis": True}, "history_limit": 0, **COPIES,
                **({"spool": str(self.spool)} if self.spool else {}),
            }  # fmt: skip
        self.environment = {
            "PYTHONFAULTHANDLER": "1",
            "FAULTS_JOURNAL": str(self.journal),
            "FAULTS_BROKER": self.queue.url,
            "FAULTS_BACKEND": url,
            "FAULTS_VIEW": view,
            "FAULTS_CONF": json.dumps(conf),
        }
        self._stack.callback(self._end_all)
        if self.backend == "kafka":
            self._run("pipeline", "init")
            self._add("pipeline", self._celery("pipeline", "run"), "chords: started")
        for name in ("worker-1", "worker-2"):
            self._add(name, self._worker(name, self.pool, PLACES.get(self.pool, 3)), "ready.")
        if self.pool in PLACES:
            # What a killed worker held kombu gives back in its event loop only, which greenlets do without.
            self._add("keeper", [*self._worker("keeper", "prefork", 1), "-Q", "none"], "ready.")
        self._add("watcher", [sys.executable, "-m", "tests.faults.watcher"], "watching")
        for service in self.services.values():
            service.wait()

    def _worker(self, name: str, pool: str, places: int) -> list[str]:
        start = ("worker", "-n", f"{name}@%h", "-P", pool, "-c", str(places))
        return self._celery(*start, "-l", "INFO", "--without-gossip", "--without-mingle")

    def start_clients(self) -> None:
        """Let the work begin."""
        until = time.time() + self.seconds
        for number in (1, 2):
            seed = 1000 * self.seed + number
            arguments = [str(seed), str(until), str(min(PATIENCE_S, self.seconds))]
            self._add(f"client-{number}", [sys.executable, "-m", "tests.faults.client", *arguments], "finished")

    @property
    def bootstrap(self) -> str:
        """The brokers behind their proxies."""
        return ",".join(f"{ports.HOST}:{proxy.port}" for name, proxy in self._proxies.items() if name != "redis")

    def _proxy(self, name: str, port: int) -> int:
        proxy = self._proxies[name] = Proxy(port)
        self._stack.callback(proxy.close)
        return proxy.port

    def _celery(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "tests.faults.app", *arguments]

    def _add(self, name: str, command: list[str], ready: str) -> None:
        self.services[name] = Service(name, command, self, ready)
        self.services[name].start()

    def _run(self, *arguments: str) -> None:
        done = subprocess.run(
            self._celery(*arguments), env={**os.environ, **self.environment}, cwd=ROOT, capture_output=True, text=True,
            timeout=READY_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"pipeline init: {done.stdout}{done.stderr}")

    def _end_all(self) -> None:
        for service in self.services.values():
            service.end()

    # -- hurting and healing ---------------------------------------------------------------------

    def keep(self) -> None:
        """Start again what has ended by itself; a client that has finished, not."""
        for service in self.services.values():
            if service.name.startswith("client") and service.process.poll() == 0:
                service.is_done = True
            service.keep()

    def hurt(self, fault: Fault) -> Callable[[], None] | None:
        """Do it, and return what undoes it; None if there was nobody to be hurt."""
        target, verb = fault.target, fault.verb
        if target == "brokers":
            return _together([self._hurt_server(f"broker-{n}", node, fault) for n, node in enumerate(self.brokers, 1)])
        if target.startswith("broker-"):
            return self._hurt_server(target, self.brokers[int(target[-1]) - 1], fault)
        if target == "redis":
            return self._hurt_server(target, self.view, fault)
        if target in ("materializer", "chords"):
            return self._hurt_pid(self._processor(target), verb)
        if target == "child":
            return self._hurt_pid(self._child(fault.number), verb)
        service = self.services["pipeline" if target == "supervisor" else target]
        if service.is_done or service.is_down or service.process.poll() is not None:
            return None
        if verb == schedule.FREEZE and target == "supervisor":
            return self._hurt_pid(service.process.pid, verb)
        if verb == schedule.FREEZE:
            process = service.process
            service.signal(signal.SIGSTOP)
            return lambda: _thaw_group(process)
        if verb == schedule.BEHEAD or target == "supervisor":
            service.behead()  # the kernel tells the processors
        else:
            service.kill()
        return service.revive

    def _hurt_server(self, name: str, server: native.Process | redis.RedisServer, fault: Fault) -> Callable[[], None]:
        proxy = self._proxies[name]
        if fault.verb == schedule.KILL:
            server.kill()
            return server.launch if isinstance(server, native.Process) else server.restart
        if fault.verb == schedule.FREEZE:
            server.freeze()
            return server.thaw
        if fault.verb == schedule.CUT:
            proxy.cut()
        else:
            proxy.slow(0.02 + 0.0002 * fault.number)
        return proxy.heal

    def _hurt_pid(self, pid: int | None, verb: str) -> Callable[[], None] | None:
        if pid is None:
            return None
        try:
            process = psutil.Process(pid)
            if verb == schedule.KILL:
                process.kill()
                return lambda: None  # its parent starts another
            process.suspend()
        except psutil.NoSuchProcess:
            return None

        def thaw() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

        return thaw

    def _processor(self, which: str) -> int | None:
        """The processor's pid, as the supervisor has said."""
        name = r"redis-\w+/1" if which == "materializer" else "chords"
        pids = [int(pid) for pid in re.findall(rf"{name}: started, pid (\d+)", self.services["pipeline"].log)]
        if not pids or not psutil.pid_exists(pids[-1]):
            return None
        return pids[-1] if psutil.Process(pids[-1]).ppid() == self.services["pipeline"].process.pid else None

    def _child(self, number: int) -> int | None:
        """The pid of a worker's child."""
        children = []
        for name in ("worker-1", "worker-2"):
            with contextlib.suppress(psutil.NoSuchProcess):
                children += [child.pid for child in psutil.Process(self.services[name].process.pid).children()]
        return sorted(children)[number % len(children)] if children else None


def _together(heals: list[Callable[[], None]]) -> Callable[[], None]:
    def heal() -> None:
        for one in heals:
            one()

    return heal


def _thaw_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
