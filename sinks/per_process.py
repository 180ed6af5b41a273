"""A connection that no process shares with its children."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from celery_kafka_backend.sinks.contract import View
from celery_kafka_backend.sinks.patience import within

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

Client = TypeVar("Client")


class PerProcess(Generic[Client]):
    """A driver's client: connected by the first thread that asks, shared by all, never used across a fork.

    A child parks what it inherits: closing it there could disturb the parent's server or TLS stream.
    """

    def __init__(self, connect: Callable[[], Client], close: Callable[[Client], None]) -> None:
        self._connect = connect
        self._close = close
        self._opened: Client | None = None
        self._parked: list[Client] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()

    @property
    def client(self) -> Client:
        """This process' client; what connecting raises, it raises."""
        if self._pid != os.getpid():
            self.after_fork()
        client = self._opened
        if client is None:
            with self._lock:
                client = self._opened = self._connect() if self._opened is None else self._opened
        return client

    def after_fork(self) -> None:
        """Park the parent's client, and make a lock that no thread of the parent's holds."""
        self._lock = threading.Lock()
        if self._pid != os.getpid() and self._opened is not None:
            self._parked.append(self._opened)
            self._opened = None
        self._pid = os.getpid()

    def close(self) -> None:
        """Disconnect, unless the client is the parent's; ``client`` connects anew."""
        if self._pid == os.getpid() and self._opened is not None:
            self._close(self._opened)
            self._opened = None


class DriverView(View, Generic[Client]):
    """A view that is read through a driver's client, one per process."""

    _own: PerProcess[Client]

    def after_fork(self) -> None:
        """Leave the parent its client."""
        self._own.after_fork()

    def close(self) -> None:
        """Disconnect; a later read connects anew."""
        self._own.close()

    def within(self, timeout_s: float) -> AbstractContextManager[None]:
        """Bound what this thread waits for the server."""
        return within(timeout_s)
