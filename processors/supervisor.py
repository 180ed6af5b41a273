"""The supervisor: runs processors as processes, restarts what dies, and takes them along when it ends.

A processor is a function that works until SIGTERM. Each runs in a fresh interpreter (spawn): a
forked one would inherit librdkafka's handles without their threads. So the function and its
arguments must be picklable, and importable there.

* SIGTERM or SIGINT here: every child gets one SIGTERM, has `Supervisor.grace_s` to finish, then is
  killed. Children ignore SIGINT: Ctrl-C in a terminal reaches the whole process group, and must
  not arrive as a second signal.
* A child that ends by itself is restarted after a growing pause; after ``crashes`` ends within
  ``window_s`` all are stopped, with `GAVE_UP`, unless it is one without which the others can do:
  that one is started again every ``refused_s``. One that ends with `MISCONFIGURED` stops all at once:
  it would end the same way, and somebody is there to see it. Unless it has worked for ``window_s``
  before: then it is a store whose password was changed, or the like, and what other views show must
  not depend on that. It is started again every ``refused_s``, as long as another one runs.
* Should this process die without a word (kill -9), its children get a SIGTERM from the kernel, or
  elsewhere than on Linux notice within a second that they are orphans; if they cannot finish
  within 30 s they end anyhow.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from celery_kafka_backend.errors import PipelineError, SettingsError
from celery_kafka_backend.processors.backoff import backoff_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.context import SpawnProcess

logger = logging.getLogger(__name__)

STOPPED: Final = 0
"""Exit code: stopped as asked."""
KILLED: Final = 75
"""… but some child did not finish within the grace and was killed; its last batch will be repeated."""
GAVE_UP: Final = 70
"""Exit code: a processor kept dying."""
MISCONFIGURED: Final = 78
"""Exit code of a child, and then of all: a setting is wrong. The numbers are those of sysexits.h."""

ORPHAN_GRACE_S: Final = 30.0
TICK_S: Final = 0.2
_PR_SET_PDEATHSIG: Final = 1


class ProcessSpec(NamedTuple):
    """A processor to run.

    Attributes:
        name: For logs; unique.
        target: Works until SIGTERM. Importable and picklable.
        args: Its arguments, picklable.
        vital: Whether all are stopped if it keeps dying.
    """

    name: str
    target: Callable[..., object]
    args: tuple[Any, ...] = ()
    vital: bool = True


class _Child:
    """One spec, and the process that runs it at the moment."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.process: SpawnProcess | None = None
        self.start_at = 0.0
        """When it is to start, or has started."""
        self.ends: list[float] = []
        self.has_worked = False


class Supervisor:
    """Keeps processes running.

    Args:
        specs: What to run.
        grace_s: How long a child may take to finish.
        crashes: How many ends within the window are too many.
        window_s: Length of the window, seconds; who runs for so long has worked.
        refused_s: Pause before one is started again whose settings were right once, or that is not vital and keeps dying.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        grace_s: float = 40.0,
        crashes: int = 5,
        window_s: float = 60.0,
        refused_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.grace_s = grace_s
        self._children = [_Child(spec) for spec in specs]
        self._crashes = crashes
        self._window_s = window_s
        self._refused_s = refused_s
        self._clock = clock
        self._context = multiprocessing.get_context("spawn")
        self._stopping = False

    def stop(self) -> None:
        """Ask `run` to stop everything. Safe from a signal handler: it takes no lock."""
        self._stopping = True

    def run(self) -> int:
        """Run until SIGTERM, SIGINT, `stop`, or until a processor cannot be kept running.

        To be called in the main thread: the kernel ties the children to the thread that makes them.

        Returns:
            An exit code: `STOPPED`, `KILLED`, `GAVE_UP` or `MISCONFIGURED`.
        """
        previous = {n: signal.signal(n, lambda *_: self.stop()) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            failure = self._watch()
            all_finished = self._stop_all()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return failure or (STOPPED if all_finished else KILLED)

    def _watch(self) -> int:
        """Start, wait, restart; return why it must end, 0 if it was asked to."""
        while not self._stopping:
            for child in self._children:
                if child.process is None and self._clock() >= child.start_at:
                    self._start(child)
            running = [child.process.sentinel for child in self._children if child.process is not None]
            # An empty wait would not wait.
            if not running:
                time.sleep(TICK_S)
                continue
            connection.wait(running, timeout=TICK_S)
            for child in self._children:
                if child.process is not None and not child.process.is_alive():
                    failure = self._ended(child, child.process)
                    if failure:
                        return failure
        return 0

    def _start(self, child: _Child) -> None:
        spec = child.spec
        child.start_at = self._clock()
        child.process = self._context.Process(
            target=live, name=spec.name, args=(os.getpid(), spec.name, spec.target, spec.args)
        )
        child.process.start()
        logger.info("%s: started, pid %d", spec.name, child.process.pid)

    def _ended(self, child: _Child, process: SpawnProcess) -> int:
        code = process.exitcode
        process.close()
        child.process = None
        if self._stopping:
            return 0
        name = child.spec.name
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        now = self._clock()
        child.has_worked = child.has_worked or now - child.start_at >= self._window_s
        if code == MISCONFIGURED:
            if not child.has_worked or all(each.process is None for each in self._children):
                logger.error("%s: ended %s: a setting is wrong, see above; stopping everything", name, how)
                return MISCONFIGURED
            logger.error(
                "%s: ended %s: a setting is no longer right, see above; the others go on, and it is tried again in %g s",
                name, how, self._refused_s,
            )  # fmt: skip
            child.start_at = now + self._refused_s
            return 0
        child.ends = [end for end in child.ends if now - end < self._window_s] + [now]
        delay = backoff_s(len(child.ends), random.random)
        if len(child.ends) >= self._crashes:
            logger.error(
                "%s: ended %s, %d times within %g s; %s",
                name, how, len(child.ends), self._window_s,
                "giving up and stopping everything" if child.spec.vital else "the others go on without it",
            )  # fmt: skip
            if child.spec.vital:
                return GAVE_UP
            delay = self._refused_s
        child.start_at = now + delay
        logger.warning("%s: ended %s; starting it again in %.1f s", name, how, delay)
        return 0

    def _stop_all(self) -> bool:
        """Ask all to stop, wait, kill the rest; return whether all finished by themselves."""
        living = [child for child in self._children if child.process is not None]
        for child in living:
            assert child.process is not None
            child.process.terminate()
        deadline = self._clock() + self.grace_s
        finished = True
        for child in living:
            process = child.process
            assert process is not None
            process.join(max(deadline - self._clock(), 0))
            if process.is_alive():
                finished = False
                logger.error("%s: did not stop within %g s; killed", child.spec.name, self.grace_s)
                process.kill()
                process.join()
            process.close()
            child.process = None
        return finished


def live(parent: int, name: str, target: Callable[..., object], args: tuple[Any, ...]) -> None:
    """Be a child: tied to the parent, deaf to Ctrl-C, with an exit code that says what is wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    threading.Thread(target=_mind_parent, args=(parent,), name="orphan-check", daemon=True).start()
    try:
        target(*args)
    except SettingsError as exc:
        logger.error("%s: %s", name, exc)  # noqa: TRY400 - the message names setting and remedy; no traceback helps
        sys.exit(MISCONFIGURED)
    except PipelineError as exc:
        logger.error("%s: %s", name, exc)  # noqa: TRY400 - as above; it is started again
        sys.exit(1)


def _mind_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(KILLED)
