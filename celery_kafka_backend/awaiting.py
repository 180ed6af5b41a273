"""Awaiting results in asyncio: for each backend one thread hears for all, as long as somebody waits."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from celery.result import assert_will_not_block

from celery_kafka_backend import threads
from celery_kafka_backend.claims import ClaimedMeta

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from celery_kafka_backend.waiting import ResultConsumer


async def awaited(result: AsyncResult) -> Any:
    """Wait for a result; return or raise what its ``get()`` would."""
    if result.ignored:
        return None
    assert_will_not_block()
    if result._cache is None:  # noqa: SLF001 - as Celery's own `get` asks
        await _fulfilled(result)
    if result.parent is not None or isinstance(result._cache, ClaimedMeta):  # noqa: SLF001
        return await asyncio.to_thread(result.get)  # asks the view about the parents, or an object store
    return result.get()


async def _fulfilled(result: AsyncResult) -> None:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    waiter = _Waiter(loop, done)
    listener = _listener_of(result.backend.result_consumer)
    result.then(waiter.wake)
    listener.add(waiter)
    try:
        await done
    finally:
        listener.remove(waiter)
        if result._cache is None:  # noqa: SLF001 - given up
            result.backend.remove_pending_result(result)


class _Waiter:
    """A coroutine's end of the thread that hears."""

    def __init__(self, loop: asyncio.AbstractEventLoop, done: asyncio.Future[None]) -> None:
        self._loop = loop
        self._done = done

    def wake(self, *_: Any) -> None:
        self._call(lambda: self._done.set_result(None))

    def fail(self, exc: BaseException) -> None:
        self._call(lambda: self._done.set_exception(exc))

    def _call(self, tell: Any) -> None:
        def unless_done() -> None:
            if not self._done.done():
                tell()

        with suppress(RuntimeError):  # its loop is closed: nobody waits
            self._loop.call_soon_threadsafe(unless_done)


class _Listener:
    """Hears in a thread of its own; looks at what is there already in another, for the first one is waiting meanwhile."""

    def __init__(self, consumer: ResultConsumer) -> None:
        self.pid = os.getpid()
        self._consumer = consumer
        self._lock = threading.Lock()
        self._waiters: set[_Waiter] = set()
        self._hearing = False
        self._looks = ThreadPoolExecutor(1, "celery-kafka-look")

    def add(self, waiter: _Waiter) -> None:
        with self._lock:
            self._waiters.add(waiter)
            if not self._hearing:
                self._hearing = True
                threads.start(self._hear, "celery-kafka-hear")
        self._looks.submit(self._guarded, self._consumer.look)

    def remove(self, waiter: _Waiter) -> None:
        with self._lock:
            self._waiters.discard(waiter)

    def _hear(self) -> None:
        while True:
            with self._lock:
                if not self._waiters:
                    self._hearing = False
                    return
            self._guarded(self._consumer.drain_events)

    def _guarded(self, hear: Any) -> None:
        """A document that cannot be read is an exception of whoever hears it; here that is nobody, so it is everybody's."""
        try:
            hear()
        except Exception as exc:  # noqa: BLE001 - raised by `await`
            with self._lock:
                waiters = list(self._waiters)
            for waiter in waiters:
                waiter.fail(exc)


def _listener_of(consumer: ResultConsumer) -> _Listener:
    found: _Listener | None = consumer.listener
    if found is None or found.pid != os.getpid():
        found = consumer.listener = _Listener(consumer)
    return found
