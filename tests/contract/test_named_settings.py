"""Celery's own settings for a store, under Celery's names, with their effect on the real server: what docs/stores.md calls supported."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from celery import Celery

from celery_kafka_backend.configure import store_options
from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.settings import parse
from celery_kafka_backend.sinks import registry
from tests.contract.factories import batch, group_saved, stated
from tests.contract.test_native import read
from tests.services import elasticsearch as elastic_service
from tests.services import mongodb as mongo_service
from tests.services import redis as redis_service
from tests.services.doorman import Doorman
from tests.services.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery_kafka_backend.sinks.contract import StoreOptions
    from tests.services.cassandra import CassandraServer
    from tests.services.elasticsearch import ElasticServer
    from tests.services.mongodb import MongoServer

DONE = stated("SUCCESS", 10)
RIGHTS = ["+@read", "+@write", "+@scripting", "+@pubsub", "+@connection"]
"""Of a user of Redis, and the command INFO."""


def told(view: str, conf: dict[str, Any]) -> StoreOptions:
    app = Celery("named", set_as_current=False)
    app.conf.update(conf)
    return store_options(app, parse(f"kafka://b/?view={quote(view, safe='')}", {}), view)


@contextlib.contextmanager
def opened(view: str, conf: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """A sink and a view of a store that Celery's settings describe."""
    options = told(view, conf)
    sink, found = registry.open_sink(view, options), registry.open_view(view, options)
    try:
        sink.open()
        yield sink, found
    finally:
        sink.close()
        found.close()


# -- MongoDB -----------------------------------------------------------------------------------


@pytest.mark.mongodb
def test_mongodb_backend_settings(mongodb: MongoServer) -> None:
    import pymongo  # noqa: PLC0415 - the other stores run without it

    name = mongodb.clean_database().rpartition("/")[2]
    conf = {
        "mongodb_backend_settings": {
            "host": "127.0.0.1", "port": mongodb.port, "database": name, "taskmeta_collection": "tasks",
            "groupmeta_collection": "groups", "max_pool_size": 3, "options": {"appname": "named"},
        }
    }  # fmt: skip
    with opened("mongodb://127.0.0.1:1/elsewhere", conf) as (sink, view), pymongo.MongoClient(mongodb.url) as client:
        sink.write(batch(DONE, group_saved("g", members=("t",))))
        assert view.documents(["t"]) == {"t": DONE.document}
        there = client[name]
        assert (there.tasks.count_documents({}), there.groups.count_documents({})) == (1, 1)
        under_way = client.admin.aggregate([{"$currentOp": {"allUsers": True, "idleConnections": True}}])
        assert "named" in {each.get("appName") for each in under_way}
        assert view._own.client.options.pool_options.max_pool_size == 3
        given = conf["mongodb_backend_settings"]
        del given["max_pool_size"]  # Celery's own backend hands it to a driver that does not know it
        (answer,) = read([{"backend": "mongodb://", "conf": conf, "tasks": ["t"], "groups": ["g"]}])
        assert answer["tasks"]["t"]["state"] == "SUCCESS"
        assert answer["groups"] == {"g": ["t"]}


@pytest.mark.mongodb
def test_mongodb_user_and_password() -> None:
    import pymongo  # noqa: PLC0415 - the other stores run without it

    server = mongo_service.start("--auth")
    try:
        with pymongo.MongoClient(server.url) as admin:  # the first user may be made from this machine
            admin.admin.command("createUser", "root", pwd="s3cret", roles=["root"])
        given = {"user": "root", "password": "s3cret", "database": "results", "options": {"authSource": "admin"}}
        with opened(server.url, {"mongodb_backend_settings": given}) as (sink, view):
            sink.write(batch(DONE))
            assert view.documents(["t"])
    finally:
        server.stop()


@pytest.fixture
def served_name(mongodb: MongoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A name, for which a name server of our own names the MongoDB."""
    import dns.message  # noqa: PLC0415 - the other stores run without it
    import dns.rdatatype  # noqa: PLC0415
    import dns.resolver  # noqa: PLC0415
    import dns.rrset  # noqa: PLC0415

    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))

    def answer() -> None:
        while (received := sock.recvfrom(4096))[0]:
            asked = dns.message.from_wire(received[0])
            told = dns.message.make_response(asked)
            name = asked.question[0].name
            if asked.question[0].rdtype == dns.rdatatype.SRV:
                told.answer.append(dns.rrset.from_text(name, 60, "IN", "SRV", f"0 0 {mongodb.port} h.results.test."))
            sock.sendto(told.to_wire(), received[1])

    thread = threading.Thread(target=answer)
    thread.start()
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = ["127.0.0.1"], sock.getsockname()[1]
    monkeypatch.setattr(dns.resolver, "default_resolver", resolver)
    real, here = socket.getaddrinfo, {"h.results.test": "127.0.0.1"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **kw: real(here.get(host, host), *more, **kw))
    yield "db.results.test"
    sock.sendto(b"", sock.getsockname())
    thread.join()
    sock.close()


@pytest.mark.mongodb
def test_mongodb_srv(mongodb: MongoServer, served_name: str) -> None:
    """TLS is the default there."""
    database = mongodb.clean_database().rpartition("/")[2]
    with opened(f"mongodb+srv://{served_name}/{database}?tls=false", {}) as (sink, view):
        sink.write(batch(DONE))
        assert view.documents(["t"]) == {"t": DONE.document}


# -- Elasticsearch -----------------------------------------------------------------------------


@pytest.fixture
def elastic_url(elastic: tuple[ElasticServer, str]) -> Iterator[str]:
    server, _ = elastic
    url = server.clean_index()
    yield url
    server.drop(url)


def _port(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


@pytest.mark.elasticsearch
def test_elasticsearch_save_meta_as_text_and_a_document_type_in_the_url(elastic_url: str) -> None:
    index = elastic_url.rpartition("/")[2]
    with opened(f"{elastic_url}/backend", {"elasticsearch_save_meta_as_text": False}) as (sink, view):
        sink.write(batch(DONE))
        assert view.documents(["t"]) == {"t": DONE.document}
    status, said = elastic_service.ask(_port(elastic_url), "GET", f"/{index}/_doc/celery-task-meta-t")
    assert (status, json.loads(said)["_source"]["result"]["status"]) == (200, "SUCCESS")


@pytest.mark.elasticsearch
@pytest.mark.parametrize(("retries", "again"), [(0, True), (2, True), (2, False)])
def test_elasticsearch_timeout_max_retries_and_retry_on_timeout(elastic_url: str, retries: int, again: bool) -> None:
    conf = {"elasticsearch_max_retries": retries, "elasticsearch_retry_on_timeout": again, "elasticsearch_timeout": 4.0}
    with (
        contextlib.closing(Doorman(_port(elastic_url))) as doorman,
        opened(doorman.url(elastic_url), conf) as (_, view),
    ):
        assert view.documents(["t"]) == {}
        doorman.answers(502, {})
        doorman.seen.clear()
        with pytest.raises(Unavailable):
            view.documents(["t"])
        assert len(doorman.seen) == 1 + retries
        doorman.lets_through()
        doorman.delay_s = 8.0
        doorman.seen.clear()
        with pytest.raises(Unavailable, match="timed out"):
            view.documents(["t"])
        assert len(doorman.seen) == 1 + (retries if again else 0)


# -- Cassandra ---------------------------------------------------------------------------------


@pytest.mark.cassandra
def test_cassandra_servers_port_keyspace_table_options_and_entry_ttl(
    cassandra: CassandraServer, cassandra_session: Any
) -> None:
    """Of two servers the first is not there."""
    keyspace = cassandra.new_keyspace(durable=False)
    conf = {
        "cassandra_servers": ["127.0.0.9", "127.0.0.1"], "cassandra_port": cassandra.port, "cassandra_keyspace": keyspace,
        "cassandra_table": "results", "cassandra_options": {"protocol_version": 4},
        "cassandra_entry_ttl": 60.0,
    }  # fmt: skip
    now = time.time_ns() // 1_000_000
    with opened("cassandra://", conf) as (sink, view):
        sink.write(batch(stated("SUCCESS", now - DONE.at + 10, task="now", run=None)))
        assert view.documents(["now"])
        (row,) = cassandra_session.execute(f"SELECT task_id, ttl(status) AS ttl FROM {keyspace}.results")
        assert row.task_id == "now"
        assert 50 <= row.ttl <= 61
        clients = cassandra_session.execute("SELECT protocol_version FROM system_views.clients")
        assert {each.protocol_version for each in clients} == {4, 5}


@pytest.mark.cassandra
@pytest.mark.parametrize(("reads", "writes"), [("ONE", "TWO"), ("TWO", "ONE")])
def test_cassandra_read_and_write_consistency(cassandra: CassandraServer, reads: str, writes: str) -> None:
    """Two replicas have to answer where there is one."""
    url = cassandra.url(cassandra.new_keyspace(durable=False))
    with opened(url, {"cassandra_read_consistency": reads, "cassandra_write_consistency": writes}) as (sink, view):
        for level, act in ((writes, lambda: sink.write(batch(DONE))), (reads, lambda: view.documents(["t"]))):
            with pytest.raises(Unavailable, match="TWO") if level == "TWO" else contextlib.nullcontext():
                act()


# -- Redis -------------------------------------------------------------------------------------


@pytest.mark.redis
def test_redis_settings() -> None:
    """All of them on one connection, whose server knows users."""
    import redis  # noqa: PLC0415 - the other stores run without it

    server = redis_service.start()
    try:
        with redis.Redis.from_url(server.url) as admin:
            admin.acl_setuser(
                "fleet",
                enabled=True,
                passwords=["+s3cret"],
                keys=["*"],
                channels=["*"],
                categories=RIGHTS,
                commands=["+info"],
            )
            admin.acl_setuser("default", enabled=False)
        conf = {
            "redis_host": "127.0.0.1", "redis_port": server.port, "redis_db": 7, "redis_username": "fleet",
            "redis_password": "s3cret", "redis_max_connections": 3, "redis_socket_timeout": 4.0,
            "redis_socket_connect_timeout": 5.0, "redis_socket_keepalive": True, "redis_retry_on_timeout": True,
            "redis_backend_health_check_interval": 6, "redis_client_name": "named",
            "result_backend_transport_options": {"global_keyprefix": "fleet"},
        }  # fmt: skip
        login = server.url.replace("://", "://fleet:s3cret@").replace("/0", "/7")
        with opened("redis://", conf) as (sink, view), redis.Redis.from_url(login) as admin:
            sink.write(batch(DONE))
            assert view.documents(["t"]) == {"t": DONE.document}
            assert admin.get("fleet_celery-task-meta-t") == DONE.document
            assert {each["db"] for each in admin.client_list() if each["name"] == "named"} == {"7"}
            connection = sink._wire._connection
            assert (connection.socket_timeout, connection.socket_connect_timeout) == (4.0, 5.0)
            assert (connection.retry_on_timeout, connection.health_check_interval) == (True, 6)
            assert connection._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert view._client.connection_pool.max_connections == 3
    finally:
        server.stop()


@pytest.mark.redis
def test_redis_socket_timeout_ends_a_read(redis_url: str) -> None:
    """… instead of the thirty seconds that it would take."""
    with contextlib.closing(Proxy(int(redis_url.rpartition(":")[2].partition("/")[0]))) as proxy:
        url = redis_url.replace(str(proxy.target), str(proxy.port))
        with opened(url, {"redis_socket_timeout": 0.5}) as (_, view):
            assert view.documents(["t"]) == {}
            proxy.freeze()
            began = time.monotonic()
            with pytest.raises(Unavailable):
                view.documents(["t"])
            assert time.monotonic() - began < 15
            proxy.heal()
