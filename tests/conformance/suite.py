"""Celery's integration tests, out of its source distribution, of the very version that is installed."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from tests.services import cache, commands

VERSION = "5.7.0"
SHA256 = "6a5dfcf6662287204f009a02002b9e66c83d4105e47ebabdc7079108772fc6f0"
COLLECTED = 409
FOLDER = Path("t/integration")


def fetched() -> Path:
    """The folder of the cache that holds the tests, and no Celery: that would shadow the installed one."""
    return cache.installed(f"celery-tests-{VERSION}-{SHA256[:8]}", _fetch)


def _fetch(into: Path) -> None:
    name = f"celery-{VERSION}"
    archive = commands.pip_download(f"celery=={VERSION}", into, "--quiet", "--no-binary", ":all:", sha256=SHA256)
    with tarfile.open(archive) as opened:
        wanted = [
            m for m in opened.getmembers() if m.name == f"{name}/pyproject.toml" or m.name.startswith(f"{name}/t/")
        ]
        opened.extractall(into, members=wanted, filter="data")
    for one in (into / name).iterdir():
        one.rename(into / one.name)
    (into / name).rmdir()
    archive.unlink()


def copied(to: Path) -> Path:
    """A copy of the tests to run in: they read their settings from a file among them."""
    return Path(shutil.copytree(fetched(), to))


def files(folder: Path) -> list[str]:
    """The test files, each to be run in a process of its own, as Celery's CI does."""
    return sorted(path.name for path in (folder / FOLDER).glob("test_*.py"))
