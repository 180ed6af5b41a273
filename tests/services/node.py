"""One running server, as a test sees it: a process here, a container where there is Docker."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from tests.services.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable


class Node(Protocol):
    """A server that can be hurt and healed. ``tests.services.native`` and ``tests.services.docker`` have one each."""

    @property
    def port(self) -> int:
        """Where clients on this machine connect; the same after ``restart``."""

    @property
    def pid(self) -> int:
        """Its process id on this machine; another one after ``restart``."""

    def wait(self) -> None:
        """Return when it answers; if it does not, stop it and raise ``ServiceError``."""

    def kill(self) -> None:
        """SIGKILL: no goodbye, no flush. Its data stay."""

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""

    def thaw(self) -> None:
        """Undo ``freeze``."""

    def restart(self) -> None:
        """Start it again on its data, killed first if it still runs; returns when it answers."""

    def stop(self) -> None:
        """End it for good. Harmless when it has ended already."""


def wait_until_ready(what: str, ready: Callable[[], bool], alive: Callable[[], bool], timeout_s: float) -> None:
    """Return once ``ready()`` is true.

    Raises:
        ServiceError: It ended, or took longer than ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        if not alive():
            raise ServiceError(f"{what} ended while starting")
        if time.monotonic() > deadline:
            raise ServiceError(f"{what} did not answer within {timeout_s:.0f} s")
        time.sleep(0.05)
