"""A server of one node, as a test sees it: its data are its own, and go with it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tests.services.node import Node


class OneServer:
    """A running server. What of its data survives ``kill`` is its store's to say."""

    def __init__(self, node: Node, folder: Path | None = None) -> None:
        self._node = node
        self._folder = folder

    @property
    def port(self) -> int:
        """Where it listens on the loopback interface; the same after ``restart``."""
        return self._node.port

    @property
    def pid(self) -> int:
        """Its process id; another one after ``restart``."""
        return self._node.pid

    def kill(self) -> None:
        """SIGKILL."""
        self._node.kill()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        self._node.freeze()

    def thaw(self) -> None:
        """Undo ``freeze``."""
        self._node.thaw()

    def restart(self) -> None:
        """Start it again on the same port and folder, killed first if it still runs."""
        self._node.restart()

    def stop(self) -> None:
        """End it and throw its data away."""
        self._node.stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
