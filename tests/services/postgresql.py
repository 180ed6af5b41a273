"""PostgreSQL: one that is installed, or Debian's. It refuses to run as root, so where the tests are root it runs as nobody."""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.services import apt, commands, docker, ports, scratch
from tests.services.errors import Missing, ServiceError
from tests.services.native import Process
from tests.services.nobody import NOBODY, as_nobody
from tests.services.server import OneServer

USER = "tests"
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 10.0


class PostgresServer(OneServer):
    """A running server. What was committed is there after ``kill`` and ``restart``."""

    @property
    def url(self) -> str:
        """Of the database that every server has; ``clean_database`` never gives it out."""
        return f"postgresql://{USER}@{ports.HOST}:{self.port}/postgres"

    def clean_database(self) -> str:
        """The URL of a database that nobody else uses."""
        name = f"t{secrets.token_hex(6)}"
        tool = [_tool("createdb"), "--host", ports.HOST, "--port", str(self.port), "--username", USER, name]
        commands.run(tool, START_TIMEOUT_S, "PostgreSQL could not make a database")
        return f"postgresql://{USER}@{ports.HOST}:{self.port}/{name}"


def missing() -> list[Missing]:
    """What this machine lacks."""
    if docker.chosen():
        return [
            Missing("PostgreSQL in a container", "this project has none: use SERVICES=native, or leave its tests out")
        ]
    if _folder() is not None or apt.works():
        return []
    return [Missing("PostgreSQL (initdb is not on PATH)", "install PostgreSQL 13 or newer")]


def install() -> None:
    """Fetch what ``start`` needs."""
    _tool("initdb")


def start() -> PostgresServer:
    """Start a server of its own, which keeps its data over ``kill`` and ``restart``.

    Raises:
        ServiceError: It could not be installed, or did not start; nothing is left running.
    """
    folder = scratch.folder("postgresql")
    data = folder / "data"
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    make = [
        _tool("initdb"),
        "--pgdata",
        str(data),
        "--username",
        USER,
        "--auth",
        "trust",
        "--no-sync",
        "--locale",
        "C.UTF-8",
    ]
    commands.run(as_nobody(make), START_TIMEOUT_S, "PostgreSQL's data folder could not be made")
    (port,) = ports.free(1)
    own = {"listen_addresses": ports.HOST, "port": str(port), "unix_socket_directories": "", "shared_buffers": "64MB"}
    options = [word for name, value in own.items() for word in ("-c", f"{name}={value}")]
    node = Process(
        name="PostgreSQL",
        port=port,
        command=as_nobody([_tool("postgres"), "-D", str(data), *options]),
        log=folder / "server.log",
        ready=functools.partial(_answers, port),
        start_timeout_s=START_TIMEOUT_S,
    )
    node.launch()
    node.wait()
    return PostgresServer(node, folder)


def _answers(port: int) -> bool:
    """Whether it takes connections: it accepts them before it does, and says so, without a driver."""
    ask = [_tool("pg_isready"), "--quiet", "--host", ports.HOST, "--port", str(port)]
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(ask, timeout=ANSWER_TIMEOUT_S, check=False).returncode == 0
    return False


def _tool(name: str) -> str:
    folder = _folder()
    if folder is None:
        apt.install("postgresql")
        folder = _folder()
    if folder is None:
        raise ServiceError("PostgreSQL could not be installed")
    return str(folder / name)


def _folder() -> Path | None:
    """Return where the programs are: Debian keeps the server's off PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None
