"""`pipeline rerun` beside a running fleet: tasks run again under their ids, once, recorded; what cannot be says why."""

from __future__ import annotations

import json
import signal
import time

import pytest
from celery import chord
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_kafka_backend import codec, topics
from celery_kafka_backend.cli import pipeline, resending
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.cli.records import batches
from celery_kafka_backend.configure import settings_of
from celery_kafka_backend.events import RERUN, SENT
from tests.patience import PATIENCE_S
from tests.services import native

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.redis,
    pytest.mark.parametrize(
        "fleet",
        [{"settings": {"record_messages": ["fleet_app.fail*", "fleet_app.listed"], "record_messages_bytes": 2_000}}],
        indirect=True,
        ids=[""],
    ),
]


class Desk:
    """An operator's desk beside a fleet."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.app = fleet.app
        self.settings = settings_of(fleet.app.app)

    def __call__(self, *arguments):
        context = CLIContext(self.app.app, no_color=True, workdir=None)
        done = CliRunner().invoke(pipeline, arguments, obj=context)
        assert "Traceback" not in done.output
        found = json.loads(done.stdout) if "--json" in arguments and done.stdout.startswith(("{", "[")) else None
        return Exit(done.exit_code), found, done.output

    def rerun(self, *arguments, why="the bank was down"):
        return self("rerun", *arguments, "--reason", why, "--actor", "ann@desk", "--yes", "--json")

    def events(self):
        """Every event in the log."""
        broker = Broker(self.settings, 20)
        topic = topics.task_events(self.settings.topic_prefix)
        try:
            parts = {(topic, n): marks for n, marks in broker.ends(topic).items()}
            return [codec.decode(message.value()) for found in batches(broker, parts) for message in found]
        finally:
            broker.close()

    def until(self, holds):
        deadline = time.monotonic() + PATIENCE_S
        while not holds(found := self.events()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return found


@pytest.fixture(scope="module")
def desk(fleet):
    return Desk(fleet)


def failed(desk, path, count):
    results = [desk.app.fails_until.delay(str(path), n) for n in range(count)]
    for each in results:
        with pytest.raises(ValueError, match="no"):
            each.get(timeout=PATIENCE_S)
    return results


def test_a_failed_task_runs_again_under_its_id_as_a_first_attempt(desk, tmp_path):
    there = tmp_path / "there"
    (result,) = failed(desk, there, 1)
    there.touch()
    desk.until(lambda found: any(e.kind == SENT and e.task == result.id and e.attempt == 1 for e in found))
    code, _, said = desk("rerun", result.id, "--dry-run")
    assert (code, "would run again: 1 task" in said) == (Exit.OK, True)
    assert desk("rerun", result.id)[0] is Exit.CONFIGURATION  # no reason
    code, found, _ = desk.rerun(result.id)
    assert (code, found["sent"], found["refused"]) == (Exit.OK, [result.id], [])
    desk.until(lambda found: any(e.task == result.id and e.kind == "success" for e in found))
    again = desk.app.app.AsyncResult(result.id)
    deadline = time.monotonic() + PATIENCE_S
    while again.state != "SUCCESS":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert again.get(timeout=PATIENCE_S) == 0
    life = [e for e in desk.events() if e.task == result.id]
    announced = next(e for e in life if e.kind == RERUN)
    assert (announced.by, announced.message, announced.role) == ("ann@desk", "the bank was down", "operator")
    of_it = [e for e in life if e.run == announced.run]
    assert [e.attempt for e in of_it if e.kind in ("received", "started", "success")] == [0, 0, 0]
    first = next(e for e in life if e.kind == SENT and e.run != announced.run and e.attempt == 0)
    last = next(e for e in of_it if e.kind == SENT)
    assert (last.queue, last.priority, last.parcel.body) == (first.queue, first.priority, first.parcel.body)
    said = desk("history", result.id, "--log")[2]
    assert "by ann@desk" in said
    assert "the bank was down" in said
    assert desk.rerun("--state", "FAILURE", "--since", "1h", "--name", "fleet_app.fails_until")[0] is Exit.NOT_FOUND
    code, _, said = desk.rerun(result.id, "--state", "FAILURE")
    assert code is Exit.NOT_FOUND


def test_what_was_not_recorded_is_refused_by_name(desk):
    unnamed = desk.app.add.delay(1, "x")
    large = desk.app.fail.delay("x" * 5_000)
    for result in (unnamed, large):
        result.get(timeout=PATIENCE_S, propagate=False)
    desk.until(lambda found: {unnamed.id, large.id} <= {e.task for e in found if e.kind == SENT})
    code, found, _ = desk.rerun(unnamed.id, large.id)
    assert code is Exit.NOT_DONE
    assert found["sent"] == []
    why = {one["task"]: one["why"] for one in found["refused"]}
    assert "kafka_backend_settings['record_messages'] did not name fleet_app.add" in why[unnamed.id]
    assert "over record_messages_bytes = 2000" in why[large.id]
    assert desk.rerun("no-such-task")[0] is Exit.NOT_FOUND
    assert desk("rerun", "--reason", "x", "--yes")[0] is Exit.CONFIGURATION


def test_a_member_of_a_chord_that_is_over_does_not_fire_it_again(desk, tmp_path):
    there = tmp_path / "there"
    there.touch()
    body = chord([desk.app.fails_until.s(str(there), n) for n in range(2)])(desk.app.listed.s())
    assert sorted(body.get(timeout=PATIENCE_S)) == [0, 1]
    member = body.parent.results[0].id
    desk.until(lambda found: any(e.task == member and e.kind == SENT for e in found))
    code, found, _ = desk.rerun(member, "--state", "SUCCESS")
    assert (code, found["sent"]) == (Exit.OK, [member])
    desk.until(lambda found: sum(e.task == member and e.kind == "success" for e in found) == 2)
    other = chord([desk.app.fails_until.s(str(there), n) for n in range(2)])(desk.app.listed.s())
    other.get(timeout=PATIENCE_S)  # the chord processor has seen what came before
    assert sum(e.task == body.id and e.kind == SENT for e in desk.events()) == 1


def test_what_somebody_announced_and_never_sent_is_sent_as_that_run_once_their_time_is_over(
    desk, tmp_path, monkeypatch
):
    """As after a kill between the announcement and the broker."""
    there = tmp_path / "there"
    (result,) = failed(desk, there, 1)
    there.touch()
    desk.until(lambda found: any(e.kind == SENT and e.task == result.id and e.attempt == 1 for e in found))
    monkeypatch.setattr(resending, "LEASE_S", 1.0)
    monkeypatch.setattr(resending, "CLOCKS_S", 0.5)
    monkeypatch.setattr(resending.Resending, "_send", lambda *_: pytest.fail("killed"))
    with pytest.raises(BaseException, match="killed"):
        desk.rerun(result.id)
    (announced,) = [e for e in desk.events() if e.task == result.id and e.kind == RERUN]
    monkeypatch.undo()
    monkeypatch.setattr(resending, "LEASE_S", 1.0)
    monkeypatch.setattr(resending, "CLOCKS_S", 0.5)
    said = desk("rerun", result.id, "--dry-run")[2]
    assert "announced, and perhaps not sent" in said
    code, found, _ = desk.rerun(result.id)
    assert (code, found["sent"]) == (Exit.OK, [result.id])
    life = [e for e in desk.events() if e.task == result.id]
    (again,) = [e for e in life if e.kind == SENT and e.role == "operator"]
    assert again.run == announced.run
    assert again.sent_at - announced.at > 1_500


def test_two_operators_at_once_send_none_twice_and_the_killed_ones_rest_is_sent(desk, tmp_path):
    count = 60
    there = tmp_path / "there"
    results = failed(desk, there, count)
    desk.until(lambda found: sum(e.kind == SENT and e.attempt == 1 for e in found) >= count)
    there.touch()
    until = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 1))
    command = desk.fleet.celery(
        "pipeline", "rerun", "--state", "FAILURE", "--name", "*.fails_until", "--until", until,
        "--reason", "both", "--yes", "--json", "--rate", "40",
    )  # fmt: skip
    operators = []
    for n in range(2):
        with (tmp_path / f"operator-{n}.log").open("wb") as output:
            operators.append(native.popen(command, output=output, env=desk.fleet.environment))
    ids = {result.id for result in results}
    desk.until(lambda found: any(e.kind == RERUN and e.task in ids for e in found))
    operators[0].send_signal(signal.SIGKILL)
    for each in operators:
        each.wait(timeout=PATIENCE_S)
    done = desk.fleet.run(*command[command.index("pipeline") :])
    assert done.returncode in (Exit.OK, Exit.NOT_FOUND), done.stderr
    found = desk.until(lambda found: len({e.task for e in found if e.kind == "success"} & ids) == count)
    said = [e.task for e in found if e.kind == SENT and e.role == "operator" and e.task in ids]
    assert len(said) == len(set(said))
    runs = {(e.task, e.run) for e in found if e.kind == RERUN and e.task in ids}
    assert len(runs) == count
