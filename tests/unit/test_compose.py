"""The files in ``compose/`` are valid, and say what the native servers do. They start no container."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml

from tests.services import docker, kafka

FILES = [docker.ONE, docker.THREE_BROKERS]


def services(file) -> dict[str, dict]:
    """Return the services of a compose file, by name."""
    return yaml.safe_load(file.read_text())["services"]


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_docker_compose_accepts_the_file(file) -> None:
    """Also the old program that Debian ships; this needs no engine."""
    checked = subprocess.run(
        ["docker-compose", "-f", str(file), "config", "--quiet"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("file", "brokers"), [(docker.ONE, 1), (docker.THREE_BROKERS, 3)], ids=["one", "three"])
def test_containers_and_native_brokers_keep_as_many_copies(file, brokers) -> None:
    """The version too: what is tested natively is what the containers run."""
    found = [service for service in services(file).values() if service.get("image", "").startswith("apache/kafka")]
    assert len(found) == brokers
    expected = {f"KAFKA_{key.upper().replace('.', '_')}": value for key, value in kafka.replication(brokers).items()}
    for service in found:
        assert service["image"] == f"apache/kafka:{kafka.VERSION}"
        assert expected.items() <= service["environment"].items()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_mounted_file_exists(file) -> None:
    """Docker would make an empty folder in place of a missing file, and say nothing."""
    mounted = [
        volume.split(":")[0]
        for service in services(file).values()
        for volume in service.get("volumes", ())
        if volume[0] == "."
    ]
    assert mounted
    for name in mounted:
        assert (file.parent / name).exists()
