"""The same servers as containers, through ``compose/`` — for machines with a Docker engine.

NOT YET RUN: it was written where no engine exists. What was checked is that the compose files are valid, and that
their Kafka settings start the very same Kafka outside of a container. ``SERVICES=native`` avoids this module.

Unlike a native server, a container outlives a test run that is killed with SIGKILL; its project is named
``ckb-test-…``, to be removed with ``docker compose -p NAME down -v``.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.services import ports
from tests.services.errors import Missing, ServiceError
from tests.services.kafka_wire import live_brokers
from tests.services.node import wait_until_ready

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

COMPOSE = Path(__file__).resolve().parents[2] / "compose"
ONE = COMPOSE / "docker-compose.yml"
THREE_BROKERS = COMPOSE / "three-brokers.yml"
INFO_TIMEOUT_S = 5
COMMAND_TIMEOUT_S = 120
PULL_TIMEOUT_S = 900
START_TIMEOUT_S = 120.0
CHOICES = ("auto", "native", "docker")


@functools.cache
def chosen() -> bool:
    """Whether ``SERVICES`` (``auto``, ``native`` or ``docker``) says containers; ``auto`` asks for an engine, once.

    Raises:
        ServiceError: It says something else.
    """
    choice = os.environ.get("SERVICES") or "auto"
    if choice not in CHOICES:
        raise ServiceError(f"SERVICES={choice}: expected one of {', '.join(CHOICES)}")
    return choice == "docker" or (choice == "auto" and _engine_answers() and _compose_command() is not None)


def missing() -> list[Missing]:
    """What a machine lacks on which containers were asked for."""
    lacking = []
    if not _engine_answers():
        lacking.append(Missing("a Docker engine (`docker info` fails)", "start it, or use SERVICES=native"))
    if _compose_command() is None:
        lacking.append(
            Missing("Docker Compose", "install the compose plugin or docker-compose, or use SERVICES=native")
        )
    return lacking


def pull(service: str) -> None:
    """Fetch the image of a service of ``docker-compose.yml``."""
    Project(ONE, {}).compose("pull", service, timeout_s=PULL_TIMEOUT_S)


def kafka(brokers: int) -> list[Container]:
    """Start one broker or three, without waiting for them."""
    numbers = ports.free(brokers)
    if brokers == 1:
        project, services = Project(ONE, {"CKB_KAFKA_PORT": str(numbers[0])}), ["kafka"]
    else:
        settings = {f"CKB_KAFKA_{node_id}_PORT": str(port) for node_id, port in enumerate(numbers, start=1)}
        project, services = Project(THREE_BROKERS, settings), [f"kafka-{i}" for i in range(1, brokers + 1)]
    project.compose("up", "--detach", *services, timeout_s=PULL_TIMEOUT_S)
    return [
        Container(project, service, port, functools.partial(_sees_itself, node_id, port))
        for node_id, (service, port) in enumerate(zip(services, numbers, strict=True), start=1)
    ]


def single(service: str, *, ready: Callable[[int], bool], **settings: str) -> Container:
    """Start a service of which one container is enough, without waiting for it.

    Args:
        service: Its name in ``docker-compose.yml``.
        ready: Asked with its port, until it is true.
        settings: What the compose file takes from the environment, as ``appendonly="yes"`` for ``CKB_REDIS_APPENDONLY``.
    """
    (port,) = ports.free(1)
    given = {"port": str(port), **settings}
    project = Project(ONE, {f"CKB_{service}_{name}".upper(): value for name, value in given.items()})
    project.compose("up", "--detach", service, timeout_s=PULL_TIMEOUT_S)
    return Container(project, service, port, functools.partial(ready, port))


class Project:
    """One compose project: its containers, network and volumes have a name that no other run has."""

    def __init__(self, file: Path, settings: Mapping[str, str]) -> None:
        self.name = f"ckb-test-{secrets.token_hex(4)}"
        self._file = file
        self._settings = settings

    def compose(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a compose command on this project and return what it printed."""
        command = _compose_command() or ["docker", "compose"]
        return _run([*command, "-p", self.name, "-f", str(self._file), *arguments], timeout_s, self._settings)


class Container:
    """A ``Node`` that is a container."""

    def __init__(self, project: Project, service: str, port: int, ready: Callable[[], bool]) -> None:
        self.port = port
        self._project = project
        self._service = service
        self._ready = ready

    @property
    def pid(self) -> int:
        """As ``Node.pid``."""
        return int(self._inspect("{{.State.Pid}}"))

    def wait(self) -> None:
        """As ``Node.wait``; the error has the last words of its log."""
        try:
            wait_until_ready(self._service, self._ready, self._is_running, START_TIMEOUT_S)
        except ServiceError as error:
            said = self._project.compose("logs", "--no-color", "--tail=40", self._service)
            self.stop()
            raise ServiceError(f"{error}; its log ends:\n{said}") from error

    def kill(self) -> None:
        """As ``Node.kill``."""
        if self._is_running():
            self._project.compose("kill", self._service)

    def freeze(self) -> None:
        """As ``Node.freeze``."""
        self._project.compose("pause", self._service)

    def thaw(self) -> None:
        """As ``Node.thaw``."""
        self._project.compose("unpause", self._service)

    def restart(self) -> None:
        """As ``Node.restart``."""
        self.kill()
        self._project.compose("start", self._service)
        self.wait()

    def stop(self) -> None:
        """Remove it, and the whole project once this was its last container."""
        self._project.compose("rm", "--stop", "--force", "-v", self._service)
        if not self._project.compose("ps", "-q").strip():
            self._project.compose("down", "--volumes")

    def _is_running(self) -> bool:
        return self._inspect("{{.State.Running}}") == "true"

    def _inspect(self, template: str) -> str:
        container_id = self._project.compose("ps", "-q", self._service).strip()
        return _run(["docker", "inspect", "--format", template, container_id], COMMAND_TIMEOUT_S, {}).strip()


def _sees_itself(node_id: int, port: int) -> bool:
    return node_id in live_brokers(port)


@functools.cache
def _engine_answers() -> bool:
    try:
        return (
            subprocess.run(
                ["docker", "info"], stdin=subprocess.DEVNULL, capture_output=True, timeout=INFO_TIMEOUT_S, check=False
            ).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


@functools.cache
def _compose_command() -> list[str] | None:
    """Compose as a plugin of Docker, else the older program of its own."""
    try:
        _run(["docker", "compose", "version"], COMMAND_TIMEOUT_S, {})
    except ServiceError:
        return ["docker-compose"] if shutil.which("docker-compose") else None
    return ["docker", "compose"]


def _run(command: Sequence[str], timeout_s: float, settings: Mapping[str, str]) -> str:
    try:
        return subprocess.run(
            command,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        ).stdout
    except subprocess.CalledProcessError as error:
        raise ServiceError(f"{' '.join(command)} failed:\n{error.stderr}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"{' '.join(command)}: {error}") from error
