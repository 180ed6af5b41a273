"""Celery's own commands, and Flower, as users run them: with this backend they do what one expects."""

from __future__ import annotations

import json
import sys
import urllib.request
import uuid
from urllib.error import HTTPError, URLError

import pytest

from celery_kafka_backend import events
from celery_kafka_backend.result import KafkaResult
from tests.patience import PATIENCE_S, until
from tests.services import native, ports

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.redis,
    pytest.mark.parametrize(
        "fleet",
        [
            {
                "conf": {
                    "worker_send_task_events": True,
                    "beat_schedule": {"often": {"task": "fleet_app.add", "schedule": 0.3, "args": [2, 2]}},
                }
            }
        ],
        indirect=True,
        ids=["events"],
    ),
]


@pytest.fixture
def celery(fleet):
    """Run a command of Celery's to its end."""

    def run(*arguments):
        done = fleet.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_result(fleet, celery):
    done = fleet.app.add.delay(2, 3)
    done.get(timeout=PATIENCE_S)
    assert celery("result", done.id).strip() == "5"
    assert celery("result", "-t", "fleet_app.add", done.id).strip() == "5"
    failed = fleet.app.fail.delay("broken")
    failed.get(timeout=PATIENCE_S, propagate=False)
    assert "ValueError: broken" in celery("result", "--traceback", failed.id)


def test_purge(fleet, celery):
    sent = [fleet.app.add.apply_async((1, 1), queue="aside") for _ in range(3)]
    assert "Purged 3 messages" in celery("purge", "-f", "-Q", "aside")
    assert "No messages purged" in celery("purge", "-f", "-Q", "aside")
    until(lambda: KafkaResult.of(sent[0]).describe() == "sent")  # nobody has told the log


def test_inspect_and_control(fleet, celery):
    node = fleet.node("worker")
    assert json.loads(celery("inspect", "-j", "ping"))[node] == {"ok": "pong"}
    assert "fleet_app.add" in json.loads(celery("inspect", "-j", "registered"))[node]
    running = fleet.app.nap.delay(20)
    until(lambda: KafkaResult.of(running).describe() == "started")
    (active,) = json.loads(celery("inspect", "-j", "active"))[node]
    assert active["id"] == running.id
    assert json.loads(celery("inspect", "-j", "query_task", running.id))[node][running.id][0] == "active"
    celery("control", "terminate", "SIGKILL", running.id)
    until(lambda: running.state == "REVOKED")
    later = fleet.app.add.apply_async((1, 1), countdown=60)
    until(lambda: KafkaResult.of(later).describe() == "received")
    celery("control", "revoke", later.id)
    until(lambda: later.state == "REVOKED")
    celery("control", "add_consumer", "more")
    assert fleet.app.add.apply_async((1, 2), queue="more").get(timeout=PATIENCE_S) == 3
    assert node in celery("status")


def test_events(fleet):
    log = fleet.folder / "events.log"
    with log.open("wb") as output:
        watching = native.popen(fleet.celery("events", "--dump"), output=output, env=fleet.environment)
    try:
        until(lambda: fleet.app.add.delay(1, 1).get(timeout=PATIENCE_S) and "succeeded" in log.read_text(), "no event")
        watching.terminate()
        watching.wait(PATIENCE_S)
    finally:
        native.end(watching)


def test_beat_and_backend_cleanup(fleet, tmp_path):
    """Nothing is to be cleaned up: documents expire by themselves. So beat does not send that task; who does, may."""
    log = tmp_path / "beat.log"
    with log.open("wb") as output:
        beat = native.popen(
            fleet.celery("beat", "-l", "DEBUG", "-s", str(tmp_path / "schedule"), "--pidfile", ""),
            output=output,
            env=fleet.environment,
        )
    try:
        until(lambda: log.read_text().count("Sending due task often") >= 3, log.read_text())
        assert "Traceback" not in log.read_text()  # beat's own loop may meet its closed schedule when it is told to end
        beat.terminate()
        beat.wait(PATIENCE_S)
    finally:
        native.end(beat)
    text = log.read_text()
    assert "celery.backend_cleanup" not in text
    task_id = text.partition("fleet_app.add sent. id->")[2].split()[0]
    found = fleet.history(task_id, events.SENT, events.SUCCESS)
    assert found[0].kind == events.SENT
    assert fleet.app.app.AsyncResult(task_id).get(timeout=PATIENCE_S) == 4
    assert fleet.app.app.send_task("celery.backend_cleanup").get(timeout=PATIENCE_S) is None


def test_report_shows_no_password(fleet, celery):
    settings = json.loads(fleet.environment["FLEET_SETTINGS"])
    settings |= {"chord_key": "hunter2", "client": {"sasl.password": "hunter3"}}
    settings |= {"view_options": {"redis": {"password": "hunter4"}, "elasticsearch": {"basic_auth": ["u", "hunter5"]}}}
    settings |= {"claim_check": "s3://key:hunter6@bucket", "claim_check_options": {"client_kwargs": {"a": "hunter7"}}}
    settings["views"] = ["redis://:hunter8@127.0.0.1:1/0"]  # nobody parses them here
    before = {name: fleet.environment[name] for name in ("FLEET_SETTINGS", "FLEET_BACKEND")}
    fleet.environment["FLEET_SETTINGS"] = json.dumps(settings)
    fleet.environment["FLEET_BACKEND"] = "kafka://u:hunter9@127.0.0.1:1/?view=redis://:hunter1@127.0.0.1:1/0"
    try:
        said = celery("report")
    finally:
        fleet.environment |= before
    assert "kafka_backend_settings" in said
    assert "hunter" not in said


# -- Flower --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flower(fleet):
    (port,) = ports.free(1)
    log = fleet.folder / "flower.log"
    command = [sys.executable, "-m", "celery", "-A", "fleet_app", "flower", f"--port={port}", "--address=127.0.0.1"]
    with log.open("wb") as output:
        process = native.popen(
            command, output=output, env={**fleet.environment, "FLOWER_UNAUTHENTICATED_API": "true"}, cwd=fleet.folder
        )

    def ask(path, body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", None if body is None else json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            said = answer.read().decode()
        return json.loads(said) if path.startswith("/api") else said

    def answers():
        assert process.poll() is None, log.read_text()
        try:
            return fleet.node("worker") in ask("/api/workers?refresh=true")
        except (HTTPError, URLError, OSError):
            return False

    try:
        until(answers, log.read_text())
        yield ask
        process.terminate()
        process.wait(PATIENCE_S)
    finally:
        native.end(process)
    assert "Traceback" not in log.read_text()


def test_flower_shows_states_and_results(fleet, flower):
    done, failed = fleet.app.add.delay(20, 22), fleet.app.fail.delay("broken")
    assert done.get(timeout=PATIENCE_S) == 42
    failed.get(timeout=PATIENCE_S, propagate=False)
    shown = flower(f"/api/task/result/{done.id}")
    assert (shown["state"], shown["result"]) == ("SUCCESS", 42)
    shown = flower(f"/api/task/result/{failed.id}")
    assert (shown["state"], shown["result"]) == ("FAILURE", "ValueError('broken')")
    assert "ValueError: broken" in shown["traceback"]
    until(lambda: flower("/api/tasks").get(done.id, {}).get("state") == "SUCCESS", "Flower's own list lacks it")
    assert "fleet_app.add" in flower(f"/task/{done.id}")


def test_flower_sends_and_revokes(fleet, flower):
    assert flower("/api/task/apply/fleet_app.add", {"args": [1, 2]})["result"] == 3
    sent = flower("/api/task/async-apply/fleet_app.nap", {"args": [30]})["task-id"]
    result = fleet.app.app.AsyncResult(sent)
    until(lambda: KafkaResult.of(result).describe() == "started")
    flower(f"/api/task/revoke/{sent}?terminate=true", {})
    until(lambda: result.state == "REVOKED")
    never = flower(f"/api/task/result/{uuid.uuid4()}")
    assert never["state"] == "PENDING"
