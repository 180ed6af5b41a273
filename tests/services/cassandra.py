"""Apache Cassandra 5.0, one node, out of its jars."""

from __future__ import annotations

import contextlib
import functools
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.services import cache, docker, maven, ports, scratch
from tests.services.errors import Missing
from tests.services.native import Process
from tests.services.server import OneServer

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = "5.0.9"
JARS = (f"org.apache.cassandra:cassandra-all:{VERSION}",)
CONFIG = Path(__file__).with_name("cassandra.yaml")
LOGGING = Path(__file__).with_name("cassandra-logback.xml")
JAVA = (11, 17)
START_TIMEOUT_S = 120.0
KEYSPACE = "CREATE KEYSPACE {} WITH replication = {{'class': 'SimpleStrategy', 'replication_factor': 1}} AND durable_writes = {}"
ANSWER_TIMEOUT_S = 10.0

# A small heap and no second compiler, for it lives for minutes; no waiting for neighbours that it does not have.
JVM = (
    "-Xms64m", "-XX:+UseSerialGC", "-Djdk.attach.allowAttachSelf=true",
    "-Dcassandra-foreground=yes", "-Dcassandra.skip_wait_for_gossip_to_settle=0", "-Dcassandra.ring_delay_ms=1",
    "-Dcassandra.superuser_setup_delay_ms=0", "-Dcassandra.initial_token=0",
)  # fmt: skip
# As Cassandra's own jvm17-server.options says.
EXPORTS = (
    "java.base/jdk.internal.misc", "java.base/java.lang.ref", "java.management.rmi/com.sun.jmx.remote.internal.rmi",
    "java.rmi/sun.rmi.registry", "java.rmi/sun.rmi.server", "java.sql/java.sql", "jdk.unsupported/sun.misc",
)  # fmt: skip
OPENS = (
    "java.base/java.io", "java.base/java.lang", "java.base/java.lang.module", "java.base/java.lang.reflect",
    "java.base/java.math", "java.base/java.net", "java.base/java.nio", "java.base/java.util",
    "java.base/java.util.concurrent", "java.base/java.util.concurrent.atomic", "java.base/jdk.internal.loader",
    "java.base/jdk.internal.math", "java.base/jdk.internal.module", "java.base/jdk.internal.ref",
    "java.base/jdk.internal.reflect", "java.base/jdk.internal.util.jar", "java.base/sun.nio.ch",
    "jdk.management/com.sun.management.internal",
)  # fmt: skip


class CassandraServer(OneServer):
    """A running server. Every acknowledged write is there after ``kill`` and ``restart``: its commit log is synced first."""

    @property
    def address(self) -> str:
        """Its contact point."""
        return f"{ports.HOST}:{self.port}"

    def url(self, keyspace: str) -> str:
        """Of a view in a keyspace, which has to be made."""
        return f"cassandra://{self.address}/{keyspace}"

    def new_keyspace(self, *, durable: bool = True) -> str:
        """The name of a keyspace that nobody else uses; one that is not durable is emptied sooner."""
        name = f"t{secrets.token_hex(6)}"
        with self.session() as session:
            session.execute(KEYSPACE.format(name, str(durable).lower()))
        return name

    @contextlib.contextmanager
    def session(self, **options: Any) -> Iterator[Any]:
        """A session of the driver, which is an extra and perhaps not here; ``options`` are its own."""
        from cassandra.cluster import Cluster  # noqa: PLC0415

        with Cluster([ports.HOST], port=self.port, **options) as cluster:
            yield cluster.connect()


def missing() -> list[Missing]:
    """What this machine lacks."""
    if docker.chosen():
        return docker.missing()
    lacking = maven.missing()
    version = maven.java_version()
    if version is not None and version not in JAVA:
        problem = f"Java 11 or 17 for Cassandra (this is {version})"
        lacking.append(Missing(problem, "apt-get install openjdk-17-jre-headless, and put it first on PATH"))
    return lacking


def install() -> None:
    """Fetch what ``start`` needs."""
    if docker.chosen():
        docker.pull("cassandra")
    else:
        jars()


def start(*, auth: bool = False, heap: str = "384m", tier: int = 1) -> CassandraServer:
    """Start a server of its own, which keeps its data over ``kill`` and ``restart``.

    Args:
        auth: Ask for passwords and rights; the first user is ``cassandra`` with that password.
        heap: Java's; of native servers only, as ``tier``.
        tier: How far Java compiles: 1 soon, 4 well.

    Raises:
        ServiceError: It could not be installed, or did not start; nothing is left running.
    """
    if docker.chosen() and not auth:
        container = docker.single("cassandra", ready=_answers)
        container.wait()
        return CassandraServer(container)
    libs = jars()
    folder = scratch.folder("cassandra")
    port, storage_port = ports.free(2)
    config = folder / "cassandra.yaml"
    config.write_text(
        CONFIG.read_text()
        + f"native_transport_port: {port}\nstorage_port: {storage_port}\n"
        + "seed_provider:\n  - class_name: org.apache.cassandra.locator.SimpleSeedProvider\n"
        + f'    parameters:\n      - seeds: "{ports.HOST}:{storage_port}"\n'
        + f"authenticator: {'PasswordAuthenticator' if auth else 'AllowAllAuthenticator'}\n"
        + f"authorizer: {'CassandraAuthorizer' if auth else 'AllowAllAuthorizer'}\n"
    )
    (agent,) = libs.glob("jamm-*.jar")
    command = [
        "java",
        f"-Xmx{heap}",
        f"-XX:TieredStopAtLevel={tier}",
        *JVM,
        f"-javaagent:{agent}",
        f"-Djava.io.tmpdir={folder}",
        f"-Djna.tmpdir={folder}",
    ]
    command += [f"-Dcassandra.config={config.as_uri()}", f"-Dcassandra.storagedir={folder}"]
    command += [f"-Dlogback.configurationFile={LOGGING}"]
    command += [part for each in EXPORTS for part in ("--add-exports", f"{each}=ALL-UNNAMED")]
    command += [part for each in OPENS for part in ("--add-opens", f"{each}=ALL-UNNAMED")]
    command += ["-cp", f"{libs}/*", "org.apache.cassandra.service.CassandraDaemon"]
    node = Process(
        name="Cassandra",
        port=port,
        command=command,
        log=folder / "cassandra.log",
        ready=functools.partial(_answers, port),
        start_timeout_s=START_TIMEOUT_S,
    )
    node.launch()
    node.wait()
    return CassandraServer(node, folder)


def jars() -> Path:
    """The folder of its jars, fetched if need be."""
    return cache.installed(f"cassandra-{VERSION}", functools.partial(maven.copy_jars, JARS)) / "libs"


def _answers(port: int) -> bool:
    """Ask for the server's options in the protocol's own words, for the driver is an extra and need not be here."""
    try:
        with socket.create_connection((ports.HOST, port), timeout=ANSWER_TIMEOUT_S) as connection:
            connection.sendall(b"\x04\0\0\0\x05\0\0\0\0")
            return connection.recv(9)[4:5] == b"\x06"
    except OSError:
        return False
