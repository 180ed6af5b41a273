"""Shadow mode on a real fleet: Celery's own backend decides, our view shows the same, and no Kafka can hurt."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

CLIENT = [sys.executable, str(Path(__file__).with_name("shadow_client.py"))]


def shadowed(kafka, redis_server, folder, view, **conf):
    """A fleet on Celery's Redis backend, with a shadow."""
    fleet = Fleet(kafka, redis_server.clean_database(), view, folder, {}, {})
    shadow = fleet.environment["FLEET_BACKEND"]
    fleet.environment["FLEET_CONF"] = json.dumps({"result_extended": True, "kafka_shadow": shadow, **conf})
    fleet.environment["FLEET_BACKEND"] = redis_server.clean_database()
    return fleet


def told(fleet):
    """Have a client do everything that stores something, and check what it is told."""
    done = subprocess.run(
        [*CLIENT, "all"], env=fleet.environment, capture_output=True, text=True, timeout=4 * PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_view_shows_what_the_backend_beside_it_has_stored(kafka, redis_server, tmp_path):
    with shadowed(kafka.bootstrap, redis_server, tmp_path, f"sqlite:///{tmp_path}/view.db") as fleet:
        fleet.init()
        fleet.start("pipeline", "pipeline", "run", "--no-chords", ready="assigned")
        fleet.worker("-c", "3")
        added, failed = told(fleet)
        done = fleet.run("pipeline", "shadow", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert (found["same"], found["different"]) == (30, 0), found
        assert fleet.run("pipeline", "status", "--no-chords").returncode == 0
        assert "chords: nobody" not in fleet.run("pipeline", "doctor").stdout

        with subprocess.Popen([*CLIENT, "moving"], env=fleet.environment, stdout=subprocess.PIPE) as client:
            assert client.stdout.readline() == b"sent\n"
            done = fleet.run("pipeline", "shadow")
        assert done.returncode == 0, done.stdout + done.stderr
        assert client.returncode == 0

        theirs = redis.Redis.from_url(fleet.environment["FLEET_BACKEND"])
        key = f"celery-task-meta-{added}"
        theirs.set(key, json.dumps({**json.loads(theirs.get(key)), "result": 7}))
        theirs.delete(f"celery-task-meta-{failed}")
        done = fleet.run("pipeline", "shadow")
        assert done.returncode == 10, done.stdout + done.stderr
        assert "2 differ." in done.stdout
        assert f"{added}\n  result: 7  |  0" in done.stdout, done.stdout
        assert f"{failed}\n  only ours" in done.stdout, done.stdout

        fleet.processes["pipeline"].terminate()
        assert fleet.processes.pop("pipeline").wait(PATIENCE_S) == 0
        theirs.delete(key)
        told(fleet)
        lagging = fleet.run("pipeline", "shadow", "--lag", "0.5")
        assert lagging.returncode == 13, lagging.stdout + lagging.stderr
        assert "lags: after 0.5 s" in lagging.stderr


def test_a_kafka_that_is_not_there_hurts_nobody(redis_server, tmp_path):
    with shadowed("127.0.0.1:1", redis_server, tmp_path, "memory://x", worker_max_tasks_per_child=5) as fleet:
        fleet.worker("-c", "3")
        told(fleet)


def test_a_shadow_with_a_wrong_setting_is_said_and_left_out(redis_server, tmp_path):
    with shadowed("127.0.0.1:1", redis_server, tmp_path, "nostore://x") as fleet:
        fleet.worker("-c", "2")
        told(fleet)
        deadline = time.monotonic() + PATIENCE_S
        while "no shadow: kafka_shadow" not in fleet.log("worker"):
            assert time.monotonic() < deadline, fleet.log("worker")
            time.sleep(0.1)
