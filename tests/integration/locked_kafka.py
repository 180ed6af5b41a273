"""A Kafka that asks who you are and what you may do: for tests of missing rights. Its other listener is an admin's."""

from __future__ import annotations

import functools
import shutil
from typing import TYPE_CHECKING

from tests.services import docker, kafka, ports, scratch
from tests.services.errors import ServiceError
from tests.services.kafka_wire import live_brokers
from tests.services.native import Process

if TYPE_CHECKING:
    from pathlib import Path

USER, PASSWORD = "celery-processor", "hunter2-sasl"
JAAS = "org.apache.kafka.common.security.plain.PlainLoginModule required"


class LockedKafka:
    """``locked`` asks for a password and rights; ``open`` is for whoever may do everything."""

    def __init__(self, node: Process, open_: str, locked: str, folder: Path) -> None:
        self.open = open_
        self.locked = locked
        self._node = node
        self._folder = folder

    def client(self, password: str = PASSWORD) -> dict[str, str]:
        """Options of librdkafka for the locked listener."""
        return {
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": "PLAIN",
            "sasl.username": USER,
            "sasl.password": password,
        }

    def stop(self) -> None:
        """End it and throw its data away."""
        self._node.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def start() -> LockedKafka:
    """Start one.

    Raises:
        ServiceError: It did not start, or Kafka runs in containers, whose files this cannot write.
    """
    if docker.chosen():
        raise ServiceError("a locked Kafka is only started natively")
    libs = kafka.jars()
    folder = scratch.folder("kafka-locked")
    port, controller, locked = ports.free(3)
    config = kafka._write_properties(folder / "1", 1, (port, port, controller), f"1@{ports.HOST}:{controller}", 1)
    with config.open("a") as properties:
        properties.write(
            f"listeners=PLAINTEXT://{ports.HOST}:{port},LOCKED://{ports.HOST}:{locked},CONTROLLER://{ports.HOST}:{controller}\n"
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,LOCKED:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT\n"
            "inter.broker.listener.name=PLAINTEXT\n"
            "listener.name.locked.sasl.enabled.mechanisms=PLAIN\n"
            f'listener.name.locked.plain.sasl.jaas.config={JAAS} user_{USER}="{PASSWORD}";\n'
            "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n"
            "super.users=User:ANONYMOUS\n"
        )
    java = ["java", kafka.HEAP[1], *kafka.JVM, "-cp", f"{libs}/*"]
    kafka._format(java, [config])
    node = Process(
        name="locked Kafka",
        port=port,
        command=[*java, "kafka.Kafka", str(config)],
        log=config.with_name("broker.log"),
        ready=functools.partial(lambda at: 1 in live_brokers(at), port),
        start_timeout_s=kafka.START_TIMEOUT_S,
    )
    node.launch()
    try:
        node.wait()
    except BaseException:
        node.stop()
        raise
    return LockedKafka(node, f"{ports.HOST}:{port}", f"{ports.HOST}:{locked}", folder)
