"""Apache Kafka in KRaft mode: one node, or three that are each broker and controller, for tests that kill one."""

from __future__ import annotations

import base64
import concurrent.futures
import functools
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from tests.services import cache, commands, docker, maven, ports, scratch
from tests.services.errors import Missing, ServiceError
from tests.services.kafka_wire import live_brokers
from tests.services.native import Process
from tests.services.node import Node, wait_until_ready

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VERSION = "4.1.0"
JARS = (f"org.apache.kafka:kafka_2.13:{VERSION}", f"org.apache.kafka:kafka-tools:{VERSION}")
BASE_PROPERTIES = docker.COMPOSE / "kafka" / "server.properties"
LOGGING = Path(__file__).with_name("log4j2.properties")
START_TIMEOUT_S = 120.0
FORMAT_TIMEOUT_S = 120.0

# A small heap: a broker of the tests lives for minutes, on a machine that has others.
JVM = ("-Xms128m", "-XX:+UseSerialGC", f"-Dlog4j2.configurationFile={LOGGING}")
HEAP = {1: "-Xmx1g", 3: "-Xmx512m"}


class KafkaCluster:
    """Running brokers; ``brokers[i]`` has the node id ``i + 1``."""

    def __init__(self, brokers: Sequence[Node], folder: Path | None = None) -> None:
        self.brokers = list(brokers)
        self._folder = folder

    @property
    def bootstrap(self) -> str:
        """For ``bootstrap.servers``: every broker, so that a client finds the cluster with one of them dead."""
        return ",".join(f"{ports.HOST}:{broker.port}" for broker in self.brokers)

    def wait(self) -> None:
        """Return once every broker sees every other: after a restart, what a test should leave behind."""
        everyone = set(range(1, len(self.brokers) + 1))
        for broker in self.brokers:
            broker.wait()
        wait_until_ready(
            "the Kafka cluster",
            ready=lambda: all(live_brokers(broker.port) == everyone for broker in self.brokers),
            alive=lambda: True,  # each has just answered; if one dies, the time runs out
            timeout_s=START_TIMEOUT_S,
        )

    def stop(self) -> None:
        """End every broker and throw its data away."""
        for broker in self.brokers:
            broker.stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def missing() -> list[Missing]:
    """What this machine lacks."""
    return docker.missing() if docker.chosen() else maven.missing()


def install() -> None:
    """Fetch what ``start`` needs."""
    if docker.chosen():
        docker.pull("kafka")
    else:
        jars()


def start(
    brokers: int = 1, advertise: Callable[[int], int] | None = None, folder: Path | None = None, *, tier: int = 1
) -> KafkaCluster:
    """Start one node or three; returns when each sees all.

    Args:
        brokers: How many.
        advertise: Given a broker's port, returns the one that clients and the other brokers are told, a proxy's; its
            controller is reached without it. `KafkaCluster.bootstrap` goes past it. Not for containers.
        folder: Empty, for all their data; else a throw-away one. Not for containers.
        tier: How far Java compiles: 1 starts soonest, 4 runs fastest once warm. Of native servers only.

    Raises:
        ServiceError: They could not be installed, or did not start; nothing is left running.
    """
    if docker.chosen():
        if advertise is not None or folder is not None:
            raise ServiceError("brokers behind a proxy, or on a disk of their own, are processes: use SERVICES=native")
        return _started(KafkaCluster(docker.kafka(brokers)))
    libs = jars()
    folder = folder or scratch.folder(f"kafka{brokers}")
    node_ids = range(1, brokers + 1)
    numbers = ports.free(2 * brokers)
    broker_ports, controller_ports = numbers[:brokers], numbers[brokers:]
    voters = ",".join(f"{i}@{ports.HOST}:{port}" for i, port in zip(node_ids, controller_ports, strict=True))
    configs = [
        _write_properties(
            folder / str(node_id),
            node_id,
            (broker_port, advertise(broker_port) if advertise else broker_port, controller_port),
            voters,
            brokers,
        )
        for node_id, broker_port, controller_port in zip(node_ids, broker_ports, controller_ports, strict=True)
    ]
    java = ["java", HEAP[brokers], *JVM, f"-XX:TieredStopAtLevel={tier}", "-cp", f"{libs}/*"]
    _format(java, configs)
    nodes = [
        Process(
            name=f"Kafka broker {node_id}",
            port=port,
            command=[*java, "kafka.Kafka", str(config)],
            log=config.with_name("broker.log"),
            ready=functools.partial(_sees_itself, node_id, port),
            start_timeout_s=START_TIMEOUT_S,
        )
        for node_id, port, config in zip(node_ids, broker_ports, configs, strict=True)
    ]
    for node in nodes:
        node.launch()
    return _started(KafkaCluster(nodes, folder))


def replication(brokers: int) -> dict[str, int]:
    """Copies of Kafka's own topics, and of ours unless they say otherwise: as many as production would have, or one."""
    copies, in_sync = (1, 1) if brokers == 1 else (3, 2)
    return {
        "default.replication.factor": copies,
        "min.insync.replicas": in_sync,
        "offsets.topic.replication.factor": copies,
        "transaction.state.log.replication.factor": copies,
        "transaction.state.log.min.isr": in_sync,
        "share.coordinator.state.topic.replication.factor": copies,
        "share.coordinator.state.topic.min.isr": in_sync,
    }


def _sees_itself(node_id: int, port: int) -> bool:
    return node_id in live_brokers(port)


def jars() -> Path:
    """The folder of Kafka's jars, fetched if need be."""
    return cache.installed(f"kafka-{VERSION}", functools.partial(maven.copy_jars, JARS)) / "libs"


def _started(cluster: KafkaCluster) -> KafkaCluster:
    try:
        cluster.wait()
    except BaseException:
        cluster.stop()
        raise
    return cluster


def _write_properties(folder: Path, node_id: int, listen: tuple[int, int, int], voters: str, brokers: int) -> Path:
    """The common file, and below it what is this node's own."""
    port, advertised_port, controller_port = listen
    folder.mkdir()
    own = {
        "node.id": node_id,
        "controller.quorum.voters": voters,
        "listeners": f"PLAINTEXT://{ports.HOST}:{port},CONTROLLER://{ports.HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{ports.HOST}:{advertised_port},CONTROLLER://{ports.HOST}:{controller_port}",
        "log.dirs": folder / "data",
        **replication(brokers),
    }
    config = folder / "server.properties"
    config.write_text(BASE_PROPERTIES.read_text() + "".join(f"{key}={value}\n" for key, value in own.items()))
    return config


def _format(java: Sequence[str], configs: Sequence[Path]) -> None:
    """Prepare the data folders, at once: each costs the start of a JVM."""
    # Never with a "-" in front, which one in 64 would have: the tool takes it for an option.
    first, *rest = uuid.uuid4().bytes
    cluster_id = base64.urlsafe_b64encode(bytes([first & 0x7F, *rest])).rstrip(b"=").decode()
    tool = [*java, "kafka.tools.StorageTool", "format", "--cluster-id", cluster_id, "--config"]

    def run(config: Path) -> None:
        commands.run([*tool, str(config)], FORMAT_TIMEOUT_S, "Kafka's data folder could not be formatted")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(run, configs))
