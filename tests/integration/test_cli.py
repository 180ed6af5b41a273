"""`celery -A proj pipeline …` as a user types it: a process, real servers, exit codes, messages, no secrets."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
import uuid

import msgspec
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from celery_kafka_backend import codec, events, order, rights, topics
from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.events import Event
from tests.integration.kafka_topics import create, must_arrive
from tests.patience import PATIENCE_S, until
from tests.services import native

from . import locked_kafka

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

SECRET = "hunter2"
APP = textwrap.dedent("""
    import json, os
    from celery import Celery
    app = Celery(os.environ["APP_NAME"], broker="memory://", backend=os.environ["BACKEND"])
    app.conf.kafka_backend_settings = json.loads(os.environ["SETTINGS"])
""")


class Shell:
    """A folder with a user's module, and the command line in it."""

    def __init__(self, folder, bootstrap, view, prefix):
        self.folder = folder
        self.view = view
        self.prefix = prefix
        self.bootstrap = bootstrap
        (folder / "proj.py").write_text(APP)

    def environment(self, name="proj", backend=None, **settings):
        small = {"replication_factor": 1, "min_insync_replicas": 1, "partitions": 4, "chord_partitions": 2}
        return {
            **os.environ,
            "APP_NAME": name,
            "BACKEND": backend or f"kafka://{self.bootstrap}/?view={self.view}",
            "SETTINGS": json.dumps({"topic_prefix": self.prefix, **small, **settings}),
        }

    def __call__(self, *arguments, command="pipeline", name="proj", backend=None, within_s=PATIENCE_S, **settings):
        done = subprocess.run(
            [sys.executable, "-m", "celery", "-A", "proj", command, *arguments],
            cwd=self.folder,
            env=self.environment(name, backend, **settings),
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
        done.said = done.stdout + done.stderr
        assert "Traceback" not in done.said, done.said
        assert SECRET not in done.said, done.said
        return done

    def admin(self):
        return AdminClient({"bootstrap.servers": self.bootstrap})

    def append(self, *found, app="proj"):
        producer = Producer(
            {"bootstrap.servers": self.bootstrap, "partitioner": "murmur2_random", "on_delivery": must_arrive}
        )
        for event in found:
            producer.produce(
                topics.task_events(self.prefix),
                key=event.task.encode(),
                value=codec.encode(event),
                headers=codec.headers(event, app),
            )
        assert producer.flush(PATIENCE_S) == 0


@pytest.fixture
def shell(tmp_path, kafka, redis_url, topic_prefix):
    return Shell(tmp_path, kafka.bootstrap, redis_url, topic_prefix)


def life(task, *, wall=None, role=events.CHILD):
    """A task that was sent, started, and succeeded."""
    wall = wall or time.time_ns() // 1_000_000
    run = order.run_at(wall)
    common = {"task": task, "run": run, "host": "h1", "pid": 7, "name": "proj.add", "queue": "celery", "sent_at": wall}
    document = json.dumps(
        {
            "status": "SUCCESS",
            "result": 3,
            "traceback": None,
            "children": [],
            "date_done": "2026-01-01",
            "task_id": task,
        }
    )
    return [
        Event(id=uuid.uuid4().hex, kind="sent", at=wall, hlc=wall, role="client", **common),
        Event(id=uuid.uuid4().hex, kind="started", at=wall + 5, hlc=wall + 5, role=role, started_at=wall + 5, **common),
        Event(
            id=uuid.uuid4().hex,
            kind="success",
            at=wall + 25,
            hlc=wall + 25,
            role=role,
            key=order.order_key(order.Rank.SUCCEEDED, wall + 25, run),
            state="SUCCESS",
            doc=msgspec.Raw(document.encode()),
            runtime_s=0.02,
            worker="celery@h1",
            **common,
        ),
    ]


class Running:
    """A `pipeline run` in the background."""

    def __init__(self, shell, *arguments, until="assigned", name="proj", **settings):
        self.log = shell.folder / f"run-{uuid.uuid4().hex[:6]}.log"
        command = [sys.executable, "-m", "celery", "-A", "proj", "pipeline", "run", *arguments]
        with self.log.open("wb") as output:
            self.process = native.popen(
                command, output=output, env=shell.environment(name, **settings), cwd=shell.folder
            )
        self.until(until)

    def said(self):
        return self.log.read_text(errors="replace")

    def until(self, text):
        def heard():
            ended = self.process.poll()
            found = text in self.said()
            assert found or ended is None, self.said()
            return found

        until(heard, lambda: f"{text!r}:\n{self.said()}")

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        said = self.said()
        assert "Traceback" not in said, said
        assert SECRET not in said
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        native.end(self.process)


# -- init --------------------------------------------------------------------------------------


def test_init_creates_the_topics_and_check_finds_nothing_to_say(shell):
    before = shell("init", "--check")
    assert before.returncode == Exit.TOPICS_WRONG
    assert before.stdout.count(": missing") == 5
    made = shell("init")
    assert made.returncode == 0, made.said
    assert "cleanup.policy = compact" in made.stdout
    assert "retention.ms = 604800000" in made.stdout
    after = shell("init", "--check")
    assert (after.returncode, after.stdout) == (0, "5 topics are as they should be.\n")
    assert shell("init").returncode == 0


def test_init_grows_the_log_only_when_asked_and_the_chords_never(shell):
    assert shell("init").returncode == 0
    more = {"partitions": 6, "chord_partitions": 5}
    check = shell("init", "--check", **more)
    assert check.returncode == Exit.TOPICS_WRONG
    assert f"{shell.prefix}.task-events: 4 partitions, wanted 6" in check.stdout
    shell("init", **more)
    assert "4 partitions, wanted 6" in shell("init", "--check", **more).stdout
    grown = shell("init", "--grow", **more)
    assert grown.returncode == Exit.TOPICS_WRONG
    assert f"{shell.prefix}.chords: 2 partitions, wanted 5" in grown.stderr
    assert "chord_partitions'] = 2" in grown.stderr
    assert len(shell.admin().list_topics(timeout=PATIENCE_S).topics[topics.chords(shell.prefix)].partitions) == 2
    assert shell("init", "--check", partitions=6).returncode == 0
    fewer = shell("init", "--check", partitions=3)
    assert fewer.returncode == 0  # topics never shrink, so more than wanted is fine
    assert "6 partitions, wanted 3" in fewer.stdout


def test_init_sets_what_differs_only_when_asked(shell):
    log = NewTopic(topics.task_events(shell.prefix), 4, 1, config={"cleanup.policy": "compact"})
    create(shell.admin(), log)
    done = shell("init")
    assert done.returncode == Exit.TOPICS_WRONG
    assert "cleanup.policy = compact, wanted delete  (init --alter sets it)" in done.stderr
    altered = shell("init", "--alter")
    assert altered.returncode == 0, altered.said
    assert shell("init", "--check").returncode == 0


def test_more_copies_than_brokers_is_refused_with_the_setting_and_the_way_out(shell):
    done = shell("init", replication_factor=3, min_insync_replicas=2)
    assert done.returncode == Exit.TOPICS_WRONG
    assert "kafka_backend_settings['replication_factor'] = 3" in done.stderr
    assert "has 1 broker" in done.stderr
    assert "--replication 1" in done.stderr
    assert shell("init", "--replication", "1", replication_factor=3, min_insync_replicas=2).returncode == 0


# -- one prefix, one app -----------------------------------------------------------------------


def test_a_second_app_on_a_prefix_is_refused(shell):
    assert shell("init").returncode == 0
    for command, arguments in (
        ("pipeline", ["init"]),
        ("pipeline", ["run"]),
        ("pipeline", ["doctor"]),
        ("worker", ["-P", "solo"]),
    ):
        done = shell(*arguments, command=command, name="other")
        assert done.returncode == Exit.FOREIGN_LOG, done.said
        assert "'proj'" in done.said
        assert "'other'" in done.said
        assert "topic_prefix" in done.said
    assert shell("init").returncode == 0


def test_a_renamed_app_takes_its_topics_along(shell):
    assert shell("init").returncode == 0
    done = shell("init", "--take-over", name="new")
    assert done.returncode == 0, done.said
    assert "they were 'proj''s" in done.stdout
    assert shell("init", name="new").returncode == 0
    assert shell("init").returncode == Exit.FOREIGN_LOG


def test_workers_events_tell_whose_log_it_is_where_nobody_has_claimed_it(shell):
    create(
        shell.admin(), *(NewTopic(t.name, t.partitions, 1, config=t.config) for t in topics.wanted(_settings(shell)))
    )
    shell.append(*life("t1")[:1], app="web")  # a client with another name is no second app
    assert shell("init", name="web2").returncode == 0
    shell.append(*life("t2"), app="theirs")
    assert shell("doctor", name="web2").stdout.count("workers of the app 'theirs'") == 1


def test_an_unclaimed_log_with_another_apps_events_is_refused(shell):
    create(
        shell.admin(), *(NewTopic(t.name, t.partitions, 1, config=t.config) for t in topics.wanted(_settings(shell)))
    )
    shell.append(*life("t2"), app="theirs")
    done = shell("run")
    assert done.returncode == Exit.FOREIGN_LOG
    assert "its workers write the events" in done.stderr


def _settings(shell):
    from celery_kafka_backend.settings import parse  # noqa: PLC0415

    return parse(
        f"kafka://{shell.bootstrap}/?view=memory://",
        {"topic_prefix": shell.prefix, "replication_factor": 1, "min_insync_replicas": 1, "partitions": 4, "chord_partitions": 2},
    )  # fmt: skip


# -- run, status, history, replay, verify ----------------------------------------------------------


def test_from_run_to_verify(shell, tmp_path):
    assert shell("init").returncode == 0
    lonely = shell("status")
    assert lonely.returncode == Exit.NOBODY_FOLDS
    assert "nobody folds" in lonely.stdout
    assert "Start `celery -A proj pipeline run`" in lonely.stdout
    shell.append(*life("t1"), *life("t2"))
    behind = json.loads(shell("status", "--json").stdout)
    assert (behind["views"][0]["lag_events"], behind["verdict"]) == (6, "nobody_folds")
    assert behind["views"][0]["lag_seconds"] > 0
    with Running(shell) as running:
        assert "processors of the app proj" in running.said()
        status = wait_for(
            lambda: json.loads(shell("status", "--json").stdout), lambda s: not s["views"][0]["lag_events"]
        )
        assert status["exit_code"] == 0
        assert status["events"] == 6
        assert status["views"][0]["folders"][0]["host"]
        assert status["chords"]["folders"]
        assert status["oldest"] <= status["latest"]
        drawn = shell("status")
        assert drawn.returncode == 0
        assert "up to date" in drawn.stdout
        assert running.stop() == 0
    assert "stopped" in running.said()
    assert shell("status").returncode == Exit.NOBODY_FOLDS

    table = shell("history", "t1")
    assert table.returncode == 0
    assert re.search(r"success +0 +child celery@h1 \[7\] +celery +20 ms +3", table.stdout), table.stdout
    assert "5 ms" in table.stdout  # its wait in the queue
    assert "3 events, from the log at" in table.stdout
    told = json.loads(shell("history", "t1", "--json").stdout)
    assert [event["kind"] for event in told] == ["sent", "started", "success"]
    assert shell("history", "t1", "--no-log").returncode == Exit.NOT_FOUND
    assert shell("history", "nobody").returncode == Exit.NOT_FOUND

    replay_and_verify(shell, tmp_path / "copy.db")


def replay_and_verify(shell, path):
    sqlite = f"sqlite:///{path}"
    replayed = shell("replay", "--to", sqlite)
    assert replayed.returncode == 0, replayed.said
    assert "6 events" in replayed.stdout
    assert shell("history", "t1", "--no-log", backend=f"kafka://{shell.bootstrap}/?view={sqlite}").returncode == 0
    assert "0 events" in shell("replay", "--to", sqlite, "--continue", "--quiet").stdout
    documents = ("verify", "--view", "redis", "--against", sqlite)
    same = shell(*documents, history={"redis": True})
    assert same.returncode == Exit.DIFFERENT  # the live view keeps no history
    assert re.search(r"document +2 +2 +\w{32} +\w{32} +yes", same.stdout), same.stdout
    assert shell(*documents).returncode == 0  # it is not said to keep any
    held = shell("verify", "--view", "redis", "--against", "log")
    assert (held.returncode, "The view is what the log says." in held.stdout) == (0, True), held.said
    assert f"{topics.task_events(shell.prefix)}:" in held.stdout.partition("as of")[2]
    with sqlite3.connect(path) as db:
        db.execute("UPDATE ckb_task SET document = ? WHERE task_id = 't1'", (b"{}",))
    spoilt = shell(*documents)
    assert re.search(r"document +2 +2 +\w{32} +\w{32} +no", spoilt.stdout), spoilt.stdout
    told = json.loads(shell(*documents, "--json").stdout)
    assert [(one["table"], one["key"], one["columns"]) for one in told["differences"]] == [
        ("document", "t1", ["document"])
    ]
    assert told["partitions"]
    assert spoilt.returncode == Exit.DIFFERENT


def test_two_equal_views_verify(shell, tmp_path):
    assert shell("init").returncode == 0
    shell.append(*life("t1"))
    a, b = (f"sqlite:///{tmp_path}/{name}.db" for name in "ab")
    for url in (a, b):
        assert shell("replay", "--to", url).returncode == 0
    done = shell("verify", "--view", a, "--against", b)
    assert (done.returncode, "The views are the same." in done.stdout) == (0, True)
    with sqlite3.connect(tmp_path / "b.db") as db:
        db.execute("UPDATE celery_taskmeta SET status = 'LOST'")
        db.execute("UPDATE ckb_task SET workers = X'07'")
    for other in (a, "log"):
        done = shell("verify", "--view", b, "--against", other)
        assert done.returncode == Exit.DIFFERENT, done.said
        assert "native.status: \"'LOST', not 'SUCCESS'\"  |  -" in done.stdout, done.stdout
        assert 'unreadable: "TypeError: a bytes-like object' in done.stdout, done.stdout


def test_ctrl_c_stops_run_cleanly(shell):
    assert shell("init").returncode == 0
    with Running(shell) as running:
        assert running.stop(signal.SIGINT) == 0


def test_two_processes_per_view_share_the_partitions(shell):
    assert shell("init").returncode == 0
    with Running(shell, "--processes", "2", "--no-chords"):

        def sharers():
            status = json.loads(shell("status", "--json", "--no-chords").stdout)
            log = topics.task_events(shell.prefix)
            return [
                held
                for one in status["views"][0]["folders"]
                if (held := [p for p in one["partitions"] if p.startswith(log)])
            ]

        held = wait_for(sharers, lambda found: len(found) == 2)
        assert sorted(len(one) for one in held) == [2, 2]


def test_a_processor_that_keeps_crashing_ends_all_with_its_own_code(shell, tmp_path):
    assert shell("init").returncode == 0
    # The module can be imported by the command, and not by the chord processor's own process.
    (tmp_path / "proj.py").write_text(
        APP + "\nimport multiprocessing\nif multiprocessing.parent_process(): raise RuntimeError('broken app')\n"
    )
    done = shell_without_traceback_check(shell, "run", "--chords-only")
    assert done.returncode == Exit.PROCESSORS_CRASHED, done.stderr
    assert "giving up" in done.stderr


def shell_without_traceback_check(shell, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", "proj", "pipeline", *arguments],
        cwd=shell.folder,
        env=shell.environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def wait_for(read, holds):
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = read()
        if holds(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


# -- doctor ------------------------------------------------------------------------------------


def test_doctor_finds_all_well(shell):
    assert shell("init").returncode == 0
    shell.append(*life("t1"))
    with Running(shell):
        wait_for(lambda: json.loads(shell("status", "--json").stdout), lambda s: not s["views"][0]["lag_events"])
        done = wait_for(lambda: shell("doctor", "--json"), lambda d: "All is well" in d.stdout)
    found = json.loads(done.stdout)
    assert {one["subject"].split()[0] for one in found["findings"]} >= {
        "versions", "delivery", "kafka", "topics", "rights", "app", "clocks", "dead", "processors", "view",
    }  # fmt: skip
    assert done.returncode == 0


def test_doctor_says_whose_clock_is_ahead(shell):
    assert shell("init").returncode == 0
    shell.append(*life("t1", wall=time.time_ns() // 1_000_000 + 3_600_000))
    done = shell("doctor")
    assert "h1: 60 min ahead of the broker" in done.stdout


def test_doctor_names_a_topic_that_is_compacted(shell):
    assert shell("init").returncode == 0
    done = shell("doctor", retention_ms=3_600_000)
    assert done.returncode == Exit.TOPICS_WRONG
    assert "retention.ms = 604800000, wanted 3600000" in done.stdout
    assert "Not well: topics." in done.stdout


# -- bad input ---------------------------------------------------------------------------------


def test_run_without_topics_says_init(shell):
    done = shell("run")
    assert done.returncode == Exit.TOPICS_WRONG
    assert topics.task_events(shell.prefix) in done.stderr
    assert "pipeline init" in done.stderr


@pytest.mark.parametrize("command", ["run", "init", "status"])
def test_a_wrong_address_is_named_with_its_setting(shell, command):
    backend = f"kafka://no-such-host.invalid:9092/?view=redis://:{SECRET}@127.0.0.1:1/0"
    done = shell(command, "--timeout", "2", backend=backend)
    assert done.returncode == Exit.KAFKA_UNREACHABLE
    assert "no-such-host.invalid:9092 within 2 s" in done.stderr
    assert "result_backend" in done.stderr
    assert "resolve" in done.stderr


def test_a_view_that_is_away_is_named(shell):
    assert shell("init").returncode == 0
    done = shell("run", backend=f"kafka://{shell.bootstrap}/?view=redis://:{SECRET}@127.0.0.1:1/0")
    assert done.returncode == Exit.VIEW_UNUSABLE
    assert "redis://:**@127.0.0.1:1/0" in done.stderr
    status = shell("status", "--no-chords", backend=f"kafka://{shell.bootstrap}/?view=redis://:{SECRET}@127.0.0.1:1/0")
    assert "cannot be read" in status.stdout
    assert "up to date" not in status.stdout


def test_a_corrupted_sqlite_file_is_named(shell, tmp_path):
    assert shell("init").returncode == 0
    (tmp_path / "bad.db").write_bytes(b"this is not a database" * 100)
    done = shell("run", backend=f"kafka://{shell.bootstrap}/?view=sqlite:///{tmp_path}/bad.db")
    assert done.returncode == Exit.VIEW_UNUSABLE
    assert "bad.db" in done.stderr
    assert "SQLite" in done.stderr


def test_the_banner_hides_passwords(shell):
    assert shell("init").returncode == 0
    host = shell.view.removeprefix("redis://")
    with Running(shell, "--no-chords", view_options={}) as running:
        assert f"view    redis://{host}" in running.said()


# -- rights ------------------------------------------------------------------------------------


@pytest.fixture
def locked_shell(tmp_path, locked, redis_url, topic_prefix):
    made = Shell(tmp_path, locked.open, redis_url, topic_prefix)
    assert made("init").returncode == 0
    made.bootstrap = locked.locked
    made.server = locked
    return made


def test_a_wrong_password_is_told_from_a_wrong_address(locked_shell, locked):
    done = locked_shell("run", "--timeout", "3", client=locked.client(password=SECRET))
    assert done.returncode == Exit.RIGHTS_MISSING, done.said
    assert "kafka_backend_settings['client']" in done.stderr


def test_missing_rights_are_named_and_the_printed_ones_are_enough(locked_shell, locked):
    shell, prefix, client = locked_shell, locked_shell.prefix, locked.client()
    blind = shell("run", client=client)
    assert blind.returncode == Exit.TOPICS_WRONG  # Kafka does not show topics without Describe
    assert "does not show it to us" in blind.stderr
    assert "init --print" in blind.stderr
    refused = shell("init", client=client)
    assert refused.returncode == Exit.RIGHTS_MISSING, refused.said
    assert "init --print" in refused.stderr
    for topic in (topics.task_events(prefix), topics.chords(prefix), topics.dead_letters(prefix)):
        locked.grant(locked_kafka.USER, "topic", topic, "Describe")
    lacking = shell("run", client=client)
    assert lacking.returncode == Exit.RIGHTS_MISSING
    assert f"User:{locked_kafka.USER} lacks Read on topic {topics.task_events(prefix)}" in lacking.stderr
    for right in rights.rights(prefix):
        if right.role == rights.PROCESSOR:
            locked.grant(locked_kafka.USER, right.resource, right.name, right.operation)
    with Running(shell, client=client) as running:
        running.until(f"{prefix}.chords")
        assert running.stop() == 0
