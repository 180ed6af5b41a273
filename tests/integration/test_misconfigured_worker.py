"""A worker that cannot work says what is wrong, without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from tests.patience import PATIENCE_S

SECRET = "p4ssw0rd"
GOOD = f"kafka://127.0.0.1:9/?view=redis://:{SECRET}@127.0.0.1:9/0"


def refusal(**environment):
    """What a worker says that ends at once with the exit code for a configuration."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "fleet_app", "worker", "-c", "1"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 3, said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("backend", "settings", "words"),
    [
        (GOOD, '{"delivry": "buffered"}', ["kafka_backend_settings['delivry']", "did you mean 'delivery'"]),
        (GOOD, '{"producer": {"acks": 1}}', ["acks", "would break"]),
        (GOOD, '{"min_insync_replicas": 3, "replication_factor": 1}', ["min_insync_replicas", "replication_factor 1"]),
        ("kafka://127.0.0.1:9/?view=mysql://x", "{}", ["mysql", "known: ", "redis"]),
        ("kafka://127.0.0.1:9/", "{}", ["no view", "?view="]),
        ("kafka:///?view=redis://x", "{}", ["no Kafka servers", "kafka://host:9092"]),
        (GOOD, '{"delivery": "pipelined"}', ["['delivery']", "acks_late of fleet_app.die_once", "'acknowledged'"]),
        (
            GOOD,
            '{"client": {"security.protocol": "SSL", "ssl.ca.location": "/no/such/ca.pem", "sasl.password": "p4ssw0rd"}}',
            ["kafka_backend_settings['client']['ssl.ca.location']: '/no/such/ca.pem'"],
        ),
        (
            GOOD,
            '{"client": {"security.protocol": "SASL_SSL", "sasl.mechanism": "NTLM", "sasl.password": "p4ssw0rd"}}',
            ["kafka_backend_settings['client']['sasl.mechanism']: 'NTLM'"],
        ),
        (
            GOOD,
            '{"client": {"sasl.mechanism": "OAUTHBEARER", "oauth_cb": "fleet_app.no_such_function"}}',
            ["kafka_backend_settings['client']['oauth_cb']: 'fleet_app.no_such_function' cannot be imported"],
        ),
        (
            GOOD,
            '{"redact": "fleet_app.no_such_function"}',
            ["kafka_backend_settings['redact']: 'fleet_app.no_such_function' cannot be imported", "module.function"],
        ),
        (
            GOOD,
            '{"client": {"sasl.pasword": "p4ssw0rd"}}',
            ["kafka_backend_settings['client']['sasl.pasword']", "CONFIG"],
        ),
    ],
)
def test_a_wrong_setting_ends_the_worker_with_one_line(backend, settings, words):
    said = refusal(FLEET_BROKER="memory://", FLEET_BACKEND=backend, FLEET_SETTINGS=settings)
    assert SECRET not in said
    for word in words:
        assert word in said


def test_a_driver_that_is_not_installed_ends_the_worker(tmp_path):
    (tmp_path / "bson.py").write_text("raise ModuleNotFoundError(\"No module named 'bson'\", name='bson')\n")
    said = refusal(
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(__file__).parent)]),
        FLEET_BROKER="memory://",
        FLEET_BACKEND=f"kafka://127.0.0.1:9/?view=mongodb://reader:{SECRET}@127.0.0.1:9/results",
    )
    assert "mongodb:// needs the package 'bson', which is not installed" in said
    assert "pip install 'celery-kafka-backend[mongodb]'" in said
    assert SECRET not in said


def test_a_client_is_told_of_a_setting_that_names_nothing():
    app = Celery(broker="memory://", backend=GOOD, set_as_current=False)
    app.conf.kafka_backend_settings = {"redact": "no_such_module.function"}
    with pytest.raises(ImproperlyConfigured, match=r"\['redact'\]: 'no_such_module.function' cannot be imported"):
        app.backend  # noqa: B018 - Celery makes it when it is asked for


@pytest.mark.kafka
@pytest.mark.redis
@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_pool_of_greenlets_without_monkey_patching_is_refused(kafka, redis_url, pool):
    said = refusal(
        FLEET_BROKER=redis_url,
        FLEET_BACKEND=f"kafka://{kafka.bootstrap}/?view={redis_url}",
        FLEET_CONF=f'{{"worker_pool": "{pool}"}}',
    )
    assert f"Start the worker with -P {pool}" in said
