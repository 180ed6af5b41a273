"""Kafka's own container set-up, run without a container on what ``compose/docker-compose.yml`` gives it."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.patience import PATIENCE_S
from tests.services import docker, kafka_wire, native, node, ports
from tests.services.kafka import jars

if TYPE_CHECKING:
    from pathlib import Path

    from tests.services.kafka import KafkaCluster

CLUSTER_ID = "4L6g3nShT-eMCtK--X86sw"
VARIABLE = re.compile(r"\$\{\w+:-(\w+)\}")


@pytest.mark.kafka
@pytest.mark.skipif(docker.chosen(), reason="containers are in use: the other tests run the image itself")
def test_the_settings_in_the_compose_file_start_a_broker(kafka: KafkaCluster, tmp_path: Path) -> None:
    """The image's set-up program merges our mounted file and the environment; ports, names and folders are ours here.

    The fixture only stands for "this machine can run Kafka".
    """
    settings = settings_without_docker(tmp_path)
    port = int(settings["KAFKA_LISTENERS"].partition(",")[0].rpartition(":")[2])
    classpath = ["-cp", f"{jars()}/*"]
    for name in ("default", "final"):
        (tmp_path / name).mkdir()
    subprocess.run(
        [
            *("java", *classpath, "kafka.docker.KafkaDockerWrapper", "setup"),
            *("--default-configs-dir", str(tmp_path / "default")),
            *("--mounted-configs-dir", str(docker.COMPOSE / "kafka")),
            *("--final-configs-dir", str(tmp_path / "final")),
        ],
        env={**os.environ, **settings, "CLUSTER_ID": CLUSTER_ID},
        timeout=PATIENCE_S,
        check=True,
    )
    with (tmp_path / "broker.log").open("wb") as log:
        broker = native.popen(
            ["java", "-Xmx512m", *classpath, "kafka.Kafka", str(tmp_path / "final" / "server.properties")], output=log
        )
    try:
        node.wait_until_ready(
            "Kafka", lambda: kafka_wire.live_brokers(port) == {1}, lambda: broker.poll() is None, timeout_s=PATIENCE_S
        )
    finally:
        native.end(broker)


def settings_without_docker(folder: Path) -> dict[str, str]:
    """Return the container's environment, with this machine's ports, names and folders."""
    given = yaml.safe_load(docker.ONE.read_text())["services"]["kafka"]["environment"]
    text = {key: VARIABLE.sub(r"\1", str(value)) for key, value in given.items()}
    numbers = dict(zip(("9092", "9093", "19092"), map(str, ports.free(3)), strict=True))
    moved = {
        key: re.sub(r":(\d+)\b", lambda found: ":" + numbers[found[1]], value)
        .replace("//:", f"//{ports.HOST}:")
        .replace("kafka:", f"{ports.HOST}:")
        .replace("localhost:", f"{ports.HOST}:")
        for key, value in text.items()
        if key in {"KAFKA_LISTENERS", "KAFKA_ADVERTISED_LISTENERS", "KAFKA_CONTROLLER_QUORUM_VOTERS"}
    }
    return text | moved | {"KAFKA_LOG_DIRS": str(folder / "data")}
