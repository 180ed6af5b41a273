"""What only Cassandra can do to a view: go away, refuse, keep what Celery's own backend wrote and reads."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from celery import VERSION, Celery, states

from celery_kafka_backend.changes import Batch, ChordFact, Partition
from celery_kafka_backend.errors import Rejected, SettingsError, Unavailable
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import FAR, RUN, R, batch, forgotten, group_saved, json_document, sent, stated
from tests.contract.patience import again
from tests.contract.test_native import SERIALIZERS, read
from tests.patience import PATIENCE_S
from tests.services import cassandra as service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.contract.conftest import _Cassandra

pytest.importorskip("cassandra", exc_type=ImportError)
pytestmark = pytest.mark.cassandra
PAST = 1_000_000_000_000
HOUR_MS = 3_600_000
CELERYS = "task_id text, status text, result blob, date_done timestamp, traceback blob, children blob"


@pytest.fixture(scope="module")
def own() -> Iterator[service.CassandraServer]:
    """A server that asks for passwords, and that a test may kill; it must leave it running."""
    found = service.start(auth=True)
    yield found
    found.stop()


def admin(server: service.CassandraServer, *statements: str) -> None:
    from cassandra.auth import PlainTextAuthProvider  # noqa: PLC0415
    from cassandra.cluster import NoHostAvailable  # noqa: PLC0415

    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with server.session(auth_provider=PlainTextAuthProvider("cassandra", "cassandra")) as session:
                for statement in statements:
                    session.execute(statement)
                return
        except NoHostAvailable:  # the first user is made a moment after the server answers
            assert time.monotonic() < deadline
            time.sleep(0.2)


def patient_for(timeout_s: float) -> StoreOptions:
    from cassandra.cluster import EXEC_PROFILE_DEFAULT, ExecutionProfile  # noqa: PLC0415

    login = {"username": "cassandra", "password": "cassandra"}
    options = {"auth_provider": "PlainTextAuthProvider", "auth_kwargs": login}
    profiles = {EXEC_PROFILE_DEFAULT: ExecutionProfile(request_timeout=timeout_s)}
    return StoreOptions(options={**options, "execution_profiles": profiles})


@pytest.fixture
def place(cassandra_place: _Cassandra) -> Iterator[_Cassandra]:
    yield cassandra_place
    cassandra_place.close()


def stock(place: _Cassandra, **conf: Any) -> Any:
    app = Celery("stock", set_as_current=False)
    app.conf.update(accept_content=SERIALIZERS, result_accept_content=SERIALIZERS, **conf)
    told = {name: value for name, value in place.celery.items() if name != "backend"}
    app.conf.update(result_backend="cassandra://", **told)
    found = app.backend
    found.port = told["cassandra_port"]  # Celery 5.4 has the setting and does not look at it
    return found


@pytest.fixture
def celery(place: _Cassandra) -> Iterator[Any]:
    """Celery's own backend on the same table."""
    found = stock(place)
    yield found
    if found._cluster is not None:
        found._cluster.shutdown()


def rows(place: _Cassandra, task: str) -> list[Any]:
    query = f"SELECT status, result, ttl(status) AS ttl FROM {place._keyspace}.tasks WHERE task_id = %s"
    return list(place._session.execute(query, [task]))


# -- going away --------------------------------------------------------------------------------


def test_a_server_that_is_frozen_or_killed_in_the_middle_of_a_batch_is_unavailable_and_nothing_is_missing(
    own: service.CassandraServer,
) -> None:
    admin(own, service.KEYSPACE.format("away", "true"))
    options = patient_for(2)
    sink, view = registry.open_sink(own.url("away"), options), registry.open_view(own.url("away"), options)
    again(sink.open)  # two seconds are soon over where much else is done
    first = batch(stated("SUCCESS", 10, task="first"))
    again(lambda: sink.write(first))
    own.freeze()
    with pytest.raises(Unavailable):
        sink.write(first)
    with pytest.raises(Unavailable), view.within(0.3):
        view.documents(["first"])
    own.thaw()
    again(lambda: sink.write(first))

    ids = [f"t{n}" for n in range(4_000)]
    found = batch(*(stated("SUCCESS", 10, task=each) for each in ids), positions={Partition("x", 0): 9})

    written = threading.Event()

    def kill_once_something_is_there() -> None:
        while not (again(lambda: view.documents(ids[:100])) or written.is_set()):
            time.sleep(0.002)
        own.kill()

    killer = threading.Thread(target=kill_once_something_is_there)
    killer.start()
    try:
        with pytest.raises(Unavailable):
            sink.write(found)
    finally:
        written.set()
        killer.join()
    with pytest.raises(Unavailable):
        view.documents(["first"])
    with pytest.raises(Unavailable):
        registry.open_sink(own.url("away"), StoreOptions()).open()
    own.restart()
    assert again(lambda: view.documents(["first"])), "what was acknowledged outlives SIGKILL"
    assert again(view.positions) == {}
    again(lambda: sink.write(found))
    assert again(lambda: view.documents(ids)).keys() == set(ids)
    assert again(view.positions) == {Partition("x", 0): 9}
    for each in (sink, view):
        each.close()


# -- refused -----------------------------------------------------------------------------------


def test_wrong_credentials_and_missing_rights_are_settings(own: service.CassandraServer) -> None:
    admin(
        own,
        service.KEYSPACE.format("rights", "true"),
        "CREATE ROLE reader WITH PASSWORD = 's3cret' AND LOGIN = true",
        "GRANT SELECT ON KEYSPACE rights TO reader",
    )
    for login, said in (("cassandra:wr0ng", "refuses"), ("reader:s3cret", "CREATE"), ("", "refuses")):
        url = own.url("rights").replace("://", f"://{login}@" if login else "://")
        sink = registry.open_sink(url, StoreOptions())
        with pytest.raises(SettingsError, match=said) as caught:
            sink.open()
        assert "wr0ng" not in str(caught.value)
        assert "s3cret" not in str(caught.value)
        sink.close()
    sink = registry.open_sink(own.url("rights"), patient_for(10))
    sink.open()
    sink.close()
    reader = own.url("rights").replace("://", "://reader:s3cret@")
    sink, view = registry.open_sink(reader, StoreOptions()), registry.open_view(reader, StoreOptions())
    sink.open()  # the tables are there: nothing to be made
    with pytest.raises(SettingsError, match="MODIFY"):
        sink.write(batch(stated("SUCCESS", 10)))
    assert view.documents(["t"]) == {}
    for each in (sink, view):
        each.close()


def test_a_keyspace_that_is_missing_is_named_with_what_makes_it(place: _Cassandra) -> None:
    url = place.url.replace(place._keyspace, "NoSuch")
    with pytest.raises(SettingsError, match='CREATE KEYSPACE "NoSuch"'):
        registry.open_sink(url, StoreOptions()).open()
    with pytest.raises(SettingsError, match="NoSuch"):
        registry.open_view(url, StoreOptions()).documents(["t"])


def test_a_view_without_tables_is_unavailable_until_a_processor_made_them(cassandra: service.CassandraServer) -> None:
    url = cassandra.url(cassandra.new_keyspace())
    view = registry.open_view(url, StoreOptions())
    with pytest.raises(Unavailable, match="processor"):
        view.documents(["t"])
    sink = registry.open_sink(url, StoreOptions())
    sink.open()
    assert view.documents(["t"]) == {}
    for each in (sink, view):
        each.close()


@pytest.mark.parametrize(
    ("table", "columns", "said"),
    [
        ("tasks", "task_id text PRIMARY KEY, status text", "date_done"),
        ("tasks", f"{CELERYS.replace('result blob', 'result text')}, PRIMARY KEY (task_id, date_done)", "result is text"),
        ("tasks", f"{CELERYS}, PRIMARY KEY (task_id, date_done)", "descending"),
        ("celery_kafka_view", "id text PRIMARY KEY", "celery_kafka_view"),
    ],
)  # fmt: skip
def test_a_table_that_somebody_made_differently_is_named(
    cassandra: service.CassandraServer, cassandra_session: Any, table: str, columns: str, said: str
) -> None:
    keyspace = cassandra.new_keyspace()
    cassandra_session.execute(f"CREATE TABLE {keyspace}.{table} ({columns})")
    with pytest.raises(SettingsError, match=said):
        registry.open_sink(cassandra.url(keyspace), StoreOptions()).open()


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("cassandra://", {"keyspace": "k"}, "cassandra_servers"),
        ("cassandra://h", {}, "cassandra_keyspace"),
        ("cassandra://h:port/k", {}, "port"),
        ("cassandra://h/k?tabel=t", {}, "tabel"),
        ("cassandra://h/k", {"read_consistency": "ALMOST"}, "cassandra_read_consistency"),
        ("cassandra://h/k", {"write_consistency": "SERIAL"}, "cassandra_write_consistency"),
        ("cassandra://h/k", {"auth_provider": "Nobody", "auth_kwargs": {"a": 1}}, "cassandra_auth_provider"),
        ("cassandra://h/k", {"auth_provider": "PlainTextAuthProvider", "auth_kwargs": {"a": 1}}, "auth_kwargs"),
        ("cassandra://", {"servers": ["h"], "secure_bundle_path": "/b", "keyspace": "k"}, "bundle"),
        ("cassandra://127.0.0.1/k", {"no_such_option": 1}, "cassandra_options"),
    ],
)
def test_what_the_store_cannot_be_told_is_a_setting(url: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        registry.open_sink(url, StoreOptions(options=options)).open()


def test_a_server_that_does_not_speak_the_driver_s_protocol_is_a_setting(place: _Cassandra) -> None:
    options = StoreOptions(options={"protocol_version": 0x42})
    with pytest.raises(SettingsError, match="66") as caught:
        registry.open_sink(place.url, options).open()
    assert "4.0 or newer" in caught.value.remedy


def test_what_only_the_server_refuses_is_named_and_the_rest_is_written(place: _Cassandra) -> None:
    """A key of more than 64 KB, and more than the commit log takes at once."""
    long, longer = "x" * 65_000, "x" * 70_000
    large = json_document("large", "SUCCESS", "x" * (9 << 20))
    good = [stated("SUCCESS", 10, task=f"t{n}") for n in range(60)]
    found = batch(
        *good[:30], stated("SUCCESS", 10, task=longer), stated("SUCCESS", 10, task="large", document=large), *good[30:],
        stated("SUCCESS", 10, task=long),
    )  # fmt: skip
    facts = [ChordFact("x" * 70_000, "sized", 1, b"1", 0), ChordFact("g", "sized", 1, b"1", 0)]
    with pytest.raises(Rejected) as caught:
        place.sink().write(Batch(changes=found.changes, chords=facts, positions={Partition("x", 0): 1}))
    assert {each for each, _ in caught.value.reasons} == {longer, "large"}
    view = place.view()
    ids = [event.task for event in good]
    assert view.documents([*ids, "large", long]).keys() == {*ids, long}
    assert view.chord("g") == {"sized": b"1"}
    assert view.positions() == {Partition("x", 0): 1}


def test_tables_that_somebody_drops_are_made_again_and_no_event_is_refused_for_it(
    cassandra: service.CassandraServer, cassandra_session: Any
) -> None:
    keyspace = cassandra.new_keyspace()
    sink, view = (open_(cassandra.url(keyspace), StoreOptions()) for open_ in (registry.open_sink, registry.open_view))
    sink.open()
    sink.write(batch(stated("STARTED", 10)))
    for table in ("celery_kafka_view", "tasks"):
        cassandra_session.execute(f"DROP TABLE {keyspace}.{table}")
    found = batch(stated("SUCCESS", 20), positions={Partition("x", 0): 1})
    again(lambda: sink.write(found))
    assert view.documents(["t"]) == {"t": stated("SUCCESS", 20).document}
    for each in (sink, view):
        each.close()


def test_no_batch_is_one_that_the_server_warns_of(place: _Cassandra, caplog: pytest.LogCaptureFixture) -> None:
    """It would warn in its own log, and the driver in ours, four hundred times a second."""
    sizes = (10, 300, 900, 3_000, 20_000)
    found = [stated("SUCCESS", 10, task=f"t{n}", value="x" * sizes[n % 5], worker="celery@one") for n in range(300)]
    place.sink().write(batch(*found, *(stated("STARTED", 5, task=f"t{n}") for n in range(300))))
    assert [record.getMessage() for record in caplog.records if "Server warning" in record.getMessage()] == []
    assert len(place.view().documents([f"t{n}" for n in range(300)])) == 300


# -- beside Celery's own backend ---------------------------------------------------------------


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_we_read_what_celery_s_own_backend_wrote_in_every_serializer(place: _Cassandra, serializer: str) -> None:
    if VERSION[:2] < (5, 7) and serializer in ("pickle", "msgpack"):
        pytest.skip("such a Celery's backend for Cassandra fails on bytes")
    backend = stock(place, result_serializer=serializer)
    value = {"text": "ä\n'\": - x", "list": [1, 2.5, None, True], "deep": [{"a": [1]}], "same": ["same"] * 2}
    backend.store_result("t", value, states.SUCCESS)
    backend.store_result("u", ValueError("why"), states.FAILURE, traceback="Trace\n  back…")
    backend.store_result("n", 5, "PROGRESS")
    view = place.view(serializer=serializer)
    metas = {task: backend.decode(document) for task, document in view.documents(["t", "u", "n"]).items()}
    assert (metas["t"]["status"], metas["t"]["result"], metas["t"]["task_id"]) == ("SUCCESS", value, "t")
    assert str(backend.exception_to_python(metas["u"]["result"])) == "why"
    assert metas["u"]["traceback"] == "Trace\n  back…"
    assert metas["n"]["result"] == 5
    backend._cluster.shutdown()


def test_a_stock_success_survives_whatever_we_write_in_whatever_order(place: _Cassandra, celery: Any) -> None:
    """A fleet that is being moved has workers of both kinds: a RETRY of ours must not bury the other's SUCCESS."""
    sink = place.sink()
    ours = [stated("RETRY", 10), stated("FAILURE", 9_000, run=RUN + 1)]
    for number, order in enumerate(itertools.permutations(range(3))):
        task = f"t{number}"
        for step in order:
            if step == 2:
                celery.store_result(task, {"made": "elsewhere"}, states.SUCCESS)
            else:
                sink.write(batch(msgspec.structs.replace(ours[step], task=task)))
        document = place.view().documents([task])[task]
        assert msgspec.json.decode(document)["result"] == {"made": "elsewhere"}
        assert [row for row in rows(place, task) if row.result == b'{"made": "elsewhere"}']


def test_the_stock_backend_goes_on_where_we_stop(place: _Cassandra, celery: Any) -> None:
    """Its forget forgets, and a task that it runs again shows the new state."""
    sink = place.sink()
    sink.write(batch(stated("FAILURE", 10, task="again"), stated("SUCCESS", 10, task="forgotten")))
    celery.store_result("again", 7, states.SUCCESS)
    assert celery.get_result("again") == 7
    if VERSION[:2] < (5, 7):
        with pytest.raises(NotImplementedError):
            celery.forget("forgotten")
    else:
        celery.forget("forgotten")
        assert celery.get_state("forgotten") == states.PENDING


def test_a_forget_deletes_every_row_of_a_stock_backend(place: _Cassandra, celery: Any) -> None:
    for state in ("STARTED", "RETRY", states.SUCCESS):
        celery.store_result("t", 1, state)
    sink = place.sink()
    sink.write(batch(stated("STARTED", 5), forgotten(10)))
    assert rows(place, "t") == []
    celery._cache.clear()
    assert celery.get_state("t") == states.PENDING
    sink.write(batch(stated("STARTED", 9_000, run=RUN + 1)))
    assert celery.get_state("t") == states.STARTED, "… and does not stand in the way of the next run"


def test_a_stock_client_sees_one_row_in_every_order(place: _Cassandra) -> None:
    """A skewed host's later date_done does not put its STARTED on top."""
    events = [
        stated("STARTED", 10),
        msgspec.structs.replace(stated("RETRY", 20), at=R + 300_000),
        stated("FAILURE", 30),
        stated("SUCCESS", 25),
    ]
    sink = place.sink()
    for number, order in enumerate(itertools.permutations(events)):
        for event in order:
            sink.write(batch(msgspec.structs.replace(event, task=f"t{number}")))
        (row,) = rows(place, f"t{number}")
        assert row.status == "SUCCESS"


def test_stock_clients_read_an_expired_winner_and_unknown_runs(place: _Cassandra) -> None:
    sink = place.sink()
    sink.write(batch(stated("STARTED", 10, task="gone"), stated("SUCCESS", 10, task="unknown", run=None)))
    sink.write(batch(stated("FAILURE", 20, task="gone", expires_at=PAST), forgotten(20, task="unknown", run=None)))
    sink.write(batch(stated("SUCCESS", 9_000, task="unknown", value=2)))
    conf = {name: value for name, value in place.celery.items() if name != "backend"}
    job = {"backend": "cassandra://", "conf": conf, "tasks": ["gone", "unknown"], "groups": []}
    (answer,) = read([job])
    assert answer["tasks"]["gone"]["state"] == "PENDING"
    assert (answer["tasks"]["unknown"]["state"], answer["tasks"]["unknown"]["result"]) == ("SUCCESS", 2)


# -- expiry ------------------------------------------------------------------------------------


def test_rows_live_as_long_as_they_are_shown_and_guards_a_day_longer(place: _Cassandra) -> None:
    at = time.time_ns() // 1_000_000 + HOUR_MS
    place.sink().write(batch(stated("SUCCESS", 10, expires_at=at), group_saved("g", expires_at=at)))
    (native,) = rows(place, "t")
    assert 3_590 < native.ttl <= 3_601
    query = f"SELECT ttl(document) AS document, ttl(guard) AS guard, ttl(expiry) AS side FROM {place._keyspace}.celery_kafka_view"
    for found in place._session.execute(query):
        assert 3_590 < found.document <= 3_601
        assert found.guard == found.side == found.document + 86_400
    query = f"SELECT ttl(value) AS ttl FROM {place._keyspace}.celery_kafka_history"
    assert all(3_590 < found.ttl <= 3_601 for found in place._session.execute(query))


def test_a_history_is_found_when_all_else_of_its_task_is_gone(place: _Cassandra) -> None:
    """The hours that it is in are known for as long as it stays."""
    sink = place.sink(history_retention_ms=FAR - R)
    sink.write(batch(sent(0, expires_at=PAST), stated("SUCCESS", 3_600_000, expires_at=PAST)))
    query = f"SELECT expiry, hours FROM {place._keyspace}.celery_kafka_view WHERE subject = 'task' AND id = 't'"
    deadline = time.monotonic() + 120
    while (found := place._session.execute(query).one()).expiry is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(found.hours) == 2
    assert len(place.view().history("t")) == 2


@pytest.mark.parametrize("turned", [False, True])
def test_a_key_guards_as_long_as_its_side_record_stays(place: _Cassandra, turned: bool) -> None:
    """A result that expires first does not uncover an older state that would stay longer."""
    sink, view = place.sink(), place.view()
    soon = time.time_ns() // 1_000_000 + 700
    events = [stated("STARTED", 10), stated("SUCCESS", 20, expires_at=soon)]
    for event in events[::-1] if turned else events:
        sink.write(batch(event))
    assert view.documents(["t"]) == {"t": events[1].document}
    while view.documents(["t"]):
        time.sleep(0.05)
    sink.write(batch(events[0]))
    assert view.documents(["t"]) == {}
    assert view.shown(["t"])["t"].key == events[1].key


def test_cassandra_entry_ttl_takes_the_place_of_the_event_s_expiry(place: _Cassandra) -> None:
    now = time.time_ns() // 1_000_000
    event = msgspec.structs.replace(stated("SUCCESS", 10, expires_at=now + HOUR_MS), at=now)
    sink = registry.open_sink(place.url, StoreOptions(options={"entry_ttl": 60.0}))
    sink.open()
    sink.write(batch(event))
    sink.close()
    (native,) = rows(place, "t")
    assert 55 <= native.ttl <= 61
    assert {row.expires_at for row in place.dump()} == {now + 60_000}


def test_what_outlives_2038_has_no_time_to_live(place: _Cassandra) -> None:
    """Cassandra refuses it, unless told that no older version is near."""
    place.sink().write(batch(stated("SUCCESS", 10, expires_at=2_200_000_000_000)))
    assert [row.ttl for row in rows(place, "t")] == [None]
    assert place.view().documents(["t"])


# -- what stays bounded ------------------------------------------------------------------------


def test_a_task_that_reports_progress_all_day_has_small_partitions(place: _Cassandra) -> None:
    sink = place.sink()
    for minute in range(0, 24 * 60, 10):
        at = minute * 60_000
        sink.write(batch(*(stated("PROGRESS", at + n, worker="celery@one", started_at=R + 1) for n in range(3))))
    view = place.view()
    assert len(view.history("t")) == 3 * 6 * 24
    count = f"SELECT count(*) FROM {place._keyspace}.celery_kafka_view"
    assert place._session.execute(count).one()[0] == 1, "what cannot be shown any more is gone"
    found = place._session.execute(f"SELECT pieces, hours FROM {place._keyspace}.celery_kafka_view").one()
    assert len(found.pieces) == 1
    assert 24 <= len(found.hours) <= 25
    sizes = place._session.execute(
        f"SELECT task_id, hour, count(*) AS n FROM {place._keyspace}.celery_kafka_history GROUP BY task_id, hour"
    )
    assert max(each.n for each in sizes) == 18


def test_thousands_of_events_of_one_task_in_one_batch_are_no_one_mutation(place: _Cassandra) -> None:
    """9 MB of history, of which the server takes 8 MB at once."""
    events = [stated("PROGRESS", n, value="x" * 10_000) for n in range(900)]
    facts = [ChordFact("g", f"part|{n}|0", 1, b"{}", FAR) for n in range(900)]
    place.sink().write(batch(*events, chords=facts))
    assert len(place.view().history("t")) == len(events)
    assert len(place.view().chord("g")) == len(facts)


def test_chord_facts_replace_each_other(place: _Cassandra) -> None:
    sink = place.sink()
    for order in range(20):
        sink.write(Batch(changes=[], chords=[ChordFact("g", "progress", order, b"%d" % order, FAR)]))
    assert place._session.execute(f"SELECT count(*) FROM {place._keyspace}.celery_kafka_view").one()[0] == 1
    assert place.view().chord("g") == {"progress": b"19"}


def test_a_session_is_one_per_process_and_leaves_nothing_behind(cassandra: service.CassandraServer, place: Any) -> None:
    def used() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208

    def once(name: str) -> None:
        options = StoreOptions(options={"client_id": None, "application_name": name})
        sink, views = registry.open_sink(place.url, options), [registry.open_view(place.url, options) for _ in range(5)]
        sink.open()
        before = used()
        assert [view.documents(["t"]) for view in views] == [{}] * 5
        assert used()[0] == before[0], "no further connection"
        for each in (sink, *views):
            each.close()

    once("first")
    before = used()
    for n in range(3):
        once(f"{n}")
    deadline = time.monotonic() + PATIENCE_S
    while any(now > then for now, then in zip(used(), before, strict=True)):
        assert time.monotonic() < deadline, (used(), before)
        time.sleep(0.05)


FORKING = """
import os, sys
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.sinks.contract import StoreOptions
view = registry.open_view(sys.argv[1], StoreOptions())
assert view.documents(["t"])
if os.fork() == 0:
    assert view.documents(["t"])
    sys.exit(0)
assert os.wait()[1] == 0
assert view.documents(["t"])
view.close()
"""


def test_a_child_that_exits_as_usual_leaves_its_parent_its_session(place: _Cassandra) -> None:
    """The driver has every cluster shut down at exit, also one that a child inherited."""
    place.sink().write(batch(stated("SUCCESS", 10)))
    subprocess.run([sys.executable, "-c", FORKING, place.url], timeout=PATIENCE_S, check=True)


def test_events_without_a_document_leave_celery_s_table_alone(place: _Cassandra) -> None:
    place.sink().write(batch(sent(0)))
    assert rows(place, "t") == []
