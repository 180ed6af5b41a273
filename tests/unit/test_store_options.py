"""Celery's own settings for a store reach its driver under the driver's names."""

from __future__ import annotations

import ssl

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from celery_kafka_backend.configure import MOST_RETRIES, store_options
from celery_kafka_backend.settings import parse
from celery_kafka_backend.sinks.contract import StoreOptions


def options(view: str, view_options: dict | None = None, **conf):
    return store(view, view_options, **conf).options


def store(view: str, view_options: dict | None = None, **conf):
    app = Celery("options", set_as_current=False)
    app.conf.update(conf)
    settings = parse(f"kafka://b/?view={view}", {"view_options": view_options or {}})
    return store_options(app, settings, view)


@pytest.mark.parametrize("view", ["mongodb://h/db", "mongodb+srv://h/db"])
def test_mongodb_s_settings_by_name(view):
    given = {
        "database": "results", "taskmeta_collection": "tasks", "groupmeta_collection": "groups", "user": "u",
        "password": "p", "host": "other", "port": 1, "max_pool_size": 3, "tz_aware": True,
        "options": {"replicaSet": "rs0", "tz_aware": False},
    }  # fmt: skip
    assert options(view, mongodb_backend_settings=given) == {
        "database": "results", "taskmeta_collection": "tasks", "groupmeta_collection": "groups", "username": "u",
        "password": "p", "host": "other", "port": 1, "maxPoolSize": 3, "tz_aware": True, "replicaSet": "rs0",
    }  # fmt: skip
    assert options(view) == {}
    assert "database" not in options("redis://h/0", mongodb_backend_settings=given)


def test_view_options_are_laid_over_celery_s():
    found = options("mongodb://h/db", {"mongodb": {"database": "b"}}, mongodb_backend_settings={"database": "a"})
    assert found == {"database": "b"}


@pytest.mark.parametrize("view", ["elasticsearch://h/i", "elasticsearch+https://h/i"])
def test_elasticsearch_s_settings_by_name(view):
    given = {"timeout": 3.5, "max_retries": 1, "retry_on_timeout": True, "save_meta_as_text": False}
    found = options(view, {"elasticsearch": {"api_key": "k"}}, **{f"elasticsearch_{n}": v for n, v in given.items()})
    assert found == {
        "request_timeout": 3.5, "max_retries": 1, "retry_on_timeout": True, "save_meta_as_text": False, "api_key": "k",
    }  # fmt: skip
    assert options(view) == {}


def test_mongodb_s_settings_must_be_a_dictionary():
    with pytest.raises(ImproperlyConfigured, match="mongodb_backend_settings"):
        options("mongodb://h/db", mongodb_backend_settings="database")


def test_redis_s_settings_by_name():
    given = {
        "redis_host": "h", "redis_port": 1, "redis_db": 2, "redis_username": "u", "redis_password": "p",
        "redis_max_connections": 3, "redis_socket_timeout": 4.0, "redis_socket_connect_timeout": 5.0,
        "redis_socket_keepalive": True, "redis_retry_on_timeout": True, "redis_backend_health_check_interval": 6,
        "redis_client_name": "c",
    }  # fmt: skip
    assert options("redis://", **given) == {
        "host": "h", "port": 1, "db": 2, "username": "u", "password": "p", "max_connections": 3, "socket_timeout": 4.0,
        "socket_connect_timeout": 5.0, "socket_keepalive": True, "retry_on_timeout": True, "health_check_interval": 6,
        "client_name": "c",
    }  # fmt: skip
    assert options("redis://") == options("mongodb://h/db", **given) == {}


@pytest.mark.parametrize("required", [ssl.CERT_REQUIRED, 2, "CERT_REQUIRED", "required"])
def test_redis_s_tls_as_celery_writes_it(required):
    tls = {"ssl_cert_reqs": required, "ssl_ca_certs": "ca.pem"}
    found = {"ssl_cert_reqs": "required", "ssl_ca_certs": "ca.pem"}
    assert options("rediss://h", redis_backend_use_ssl=tls) == found
    assert options("sentinel://h", redis_backend_use_ssl=tls) == {**found, "ssl": True}


def test_sentinels_are_asked_as_the_transport_options_say():
    transport = {
        "master_name": "m",
        "sentinel_kwargs": {"password": "s"},
        "min_other_sentinels": 1,
        "priority_steps": [],
    }
    found = {"master_name": "m", "sentinel_kwargs": {"password": "s"}, "min_other_sentinels": 1, "password": "p"}
    given = {"redis_password": "p", "redis_host": "elsewhere", "result_backend_transport_options": transport}
    assert options("sentinel://h:1;sentinel://h:2", **given) == found
    assert options("redis://h", **given) == {"password": "p", "host": "elsewhere"}


def test_a_reader_asks_again_as_celery_s_retry_policy_says():
    def pauses(**policy):
        return store("redis://h", result_backend_transport_options={"retry_policy": policy}).pauses_s

    assert pauses(max_retries=3, interval_start=0.5, interval_step=0.25, interval_max=0.8) == (0.5, 0.75, 0.8)
    assert pauses(max_retries=2) == (0.0, 1.0)
    assert len(pauses(max_retries=None)) == MOST_RETRIES
    assert pauses() == StoreOptions().pauses_s


def test_cassandra_s_settings_by_name():
    given = {
        "servers": ["a", "b"], "port": "9043", "keyspace": "celery", "table": "results", "read_consistency": "ONE",
        "write_consistency": "QUORUM", "auth_provider": "PlainTextAuthProvider", "entry_ttl": 60.0,
        "auth_kwargs": {"username": "u", "password": "p"},
    }  # fmt: skip
    conf = {f"cassandra_{name}": value for name, value in given.items()}
    assert options("cassandra://", cassandra_options={"executor_threads": 1}, **conf) == {
        "executor_threads": 1,
        **given,
    }
    assert options("cassandra://") == {}
    assert "keyspace" not in options("redis://h/0", **conf)
    bundle = {"cassandra_secure_bundle_path": "/b.zip"}
    assert options("cassandra://", {"cassandra": {"keyspace": "other"}}, cassandra_keyspace="k", **bundle) == {
        "secure_bundle_path": "/b.zip", "keyspace": "other",
    }  # fmt: skip


def test_a_history_s_retention_reaches_every_store():
    app = Celery("options", set_as_current=False)
    settings = parse("kafka://b/?view=redis://h/0&view=memory://m", {"history_retention_ms": 90 * 86_400_000})
    assert {store_options(app, settings, view).history_retention_ms for view in settings.views} == {90 * 86_400_000}
    assert store("redis://h/0").history_retention_ms is None
