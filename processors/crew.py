"""A replay by several processes, each with partitions of its own; what they do comes out as if one did it.

Each is a fresh interpreter, as `supervisor`'s are and for the same reasons, and ends with the one that started it. Here
none is started again: what fails is told, and the replay can be taken up where it was.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from multiprocessing import connection
from typing import TYPE_CHECKING, Final

from celery_kafka_backend.errors import Crashed, PipelineError
from celery_kafka_backend.processors import supervisor
from celery_kafka_backend.processors.hosting import calm, log_to_stderr
from celery_kafka_backend.processors.replay import Replayed, feed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from celery_kafka_backend.processors.plan import Job, Target
    from celery_kafka_backend.settings import Settings

TELL_S: Final = 0.2
"""How often a process says how far it is."""


def feed_all(
    settings: Settings, target: Target, jobs: Sequence[Job], on_progress: Callable[[Replayed], None]
) -> Replayed:
    """Do several jobs at once; return what they did together.

    To be called in the main thread: the kernel ties the children to the thread that makes them.

    Args:
        settings: The user's; must be picklable.
        target: The store.
        jobs: One for each process.
        on_progress: Called now and then with what all have done.

    Raises:
        Crashed: A process was killed.
        PipelineError: What one of them ended with.
    """
    context = multiprocessing.get_context("spawn")
    done: dict[Connection, Replayed] = {}
    running: dict[Connection, SpawnProcess] = {}
    try:
        for number, job in enumerate(jobs, 1):
            here, there = context.Pipe(duplex=False)
            name = f"replay/{number}"
            arguments = (settings, target, job, there)
            process = context.Process(target=supervisor.live, name=name, args=(os.getpid(), name, _work, arguments))
            process.start()
            there.close()
            running[here] = process
            done[here] = Replayed(total=sum(end - start for start, end in job.spans.values()))
        open_ones = set(running)
        while open_ones:
            for one in connection.wait(open_ones):
                assert isinstance(one, connection.Connection)
                if _hear(one, running[one], done):
                    open_ones.discard(one)
            on_progress(sum(done.values(), Replayed()))
    finally:
        for process in running.values():
            process.terminate()
            process.join()
    return sum(done.values(), Replayed())


def _hear(one: Connection, process: SpawnProcess, done: dict[Connection, Replayed]) -> bool:
    """Take what a process says; return whether it has finished."""
    try:
        said = one.recv()
    except EOFError:
        process.join()
        raise Crashed(f"{process.name} ended with {process.exitcode}, before it was done") from None
    if isinstance(said, PipelineError):
        raise said
    done[one], finished = said
    return bool(finished)


def _work(settings: Settings, target: Target, job: Job, tell: Connection) -> None:
    """Be one of them."""
    log_to_stderr("warning")
    calm()
    told = 0.0

    def on_progress(done: Replayed) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_S:
            told = time.monotonic()
            tell.send((done, False))

    try:
        tell.send((feed(settings, target, job, on_progress), True))
    except PipelineError as exc:
        logging.getLogger(__name__).debug("ended by", exc_info=True)
        tell.send(exc)
