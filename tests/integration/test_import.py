"""`pipeline import` from what Celery's own backends wrote in real stores, until clients read it in another one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone

import msgspec
import pytest
import redis
from celery import Celery, states
from celery.bin.base import CLIContext
from celery.result import AsyncResult, GroupResult
from click.testing import CliRunner

from celery_kafka_backend import codec
from celery_kafka_backend.changes import Batch, Logged
from celery_kafka_backend.cli import pipeline
from celery_kafka_backend.cli.bookmark import Shelf
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.configure import settings_of
from celery_kafka_backend.events import STARTED, Event
from celery_kafka_backend.order import Rank, order_key, run_at, system_wall_ms
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink, open_view
from celery_kafka_backend.topics import view_name
from tests.patience import PATIENCE_S
from tests.services import native

pytestmark = pytest.mark.kafka

SERIALIZERS = {
    "json": {"result_serializer": "json"},
    "json compressed": {"result_serializer": "json", "result_compression": "gzip"},
    "pickle": {"result_serializer": "pickle"},
    "pickle compressed": {"result_serializer": "pickle", "result_compression": "bzip2"},
    "msgpack": {"result_serializer": "msgpack"},
    "yaml": {"result_serializer": "yaml"},
}
ACCEPT = {"accept_content": ["json", "pickle", "msgpack", "yaml"]}


class Move:
    """A fleet with Celery's own backend in one store, that is to arrive on a log whose view is another."""

    def __init__(self, kafka, prefix, old, new, **conf):
        self.old, self.new = old, new
        self.stock = self.app(old, conf)
        self.ours = self.app(f"kafka://{kafka.bootstrap}/?view={new}", conf, topic_prefix=prefix)
        assert self("init")[0] is Exit.OK

    @staticmethod
    def app(backend, conf, **settings):
        app = Celery("mover", backend=backend, broker="memory://", set_as_current=False)
        sizes = {"replication_factor": 1, "min_insync_replicas": 1, "partitions": 2, "chord_partitions": 2}
        app.conf.update({**ACCEPT, **conf, "kafka_backend_settings": {**sizes, **settings} if settings else {}})
        return app

    def __call__(self, *arguments):
        """Type a command; return its exit code, its JSON and all it said."""
        done = CliRunner().invoke(pipeline, arguments, obj=CLIContext(self.ours, no_color=True, workdir=None))
        assert "Traceback" not in done.output
        found = json.loads(done.stdout) if "--json" in arguments and done.stdout.startswith(("{", "[")) else None
        return Exit(done.exit_code), found, done.output

    def import_(self, *more):
        code, found, said = self("import", "--from", self.old, "--actor", "ann@desk", "--json", *more)
        assert found is not None, said
        return code, found

    def show(self):
        """Fold the log into the view."""
        code, _, said = self("replay", "--to", self.new, "--quiet")
        assert code is Exit.OK, said

    def ended(self, task_id, result=None, state=states.SUCCESS, traceback=None):
        self.stock.backend.store_result(task_id, result, state, traceback)


def rows(url, prefix):
    view = open_view(url, StoreOptions(namespace=prefix, history=True))
    try:
        return sorted((row.table, row.key, sorted(row.columns.items()), row.expires_at) for row in view.rows())
    finally:
        view.close()


@pytest.mark.redis
@pytest.mark.parametrize("conf", SERIALIZERS.values(), ids=SERIALIZERS)
def test_every_serializers_results_are_the_same_after_the_move(kafka, redis_server, topic_prefix, tmp_path, conf):
    move = Move(kafka, topic_prefix, redis_server.clean_database(), f"sqlite:///{tmp_path}/new.db", **conf)
    move.ended("good", {"sum": 42, "list": [1, [2]]})
    move.ended("bad", ValueError("no", 7), states.FAILURE, "Traceback …")
    move.stock.backend.store_result("busy", {"step": 3}, "PROGRESS")
    group = GroupResult("g", [AsyncResult("good", app=move.stock), AsyncResult("bad", app=move.stock)], app=move.stock)
    group.save()
    code, found = move.import_()
    assert (code, found["tasks"], found["groups"], found["broken"]) == (Exit.OK, 3, 1, 0)
    move.show()
    for task_id in ("good", "bad", "busy"):
        before, after = AsyncResult(task_id, app=move.stock), AsyncResult(task_id, app=move.ours)
        assert after.state == before.state
        assert after.date_done == before.date_done
        assert after.traceback == before.traceback
        assert (type(after.result), repr(after.result)) == (type(before.result), repr(before.result))
    assert [child.id for child in GroupResult.restore("g", app=move.ours).results] == ["good", "bad"]
    if "result_compression" not in conf:
        stock = Move.app(f"db+sqlite:///{tmp_path}/new.db", conf)
        assert AsyncResult("good", app=stock).result == {"sum": 42, "list": [1, [2]]}
        assert repr(AsyncResult("bad", app=stock).result) == "ValueError('no', 7)"
    _, told, _ = move("history", "good", "--json")
    assert told[0]["imported"]["by"] == "ann@desk"
    assert "@" not in told[0]["imported"]["from"]
    said = move("history", "good")[2]
    assert "imported from redis://" in said
    assert "by ann@desk" in said


@pytest.mark.mongodb
@pytest.mark.parametrize(
    ("serializer", "compression"),
    [("json", None), ("pickle", None), ("msgpack", None), ("yaml", None), ("json", "gzip"), ("msgpack", "gzip")],
)
def test_from_mongodb_likewise(kafka, mongodb_url, topic_prefix, tmp_path, serializer, compression):
    conf = {"result_serializer": serializer, "result_compression": compression, "result_expires": 3600}
    move = Move(kafka, topic_prefix, mongodb_url, f"sqlite:///{tmp_path}/new.db", **conf)
    move.ended("good", {"sum": 42})
    move.ended("bad", ValueError("no"), states.FAILURE, "Traceback …")
    GroupResult("g", [AsyncResult("good", app=move.stock)], app=move.stock).save()
    assert move.import_("--dry-run")[1]["tasks"] == 2
    code, found = move.import_()
    assert (code, found["tasks"], found["groups"], found["broken"]) == (Exit.OK, 2, 1, 0), found
    move.show()
    for task_id in ("good", "bad"):
        before, after = AsyncResult(task_id, app=move.stock), AsyncResult(task_id, app=move.ours)
        assert (after.state, after.traceback, repr(after.result)) == (
            before.state,
            before.traceback,
            repr(before.result),
        )
    assert [child.id for child in GroupResult.restore("g", app=move.ours).results] == ["good"]
    document = next(row for row in rows(move.new, topic_prefix) if row[:2] == ("document", "good"))
    done = AsyncResult("good", app=move.ours).date_done
    assert document[3] == int(done.timestamp() * 1000) + 3_600_000


@pytest.mark.mongodb
def test_a_result_that_is_over_arrives_in_a_history_that_is_kept_for_longer(kafka, mongodb_url, topic_prefix, tmp_path):
    from pymongo import MongoClient  # noqa: PLC0415 - the cases of the other stores run without it

    move = Move(kafka, topic_prefix, mongodb_url, f"sqlite:///{tmp_path}/new.db", result_expires=3600)
    move.ended("over", 1)
    with MongoClient(mongodb_url) as client:
        yesterday = {"date_done": datetime.now(timezone.utc) - timedelta(days=1)}
        client.get_default_database().celery_taskmeta.update_one({"_id": "over"}, {"$set": yesterday})
    found = move.import_()[1]
    assert (found["expired"], found["tasks"]) == (1, 0)
    move.ours.conf.kafka_backend_settings["history_retention_ms"] = 90 * 86_400_000
    found = move.import_()[1]
    assert (found["expired"], found["tasks"]) == (0, 1)
    move.show()
    assert AsyncResult("over", app=move.ours).state == states.PENDING
    assert [event["kind"] for event in move("history", "over", "--no-log", "--json")[1]] == ["success"]


@pytest.fixture
def move(kafka, redis_server, topic_prefix):
    """From one Redis database to another one, which keeps history."""
    old, new = redis_server.clean_database(), redis_server.clean_database()
    return Move(kafka, topic_prefix, old, new, result_extended=True)


@pytest.fixture
def with_history(move):
    settings = {**move.ours.conf.kafka_backend_settings, "history": {"redis": True}}
    move.ours = Move.app(move.ours.conf.result_backend, {"result_extended": True}, **settings)
    return move


@pytest.mark.redis
def test_a_repeated_import_changes_nothing(with_history, topic_prefix):
    move = with_history
    for n in range(50):
        move.ended(f"t{n}", n)
    move.stock.backend.store_result("busy", {"step": 3}, "PROGRESS")
    assert move.import_()[1]["tasks"] == 51
    move.show()
    before = rows(move.new, topic_prefix)
    assert sum(row[0] == "history" for row in before) == 51
    _, found, _ = move("import", "--from", move.old, "--actor", "bob", "--json")
    assert found["tasks"] == 51
    move.show()
    assert rows(move.new, topic_prefix) == before


@pytest.mark.redis
def test_expiry_is_taken_over_and_what_is_over_stays_out(move):
    old = redis.Redis.from_url(move.old)
    move.ended("kept", 1)
    old.persist("celery-task-meta-kept")
    move.ended("short", 2)
    old.pexpire("celery-task-meta-short", 1_234_567)
    move.ended("over", 3)
    move.import_()
    old.delete("celery-task-meta-over")
    move.show()
    new = redis.Redis.from_url(move.new)
    assert new.pttl("celery-task-meta-kept") == -1
    assert abs(new.pttl("celery-task-meta-short") - old.pttl("celery-task-meta-short")) < 1_000
    assert new.get("celery-task-meta-short") == old.get("celery-task-meta-short")


@pytest.mark.redis
def test_ours_are_left_out_and_the_broken_are_named(move):
    old = redis.Redis.from_url(move.old)
    move.ended("theirs", 1)
    sink = open_sink(move.old, StoreOptions())
    sink.open()
    wall = system_wall_ms()
    document = b'{"status": "STARTED", "result": null, "traceback": null, "children": [], "date_done": null}'
    for task in ("ours", "finished-by-theirs"):
        event = Event(
            id=task, kind=STARTED, task=task, at=wall, hlc=wall, run=run_at(wall), state="STARTED",
            key=order_key(Rank.UNREADY, wall, run_at(wall)), doc=msgspec.Raw(document),
        )  # fmt: skip
        sink.write(Batch(fold([Logged(event, codec.encode(event))])))
    sink.close()
    move.ended("finished-by-theirs", 2)
    old.set("celery-task-meta-rubbish", b"\xff\x00")
    old.hset("celery-task-meta-hash", "a", "b")
    old.set("celery-taskset-meta-odd", b'{"result": 5}')
    old.set(b"celery-task-meta-\xff", b"{}")
    code, found = move.import_()
    assert code is Exit.NOT_DONE
    assert (found["tasks"], found["ours"], found["broken"]) == (2, 1, 4)
    named = "\n".join(found["problems"])
    for each in ("task rubbish", "task hash", "group odd", "\\xff"):
        assert each in named
    _, _, said = move("import", "--from", move.old)
    assert "4 broken" in said
    assert "broken: " in said


@pytest.mark.redis
def test_an_import_from_the_view_itself_leaves_it_as_it_is(kafka, redis_url, topic_prefix):
    """As when a fleet is switched in place: the log gets the past, and stock clients see what they saw."""
    move = Move(kafka, topic_prefix, redis_url, redis_url)
    move.ended("good", 1)
    move.ended("bad", ValueError("x"), states.FAILURE)
    store = redis.Redis.from_url(redis_url)
    before = {key: (store.get(key), store.pttl(key)) for key in store.keys("celery-task-meta-*")}
    assert move.import_()[1]["tasks"] == 2
    move.show()
    for key, (value, ttl) in before.items():
        assert store.get(key) == value
        assert abs(store.pttl(key) - ttl) < 5_000
    assert move("history", "good", "--log", "--json")[1][0]["kind"] == "success"


@pytest.mark.redis
def test_a_killed_import_goes_on_and_has_all(move, tmp_path):
    store = redis.Redis.from_url(move.old)
    document = move.stock.backend.encode(
        {"status": "SUCCESS", "result": 1, "traceback": None, "children": [], "date_done": "2026-11-01T00:00:00+00:00"}
    )
    store.mset({f"celery-task-meta-t{n}": document for n in range(3_000)})
    (tmp_path / "moving.py").write_text(
        "from celery import Celery\n"
        f"app = Celery('mover', backend={move.ours.conf.result_backend!r}, broker='memory://')\n"
        f"app.conf.kafka_backend_settings = {dict(move.ours.conf.kafka_backend_settings)!r}\n"
    )
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "moving",
        "pipeline",
        "import",
        "--from",
        move.old,
        "--rate",
        "300",
    ]
    with (tmp_path / "log").open("wb") as output:
        process = native.popen(command, output=output, cwd=tmp_path)
    deadline = time.monotonic() + PATIENCE_S
    while not marked(move):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        [*command[:-2], "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert "going on with the import that" in done.stderr
    assert 0 < json.loads(done.stdout)["tasks"] < 3_000
    move.show()
    assert len(redis.Redis.from_url(move.new).keys("celery-task-meta-*")) == 3_000


def marked(move):
    """Where the import of the old store would go on."""
    broker = Broker(settings_of(move.ours), 20)
    try:
        mark = Shelf(broker, view_name(move.old)).take()
        return mark and mark.after
    finally:
        broker.close()


def test_a_store_that_cannot_be_imported_from_is_named(kafka, topic_prefix, tmp_path):
    move = Move(kafka, topic_prefix, f"sqlite:///{tmp_path}/old.db", f"sqlite:///{tmp_path}/new.db")
    code, _, said = move("import", "--from", move.old)
    assert code is Exit.CONFIGURATION
    assert "nothing can be imported" in said
