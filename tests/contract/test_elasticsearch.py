"""What only Elasticsearch can do to a view: go away, refuse, keep what Celery's own backend wrote and reads."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from celery import Celery, states

from celery_kafka_backend.changes import Batch, ChordFact, Logged, Partition
from celery_kafka_backend.errors import Rejected, SettingsError, Unavailable
from celery_kafka_backend.events import Opaque
from celery_kafka_backend.query import Query
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import (
    FAR,
    RUN,
    R,
    batch,
    forgotten,
    group_deleted,
    group_saved,
    json_document,
    sent,
    stated,
)
from tests.contract.patience import again
from tests.contract.test_native import SERIALIZERS, STATES, documents, read
from tests.patience import PATIENCE_S, until
from tests.services import elasticsearch as service
from tests.services.doorman import Doorman

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery_kafka_backend.events import Event

pytest.importorskip("elasticsearch")
pytestmark = pytest.mark.elasticsearch
PAST = 1_000_000_000_000
OBJECT = {"save_meta_as_text": False}


@pytest.fixture
def server(elasticsearch: service.ElasticServer) -> service.ElasticServer:
    """The run's own: to start another costs more than most of this file. A test that kills it starts it again."""
    return elasticsearch


@pytest.fixture
def sink(elasticsearch_url: str) -> Iterator[Any]:
    found = registry.open_sink(elasticsearch_url, StoreOptions())
    found.open()
    yield found
    found.close()


@pytest.fixture
def view(elasticsearch_url: str) -> Iterator[Any]:
    found = registry.open_view(elasticsearch_url, StoreOptions())
    yield found
    found.close()


@pytest.fixture
def doorman(server: service.ElasticServer) -> Iterator[Doorman]:
    found = Doorman(server.port)
    yield found
    found.close()


def quick() -> StoreOptions:
    return StoreOptions(options={"request_timeout": 1.0, "max_retries": 0})


def source(server: service.ElasticServer, url: str, key: str) -> dict[str, Any]:
    """Return what lies under a key, by the server's own word."""
    status, said = service.ask(server.port, "GET", f"/{url.rpartition('/')[2]}/_doc/{key}")
    return json.loads(said)["_source"] if status == 200 else {}


def named(event: Event, name: str) -> Event:
    return msgspec.structs.replace(event, name=name)


# -- going away --------------------------------------------------------------------------------


def test_a_server_that_is_frozen_or_killed_in_the_middle_of_a_batch_is_unavailable_and_the_batch_comes_again(
    server: service.ElasticServer,
) -> None:
    url = server.clean_index()
    sink, view = registry.open_sink(url, quick()), registry.open_view(url, quick())
    again(sink.open)  # a second is soon over where much else is done
    again(lambda: sink.write(batch(stated("STARTED", 10))))
    ids = [f"t{n}" for n in range(6_000)]
    found = batch(*(stated("SUCCESS", 10, task=each) for each in ids), positions={Partition("x", 0): 9})
    server.freeze()
    with pytest.raises(Unavailable):
        sink.write(found)
    hurried = registry.open_view(url, StoreOptions(options={"request_timeout": PATIENCE_S}))
    began = time.monotonic()
    with pytest.raises(Unavailable), hurried.within(0.2):
        hurried.documents(["t"])
    assert time.monotonic() - began < PATIENCE_S / 2, "not the time that anybody else would give it"
    hurried.close()
    server.thaw()

    def kill_once_something_is_there() -> None:
        while service.ask(server.port, "GET", f"/{url.rpartition('/')[2]}/_doc/celery-task-meta-t0")[0] != 200:
            time.sleep(0.005)
        server.kill()

    killer = threading.Thread(target=kill_once_something_is_there)
    killer.start()
    with pytest.raises(Unavailable):
        until_failed(sink, batch(*(stated("SUCCESS", 10, task=each) for each in ids)))
    killer.join()
    with pytest.raises(Unavailable):
        view.documents(["t"])
    server.restart()
    shown = again(lambda: view.documents(["t"]))
    assert shown == {"t": stated("STARTED", 10).document}, "what was acknowledged outlives SIGKILL"
    assert again(view.positions) == {}
    again(lambda: sink.write(found))
    assert again(lambda: view.documents(ids)).keys() == set(ids)
    assert again(view.positions) == {Partition("x", 0): 9}
    for each in (sink, view):
        each.close()
    server.drop(url)


def until_failed(sink: Any, found: Batch) -> None:
    """Write again and again, for the server may be done before it is killed."""
    while True:
        sink.write(found)


# -- refusing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
def test_who_may_not_is_told_so_and_not_asked_again(doorman: Doorman, elasticsearch_url: str, status: int) -> None:
    """The server of the tests knows no users; what stands before it answers as one that does."""
    url = doorman.url(elasticsearch_url).replace("://", "://me:s3cret@")
    sink, view = registry.open_sink(url, StoreOptions()), registry.open_view(url, StoreOptions())
    sink.open()
    doorman.answers(status, {"error": {"type": "security_exception", "reason": "unable to authenticate"}})
    for act in (
        sink.open,
        lambda: registry.open_sink(url, StoreOptions()).write(batch()),
        lambda: view.documents(["t"]),
    ):
        doorman.seen.clear()
        with pytest.raises(SettingsError) as caught:
            act()
        assert "s3cret" not in str(caught.value)
        assert str(status) in str(caught.value)
        assert ("user and password" if status == 401 else "manage_index_templates") in caught.value.remedy
        assert len(doorman.seen) == 1, "not retried"
    sink.close()
    view.close()


def test_credentials_are_sent_and_options_are_the_driver_s(doorman: Doorman, elasticsearch_url: str) -> None:
    url = doorman.url(elasticsearch_url).replace("://", "://me:p%40ss@")
    sink = registry.open_sink(url, StoreOptions())
    sink.open()
    assert doorman.seen[0].headers["authorization"] == "Basic bWU6cEBzcw=="
    sink.close()
    doorman.seen.clear()
    sink = registry.open_sink(doorman.url(elasticsearch_url), StoreOptions(options={"api_key": "k"}))
    sink.open()
    assert doorman.seen[0].headers["authorization"] == "ApiKey k"
    sink.close()


@pytest.mark.parametrize(
    ("status", "product", "remedy"),
    [(200, "OpenSearch", "7.14 or newer"), (406, "Elasticsearch", "Elasticsearch 8 must")],
)
def test_another_server_and_one_of_another_version_are_settings(
    doorman: Doorman, elasticsearch_url: str, status: int, product: str, remedy: str
) -> None:
    doorman.product = product
    why = "Content-Type header [application/vnd.elasticsearch+json; compatible-with=8] is not supported"
    doorman.answers(status, {"error": {"type": "media_type_header_exception", "reason": why}})
    with pytest.raises(SettingsError) as caught:
        registry.open_sink(doorman.url(elasticsearch_url), StoreOptions()).open()
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_server_is_unavailable(doorman: Doorman, elasticsearch_url: str, status: int) -> None:
    sink = registry.open_sink(doorman.url(elasticsearch_url), StoreOptions(options={"max_retries": 0}))
    sink.open()
    sink.write(batch(stated("SUCCESS", 10)))
    doorman.answers(status, {"error": {"type": "es_rejected_execution_exception", "reason": "queue is full"}})
    with pytest.raises(Unavailable, match="queue is full"):
        sink.write(batch(stated("SUCCESS", 20)))
    doorman.lets_through()
    busy = {"status": status, "error": {"type": "es_rejected_execution_exception", "reason": "of this shard"}}
    doorman.answers(200, {"errors": True, "items": [{"update": busy}, {"create": {"status": 201}}]}, only="_bulk")
    with pytest.raises(Unavailable, match="of this shard"):
        sink.write(batch(stated("SUCCESS", 20)))
    sink.close()


def test_a_full_disk_is_waited_for(server: service.ElasticServer, elasticsearch_url: str, sink: Any) -> None:
    index = elasticsearch_url.rpartition("/")[2]

    def refused() -> str:
        blocked = {"index.blocks.read_only_allow_delete": True}
        assert service.ask(server.port, "PUT", f"/{index}/_settings", blocked)[0] == 200
        try:
            sink.write(batch(stated("SUCCESS", 10)))
        except Unavailable as exc:
            return str(exc)
        return ""  # twice a minute the server looks at its disk, finds room, and lifts the block

    assert "block" in until(refused)
    blocked = {"index.blocks.read_only_allow_delete": None}
    assert service.ask(server.port, "PUT", f"/{index}/_settings", blocked)[0] == 200
    sink.write(batch(stated("SUCCESS", 10)))


def test_a_closed_index_is_waited_for(server: service.ElasticServer, elasticsearch_url: str, sink: Any) -> None:
    """Nothing is wrong with the documents: they are no dead letters."""
    index = elasticsearch_url.rpartition("/")[2]
    assert service.ask(server.port, "POST", f"/{index}/_close")[0] == 200
    with pytest.raises(Unavailable, match="closed"):
        sink.write(batch(stated("SUCCESS", 10)))
    assert service.ask(server.port, "POST", f"/{index}/_open")[0] == 200
    sink.write(batch(stated("SUCCESS", 10)))


def test_a_server_that_runs_no_scripts_and_a_foreign_field_of_our_name_are_settings(
    server: service.ElasticServer, doorman: Doorman, elasticsearch_url: str
) -> None:
    why = {"type": "illegal_argument_exception", "reason": "cannot execute [inline] scripts"}
    doorman.answers(200, {"errors": True, "items": [{"update": {"status": 400, "error": why}}]}, only="_bulk")
    with pytest.raises(SettingsError, match="inline"):
        registry.open_sink(doorman.url(elasticsearch_url), StoreOptions()).open()
    foreign = server.clean_index()
    made = {"mappings": {"properties": {"ckb": {"type": "keyword"}}}}
    assert service.ask(server.port, "PUT", f"/{foreign.rpartition('/')[2]}", made)[0] == 200
    with pytest.raises(SettingsError, match="ckb"):
        registry.open_sink(foreign, StoreOptions()).open()
    server.drop(foreign)


def test_positions_that_the_server_refuses_end_the_processor(
    server: service.ElasticServer, elasticsearch_url: str, sink: Any
) -> None:
    index = elasticsearch_url.rpartition("/")[2]
    theirs = {"ckb": {"next": "a word"}}
    assert service.ask(server.port, "PUT", f"/{index}/_doc/celery-kafka-positions-celery", theirs)[0] == 201
    with pytest.raises(SettingsError, match="takes no positions"):
        sink.write(batch(stated("SUCCESS", 10), positions={Partition("x", 0): 1}))


def test_an_alias_serves_as_an_index(server: service.ElasticServer, elasticsearch_url: str, view: Any) -> None:
    index = elasticsearch_url.rpartition("/")[2]
    made = {"aliases": {index: {"is_write_index": True}}}
    assert service.ask(server.port, "PUT", f"/{index}-000001", made)[0] == 200
    sink = registry.open_sink(elasticsearch_url, StoreOptions())
    sink.open()
    sink.write(batch(stated("SUCCESS", 10)))
    assert view.documents(["t"])
    sink.close()
    assert service.ask(server.port, "DELETE", f"/{index}-000001")[0] == 200


def test_a_request_too_large_for_what_stands_before_the_server_is_cut(
    doorman: Doorman, elasticsearch_url: str, view: Any
) -> None:
    sink = registry.open_sink(doorman.url(elasticsearch_url), StoreOptions(history=False))
    sink.open()
    doorman.limit = 100_000
    large = json_document("large", "SUCCESS", "x" * 200_000)
    ids = [f"t{n}" for n in range(300)]
    found = [stated("SUCCESS", 10, task=each) for each in ids]
    with pytest.raises(Rejected) as caught:
        sink.write(batch(*found, stated("SUCCESS", 10, task="large", document=large)))
    assert [each for each, _ in caught.value.reasons] == ["large"]
    assert view.documents([*ids, "large"]).keys() == set(ids)
    sink.close()


def test_what_only_the_server_refuses_is_named_and_the_rest_is_written(
    server: service.ElasticServer, elasticsearch_url: str, view: Any
) -> None:
    """An index that somebody made, whose dynamic mapping has learnt that all results are numbers."""
    index = elasticsearch_url.rpartition("/")[2]
    made = {"mappings": {"properties": {"result": {"properties": {"result": {"type": "long"}}}}}}
    assert service.ask(server.port, "PUT", f"/{index}", made)[0] == 200
    sink = registry.open_sink(elasticsearch_url, StoreOptions(options=OBJECT))
    sink.open()
    events = [stated("SUCCESS", 10, task="bad", value="no number"), stated("SUCCESS", 10, value=7)]
    long = stated("SUCCESS", 10, task="x" * 600)
    with pytest.raises(Rejected) as caught:
        sink.write(batch(*events, long, positions={Partition("x", 0): 1}))
    reasons = dict(caught.value.reasons)
    assert reasons.keys() == {"bad", "x" * 600}
    assert "no number" in reasons["bad"]
    assert list(view.documents(["bad", "t"])) == ["t"]
    assert view.positions() == {Partition("x", 0): 1}
    sink.close()


def test_a_document_and_an_event_beyond_the_limit_are_refused_by_name(sink: Any, view: Any) -> None:
    large = json_document("large", "SUCCESS", "x" * 20_000_000)
    almost = json_document("almost", "SUCCESS", "x" * 9_000_000)
    event = batch(stated("SUCCESS", 10, task="event")).changes[0]
    event.history[0] = Logged(event.history[0].event, b"x" * 20_000_001)
    found = batch(*(stated("SUCCESS", 10, task=t, document=d) for t, d in (("large", large), ("almost", almost))))
    found.changes[0].history.clear()
    with pytest.raises(Rejected) as caught:
        sink.write(Batch(changes=[*found.changes, event]))
    assert [each for each, _ in caught.value.reasons] == ["large", "event"]
    assert view.documents(["large", "almost"]) == {"almost": almost}


@pytest.mark.parametrize("made_as_text", [True, False])
def test_an_index_with_results_of_the_other_kind_is_a_setting(elasticsearch_url: str, made_as_text: bool) -> None:
    made = stock(elasticsearch_url, elasticsearch_save_meta_as_text=made_as_text)
    made.store_result("t", {"a": 1}, states.SUCCESS)
    with pytest.raises(SettingsError, match="elasticsearch_save_meta_as_text"):
        registry.open_sink(elasticsearch_url, StoreOptions(options={"save_meta_as_text": not made_as_text})).open()
    sink = registry.open_sink(elasticsearch_url, StoreOptions(options={"save_meta_as_text": made_as_text}))
    sink.open()
    sink.close()


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("elasticsearch://h:port/i", {}),
        ("elasticsearch://127.0.0.1:1/i?refresh=true", {}),
        ("elasticsearch://127.0.0.1:1/i", {"no_such_option": 1}),
    ],
)
def test_a_url_or_option_that_the_driver_does_not_take_is_a_setting(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        registry.open_sink(url, StoreOptions(options=options)).open()


def test_an_index_that_cannot_be_named_so_is_a_setting(elasticsearch_url: str) -> None:
    with pytest.raises(SettingsError, match="lower"):
        registry.open_sink(elasticsearch_url + "UPPER", StoreOptions()).open()


def test_an_index_that_is_deleted_comes_again_with_its_mapping(
    server: service.ElasticServer, elasticsearch_url: str, sink: Any, view: Any
) -> None:
    sink.write(batch(stated("SUCCESS", 10)))
    index = elasticsearch_url.rpartition("/")[2]
    assert service.ask(server.port, "DELETE", f"/{index},{index}-kafka*")[0] == 200
    assert view.documents(["t"]) == {}
    assert view.positions() == {}
    assert view.history("t") == []
    assert list(view.rows()) == []
    sink.write(batch(stated("SUCCESS", 10), positions={Partition("x", 0): 1}))
    assert view.documents(["t"])
    assert view.history("t")
    status, said = service.ask(server.port, "GET", f"/{index}*/_mapping")
    assert status == 200
    assert {mapping["mappings"]["dynamic"] for mapping in json.loads(said).values()} == {"false"}


def test_a_host_that_is_gone_is_passed_over(elasticsearch_url: str) -> None:
    url = elasticsearch_url.replace("://", "://127.0.0.1:1,")
    sink, view = registry.open_sink(url, StoreOptions()), registry.open_view(url, StoreOptions())
    sink.open()
    for n in range(4):
        sink.write(batch(stated("SUCCESS", 10, task=f"t{n}")))
    assert len(view.documents([f"t{n}" for n in range(4)])) == 4
    sink.close()
    view.close()


def test_it_speaks_tls(server: service.ElasticServer, elasticsearch_url: str) -> None:
    with contextlib.closing(Doorman(server.port, tls=True)) as doorman:
        url = doorman.url(elasticsearch_url).replace("elasticsearch://", "elasticsearch+https://")
        untrusting = registry.open_sink(url, StoreOptions(options={"max_retries": 0}))
        with pytest.raises(Unavailable, match="certificate"):
            untrusting.open()
        sink = registry.open_sink(url, StoreOptions(options={"ca_certs": doorman.authority}))
        sink.open()
        sink.write(batch(stated("SUCCESS", 10)))
        sink.close()
        assert doorman.seen


# -- beside Celery's own backend ---------------------------------------------------------------


def stock(url: str, **conf: Any) -> Any:
    app = Celery("stock", backend=url, set_as_current=False)
    app.conf.update(accept_content=SERIALIZERS, result_accept_content=SERIALIZERS, **conf)
    return app.backend


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("serializer", ["json", "yaml"])
def test_a_stock_success_stays_in_every_serializer(
    server: service.ElasticServer, elasticsearch_url: str, serializer: str, as_text: bool
) -> None:
    backend = stock(
        elasticsearch_url, result_serializer=serializer, result_extended=True, elasticsearch_save_meta_as_text=as_text
    )
    backend.store_result("done", {"status": "FAILURE"}, states.SUCCESS)
    backend.store_result("failed", {"status": "SUCCESS", "deep": {"status": "SUCCESS"}}, "PROGRESS")
    before = source(server, elasticsearch_url, "celery-task-meta-done")
    sink = registry.open_sink(elasticsearch_url, StoreOptions(options={"save_meta_as_text": as_text}))
    sink.open()
    sink.write(batch(*(stated("FAILURE", 9_000, task=task, run=RUN + 1) for task in ("done", "failed"))))
    assert before.items() <= source(server, elasticsearch_url, "celery-task-meta-done").items()
    assert backend.get_state("done") == "SUCCESS"
    assert stock(elasticsearch_url, elasticsearch_save_meta_as_text=as_text).get_state("failed") == "FAILURE"
    sink.write(batch(forgotten(10, task="done")))
    assert backend.get_state("done") == states.PENDING
    sink.close()


@pytest.mark.parametrize("serializer", ["pickle", "msgpack"])
def test_celery_s_own_backend_cannot_write_bytes(elasticsearch_url: str, serializer: str) -> None:
    """So there is nothing of it to read, and no form to copy."""
    import elasticsearch  # noqa: PLC0415

    with pytest.raises(elasticsearch.SerializationError):
        stock(elasticsearch_url, result_serializer=serializer).store_result("t", b"\xff", states.SUCCESS)


@pytest.mark.parametrize("as_text", [True, False])
def test_we_read_what_celery_s_own_backend_wrote(elasticsearch_url: str, view: Any, as_text: bool) -> None:
    backend = stock(elasticsearch_url, result_extended=True, elasticsearch_save_meta_as_text=as_text)
    backend.store_result("t", [1, "ä"], states.SUCCESS)
    backend.store_result("u", ValueError("why"), states.FAILURE, traceback="…")
    backend.store_result("empty", None, states.SUCCESS)
    found = {task: msgspec.json.decode(d) for task, d in view.documents(["t", "u", "empty", "nobody"]).items()}
    assert (found["t"]["status"], found["t"]["result"], found["t"]["task_id"]) == ("SUCCESS", [1, "ä"], "t")
    assert found["u"]["result"]["exc_type"] == "ValueError"
    assert found["u"]["traceback"] == "…"
    assert found["empty"]["result"] is None
    assert "nobody" not in found


def test_what_celery_s_own_backend_writes_over_ours_is_seen_as_its_own(
    elasticsearch_url: str, sink: Any, view: Any
) -> None:
    """Workers may still store by the stock backend while others store by ours."""
    sink.write(batch(stated("STARTED", 10), forgotten(10, task="gone")))
    backend = stock(elasticsearch_url)
    for task in ("t", "gone"):
        backend.store_result(task, 7, states.SUCCESS)
    assert view.shown(["t"])["t"].key == 0
    assert all(b'"SUCCESS"' in document for document in view.documents(["t", "gone"]).values())
    sink.write(batch(stated("FAILURE", 9_000, run=RUN + 1), stated("FAILURE", 9_000, task="gone", run=RUN + 1)))
    assert [backend.get_state(task) for task in ("t", "gone")] == ["SUCCESS", "SUCCESS"]
    sink.write(batch(forgotten(9_001, run=RUN + 1)))
    assert view.documents(["t"]) == {}


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("serializer", ["json", "yaml", "pickle"])
def test_a_stock_client_reads_documents_kept_as_objects(
    elasticsearch_url: str, serializer: str, compression: str | None
) -> None:
    conf = {"result_serializer": serializer, "result_extended": True, "accept_content": SERIALIZERS}
    conf |= {"result_accept_content": SERIALIZERS, "result_compression": compression}
    sink = registry.open_sink(elasticsearch_url, StoreOptions(options=OBJECT))
    sink.open()
    events = documents(conf, serializer)
    sink.write(batch(*events, group_saved("g", members=("a",))))
    view = registry.open_view(elasticsearch_url, StoreOptions(options=OBJECT))
    assert view.documents([event.task for event in events]) == {event.task: event.document for event in events}
    view.close()
    sink.close()
    job = {"backend": elasticsearch_url, "tasks": [event.task for event in events], "groups": []}
    job["conf"] = {**conf, "elasticsearch_save_meta_as_text": False}
    if serializer == "json":
        job["groups"] = ["g"]
    (answer,) = read([job])
    for task, seen in answer["tasks"].items():
        state = task.partition("-")[0]
        assert seen["state"] == state
        if not isinstance(STATES[state], Exception) and state != "REVOKED":
            assert seen["result"] == STATES[state], task
        assert seen["children"] == (["child"] if state == "SUCCESS" else [])
        about = tuple(seen[part] for part in ("name", "args", "kwargs", "worker", "retries", "queue"))
        assert about == ("proj.add", [1, "é"], {"k": [2]}, "celery@host", 2, "slow")
    assert answer["groups"] == ({"g": ["a"]} if serializer == "json" else {})


@pytest.mark.parametrize(
    "kwargs",
    [{"a.b": 2, ".": 1, "": {"": 1}}, {"big": 1 << 70}, {"deep": [[[[1]]]] * 40}, {"x": "y" * 40_000}],
    ids=str,
)
@pytest.mark.parametrize("as_text", [True, False])
def test_any_arguments_are_kept(elasticsearch_url: str, kwargs: Any, as_text: bool) -> None:
    document = json_document("t", "SUCCESS", 7, name="proj.add", args=[], kwargs=kwargs)
    options = StoreOptions(options={"save_meta_as_text": as_text})
    sink, view = registry.open_sink(elasticsearch_url, options), registry.open_view(elasticsearch_url, options)
    sink.open()
    sink.write(batch(named(stated("SUCCESS", 10, document=document, args=[kwargs], kwargs=kwargs), "n" * 1000)))
    assert view.documents(["t"]) == {"t": document}
    conf = {"result_extended": True, "elasticsearch_save_meta_as_text": as_text}
    assert stock(elasticsearch_url, **conf).get_result("t") == 7
    for each in (sink, view):
        each.close()


def test_a_compressed_document_that_is_not_text_at_all_is_ours_alone(
    sink: Any, view: Any, elasticsearch_url: str
) -> None:
    opaque = Opaque(meta=b"\x83msgpack\xff", content_type="application/x-msgpack", result=b"\xff")
    sink.write(batch(stated("SUCCESS", 10, opaque=opaque)))
    assert view.documents(["t"]) == {"t": opaque.meta}
    assert stock(elasticsearch_url).get_state("t") == states.PENDING


def test_a_group_is_deleted_for_stock_clients_too(sink: Any, elasticsearch_url: str) -> None:
    sink.write(batch(group_saved("g", 5, members=("a",)), group_saved("h", 5, members=("a",))))
    sink.write(batch(group_deleted("g", 10)))
    (answer,) = read([{"backend": elasticsearch_url, "conf": {}, "tasks": [], "groups": ["g", "h"]}])
    assert answer["groups"] == {"g": None, "h": ["a"]}


def test_a_key_prefix_is_celery_s(elasticsearch_url: str) -> None:
    sink = registry.open_sink(elasticsearch_url, StoreOptions(key_prefix="team_"))
    sink.open()
    sink.write(batch(stated("SUCCESS", 10, value=7)))
    assert stock(elasticsearch_url, result_backend_transport_options={"global_keyprefix": "team"}).get_result("t") == 7
    sink.close()


# -- searching ---------------------------------------------------------------------------------


def test_history_is_searched_by_what_happened(server: service.ElasticServer, elasticsearch_url: str, sink: Any) -> None:
    about = {"worker": "celery@one", "exception": "builtins.ValueError", "message": "broken pipe"}
    failed = stated("FAILURE", 10, **about, args=["orange", 7], kwargs={"colour": "blue"})
    other = stated("SUCCESS", 20, task="u", worker="celery@two", args=["apple"])
    sink.write(batch(*(named(event, name) for event, name in ((failed, "proj.add"), (other, "proj.mul")))))
    index = elasticsearch_url.rpartition("/")[2]
    service.ask(server.port, "POST", f"/{index}-kafka-history-*/_refresh")
    for query in (
        {"term": {"name": "proj.add"}}, {"term": {"worker": "celery@one"}}, {"term": {"state": "FAILURE"}},
        {"term": {"exception": "builtins.ValueError"}}, {"match": {"args": "orange"}}, {"match": {"kwargs": "blue"}},
        {"match": {"message": "pipe"}}, {"range": {"at": {"lte": R + 15}}}, {"term": {"kind": "failure"}},
    ):  # fmt: skip
        _, said = service.ask(server.port, "POST", f"/{index}-kafka-history-*/_search", {"query": query})
        assert [hit["_source"]["task"] for hit in json.loads(said)["hits"]["hits"]] == ["t"], query


def test_a_long_history_is_read_page_by_page(sink: Any, view: Any) -> None:
    events = [stated("PROGRESS", at) for at in range(2_345)]
    sink.write(batch(*events))
    assert [b'"hlc":%d,' % event.hlc in value for event, value in zip(events, view.history("t"), strict=True)]


# -- expiry ------------------------------------------------------------------------------------


def count(server: service.ElasticServer, pattern: str) -> int:
    service.ask(server.port, "POST", f"/{pattern}/_refresh?ignore_unavailable=true")
    return int(json.loads(service.ask(server.port, "GET", f"/{pattern}/_count?ignore_unavailable=true")[1])["count"])


def test_a_sweep_removes_what_has_expired(
    server: service.ElasticServer, elasticsearch_url: str, sink: Any, view: Any
) -> None:
    stock(elasticsearch_url).store_result("stock", 1, states.SUCCESS)
    at = time.time_ns() // 1_000_000 + 700
    facts = [
        ChordFact("c", "sized", 1, b"1", at),
        ChordFact("d", "sized", 1, b"1", FAR),
        ChordFact("d", "x", 1, b"", at),
    ]
    sink.write(
        batch(
            stated("SUCCESS", 10, expires_at=at), group_saved("g", expires_at=at), stated("SUCCESS", task="u"),
            sent(task="stock", expires_at=at), chords=facts,
        )
    )  # fmt: skip
    index = elasticsearch_url.rpartition("/")[2]
    assert (count(server, index), count(server, f"{index}-kafka")) == (4, 5)
    time.sleep(max(0.0, at / 1000 - time.time()) + 0.01)
    sink._sweep_due = 0.0
    sink.write(batch())
    assert (count(server, index), count(server, f"{index}-kafka")) == (2, 3)
    assert list(view.documents(["t", "u", "stock"])) == ["u", "stock"]
    assert view.chord("d") == {"sized": b"1", "x": b""}
    assert "ckb" not in source(server, elasticsearch_url, "celery-task-meta-stock")


def test_a_document_that_expires_before_its_key_is_hidden_from_stock_clients_too(
    sink: Any, view: Any, elasticsearch_url: str
) -> None:
    at = time.time_ns() // 1_000_000 + 300
    sink.write(batch(stated("STARTED", 10)))
    sink.write(batch(stated("FAILURE", 20, expires_at=at)))
    deadline = time.monotonic() + PATIENCE_S
    while view.documents(["t"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while stock(elasticsearch_url).get_state("t") != states.PENDING:
        assert time.monotonic() < deadline
        sink._sweep_due = 0.0
        sink.write(batch(sent(0, task="other")))
        time.sleep(0.2)
    sink.write(batch(stated("STARTED", 10)))
    assert view.documents(["t"]) == {}
    assert view.shown(["t"])["t"].key == stated("FAILURE", 20).key


def test_history_is_dropped_by_the_index(
    server: service.ElasticServer, elasticsearch_url: str, sink: Any, view: Any
) -> None:
    now = time.time_ns() // 1_000_000
    day, month, year = (now + days * 86_400_000 for days in (1, 60, 800))
    events = [stated("PROGRESS", n, expires_at=at) for n, at in enumerate((day, month, year, None))]
    events = [msgspec.structs.replace(event, at=now) for event in events]
    sink.write(batch(*events))
    index = elasticsearch_url.rpartition("/")[2]
    names = json.loads(service.ask(server.port, "GET", f"/{index}-kafka-history-*/_alias")[1])
    assert len(names) == 4
    gone = f"{index}-kafka-history-2020.01.01"
    assert service.ask(server.port, "PUT", f"/{gone}")[0] == 200
    sink._sweep_due = 0.0
    sink.write(batch())
    found = json.loads(service.ask(server.port, "GET", f"/{index}-kafka-history-*/_alias")[1])
    assert found.keys() == names.keys()
    assert len(view.history("t")) == 4


def test_an_event_that_was_written_under_two_retentions_is_there_once(elasticsearch_url: str, sink: Any) -> None:
    """Each has an index of its own, named for the day from which on it may be dropped."""
    events = [sent(0), stated("SUCCESS", 0)]
    sink.write(batch(*events))
    other = registry.open_sink(elasticsearch_url, StoreOptions(history_retention_ms=FAR))
    other.write(batch(*events))
    other.close()
    view = registry.open_view(elasticsearch_url, StoreOptions())
    assert len(view.history("t")) == 2
    assert len(list(view.search(Query()))) == len(list(view.search(Query(newest_first=True)))) == 2
    view.close()


def test_a_translog_that_may_lose_is_said(server: service.ElasticServer, elasticsearch_url: str, sink: Any) -> None:
    assert sink.warnings() == []
    index = elasticsearch_url.rpartition("/")[2]
    relaxed = {"index.translog.durability": "async"}
    assert service.ask(server.port, "PUT", f"/{index}/_settings", relaxed)[0] == 200
    assert index in sink.warnings()[0]
