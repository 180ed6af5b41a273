"""Redis behind sentinels, and over TLS: the servers that people run, with the settings that Celery has for them."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from urllib.parse import quote

import pytest
import redis
import trustme
from celery import Celery

from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S, until
from tests.services import redis as service
from tests.services import sentinel
from tests.services.errors import ServiceError

pytestmark = [pytest.mark.kafka, pytest.mark.redis]


def role(server):
    return redis.Redis(port=server.port).info("replication")


@pytest.fixture
def watched():
    made = sentinel.start()
    until(lambda: role(made.replica)["master_link_status"] == "up", "the replica is not in step")
    yield made
    made.stop()


def test_the_primary_is_lost_with_results_that_its_replica_never_had(kafka, redis_server, watched, tmp_path):
    """Celery's settings for sentinels; a failover that forgets; and what was forgotten comes back."""
    conf = {
        "result_backend_transport_options": {"master_name": sentinel.MASTER, "min_other_sentinels": 0},
        "redis_socket_timeout": 5.0,
    }
    with Fleet(kafka.bootstrap, redis_server.clean_database(), watched.url, tmp_path, {}, conf) as fleet:
        fleet.serve()
        app = fleet.app
        assert app.add.delay(1, 2).get(timeout=PATIENCE_S) == 3
        stock = Celery("stock", broker="memory://", backend=watched.url, set_as_current=False)
        stock.conf.update(conf)
        known = app.add.delay(3, 4)
        assert known.get(timeout=PATIENCE_S) == 7
        assert stock.AsyncResult(known.id).get(timeout=PATIENCE_S) == 7
        watched.replica.freeze()
        forgotten = [app.add.delay(n, n) for n in range(50)]
        assert [each.get(timeout=PATIENCE_S) for each in forgotten] == [2 * n for n in range(50)]
        watched.primary.kill()
        watched.replica.thaw()
        until(lambda: role(watched.replica)["role"] == "master", "nobody was made the primary")
        assert app.add.delay(5, 6).get(timeout=PATIENCE_S) == 11
        documents = [b"celery-task-meta-" + each.id.encode() for each in forgotten]
        client = redis.Redis(port=watched.replica.port)
        until(lambda: None not in client.mget(documents), "the new primary never got what the old one had")
        assert [app.app.AsyncResult(each.id).get(timeout=PATIENCE_S) for each in forgotten] == [
            2 * n for n in range(50)
        ]


def test_sentinels_without_the_name_of_a_primary_are_refused(kafka, tmp_path):
    with Fleet(kafka.bootstrap, "memory://", "sentinel://127.0.0.1:1/0", tmp_path, {}, {}) as fleet:
        fleet.init()
        done = fleet.run("pipeline", "run")
    assert done.returncode == 3, done.stderr
    assert "result_backend_transport_options = {'master_name': …}" in done.stderr


@pytest.fixture
def secure(tmp_path):
    folder = tmp_path / "tls"
    folder.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("server", "client"):
        certificate = authority.issue_cert("127.0.0.1", "localhost", common_name=name)
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    (port,) = service.ports.free(1)
    try:
        server = service.start(
            tls_port=str(port), tls_cert_file=str(folder / "server.pem"), tls_key_file=str(folder / "server.key"),
            tls_ca_cert_file=str(folder / "ca.pem"), requirepass="s3cret",
        )  # fmt: skip
    except ServiceError as error:
        if _has_tls():
            raise
        pytest.skip(f"this redis-server was built without TLS: {error}")
    yield port, folder
    server.stop()


def _has_tls():
    found = shutil.which("redis-server")
    return found and "libssl" in subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("how", ["url", "settings"])
def test_a_fleet_with_redis_over_tls_and_a_client_certificate(kafka, redis_server, secure, tmp_path, how):
    port, folder = secure
    files = {
        "ssl_ca_certs": str(folder / "ca.pem"),
        "ssl_certfile": str(folder / "client.pem"),
        "ssl_keyfile": str(folder / "client.key"),
    }
    if how == "url":
        query = "&".join(f"{name}={value}" for name, value in {**files, "ssl_cert_reqs": "CERT_REQUIRED"}.items())
        view = f"rediss://:s3cret@127.0.0.1:{port}/0?{query}"
        conf = {}
    else:
        view = f"rediss://127.0.0.1:{port}"
        conf = {
            "redis_backend_use_ssl": {**files, "ssl_cert_reqs": int(ssl.CERT_REQUIRED)},
            "redis_password": "s3cret",
            "redis_db": 3,
        }
    with Fleet(kafka.bootstrap, redis_server.clean_database(), quote(view, safe=""), tmp_path, {}, conf) as fleet:
        fleet.serve()
        assert fleet.app.add.delay(1, 2).get(timeout=PATIENCE_S) == 3
        assert "s3cret" not in fleet.log("worker") + fleet.log("pipeline")
