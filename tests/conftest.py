"""What every test may use: real servers, started when the first test asks, and the proof that nothing outlives the run.

A server that is missing or does not start skips only the tests that asked for it. Where ``REQUIRE_SERVICES`` names it
(``all``, or a comma list of ``kafka``, ``kafka3``, ``redis``, ``mongodb``, ``elasticsearch``,
``cassandra``, ``postgresql``), they fail instead: that is how CI notices.
"""

from __future__ import annotations

import gc
import os
import secrets
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.services import processes
from tests.services.catalogue import SERVICES
from tests.services.errors import ServiceError
from tests.services.required import absent

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from tests.services.cassandra import CassandraServer
    from tests.services.catalogue import Server
    from tests.services.elasticsearch import ElasticServer
    from tests.services.kafka import KafkaCluster
    from tests.services.mongodb import MongoServer
    from tests.services.postgresql import PostgresServer
    from tests.services.redis import RedisServer

MARK = "CKB_TEST_SESSION"
GRACE_S = 60.0  # a process that has just been told to end may need a moment


def pytest_configure() -> None:
    """Mark everything that we start: children inherit the environment, pytest-xdist's workers too, and orphans keep it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[MARK] = secrets.token_hex(8)


def pytest_report_header() -> str:
    """Say what the tests run with: `make versions` runs them with more than one of each."""
    names = (
        "celery",
        "kombu",
        "billiard",
        "confluent-kafka",
        "msgspec",
        "redis",
        "pymongo",
        "elasticsearch",
        "cassandra-driver",
    )
    found = (f"{name} {version(name)}" for name in names)
    return f"versions: {', '.join(found)}"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Look for no garbage among what is collected, then or later: it stays. That was an eighth of `make test-quick`."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of what `make test` runs at once."""
    from tests import scheduling  # noqa: PLC0415 - only in pytest-xdist's own process

    return scheduling.chosen(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a failed test at once: a run that is cut off has no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        print(f"\nFAILED {report.nodeid} ({report.when}): {crash.message if crash else report.longrepr}", flush=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if it leaves a process behind; by now every fixture is torn down, and xdist's workers are gone."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    deadline = time.monotonic() + GRACE_S
    while (left := processes.started_by_us(MARK, os.environ[MARK])) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        print(f"\nLEAK: process {process.pid} outlived the tests: {process.command}")
        processes.kill(process)
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _running(name: str) -> Iterator[Server]:
    try:
        server = SERVICES[name].started()
    except ServiceError as error:
        absent(name, error)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def kafka() -> Iterator[KafkaCluster]:
    """One broker, shared by the whole run: never kill it."""
    yield from cast("Iterator[KafkaCluster]", _running("kafka"))


@pytest.fixture(scope="session")
def kafka3() -> Iterator[KafkaCluster]:
    """Three brokers, for a test that kills one or looks at replicas; it must leave all three running."""
    yield from cast("Iterator[KafkaCluster]", _running("kafka3"))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A Redis shared by the whole run; a test that kills one starts its own with ``tests.services.redis.start``."""
    yield from cast("Iterator[RedisServer]", _running("redis"))


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """An empty database of the shared Redis, for one test. Channels are not per database: use unique ids."""
    return redis_server.clean_database()


@pytest.fixture(scope="session")
def mongodb() -> Iterator[MongoServer]:
    """A MongoDB shared by the whole run; a test that kills one starts its own with ``tests.services.mongodb.start``."""
    yield from cast("Iterator[MongoServer]", _running("mongodb"))


@pytest.fixture
def mongodb_url(mongodb: MongoServer) -> str:
    """A database of the shared MongoDB, for one test."""
    return mongodb.clean_database()


@pytest.fixture(scope="session")
def elasticsearch() -> Iterator[ElasticServer]:
    """An Elasticsearch shared by the whole run: it takes long to start, so a test that kills it starts it again."""
    yield from cast("Iterator[ElasticServer]", _running("elasticsearch"))


@pytest.fixture
def elasticsearch_url(elasticsearch: ElasticServer) -> Iterator[str]:
    """An index of the shared Elasticsearch, for one test."""
    url = elasticsearch.clean_index()
    yield url
    elasticsearch.drop(url)


@pytest.fixture(scope="session")
def cassandra() -> Iterator[CassandraServer]:
    """A Cassandra shared by the whole run; a test that kills one starts its own with ``tests.services.cassandra.start``."""
    yield from cast("Iterator[CassandraServer]", _running("cassandra"))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """A PostgreSQL shared by the whole run; a test that kills one starts its own."""
    yield from cast("Iterator[PostgresServer]", _running("postgresql"))


@pytest.fixture
def postgresql_url(postgresql: PostgresServer) -> str:
    """A database of the shared PostgreSQL, for one test."""
    return postgresql.clean_database()


@pytest.fixture
def topic_prefix() -> str:
    """What to put before the names of topics and consumer groups, for the brokers are shared."""
    return f"t{secrets.token_hex(5)}-"
