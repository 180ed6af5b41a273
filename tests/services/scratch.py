"""One throw-away folder for the data of every server of this process."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "ckb-services-"


def folder(name: str) -> Path:
    """A new, empty folder for one server's data."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_root()))


@functools.cache
def _root() -> Path:
    _sweep()
    while (root := _locked()) is None:  # another process swept it between its making and its locking
        pass
    root.chmod(0o755)  # a server that must not run as root has to reach its own folder below
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def _locked() -> Path | None:
    made = Path(tempfile.mkdtemp(prefix=PREFIX))
    with contextlib.suppress(FileNotFoundError):
        fcntl.flock(os.open(made, os.O_RDONLY), fcntl.LOCK_EX)  # held, unclosed, for as long as this process lives
    return made if made.exists() else None


def _sweep() -> None:
    """Remove the folders of runs that were killed: those whose lock nobody holds."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            handle = os.open(left, os.O_RDONLY)
        except OSError:  # another user's, or gone by now
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except OSError:  # in use
            pass
        finally:
            os.close(handle)
