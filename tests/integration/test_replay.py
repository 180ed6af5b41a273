"""Replay on a real Kafka: killed again and again, by several processes, of a part of the log, of some tasks; into stores in trouble."""

from __future__ import annotations

import random
import re
import sqlite3
import sys
import time
import uuid
from pathlib import Path

import msgspec
import psutil
import pytest
import redis
from confluent_kafka import Producer

from celery_kafka_backend import codec, events, order, topics
from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.events import Event
from celery_kafka_backend.processors import marks
from celery_kafka_backend.processors.plan import Target, begin, prepare
from celery_kafka_backend.processors.replay import feed, replay
from celery_kafka_backend.processors.verify import compare
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_view
from tests.integration.kafka_topics import must_arrive
from tests.patience import PATIENCE_S
from tests.services import native
from tests.services import redis as redis_service

from .materializing import settings
from .test_cli import Shell, wait_for

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

ROOT = Path(__file__).parents[2]
DAY_MS = 86_400_000
STATES = {
    events.SUCCESS: order.Rank.SUCCEEDED,
    events.FAILURE: order.Rank.FAILED,
    events.RETRY: order.Rank.UNREADY,
    events.STARTED: order.Rank.UNREADY,
}


def event(task, kind, wall, *, name="shop.pay", expires_in_ms=DAY_MS, size=0, **more):
    run = order.run_at(wall - 1000)
    rank = STATES.get(kind)
    state = None if rank is None else kind.upper()
    document = {"status": state, "result": "x" * size, "traceback": None, "children": [], "task_id": task}
    shown = {"doc": msgspec.Raw(msgspec.json.encode(document))} if rank is not None else {}
    return Event(
        id=uuid.uuid4().hex, kind=kind, task=task, key=0 if rank is None else order.order_key(rank, wall, run),
        at=wall, hlc=wall, run=run, state=state, name=name, worker="celery@h1", expires_at=wall + expires_in_ms,
        **shown, **more,
    )  # fmt: skip


class World:
    """A log of many tasks, and the command line beside it."""

    def __init__(self, shell):
        self.shell = shell
        self.now = time.time_ns() // 1_000_000

    def append(self, found):
        producer = Producer(
            {
                "bootstrap.servers": self.shell.bootstrap,
                "partitioner": "murmur2_random",
                "linger.ms": 20,
                "on_delivery": must_arrive,
            }
        )
        for one in found:
            producer.produce(
                topics.task_events(self.shell.prefix), key=one.task.encode(), value=codec.encode(one),
                headers=codec.headers(one, "proj"),
            )  # fmt: skip
            producer.poll(0)
        assert producer.flush(PATIENCE_S) == 0

    def view(self, url):
        options = StoreOptions(namespace=self.shell.prefix, history=True, history_limit=0)
        return open_view(url, options)

    def same(self, a, b):
        found = compare(self.view(a), self.view(b))
        assert found.equal, found.differences[:3]
        return found

    def replay(self, url, *more, code=0, **settings):
        done = self.shell("replay", "--to", url, "--quiet", *more, within_s=PATIENCE_S, **settings)
        assert done.returncode == code, done.said
        return done

    def marks(self, path):
        """How far a replay into a SQLite file is, by what the file says."""
        with sqlite3.connect(path) as db:
            found = db.execute("SELECT topic, next FROM ckb_position WHERE topic LIKE 'replay:next:%'").fetchall()
        return sum(offset % (1 << marks.BITS) for _, offset in found)


def lives(count, now, seed=1):
    """Tasks of every end, in a mixed order."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        task = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        end = (events.SUCCESS, events.FAILURE, events.RETRY, events.STARTED)[number % 4]
        name = ("shop.pay", "shop.ship", "mail.send")[number % 3]
        found += [
            event(task, kind, now + step, name=name) for step, kind in enumerate((events.SENT, events.STARTED, end))
        ]
    rng.shuffle(found)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory, kafka, redis_server):
    folder = tmp_path_factory.mktemp("replay")
    made = World(Shell(folder, kafka.bootstrap, redis_server.clean_database(), f"replay-{uuid.uuid4().hex[:8]}"))
    assert made.shell("init").returncode == 0
    made.append(lives(3000, made.now))
    made.replay(f"sqlite:///{folder}/whole.db")
    made.whole = f"sqlite:///{folder}/whole.db"
    made.folder = folder
    return made


def test_a_replay_that_is_killed_twenty_times_gives_the_same_view(world):
    path = world.folder / "killed.db"
    url, rng, kills = f"sqlite:///{path}", random.Random(7), 0
    command = [sys.executable, "-m", "tests.integration.replaying", world.shell.bootstrap, world.shell.prefix, url]
    while kills < 20:
        before = world.marks(path) if kills else 0
        process = native.popen([*command, "200"], cwd=ROOT)
        try:
            wait_for(lambda: path.exists() and has_marks(path) and world.marks(path), lambda at, b=before: at > b)
            time.sleep(rng.random() * 0.3)  # anywhere in the next batch: before, in or after its write
            assert process.poll() is None, "it was done before it could be killed"
        finally:
            process.kill()
            process.wait()
        kills += 1
    assert 0 < world.marks(path) < 9000
    done = world.replay(url, "--continue")
    assert int(re.search(r"of (\d+) records", done.stdout)[1]) < 9000, done.stdout
    world.same(world.whole, url)
    assert "0 events" in world.replay(url, "--continue").stdout


def has_marks(path):
    with sqlite3.connect(path) as db:
        return bool(db.execute("SELECT 1 FROM sqlite_master WHERE name = 'ckb_position'").fetchone())


def test_several_processes_give_the_same_view(world):
    url = f"sqlite:///{world.folder}/three.db"
    done = world.replay(url, "--processes", "3")
    assert "9000 events" in done.stdout
    found = world.same(world.whole, url)
    assert found.a["document"].rows == 3000
    assert world.view(url).positions() == world.view(world.whole).positions()


def test_a_killed_process_of_several_ends_the_others_and_is_gone_on_with(world):
    path = world.folder / "crew.db"
    url = f"sqlite:///{path}"
    words = [
        "-m",
        "celery",
        "-A",
        "proj",
        "pipeline",
        "replay",
        "--to",
        url,
        "--quiet",
        "--processes",
        "2",
        "--rate",
        "900",
    ]
    said = world.folder / "crew.log"
    with said.open("wb") as output:
        crew = native.popen(
            [sys.executable, *words], output=output, cwd=world.shell.folder, env=world.shell.environment()
        )
    try:
        wait_for(lambda: path.exists() and has_marks(path) and world.marks(path), lambda at: at > 0)
        workers = [each for each in psutil.Process(crew.pid).children() if "spawn_main" in " ".join(each.cmdline())]
        assert len(workers) == 2
        workers[0].kill()
        assert crew.wait(PATIENCE_S) == Exit.PROCESSORS_CRASHED, said.read_text()
        assert "--continue" in said.read_text()
        assert not workers[1].is_running()
    finally:
        native.end(crew)
    world.replay(url, "--continue", "--processes", "2")
    world.same(world.whole, url)


def test_a_dry_run_writes_nothing_and_says_what_it_would(world):
    path = world.folder / "dry.db"
    done = world.replay(f"sqlite:///{path}", "--dry-run", "--rate", "20000")  # by which a task is in many batches
    with sqlite3.connect(world.whole.removeprefix("sqlite:///")) as db:
        (rows,) = db.execute("SELECT (SELECT count(*) FROM ckb_task) + (SELECT count(*) FROM ckb_group)").fetchone()
    assert f" {rows} tasks and groups would be written" in done.stdout
    assert "Nothing was written" in done.stdout
    assert not path.exists()
    again = world.replay(world.whole, "--dry-run").stdout
    shown, kept = map(int, re.search(r"Of (\d+) documents the store has (\d+)", again).groups())
    assert shown == kept >= 3000


def test_a_rate_is_kept(world):
    began = time.monotonic()
    world.replay(f"sqlite:///{world.folder}/slow.db", "--rate", "6000")
    assert time.monotonic() - began >= 9000 / 6000


def test_some_tasks_are_taken_whole(world):
    url = f"sqlite:///{world.folder}/some.db"
    words = ("--state", "failure", "--task-name", "shop.*")
    done = world.replay(url, *words)
    expected = [n for n in range(3000) if n % 4 == 1 and n % 3 < 2]
    assert f"{len(expected)} tasks are wanted" in done.stdout
    assert f"{3 * len(expected)} events" in done.stdout
    some = {(row.table, row.key): row for row in world.view(url).rows()}
    assert sum(table == "document" for table, _ in some) == len(expected)
    whole = {(row.table, row.key): row for row in world.view(world.whole).rows()}
    assert all(whole[at] == row for at, row in some.items())
    assert marks.own(world.view(url).positions()) == {}  # it promises nothing
    assert "0 events" in world.replay(url, "--continue", *words).stdout
    refused = world.replay(url, "--continue", code=Exit.CONFIGURATION)
    assert "took other tasks" in refused.said


def test_pending_tasks_are_those_of_which_nothing_is_shown(world):
    url = f"sqlite:///{world.folder}/pending.db"
    assert "0 tasks are wanted" in world.replay(url, "--state", "PENDING", code=Exit.NOT_FOUND).stdout


def test_a_replay_of_no_task_is_not_taken_for_one(world):
    done = world.replay(f"sqlite:///{world.folder}/none.db", "--state", "FAILED", code=Exit.NOT_FOUND)
    assert "did you mean FAILURE?" in done.said
    assert "--continue" not in done.said


def test_offsets_begin_and_end_a_replay(world):
    log = topics.task_events(world.shell.prefix)
    ends = {at.partition: offset for at, offset in world.view(world.whole).positions().items() if at.topic == log}
    url = f"sqlite:///{world.folder}/offsets.db"
    half = ",".join(f"{log}:{number}:{end // 2}" for number, end in ends.items())
    first = world.replay(url, "--until", half)
    assert f"{sum(end // 2 for end in ends.values())} events" in first.stdout
    assert world.view(url).positions()[log, 0] == ends[0] // 2
    exported = world.folder / "offsets.csv"
    exported.write_text("".join(f'"{log}",{number},{end // 2}\n' for number, end in ends.items()))
    second = world.replay(url, "--from", f"@{exported}")
    assert f"{sum(end - end // 2 for end in ends.values())} events" in second.stdout
    assert "not told" not in second.stdout  # what came before is there
    world.same(world.whole, url)
    alone = world.replay(f"sqlite:///{world.folder}/alone.db", "--from", f"@{exported}")
    assert "readers are not told" in alone.stdout
    assert "there is no nothing/0" in world.replay(url, "--from", "nothing:0:5", code=Exit.CONFIGURATION).said
    beyond = world.replay(url, "--from", f"{log}:0:999999", code=Exit.NOT_FOUND)
    assert f"Kafka keeps 0 to {ends[0] - 1}" in beyond.said


def test_a_range_before_the_log_begins_is_said(world):
    done = world.replay(f"sqlite:///{world.folder}/early.db", "--until", "2020-01-01", code=Exit.NOT_FOUND)
    assert re.search(r"nothing in that range\nits oldest record is of 20\d\d", done.said)
    whole = world.replay(f"sqlite:///{world.folder}/since.db", "--from", "2020-01-01")
    assert "9000 events" in whole.stdout


def test_older_data_replace_nothing_newer(world):
    log = topics.task_events(world.shell.prefix)
    newer = {(row.table, row.key): row for row in world.view(world.whole).rows()}
    positions = world.view(world.whole).positions()
    done = world.replay(world.whole, "--until", f"{log}:0:300")
    assert "events" in done.stdout
    assert {(row.table, row.key): row for row in world.view(world.whole).rows()} == newer
    kept = marks.own(world.view(world.whole).positions())
    assert kept == marks.own(positions)


def test_foreign_data_are_refused_or_left_alone(world):
    other = f"sqlite:///{world.folder}/other.db"
    with sqlite3.connect(world.folder / "other.db") as db:
        db.execute("CREATE TABLE celery_taskmeta (id INTEGER PRIMARY KEY, task_id TEXT UNIQUE, status TEXT, result BLOB,"
                   " date_done TEXT, traceback TEXT)")  # fmt: skip
        db.execute("INSERT INTO celery_taskmeta (task_id, status) VALUES ('stock', 'SUCCESS')")
        db.execute(
            "CREATE TABLE ckb_position (topic TEXT, partition INTEGER, next INTEGER, PRIMARY KEY (topic, partition))"
        )
        db.execute("INSERT INTO ckb_position VALUES ('shop.task-events', 0, 5)")
    refused = world.replay(other, code=Exit.CONFIGURATION)
    assert "holds the view of another log: shop.task-events" in refused.said
    with sqlite3.connect(world.folder / "other.db") as db:
        db.execute("DELETE FROM ckb_position")
    world.replay(other)
    with sqlite3.connect(world.folder / "other.db") as db:
        assert db.execute("SELECT status FROM celery_taskmeta WHERE task_id = 'stock'").fetchone() == ("SUCCESS",)
    (world.folder / "text.db").write_text(
        "this is no database, but quite a long text about something else entirely" * 9
    )
    damaged = world.replay(f"sqlite:///{world.folder}/text.db", code=Exit.CONFIGURATION)
    assert "no SQLite file" in damaged.said


# -- a store in trouble ----------------------------------------------------------------------------


def config_and_target(world, url):
    target = Target(url, StoreOptions(namespace=world.shell.prefix, history=True, history_limit=0))
    return settings(world.shell.bootstrap, world.shell.prefix), target


def test_a_store_that_dies_in_the_middle_is_gone_on_with(world):
    server = redis_service.start(appendonly=True)
    try:
        config, target = config_and_target(world, server.url)

        def die(done):
            if done.read > 2000:
                server.kill()

        prepared = prepare(config, target)
        begin(target, prepared)
        with pytest.raises(Unavailable):
            feed(config, target, msgspec.structs.replace(prepared.job, per_s=5000), die, patience_s=0.5)
        server.restart()
        rest = prepare(config, target, go_on=True)
        assert 0 < sum(end - start for start, end in rest.job.spans.values()) < 9000
        feed(config, target, rest.job)
        world.same(world.whole, server.url)
    finally:
        server.stop()


def test_a_store_that_runs_out_of_space_says_so_and_is_gone_on_with(world):
    server = redis_service.start()
    try:
        config, target = config_and_target(world, server.url)
        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "4mb")
            with pytest.raises(Unavailable, match="OOM"):
                replay(config, target, patience_s=0.5)
            client.config_set("maxmemory", "0")
        feed(config, target, prepare(config, target, go_on=True).job)
        world.same(world.whole, server.url)
    finally:
        server.stop()


def test_keys_of_another_kind_are_refused_one_by_one(world, redis_url):
    config, target = config_and_target(world, redis_url)
    victim = next(row.key for row in world.view(world.whole).rows() if row.table == "document")
    with redis.Redis.from_url(redis_url) as client:
        client.rpush(f"celery-task-meta-{victim}", "not ours")
        done = replay(config, target)
        assert client.lrange(f"celery-task-meta-{victim}", 0, -1) == [b"not ours"]
        client.delete(f"celery-task-meta-{victim}")  # nobody can read a view with a list among its documents
    assert done.rejected > 0
    found = compare(world.view(world.whole), world.view(redis_url))
    assert {each.key.partition("/")[0] for each in found.differences} <= {victim}
