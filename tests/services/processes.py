"""Which processes of this machine are ours (Linux: it reads ``/proc``; elsewhere it finds none)."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import NamedTuple

# multiprocessing's own, one per process that uses it; it ends when we do.
HARMLESS = "multiprocessing.resource_tracker"


class Running(NamedTuple):
    """A live process."""

    pid: int
    parent: int
    command: str


def started_by_us(variable: str, value: str) -> list[Running]:
    """Every process that we started; see `started_by`."""
    return started_by(os.getpid(), variable, value)


def started_by(ancestor: int, variable: str, value: str) -> list[Running]:
    """The descendants of a process, and every process that was started with ``variable=value`` in its environment.

    Both, for an orphan is no descendant any more, and a child that was forked without ``exec`` shows the environment
    that the ancestor was started with.
    """
    table = {process.pid: process for process in _all()}
    return [
        process
        for process in table.values()
        if process.pid not in (os.getpid(), ancestor)
        and HARMLESS not in process.command
        and (_descends(process, ancestor, table) or _was_given(process.pid, f"{variable}={value}"))
    ]


def kill(process: Running) -> None:
    """SIGKILL it; harmless when it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def _all() -> list[Running]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked
            # After the name, which may hold spaces and parentheses: "state ppid …".
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if state != "Z":
                found.append(Running(int(folder.name), int(parent), command))
    return found


def _descends(process: Running, ancestor: int, table: dict[int, Running]) -> bool:
    seen = process
    while seen.parent != ancestor:
        if seen.parent not in table:
            return False
        seen = table[seen.parent]
    return True


def _was_given(pid: int, entry: str) -> bool:
    try:
        return entry.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or ended
        return False
