"""Where downloads live (outside of the checkout), installed once however many runs want them at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def root() -> Path:
    """``CKB_CACHE``, else ``celery-kafka-backend`` in the user's cache folder; created if need be."""
    chosen = os.environ.get("CKB_CACHE")
    if chosen:
        path = Path(chosen)
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "celery-kafka-backend"
    path = path.absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the machine-wide lock of this cache called ``name``; the kernel frees it if we die."""
    with (root() / f"{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def installed(name: str, build: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, made by ``build(folder)`` if nobody has yet.

    ``build`` works in a temporary folder that is renamed when it succeeds: a folder that exists is complete, even
    after a kill -9. Put the version into the name; nothing is ever updated in place.
    """
    target = root() / name
    if target.is_dir():
        return target
    with locked(name):
        if not target.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root()))
            try:
                build(unfinished)
                unfinished.chmod(0o755)  # mkdtemp's 0700 would hide it from a server that runs as another user
                unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return target
