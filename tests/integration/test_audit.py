"""Auditing a real fleet by command line: docs/audit.md as it stands, and what the commands say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_kafka_backend import codec, events, timeline
from celery_kafka_backend.cli import pipeline
from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.result import KafkaResult
from tests.integration.conftest import Fleet

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

DOC = Path(__file__).parents[2] / "docs/audit.md"
COMMANDS = re.findall(r"^\$ celery -A proj (pipeline .*)$", DOC.read_text(), re.MULTILINE)
WORLD = """
app.conf.result_extended = True

class Declined(Exception):
    pass

@app.task(bind=True, name="shop.pay", max_retries=1)
def pay(self, order):
    time.sleep(0.15)
    if not self.request.retries:
        raise self.retry(countdown=0.05, exc=Declined("no funds"))
    raise Declined(f"{order}: no funds")

@app.task(name="shop.begin")
def begin(n):
    time.sleep(0.12)
    chord([add.s(i, i) for i in range(n)])(total.s())
"""


@pytest.fixture(scope="module")
def audit(kafka, redis_server, tmp_path_factory):
    """A fleet on a SQLite view, with a failed payment and a workflow that fans out and in."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "fleet_app.py").write_text((Path(__file__).parent / "fleet_app.py").read_text() + WORLD)
    with Fleet(
        kafka.bootstrap, redis_server.clean_database(), f"sqlite:///{folder / 'view.db'}", folder, {}, {}
    ) as fleet:
        fleet.environment["PYTHONPATH"] = str(folder)
        fleet.serve()
        app = fleet.app.app
        task = app.send_task("shop.pay", ("order-1717",))
        root = app.send_task("shop.begin", (3,))
        for one in (task, root):
            one.get(timeout=60, propagate=False)
        world = {"TASK": task.id, "ROOT": root.id, "GROUP": "", "app": app}

        def settled():
            found = told(fleet, "history", root.id, "--tree", "--json")
            world["tree"] = json.loads(found.stdout or "[]")
            return [node["state"] for node in world["tree"]] == ["success"] * 5

        until(settled, lambda: world)
        until(lambda: timeline.ended(KafkaResult.of(task).history()))
        members = [node["task"] for node in world["tree"] if node["name"] == "fleet_app.add"]
        world["GROUP"] = KafkaResult.of(app.AsyncResult(members[0])).history()[0].group
        fleet.world = world
        yield fleet


def until(holds, say=lambda: ""):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, say()
        time.sleep(0.2)


def told(fleet, *arguments):
    """Run a command as `celery -A … pipeline` does, in this process: a new one takes a second to start."""
    done = CliRunner().invoke(pipeline, arguments, obj=CLIContext(fleet.app.app, no_color=True, workdir=None))
    assert "Traceback (most" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_documentation_works(audit, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [audit.world[word[1:]] if word.startswith("$") else word for word in shlex.split(command)]
    done = told(audit, *words[1:])
    assert done.exit_code == 0, done.output
    assert done.stdout or list(tmp_path.iterdir())


def test_the_documentation_has_commands():
    assert len(COMMANDS) >= 20


def test_a_failed_payment_has_its_whole_history_from_the_view_and_from_the_log(audit):
    task = audit.world["TASK"]
    kinds = [
        events.SENT,
        events.RECEIVED,
        events.STARTED,
        events.RETRY,
        events.SENT,
        events.RECEIVED,
        events.STARTED,
        events.FAILURE,
    ]
    for where in ((), ("--log",), ("--log", "--around", "0s", "--window", "1h")):
        found = json.loads(told(audit, "history", task, "--json", *where).stdout)
        assert [one["kind"] for one in found] == kinds
        assert [one.get("attempt", 0) for one in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [one.kind for one in KafkaResult.of(audit.world["app"].AsyncResult(task)).history()] == kinds
    table = told(audit, "history", task).stdout
    assert "Declined: order-1717: no funds" in table
    assert "retry 1" in table
    assert re.search(r"started +1 +child worker@\S+ \[\d+\]", table), table


def test_a_time_at_which_nothing_was_written_finds_nothing_and_says_where_it_looked(audit):
    done = told(audit, "history", audit.world["TASK"], "--log", "--around", "2020-01-01", "--window", "1m")
    assert done.exit_code == Exit.NOT_FOUND
    assert "between 2019-12-31 23:59" in done.stderr or "between 2020" in done.stderr
    assert "leave out --around" in done.stderr


def test_the_workflow_below_a_task_is_a_tree(audit):
    names = [(node["depth"], node["name"]) for node in audit.world["tree"]]
    assert names[0] == (0, "shop.begin")
    # A chord's body is the child of the member that was last in: that is what Celery says.
    assert sorted(names[1:]) == [(1, "fleet_app.add")] * 3 + [(2, "fleet_app.total")]
    from_log = json.loads(told(audit, "history", audit.world["ROOT"], "--tree", "--json", "--log").stdout)
    assert [node["task"] for node in from_log] == [node["task"] for node in audit.world["tree"]]


def test_states_as_of_every_moment_of_a_life(audit):
    task = audit.world["TASK"]
    life = KafkaResult.of(audit.world["app"].AsyncResult(task)).history()
    for n in (0, 3, len(life) - 1):
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(life[n].hlc / 1000)) + f".{life[n].hlc % 1000:03d}"
        found = json.loads(told(audit, "history", task, "--as-of", at, "--json").stdout)
        assert found["state"] == timeline.state(timeline.as_of(life, life[n].hlc))
        assert found["events"] == [json.loads(codec.encode(one)) for one in life if one.hlc <= life[n].hlc]
    before = told(audit, "history", task, "--as-of", "2020-01-01")
    assert (before.exit_code, "unknown" in before.stdout) == (0, True)


def test_a_chord_as_of_now_and_as_of_before_it_was(audit):
    group = audit.world["GROUP"]
    for where in ((), ("--log",)):
        now = json.loads(told(audit, "history", group, "--group", "--json", *where).stdout)
        assert now["counts"] == {"success": 3}
        assert now["chord"].startswith("chord: fired")
    declared = KafkaResult.of(audit.world["app"].AsyncResult(now["members"][0]["task"])).history()[0].hlc
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(declared / 1000)) + f".{declared % 1000:03d}"
    then = json.loads(told(audit, "history", group, "--group", "--json", "--as-of", at).stdout)
    assert "success" not in then["counts"]
    assert then["chord"].startswith("chord: waiting")


def test_counts_as_of_a_time_are_of_all_tasks_in_the_window(audit):
    for where in ((), ("--log",)):
        found = json.loads(told(audit, "history", "--as-of", "0s", "--window", "1h", "--json", *where).stdout)
        counts = {(row["name"], row["state"]): row["tasks"] for row in found["counts"]}
        assert counts["fleet_app.add", "success"] == 3
        assert counts["shop.pay", "failure"] == 1
    none = json.loads(told(audit, "history", "--as-of", "2020-01-01", "--json").stdout)
    assert none["counts"] == []


def test_the_view_and_the_log_find_the_same(audit):
    for asked in (
        ("--state", "failure"), ("--name", "shop.*"), ("--text", "ORDER-1717", "--retries", "1"), ("--group", audit.world["GROUP"]),
        ("--min-duration", "100ms"), ("--exception", "*Declined"), ("--root", audit.world["ROOT"]),
    ):  # fmt: skip
        answers = [
            {one["id"] for one in json.loads(told(audit, "search", *asked, "--json", *where).stdout)}
            for where in (("--view", "sqlite"), ("--log",))
        ]
        assert answers[0] == answers[1] != set()


def test_nothing_found_is_an_exit_code_and_a_word(audit):
    done = told(audit, "search", "--name", "no.such", "--json")
    assert (done.exit_code, done.stdout) == (Exit.NOT_FOUND, "[]\n")
    assert "nothing of that kind in sqlite:///" in done.stderr


def test_an_export_holds_what_was_recorded_in_each_format(audit, tmp_path):
    from pyarrow import parquet  # noqa: PLC0415 - an extra

    found = {}
    for form in ("jsonl", "cloudevents", "parquet"):
        path = tmp_path / f"out.{form}"
        done = told(audit, "export", "--name", "shop.pay", "--format", form, "-o", str(path))
        assert done.exit_code == 0, done.stderr
        assert "8 events from sqlite" in done.stderr
        found[form] = path
    lines = found["jsonl"].read_bytes().splitlines()
    ids = [codec.decode(line).id for line in lines]
    envelopes = [json.loads(line) for line in found["cloudevents"].read_bytes().splitlines()]
    assert [one["id"] for one in envelopes] == ids
    assert {one["type"] for one in envelopes} >= {"celery.task.sent", "celery.task.failure"}
    assert envelopes[0]["data"] == json.loads(lines[0])
    assert (envelopes[0]["specversion"], envelopes[0]["subject"]) == ("1.0", audit.world["TASK"])
    rows = parquet.read_table(found["parquet"]).to_pylist()
    assert [row["event"].encode() for row in rows] == lines
    assert rows[-1]["exception"] == "fleet_app.Declined"
    assert rows[-1]["at"].timestamp() * 1000 == codec.decode(lines[-1]).at
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.cloudevents", "out.parquet"}


def test_an_export_to_where_nothing_can_be_written_is_refused(audit, tmp_path):
    done = told(audit, "export", "-o", str(tmp_path / "no" / "such" / "file"))
    assert done.exit_code == Exit.CONFIGURATION
    assert "-o" in done.stderr


def test_following_a_task_shows_what_comes_until_it_has_ended(audit):
    napping = audit.world["app"].send_task("fleet_app.nap", (2,))
    follower = subprocess.Popen(
        audit.celery("pipeline", "history", napping.id, "--follow", "--json"),
        env=audit.environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    kinds = [json.loads(line)["kind"] for line in said.splitlines()]
    assert (kinds[0], kinds[-1], len(kinds)) == (events.SENT, events.SUCCESS, 4)
