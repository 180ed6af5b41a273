"""What only MongoDB can do to a view: go away, refuse, keep what Celery's own backend wrote and reads."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from celery import VERSION, Celery, states

from celery_kafka_backend.changes import Batch, Logged, Partition
from celery_kafka_backend.errors import Rejected, SettingsError, Unavailable
from celery_kafka_backend.events import Opaque
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import FAR, RUN, batch, forgotten, group_deleted, group_saved, json_document, sent, stated
from tests.contract.patience import again
from tests.contract.test_native import SERIALIZERS, read
from tests.patience import PATIENCE_S
from tests.services import mongodb as service

if TYPE_CHECKING:
    from collections.abc import Iterator

pymongo = pytest.importorskip("pymongo")
pytestmark = pytest.mark.mongodb
PAST = 1_000_000_000_000


@pytest.fixture(scope="module")
def own() -> Iterator[service.MongoServer]:
    """A server that a test may kill; it must leave it running."""
    found = service.start()
    yield found
    found.stop()


@pytest.fixture
def sink(mongodb_url: str) -> Iterator[Any]:
    found = registry.open_sink(mongodb_url, StoreOptions())
    found.open()
    yield found
    found.close()


@pytest.fixture
def database(mongodb_url: str) -> Iterator[Any]:
    with pymongo.MongoClient(mongodb_url) as client:
        yield client.get_default_database()


@pytest.fixture
def view(mongodb_url: str) -> Iterator[Any]:
    found = registry.open_view(mongodb_url, StoreOptions())
    yield found
    found.close()


def quick(url: str) -> StoreOptions:
    return StoreOptions(options={"serverSelectionTimeoutMS": 300, "socketTimeoutMS": 1000})


# -- going away --------------------------------------------------------------------------------


def test_a_server_that_is_away_or_frozen_is_unavailable_and_the_next_write_reconnects(own: service.MongoServer) -> None:
    url = own.clean_database()
    sink, view = registry.open_sink(url, quick(url)), registry.open_view(url, quick(url))
    sink.open()
    sink.write(batch(stated("STARTED", 10)))
    assert view.documents(["t"])
    found = batch(stated("SUCCESS", 20), positions={Partition("x", 0): 1})
    own.freeze()
    with pytest.raises(Unavailable):
        sink.write(found)
    own.thaw()
    again(lambda: sink.write(found))  # the driver looks for a lost server every 0.5 s, and waits 0.3 s here
    own.kill()
    with pytest.raises(Unavailable):
        sink.write(found)
    with pytest.raises(Unavailable):
        view.documents(["t"])
    own.restart()
    shown = again(lambda: view.documents(["t"]))
    assert shown == {"t": stated("SUCCESS", 20).document}, "what was acknowledged outlives SIGKILL"
    again(lambda: sink.write(found))  # it has its own client
    assert view.positions() == {Partition("x", 0): 1}
    for each in (sink, view):
        each.close()


def test_a_server_killed_in_the_middle_of_a_batch_has_no_position_and_the_batch_comes_again(
    own: service.MongoServer,
) -> None:
    url = own.clean_database()
    sink, view = registry.open_sink(url, StoreOptions()), registry.open_view(url, StoreOptions())
    sink.open()
    ids = [f"t{n}" for n in range(6_000)]
    found = batch(*(stated("SUCCESS", 10, task=each) for each in ids), positions={Partition("x", 0): 9})

    def kill_once_something_is_there() -> None:
        with pymongo.MongoClient(url) as client:
            while not client.get_default_database().celery_taskmeta.estimated_document_count():
                time.sleep(0.005)
        own.kill()

    killer = threading.Thread(target=kill_once_something_is_there)
    killer.start()
    with pytest.raises(Unavailable):
        sink.write(found)
    killer.join()
    own.restart()
    assert view.positions() == {}
    sink.write(found)
    assert view.documents(ids).keys() == set(ids)
    assert view.positions() == {Partition("x", 0): 9}
    for each in (sink, view):
        each.close()


def test_wrong_credentials_and_missing_rights_are_settings() -> None:
    server = service.start("--auth")
    try:
        with pymongo.MongoClient(server.url) as admin:  # the first user may be made from this machine
            admin.admin.command("createUser", "root", pwd="s3cret", roles=["root"])
        with pymongo.MongoClient(server.url, username="root", password="s3cret", authSource="admin") as admin:
            admin.admin.command("createUser", "reader", pwd="s3cret", roles=[{"role": "read", "db": "celery"}])
        for user, password in (("root", "wr0ng"), ("reader", "s3cret"), ("", "")):
            login = f"{user}:{password}@" if user else ""
            url = f"mongodb://{login}127.0.0.1:{server.port}/celery?authSource=admin"
            sink = registry.open_sink(url, StoreOptions())
            with pytest.raises(SettingsError) as caught:
                sink.open()
            assert "roles" in str(caught.value)
            assert "wr0ng" not in str(caught.value)
            assert "s3cret" not in str(caught.value)
            sink.close()
        options = StoreOptions(options={"username": "root", "password": "s3cret", "authSource": "admin"})
        sink = registry.open_sink(server.url, options)
        sink.open()
        sink.write(batch(stated("SUCCESS", 10)))
        sink.close()
    finally:
        server.stop()


def test_a_server_too_old_for_the_driver_is_a_setting(mongodb_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the driver were one of years from now."""
    monkeypatch.setattr(pymongo.common, "MIN_SUPPORTED_WIRE_VERSION", 99)
    with pytest.raises(SettingsError, match="wire version"):
        registry.open_sink(mongodb_url, StoreOptions()).open()


@pytest.mark.parametrize("url", ["mongodb://", "mongodb://h:port/db", "mongodb://h/db?nosuch=1&maxPoolSize=many"])
def test_a_url_that_the_driver_does_not_take_is_a_setting(url: str) -> None:
    options = StoreOptions(options={"no_such_option": 1})
    with pytest.raises(SettingsError):
        registry.open_sink(url, options).open()


# -- refusing ----------------------------------------------------------------------------------


def test_what_only_the_server_refuses_is_named_and_the_rest_is_written(sink: Any, view: Any, database: Any) -> None:
    """A validator that somebody put on Celery's collection."""
    database.command("collMod", "celery_taskmeta", validator={"result": {"$ne": '"no"'}})
    with pytest.raises(Rejected) as caught:
        sink.write(
            batch(
                stated("SUCCESS", 10, task="bad", value="no"), stated("SUCCESS", 10), positions={Partition("x", 0): 1}
            )
        )
    assert [each for each, _ in caught.value.reasons] == ["bad"]
    assert list(view.documents(["bad", "t"])) == ["t"]
    assert view.positions() == {Partition("x", 0): 1}


def test_a_document_beyond_mongodb_s_limit_is_refused_by_name(sink: Any, view: Any) -> None:
    large = json_document("large", "SUCCESS", "x" * (16 << 20))
    almost = json_document("almost", "SUCCESS", "x" * (15 << 20))
    with pytest.raises(Rejected, match="large"):
        sink.write(
            batch(
                stated("SUCCESS", 10, task="large", document=large),
                stated("SUCCESS", 10, task="almost", document=almost),
            )
        )
    assert view.documents(["large", "almost"]) == {"almost": almost}


def test_what_is_stored_twice_is_measured_twice(sink: Any, view: Any) -> None:
    """A document that is not JSON stands beside its result: together they must fit."""
    found = []
    for task, size in (("fits", 7 << 20), ("large", 9 << 20)):
        opaque = Opaque(meta=b"m" * size, content_type="application/x-python-serialize", result=b"r" * size)
        found += batch(stated("SUCCESS", 10, task=task, opaque=opaque)).changes
    for change in found:
        change.history.clear()  # events of this size are not what this is about
    with pytest.raises(Rejected) as caught:
        sink.write(Batch(changes=found))
    assert [each for each, _ in caught.value.reasons] == ["large"]
    assert list(view.documents(["fits", "large"])) == ["fits"]
    event = batch(stated("SUCCESS", 10, task="event")).changes[0]
    event.history[0] = Logged(event.history[0].event, b"x" * (17 << 20))
    with pytest.raises(Rejected, match="an event of"):
        sink.write(Batch(changes=[event]))


@pytest.mark.parametrize(
    "kwargs", [{"$where": 1, "a.b": 2}, {"big": 1 << 70}, {"": {"nul\0": 1}}, {"deep": [[[[1]]]] * 40}], ids=str
)
def test_arguments_that_bson_cannot_say_are_text_and_the_result_is_there(
    sink: Any, view: Any, database: Any, kwargs: Any
) -> None:
    document = json_document("t", "SUCCESS", 7, name="proj.add", args=[], kwargs=kwargs)
    sink.write(batch(stated("SUCCESS", 10, document=document)))
    assert view.documents(["t"]) == {"t": document}
    found = database.celery_taskmeta.find_one("t")
    assert found["result"] == "7"
    assert msgspec.json.decode(found["kwargs"]) == kwargs


# -- beside Celery's own backend ---------------------------------------------------------------


def stock(url: str, **conf: Any) -> Any:
    app = Celery("stock", backend=url, set_as_current=False)
    app.conf.update(accept_content=SERIALIZERS, result_accept_content=SERIALIZERS, **conf)
    return app.backend


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_a_stock_success_stays_in_every_serializer_and_compression(
    sink: Any, mongodb_url: str, database: Any, serializer: str
) -> None:
    backend = stock(mongodb_url, result_serializer=serializer, result_compression="gzip", result_extended=True)
    backend.store_result("done", {"status": "FAILURE"}, states.SUCCESS)
    backend.store_result("failed", {"status": "SUCCESS"}, "PROGRESS")
    before = database.celery_taskmeta.find_one("done")
    sink.write(batch(*(stated("FAILURE", 9_000, task=task, run=RUN + 1) for task in ("done", "failed"))))
    assert database.celery_taskmeta.find_one("done") == before
    assert database.celery_taskmeta.find_one("failed")["status"] == "FAILURE"
    sink.write(batch(forgotten(10, task="done")))
    if VERSION[:2] < (5, 7):  # it cannot read what was stored without a request, its own documents neither
        backend = stock(mongodb_url, result_serializer=serializer)
    assert backend.get_state("done") == states.PENDING


def test_we_read_what_celery_s_own_backend_wrote(sink: Any, view: Any, mongodb_url: str) -> None:
    backend = stock(mongodb_url, result_extended=True)
    backend.store_result("t", [1, "ä"], states.SUCCESS)
    backend.store_result("u", ValueError("why"), states.FAILURE, traceback="…")
    found = {task: msgspec.json.decode(document) for task, document in view.documents(["t", "u"]).items()}
    assert (found["t"]["status"], found["t"]["result"], found["t"]["task_id"]) == ("SUCCESS", [1, "ä"], "t")
    assert found["u"]["result"]["exc_type"] == "ValueError"
    assert found["u"]["traceback"] == "…"


def test_an_expired_winner_and_a_deleted_group_leave_what_a_stock_client_can_read(sink: Any, mongodb_url: str) -> None:
    sink.write(batch(stated("STARTED", 10, task="gone"), group_saved("g", 5, members=("gone",))))
    sink.write(batch(stated("FAILURE", 20, task="gone", expires_at=PAST), group_deleted("g", 10)))
    for serializer in SERIALIZERS:
        conf = {"result_serializer": serializer, "accept_content": SERIALIZERS, "result_accept_content": SERIALIZERS}
        (answer,) = read([{"backend": mongodb_url, "conf": conf, "tasks": ["gone"], "groups": []}])
        assert answer["tasks"]["gone"]["state"] == "PENDING"
    (answer,) = read([{"backend": mongodb_url, "conf": {}, "tasks": [], "groups": ["g"]}])
    assert answer["groups"] == {"g": []}


def test_the_index_that_celery_made_stays(mongodb_url: str, database: Any) -> None:
    stock(mongodb_url).store_result("t", 1, states.SUCCESS)
    before = database.celery_taskmeta.index_information()
    assert "date_done_1" in before
    sink = registry.open_sink(mongodb_url, StoreOptions())
    sink.open()
    sink.close()
    assert before.items() <= database.celery_taskmeta.index_information().items()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"create": "celery_taskmeta", "viewOn": "elsewhere", "pipeline": []}, "is a view"),
        ({"create": "celery_kafka_history", "capped": True, "size": 4096}, "capped"),
        (
            {"createIndexes": "celery_taskmeta", "indexes": [{"key": {"ckb.x": 1}, "name": "theirs"}]},
            "theirs",
        ),
    ],
    ids=["a view", "a capped collection", "an index without TTL"],
)
def test_what_somebody_made_differently_is_named(
    mongodb_url: str, database: Any, made: dict[str, Any], said: str
) -> None:
    database.command(made)
    with pytest.raises(SettingsError, match=said) as caught:
        registry.open_sink(mongodb_url, StoreOptions()).open()
    assert "drop it" in caught.value.remedy


def test_an_index_of_somebody_s_that_deletes_results_is_warned_of(sink: Any, database: Any) -> None:
    """As those make who want Celery's `date_done` to expire, `collMod` or not: it would take the keys with the results."""
    database.celery_taskmeta.create_index("date_done")
    assert sink.warnings() == []
    database.command("collMod", "celery_taskmeta", index={"name": "date_done_1", "expireAfterSeconds": 86_400})
    (warning,) = sink.warnings()
    assert "date_done_1" in warning
    assert "86400" in warning


def test_positions_that_the_server_refuses_end_the_processor(sink: Any, database: Any) -> None:
    database.create_collection("celery_kafka_position", validator={"never": True})
    with pytest.raises(SettingsError, match="takes no positions"):
        sink.write(batch(stated("SUCCESS", 10), positions={Partition("x", 0): 1}))


# -- expiry ------------------------------------------------------------------------------------


def test_the_server_removes_what_has_expired(sink: Any, database: Any) -> None:
    at = time.time_ns() // 1_000_000 + 300
    sink.write(
        batch(stated("SUCCESS", 10, expires_at=at), group_saved("g", expires_at=at), stated("SUCCESS", task="u"))
    )
    names = ("celery_taskmeta", "celery_groupmeta", "celery_kafka_side", "celery_kafka_history")
    deadline = time.monotonic() + PATIENCE_S
    while [database[name].count_documents({}) for name in names] != [1, 0, 1, 1]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_document_that_expires_before_its_key_is_hidden_from_stock_clients_too(
    sink: Any, view: Any, mongodb_url: str
) -> None:
    at = time.time_ns() // 1_000_000 + 300
    sink.write(batch(stated("STARTED", 10)))
    sink.write(batch(stated("FAILURE", 20, expires_at=at)))
    deadline = time.monotonic() + PATIENCE_S
    while view.documents(["t"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sink._sweep_due = 0.0
    sink.write(batch(sent(0, task="other")))
    assert stock(mongodb_url).get_state("t") == states.PENDING
    sink.write(batch(stated("STARTED", 10)))
    assert view.documents(["t"]) == {}
    assert view.shown(["t"])["t"].key == stated("FAILURE", 20).key


@pytest.mark.parametrize("first", [sent(0, expires_at=FAR + 50), stated("STARTED", 10, expires_at=FAR + 50)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_key_guards_as_long_as_its_side_record_stays(sink: Any, database: Any, first: Any, turned: bool) -> None:
    events = [first, stated("SUCCESS", 20, expires_at=FAR)]
    for event in events[::-1] if turned else events:
        sink.write(batch(event))
    guard, side = database.celery_taskmeta.find_one("t")["ckb"]["x"], database.celery_kafka_side.find_one("t")["x"]
    assert guard == side
    assert round(guard.timestamp() * 1000) % 1000 == 50
