"""A server as a process of this machine, tied to ours: it cannot outlive the test run, not even after kill -9."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tests.services.errors import ServiceError
from tests.services.node import wait_until_ready

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LEASH = Path(__file__).with_name("leash.py")
LOG_TAIL_CHARS = 3000


@functools.cache
def _spawner() -> concurrent.futures.ThreadPoolExecutor:
    """The thread that starts every server.

    The kernel's "parent died" means the *thread* that forked. A server restarted by a test's short-lived thread would
    die with that thread; this one lives as long as the process.
    """
    return concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


def popen(
    command: Sequence[str],
    *,
    output: IO[bytes] | int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``command`` in its own process group, to be killed by the kernel when this process ends, however it ends.

    Also for the workers and processors of a test. ``output`` takes stdout and stderr; ``env`` is added to ours.
    """
    return (
        _spawner()
        .submit(
            subprocess.Popen,
            [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
        .result()
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the whole group of a process that ``popen`` started, and reap it; harmless when it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Process:
    """A ``Node`` that is a local process.

    ``stop`` is a SIGKILL too: the data are thrown away, and three brokers that say goodbye wait for one another.
    """

    def __init__(
        self,
        *,
        name: str,
        port: int,
        command: Sequence[str],
        log: Path,
        ready: Callable[[], bool],
        start_timeout_s: float,
    ) -> None:
        self.name = name
        self.port = port
        self.log = log
        self._command = command
        self._ready = ready
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """As ``Node.pid``."""
        return self._running().pid

    def launch(self) -> None:
        """Start it, without waiting: the brokers of a cluster answer only once they see each other."""
        with self.log.open("ab") as output:
            self._process = popen(self._command, output=output, cwd=self.log.parent)

    def wait(self) -> None:
        """As ``Node.wait``; the error has the last words of its log."""
        try:
            wait_until_ready(self.name, self._ready, lambda: self._running().poll() is None, self._start_timeout_s)
        except ServiceError as error:
            self.stop()
            tail = self.log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
            raise ServiceError(f"{error}; its log ends:\n{tail}") from error

    def kill(self) -> None:
        """As ``Node.kill``."""
        end(self._running())

    def freeze(self) -> None:
        """As ``Node.freeze``."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """As ``Node.thaw``."""
        os.killpg(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """As ``Node.restart``."""
        self.kill()
        self.launch()
        self.wait()

    def stop(self) -> None:
        """As ``Node.stop``."""
        if self._process is not None:
            end(self._process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServiceError(f"{self.name} was never started")
        return self._process
