"""Auditing a real fleet by command line: docs/audit.md as it stands, and what the commands say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner
from confluent_kafka import Producer

from celery_kafka_backend import chord_records, codec, events, order, timeline, topics
from celery_kafka_backend.cli import pipeline, sources
from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.events import Event
from celery_kafka_backend.result import KafkaResult
from tests.integration.conftest import Fleet
from tests.integration.kafka_topics import must_arrive
from tests.patience import PATIENCE_S, until

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
            one.get(timeout=PATIENCE_S, propagate=False)
        forgotten = app.send_task("fleet_app.add", (1, 1))
        forgotten.get(timeout=PATIENCE_S)
        world = {"FORGET": forgotten.id, "TASK": task.id, "ROOT": root.id, "GROUP": "", "app": app}

        def settled():
            found = told(fleet, "history", root.id, "--tree", "--json")
            world["tree"] = json.loads(found.stdout or "[]")
            return [node["state"] for node in world["tree"]] == ["success"] * 5

        until(settled, lambda: world["tree"])
        until(lambda: timeline.ended(KafkaResult.of(task).history()))
        members = [node["task"] for node in world["tree"] if node["name"] == "fleet_app.add"]
        world["GROUP"] = KafkaResult.of(app.AsyncResult(members[0])).history()[0].group
        fleet.world = world
        yield fleet


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
    assert done.output or list(tmp_path.iterdir())


FAULTS = {"unfinished", "worker-gone", "purged", "two-results", "late-state", "stuck-chord", "clock-skew"}


def faults(prefix):
    """A log with one fault of each kind, and a task that is whole."""
    now = time.time_ns() // 1_000_000
    run = order.run_at(now)

    def event(kind, ago_s, task, role=events.CHILD, **more):
        at = now - int(ago_s * 1000)
        common = {"host": "h1", "run": run, "queue": "q", "name": "shop.pay", "worker": "w@h1", "pid": 7, **more}
        return Event(id=uuid.uuid4().hex, kind=kind, task=task, at=at, hlc=at, role=role, **common)

    def success(ago_s, task, result):
        document = json.dumps({"status": "SUCCESS", "result": result, "task_id": task}).encode()
        return event(events.SUCCESS, ago_s, task, doc=msgspec.Raw(document), state="SUCCESS")

    return [
        event(events.SENT, 9000, "unfinished", events.CLIENT, queue="other", worker=None),
        event(events.RECEIVED, 9000, "worker-gone", events.PARENT, pid=1, sent_at=now - 9_000_000),
        event(events.STARTED, 8999, "worker-gone"),
        event(events.SENT, 8000, "purged", events.CLIENT, worker=None),
        event(events.RECEIVED, 5, "two-results", events.PARENT, pid=2, sent_at=now - 6_000),
        success(4, "two-results", 1),
        success(3, "two-results", 2),
        success(2, "late-state", 1),
        event(events.STARTED, 1, "late-state"),
        event(events.SENT, -60, "skewed", events.CLIENT, host="h9", worker=None),
        success(0, "skewed", 1),
        success(0, "whole", 1),
    ]  # fmt: skip


@pytest.fixture
def broken(kafka, topic_prefix, tmp_path):
    """An app whose log has one fault of each kind; nobody folds it."""
    small = {"replication_factor": 1, "min_insync_replicas": 1, "partitions": 4, "chord_partitions": 2}
    app = Celery(
        "proj",
        broker="memory://",
        backend=f"kafka://{kafka.bootstrap}/?view=sqlite:///{tmp_path}/v.db",
        set_as_current=False,
    )
    app.conf.kafka_backend_settings = {"topic_prefix": topic_prefix, **small}
    made = SimpleNamespace(app=SimpleNamespace(app=app), bootstrap=kafka.bootstrap)
    assert told(made, "init").exit_code == 0
    producer = Producer(
        {"bootstrap.servers": kafka.bootstrap, "partitioner": "murmur2_random", "on_delivery": must_arrive}
    )
    for event in faults(topic_prefix):
        producer.produce(
            topics.task_events(topic_prefix), codec.encode(event), event.task, headers=codec.headers(event)
        )
    declared = chord_records.Declared(
        group="g", generation=1, body=b"{}", body_task_id="stuck-chord", body_name="total"
    )
    key, value = chord_records.encode(declared)
    producer.produce(topics.chords(topic_prefix), value, key, topics.chord_partition("g", 2))
    assert producer.flush(PATIENCE_S) == 0
    return made


def test_a_log_with_one_fault_of_each_kind_has_these_findings(broken):
    found = []

    def all_there():  # the chord is stuck once its bound has passed, by the broker's clock
        done = told(broken, "findings", "--bound", "1s", "--json")
        assert done.exit_code == Exit.DIFFERENT, done.output
        found[:] = [json.loads(line) for line in done.stdout.splitlines()]
        return {one["kind"] for one in found} >= FAULTS

    until(all_there, lambda: found)
    by_kind = {one["kind"]: one.get("task") or one["host"] for one in found}
    assert by_kind == {**{kind: kind for kind in FAULTS}, "clock-skew": "h9"}
    assert all(one["events"] for one in found if one["kind"] != "stuck-chord")
    table = told(broken, "findings").stdout
    assert "unfinished: 1" in table
    assert "stuck-chord" not in table  # not for an hour yet
    only = told(broken, "findings", "--kind", "purged", "--limit", "0").stdout
    assert "1 findings" in only


def test_findings_as_of_a_time_know_nothing_of_what_happened_after_it(broken):
    now = order.system_wall_ms()
    run = order.run_at(now - 9_000_000)
    log = topics.task_events(broken.app.app.conf.kafka_backend_settings["topic_prefix"])
    producer = Producer(
        {"bootstrap.servers": broken.bootstrap, "partitioner": "murmur2_random", "on_delivery": must_arrive}
    )
    for kind, at in ((events.SENT, now - 9_000_000), (events.SUCCESS, now - 10_000)):
        one = Event(id=kind, kind=kind, task="ended", name="shop.pay", queue="another", at=at, hlc=at, run=run)
        producer.produce(log, codec.encode(one), "ended")
    assert producer.flush(PATIENCE_S) == 0
    for until_ms, known in ((now - 30_000, True), (now, False)):
        then = datetime.fromtimestamp(until_ms / 1000, timezone.utc).isoformat()
        found = told(broken, "findings", "--until", then, "--kind", "unfinished", "--json").stdout.splitlines()
        assert ("ended" in {json.loads(line)["task"] for line in found}) == known


def test_what_reached_the_log_hours_late_is_found_there_once_or_said_to_be_left_out(broken, monkeypatch):
    now = order.system_wall_ms()
    late = Event(
        id="e1", kind=events.SENT, task="late", name="shop.late", at=now - 3 * 3_600_000, hlc=now - 3 * 3_600_000
    )
    log = topics.task_events(broken.app.app.conf.kafka_backend_settings["topic_prefix"])
    producer = Producer({"bootstrap.servers": broken.bootstrap, "on_delivery": must_arrive})
    for _ in range(2):
        producer.produce(log, codec.encode(late), "late")
    assert producer.flush(PATIENCE_S) == 0
    asked = ("search", "--log", "--since", "4h", "--until", "2h", "--name", "shop.late", "--json")
    done = told(broken, *asked)
    assert [each["task"] for each in json.loads(done.stdout)] == ["late"]
    assert done.stderr == ""
    exported = told(broken, "export", "--log", "--name", "shop.late").stdout.splitlines()
    assert [json.loads(line)["id"] for line in exported] == ["e1"]
    counts = told(broken, "history", "--log", "--as-of", "2h", "--window", "2h", "--json").stdout
    assert {"name": "shop.late", "state": "sent", "tasks": 1} in json.loads(counts)["counts"]
    monkeypatch.setattr(sources, "FEW", 0)
    assert "that reached Kafka over 60 min after --until are not looked at" in told(broken, *asked).stderr


def test_a_fleet_that_does_its_work_has_no_findings(audit):
    done = told(audit, "findings", "--bound", "10m")
    assert (done.exit_code, "nothing found" in done.stdout) == (Exit.OK, True), done.output


def test_what_is_forgotten_is_gone_from_the_view_and_the_report_says_what_remains(audit):
    app = audit.world["app"]
    task = app.send_task("fleet_app.add", (1, 2))
    assert task.get(timeout=PATIENCE_S) == 3
    found = json.loads(told(audit, "forget", task.id, "--json").stdout)
    (view,) = found["views"]
    assert (view["document"], app.AsyncResult(task.id).state) == ("gone", "PENDING")
    assert view["history"] >= 4
    assert view["history_until"] > time.time() * 1000
    assert found["log_until"] > time.time() * 1000
    drawn = told(audit, "forget", task.id, "--report")
    assert drawn.exit_code == 0
    assert "not erased: its events in" in drawn.stdout


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


def test_a_client_without_any_history_view_reads_the_log(audit):
    conf = audit.world["app"].conf
    backend = conf.result_backend.partition("?")[0] + "?view=memory://nothing"
    app = Celery("fleet", broker="memory://", backend=backend, set_as_current=False)
    app.conf.kafka_backend_settings = conf.kafka_backend_settings
    task = audit.world["TASK"]
    life = KafkaResult.of(audit.world["app"].AsyncResult(task)).history()
    blind = KafkaResult.of(app.AsyncResult(task))
    assert blind.history() == []
    assert blind.history(log=True) == life
    now = datetime.now(timezone.utc)
    assert blind.history(around=now) == life
    assert blind.history(around=now - timedelta(days=3)) == []
    done = told(SimpleNamespace(app=SimpleNamespace(app=app)), "search", "--state", "failure", "--json")
    assert [one["task"] for one in json.loads(done.stdout)] == [task]
    assert "memory://nothing has folded nothing yet" in done.stderr


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
    assert before.stdout.startswith(f"task  {task}")


def test_a_workflow_as_of_a_moment_has_what_had_begun_by_then_as_it_was(audit):
    root = audit.world["ROOT"]
    for node in audit.world["tree"]:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(node["at"] / 1000)) + f".{node['at'] % 1000:03d}"
        found = json.loads(told(audit, "history", root, "--tree", "--as-of", at, "--json").stdout)
        lives = {
            each["task"]: KafkaResult.of(audit.world["app"].AsyncResult(each["task"])).history()
            for each in audit.world["tree"]
        }
        then = {task: timeline.as_of(life, node["at"]) for task, life in lives.items()}
        assert {each["task"]: each["state"] for each in found} == {
            task: timeline.state(life) for task, life in then.items() if life
        }
        assert next(each for each in found if each["task"] == node["task"])["state"] == "success"
    (before,) = json.loads(told(audit, "history", root, "--tree", "--as-of", "2020-01-01", "--json").stdout)
    assert (before["task"], before["state"]) == (root, "unknown")


def test_a_retried_task_is_not_its_own_parent(audit):
    done = told(audit, "history", audit.world["TASK"])
    assert f"parent {audit.world['TASK']}" not in done.stdout
    (node,) = json.loads(told(audit, "history", audit.world["TASK"], "--tree", "--json").stdout)
    assert (node["parent"], node["attempts"]) == (None, 2)


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
    before = told(audit, "history", group, "--group", "--json", "--as-of", "2020-01-01")
    assert json.loads(before.stdout)["members"] == []


def test_a_generation_that_a_chord_does_not_have_is_not_shown(audit):
    (shown,) = json.loads(told(audit, "chord", audit.world["GROUP"], "--json").stdout)
    assert json.loads(told(audit, "chord", audit.world["GROUP"], "--json", "--generation", shown["generation"]).stdout)
    done = told(audit, "chord", audit.world["GROUP"], "--generation", "5")
    assert done.exit_code == Exit.NOT_FOUND
    assert f"there are {shown['generation']}" in done.stderr


def test_a_task_is_no_group(audit):
    done = told(audit, "history", audit.world["TASK"], "--group")
    assert done.exit_code == Exit.NOT_FOUND
    assert "is a task, and no group" in done.stderr


def test_counts_as_of_a_time_are_of_all_tasks_in_the_window(audit):
    for where in ((), ("--log",)):
        found = json.loads(told(audit, "history", "--as-of", "0s", "--window", "1h", "--json", *where).stdout)
        counts = {(row["name"], row["state"]): row["tasks"] for row in found["counts"]}
        assert counts["fleet_app.add", "success"] >= 3
        assert counts["shop.pay", "failure"] == 1
    none = json.loads(told(audit, "history", "--as-of", "2020-01-01", "--json").stdout)
    assert none["counts"] == []


def test_what_hosts_with_wrong_clocks_say_is_found_where_it_belongs(broken):
    now = order.system_wall_ms()
    ahead, behind = now + 300_000, now - 120_000

    def event(kind, at, task, parent=None, hlc=None, **more):
        where = {"root": "first", "parent": parent, "run": order.run_at(now), "name": f"shop.{task}"}
        return Event(
            id=f"{task} {kind}", kind=kind, task=task, at=at, hlc=hlc or at, host=f"h{at - now}", **where, **more
        )

    log = topics.task_events(broken.app.app.conf.kafka_backend_settings["topic_prefix"])
    producer = Producer(
        {"bootstrap.servers": broken.bootstrap, "partitioner": "murmur2_random", "on_delivery": must_arrive}
    )
    for one in (
        event(events.SENT, ahead, "second", "first"),
        event(events.SENT, ahead + 1, "third", "second"),
        event(events.STARTED, now, "third", "second", hlc=ahead + 2),
        event(events.SUCCESS, behind, "slow", hlc=now),
    ):
        producer.produce(log, codec.encode(one), one.task)
    assert producer.flush(PATIENCE_S) == 0

    tree = json.loads(told(broken, "history", "second", "--log", "--tree", "--json").stdout)
    assert [(node["task"], node["state"]) for node in tree] == [("second", "sent"), ("third", "started")]
    since = datetime.fromtimestamp(ahead / 1000, timezone.utc).isoformat()
    found = json.loads(told(broken, "search", "--log", "--root", "first", "--since", since, "--json").stdout)
    assert [each["task"] for each in found] == ["third", "second"]
    for moment, states in ((now - 1, set()), (now, {"success"})):
        then = datetime.fromtimestamp(moment / 1000, timezone.utc).isoformat()
        counts = json.loads(told(broken, "history", "--log", "--as-of", then, "--json").stdout)["counts"]
        assert {row["state"] for row in counts if row["name"] == "shop.slow"} == states


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
    said, _ = follower.communicate(timeout=PATIENCE_S)
    assert follower.returncode == 0
    kinds = [json.loads(line)["kind"] for line in said.splitlines()]
    assert (kinds[0], kinds[-1], len(kinds)) == (events.SENT, events.SUCCESS, 4)


def test_status_says_how_far_back_audit_and_replay_reach(audit):
    done = told(audit, "status", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (view,) = found["views"]
    first = KafkaResult.of(audit.world["app"].AsyncResult(audit.world["TASK"])).history()[0]
    assert found["log_kept_ms"] == 7 * 86_400_000
    assert view["keeps_history"]
    assert view["results_kept_s"] == 86_400
    assert 0 < view["history_from"] <= first.at
    drawn = told(audit, "status").stdout
    assert "audit and replay reach back to" in drawn
    assert "Kafka keeps them for 7.0 d" in drawn
    assert "results are kept for 24.0 h (result_expires), and their history as long: from" in drawn


def test_history_with_a_retention_of_its_own_is_told_wherever_it_matters(audit, monkeypatch):
    settings = audit.app.app.conf.kafka_backend_settings
    monkeypatch.setitem(settings, "history_retention_ms", 90 * 86_400_000)
    (view,) = json.loads(told(audit, "status", "--json").stdout)["views"]
    assert (view["results_kept_s"], view["history_kept_s"]) == (86_400, 90 * 86_400)
    assert (
        "results are kept for 24.0 h (result_expires), history for 90.0 d (history_retention_ms): from"
        in told(audit, "status").stdout
    )
    assert (
        "history stays 90.0 d, events 7.0 d: a view that is rebuilt lacks the older history"
        in told(audit, "doctor").stdout
    )
    (left,) = json.loads(told(audit, "forget", audit.world["FORGET"], "--json").stdout)["views"]
    assert left["history_until"] > (time.time() + 89 * 86_400) * 1000
    assert told(audit, "search", "--since", "100d").stderr == ""
    monkeypatch.setitem(settings, "history_retention_ms", 3_600_000)
    less = "keeps history for 60 min (history_retention_ms), the log for 7.0 d; --log"
    assert f"{less} reaches further" in told(audit, "search", "--since", "3h").stderr
    assert told(audit, "search", "--since", "30m").stderr == ""
    assert f"{less} may have more" in told(audit, "history", audit.world["TASK"]).stdout
    monkeypatch.delitem(settings, "history_retention_ms")
    less = "keeps history for 24.0 h (result_expires), the log for 7.0 d; --log"
    assert f"{less} reaches further" in told(audit, "search", "--since", "3d").stderr
    assert told(audit, "search", "--since", "3d", "--log").stderr == ""
    assert f"{less} may have more" in told(audit, "history", audit.world["TASK"]).stdout
    monkeypatch.setitem(settings, "history_retention_ms", 0)
    assert "history for ever (history_retention_ms)" in told(audit, "status").stdout


def test_who_wants_no_log_is_not_given_the_log(audit, tmp_path, monkeypatch):
    monkeypatch.setitem(audit.app.app.conf.kafka_backend_settings, "history", {"sqlite": False})
    for asked in (("--as-of", "0s"), (audit.world["GROUP"], "--group")):
        done = told(audit, "history", *asked, "--no-log")
        assert (done.exit_code, "leave out --no-log" in done.stderr) == (Exit.NOT_FOUND, True), done.output
