"""The journal: what a process knows, written outside the system before anything can happen to it.

One append-only file per process; a line is on the disk when `Journal.note` returns. So a kill loses at most the line
that was being written, and the checker never depends on what it checks.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Journal:
    """Appends to ``<role>-<pid>.jsonl``; a fork gets a file of its own.

    Args:
        folder: Where the files of a run are.
        role: Whose it is.
    """

    def __init__(self, folder: Path, role: str) -> None:
        self._folder = folder
        self._role = role
        self._pid = 0
        self._file = -1
        self._lock = threading.Lock()

    def note(self, what: str, **facts: Any) -> None:
        """Write one line, synced."""
        self.note_all([(what, facts)])

    def note_all(self, lines: list[tuple[str, dict[str, Any]]]) -> None:
        """Write some lines, synced once."""
        if not lines:
            return
        if self._pid != os.getpid():
            path = self._folder / f"{self._role}-{os.getpid()}.jsonl"
            self._lock = threading.Lock()
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._pid = os.getpid()  # at last: for other threads it says that there is a file
        common = {"at": time.time(), "pid": self._pid, "thread": threading.get_ident()}
        text = "".join(json.dumps({"what": what, **common, **facts}) + "\n" for what, facts in lines)
        with self._lock:
            os.write(self._file, text.encode())
            os.fsync(self._file)


def read(folder: Path, role: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of all processes of a role, file by file; a torn last line is left out."""
    for path in sorted(folder.glob(f"{role}-*.jsonl")):
        for line in path.read_text().split("\n")[:-1]:
            yield json.loads(line)


def digest(result: Any) -> str:
    """Return a short name for a result, the same on both sides of JSON."""
    text = json.dumps(result, sort_keys=True)
    return text if len(text) <= 40 else hashlib.sha1(text.encode()).hexdigest()
