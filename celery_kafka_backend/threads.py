"""Threads of ours in other people's processes: none of them takes a signal.

A child of a prefork pool that is told to end (``terminate=True``, a time limit) says so through the pool's queue, with
SIGTERM blocked in its main thread, and its parent sends it another one the moment that it has heard. If a thread of
ours took that one, the child died with the queue's lock, and no other child ever ran a task again: seen with transports
that have no event loop (files, SQS), where the children of a pool share one queue.
"""

from __future__ import annotations

import signal
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from kombu.utils.compat import detect_environment

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def start(target: Callable[..., object], name: str, *args: Any) -> threading.Thread:
    """Start a daemon thread, and return it."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    if detect_environment() != "default":  # a greenlet: all of them have one mask
        thread.start()
        return thread
    # Inherited: there is no moment at which the new thread could take one.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread


def within(timeout_s: float, work: Callable[[], T], name: str) -> T:
    """Return what ``work`` does, or raise what it raises, in a thread of its own: a driver may have no bound.

    Raises:
        TimeoutError: It takes longer; it is left to itself.
    """
    found: Future[T] = Future()

    def answer() -> None:
        try:
            found.set_result(work())
        except BaseException as exc:  # noqa: BLE001 - the caller's
            found.set_exception(exc)

    start(answer, name).join(timeout_s)
    if not found.done():
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return found.result()
