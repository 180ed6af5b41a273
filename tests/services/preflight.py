"""Everything that this machine lacks, named at once: nobody should learn of it one failed run at a time."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from typing import TYPE_CHECKING

from tests.services import docker, redis
from tests.services.catalogue import SERVICES
from tests.services.errors import Missing

if TYPE_CHECKING:
    from collections.abc import Iterable

PYTHON_AT_LEAST = (3, 10)


def missing(names: Iterable[str]) -> list[Missing]:
    """What has to be installed before the services called ``names`` can be, without repetitions."""
    lacking = _python()
    for name in names:
        lacking += SERVICES[name].missing()
    return list(dict.fromkeys(lacking))


def report(names: Iterable[str]) -> int:
    """Print what is missing, or how the servers will be started; returns the exit code."""
    lacking = missing(names)
    for item in lacking:
        print(f"missing  {item}", file=sys.stderr)
    if lacking:
        return 1
    print(f"python   {platform.python_version()}")
    print(f"servers  {'containers' if docker.chosen() else 'processes of this machine'}; redis: {redis.obtained()}")
    return 0


def _python() -> list[Missing]:
    lacking = []
    if sys.version_info[:2] < PYTHON_AT_LEAST:
        wanted = ".".join(map(str, PYTHON_AT_LEAST))
        lacking.append(
            Missing(
                f"Python {wanted} or later ({sys.executable} is {platform.python_version()})",
                "install one, and say which with `make PYTHON=python3.12 …`",
            )
        )
    if importlib.util.find_spec("ensurepip") is None:
        lacking.append(Missing("Python's venv and ensurepip modules", "apt-get install python3-venv"))
    if shutil.which("git") is None:
        lacking.append(Missing("git (the packaging test asks it for the project's files)", "apt-get install git"))
    return lacking
