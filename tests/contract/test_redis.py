"""What only Redis can do to a view: go away, run full, forget its scripts, evict, refuse."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery

from celery_kafka_backend.changes import Partition
from celery_kafka_backend.errors import Rejected, SettingsError, Unavailable
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.redis_view import REGISTERED
from tests.contract.factories import R, batch, event_id, sent, stated
from tests.services import redis as service

if TYPE_CHECKING:
    from collections.abc import Iterator

redis = pytest.importorskip("redis")
pytestmark = pytest.mark.redis


@pytest.fixture
def own() -> Iterator[service.RedisServer]:
    """A server that a test may kill or fill."""
    found = service.start()
    yield found
    found.stop()


@pytest.fixture
def opened(own: service.RedisServer) -> Iterator[Any]:
    sink = registry.open_sink(own.url, StoreOptions(options={"socket_timeout": 2.0}))
    sink.open()
    yield sink
    sink.close()


def documents(url: str, *ids: str) -> dict[str, bytes]:
    view = registry.open_view(url, StoreOptions())
    try:
        return view.documents(ids)
    finally:
        view.close()


def test_the_host_may_do_something_else_until_redis_answers(own: service.RedisServer, opened: Any) -> None:
    """However much else there is, and also where the answer is that it has gone."""
    calls: list[None] = []

    def meanwhile() -> bool:
        calls.append(None)
        if len(calls) == 1:
            own.thaw()
        return True

    opened.meanwhile = meanwhile
    own.freeze()  # it answers when something else was done
    opened.write(batch(stated("SUCCESS", 10), positions={Partition("x", 0): 1}))
    assert calls
    assert documents(own.url, "t")
    own.kill()
    with pytest.raises(Unavailable):
        opened.write(batch(stated("SUCCESS", 20)))


def test_a_server_that_is_away_is_unavailable_and_the_next_write_reconnects(
    own: service.RedisServer, opened: Any
) -> None:
    opened.write(batch(stated("STARTED", 10)))
    view = registry.open_view(own.url, StoreOptions())
    ear = view.subscribe("me")
    assert view.documents(["t"])
    own.kill()
    found = batch(stated("SUCCESS", 20), positions={Partition("x", 0): 1})
    with pytest.raises(Unavailable):
        opened.write(found)
    with pytest.raises(Unavailable):
        view.documents(["t"])
    with pytest.raises(Unavailable):
        ear.wait(1)
    assert ear.fileno() == -1
    fresh = registry.open_sink(own.url, StoreOptions())
    with pytest.raises(Unavailable):
        fresh.open()
    own.restart()
    opened.write(found)
    assert view.documents(["t"])
    assert view.positions() == {Partition("x", 0): 1}
    view.close()


def test_a_server_killed_in_the_middle_of_a_batch_has_no_position_and_the_batch_comes_again(
    own: service.RedisServer, opened: Any
) -> None:
    found = batch(*(stated("SUCCESS", 10, task=f"t{n}") for n in range(40_000)), positions={Partition("x", 0): 9})
    killer = threading.Timer(0.2, own.kill)
    killer.start()
    with pytest.raises(Unavailable):
        opened.write(found)
    killer.join()
    own.restart()
    view = registry.open_view(own.url, StoreOptions())
    assert view.positions() == {}
    opened.write(found)
    assert view.positions() == {Partition("x", 0): 9}
    assert len(view.documents([f"t{n}" for n in range(40_000)])) == 40_000
    view.close()


def test_a_frozen_server_is_unavailable_within_the_timeout(own: service.RedisServer) -> None:
    sink = registry.open_sink(own.url, StoreOptions(options={"socket_timeout": 0.3}))
    sink.open()
    own.freeze()
    started = time.monotonic()
    with pytest.raises(Unavailable):
        sink.write(batch(stated("SUCCESS", 10)))
    assert time.monotonic() - started < 20, "not the thirty seconds of whoever says nothing"
    own.thaw()
    sink.write(batch(stated("SUCCESS", 10)))
    sink.close()


def test_flushed_scripts_are_loaded_again(redis_url: str) -> None:
    sink = registry.open_sink(redis_url, StoreOptions())
    sink.open()
    with redis.Redis.from_url(redis_url) as client:
        client.script_flush()
    sink.write(batch(*(stated("SUCCESS", 10, task=f"t{n}") for n in range(600)), positions={Partition("x", 0): 1}))
    assert len(documents(redis_url, *(f"t{n}" for n in range(600)))) == 600
    sink.close()


def test_a_full_server_is_unavailable_and_no_position_passes(own: service.RedisServer, opened: Any) -> None:
    with redis.Redis.from_url(own.url) as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(Unavailable, match="OOM"):
            opened.write(batch(stated("SUCCESS", 10), positions={Partition("x", 0): 1}))
        client.config_set("maxmemory", 0)
    opened.write(batch(stated("SUCCESS", 10), positions={Partition("x", 0): 1}))
    assert documents(own.url, "t")


def test_a_replica_is_unavailable(own: service.RedisServer, opened: Any) -> None:
    with redis.Redis.from_url(own.url) as client:
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(Unavailable):
            opened.write(batch(stated("SUCCESS", 10)))
        client.replicaof("NO", "ONE")


def test_a_key_of_another_type_is_refused_by_name_and_untouched(redis_url: str) -> None:
    sink = registry.open_sink(redis_url, StoreOptions(history=True))
    sink.open()
    with redis.Redis.from_url(redis_url) as client:
        client.rpush("celery-task-meta-list", "x")
        client.rpush("{celery-task-meta-side}:k", "x")
        client.rpush("{celery-task-meta-log}:h", "x")
        with pytest.raises(Rejected) as caught:
            sink.write(
                batch(
                    *(stated("SUCCESS", 10, task=task) for task in ("list", "side", "log", "good")),
                    positions={Partition("x", 0): 3},
                )
            )
        assert sorted(each for each, _ in caught.value.reasons) == ["list", "log", "side"]
        assert {client.type(key) for key in client.keys("*list*")} == {b"list"}
        assert client.get("celery-task-meta-side") is None
    assert list(documents(redis_url, "good")) == ["good"]
    sink.close()


def test_positions_under_whose_key_is_something_else_end_the_processor(redis_url: str) -> None:
    sink, view = (opened(redis_url, StoreOptions()) for opened in (registry.open_sink, registry.open_view))
    sink.open()
    with redis.Redis.from_url(redis_url) as client:
        client.set("celery-kafka:celery:positions", "somebody's")
    with pytest.raises(SettingsError, match="somebody keeps something else"):
        sink.write(batch(stated("SUCCESS", 10), positions={Partition("x", 0): 1}))
    with pytest.raises(SettingsError, match="somebody keeps something else"):
        view.positions()
    sink.close()
    view.close()


def test_a_user_without_the_rights_is_told_so(own: service.RedisServer) -> None:
    """A user of Redis' own, who may read and not write."""
    with redis.Redis.from_url(own.url) as client:
        client.acl_setuser("reader", enabled=True, passwords=["+s3cret"], keys=["*"], categories=["+@all", "-@write"])
    url = own.url.replace("://", "://reader:s3cret@")
    sink = registry.open_sink(url, StoreOptions())
    sink.open()
    with pytest.raises(SettingsError, match="ACL") as caught:
        sink.write(batch(stated("SUCCESS", 10)))
    assert "s3cret" not in str(caught.value)
    assert documents(url, "t") == {}
    sink.close()


def test_the_servers_own_limit_on_values_is_known(own: service.RedisServer) -> None:
    with redis.Redis.from_url(own.url) as client:
        client.config_set("proto-max-bulk-len", 1024 * 1024)
    sink = registry.open_sink(own.url, StoreOptions())
    sink.open()
    with pytest.raises(Rejected, match="large"):
        sink.write(batch(stated("SUCCESS", 10, task="large", value="x" * 1024 * 1024), stated("SUCCESS", 10)))
    assert list(documents(own.url, "t")) == ["t"]
    sink.close()


def test_a_wrong_password_is_a_setting_and_is_not_shown(own: service.RedisServer) -> None:
    with redis.Redis.from_url(own.url) as client:
        client.config_set("requirepass", "right")
    for url in (own.url, own.url.replace("://", "://:s3cret@")):
        with pytest.raises(SettingsError) as caught:
            registry.open_sink(url, StoreOptions()).open()
        assert "s3cret" not in str(caught.value)
    sink = registry.open_sink(own.url.replace("://", "://:right@"), StoreOptions())
    sink.open()
    sink.close()


def test_another_server_than_redis_is_a_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with contextlib.suppress(OSError):  # the test is over
                while True:
                    listening.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(SettingsError, match="no Redis"):
            registry.open_sink(f"redis://127.0.0.1:{listening.getsockname()[1]}", StoreOptions()).open()


@pytest.mark.parametrize(
    ("version", "known"), [("5.0.14", False), ("6.0.16", False), ("6.2.0", True), ("7.0.15", True)]
)
def test_a_server_without_absolute_expiries_is_a_setting(opened: Any, version: str, known: bool) -> None:
    info = f"# Server\r\nredis_version:{version}\r\nredis_mode:standalone"
    with contextlib.nullcontext() if known else pytest.raises(SettingsError, match=f"{version[:3]}.*6.2 or newer"):
        opened._check_version(info)


def test_an_eviction_policy_is_warned_of(own: service.RedisServer, opened: Any) -> None:
    assert opened.warnings() == []
    with redis.Redis.from_url(own.url) as client:
        client.config_set("maxmemory-policy", "volatile-ttl")
    (warning,) = opened.warnings()
    assert "volatile-ttl" in warning


@pytest.mark.parametrize("opening", [registry.open_sink, registry.open_view])
def test_an_option_that_redis_py_does_not_know_is_a_setting(redis_url: str, opening: Any) -> None:
    with pytest.raises(SettingsError, match=r"no_such_option.*view_options"):
        opening(redis_url, StoreOptions(options={"no_such_option": 1}))
    with pytest.raises(SettingsError, match=r"maybe.*view_options"):
        opening("rediss://h:1/0?ssl_cert_reqs=maybe", StoreOptions())


@pytest.mark.parametrize("opening", [registry.open_sink, registry.open_view])
@pytest.mark.parametrize("url", ["redis://h:1/results", "rediss://:s3cret@h/-1", "sentinel://h:1/0;sentinel://h:2/0x"])
def test_a_database_that_is_no_number_is_a_setting(url: str, opening: Any) -> None:
    """redis-py would take database 0 without a word, where others may keep something."""
    with pytest.raises(SettingsError, match="no number of a database") as caught:
        opening(url, StoreOptions(options={"master_name": "m"} if url.startswith("sentinel") else {}))
    assert "s3cret" not in str(caught.value)


def test_a_database_that_the_server_does_not_have_is_a_setting(own: service.RedisServer) -> None:
    url = re.sub(r"\d+$", "2000000000", own.url)
    with pytest.raises(SettingsError, match="databases"):
        registry.open_sink(url, StoreOptions()).open()
    with pytest.raises(SettingsError, match="databases"):
        documents(url, "t")


def test_a_history_with_a_retention_of_its_own_goes_with_its_latest_event(redis_url: str) -> None:
    """Whichever came last, and however few are kept; what is over leaves no room taken."""
    day_ms = 86_400_000
    now = time.time_ns() // 1_000_000 - R
    sink = registry.open_sink(redis_url, StoreOptions(history=True, history_limit=2, history_retention_ms=day_ms))
    sink.open()
    key = "{celery-task-meta-t}:h"
    with redis.Redis.from_url(redis_url) as client:
        for at in (now - 5, now - 7, now - 6, now - day_ms - 1):
            sink.write(batch(stated("PROGRESS", at, run=None)))
        assert [int(score) for _, score in client.zrange(key, 0, -1, withscores=True)] == [R + now - 6, R + now - 5]
        left_ms = client.pttl(key)
        assert R + now - 5 + day_ms - time.time_ns() // 1_000_000 - 1 <= left_ms <= day_ms
        sink.write(batch(sent(now - day_ms - 1, task="over")))
        assert not client.exists("{celery-task-meta-over}:h")
    sink.close()


def test_all_keys_of_a_task_share_a_slot(redis_url: str) -> None:
    from redis.crc import key_slot  # noqa: PLC0415

    sink = registry.open_sink(redis_url, StoreOptions(history=True, key_prefix="fleet_"))
    sink.open()
    view = registry.open_view(redis_url, StoreOptions(key_prefix="fleet_"))
    view.register("me", ["t"], 60)
    sink.write(batch(stated("SUCCESS", 10)))
    with redis.Redis.from_url(redis_url) as client:
        keys = client.keys("*fleet_celery-task-meta-t*")
    assert len(keys) == 4
    assert len({key_slot(key) for key in keys}) == 1
    assert {row.table for row in view.rows()} == {"document", "side", "history"}
    sink.close()
    view.close()


def test_in_a_cluster_a_call_stays_on_one_slot_and_elsewhere_serves_many_tasks() -> None:
    from redis.crc import key_slot  # noqa: PLC0415

    from celery_kafka_backend.sinks.redis_calls import TOGETHER, Calls  # noqa: PLC0415

    def slots(calls: Calls) -> list[int]:
        found = []
        for call in calls.of_changes(changes, 0, []):
            words = call.command.split(b"\r\n")[2::2]
            found.append(len({key_slot(key) for key in words[3 : 3 + int(words[2])]}))
        return found

    changes = batch(*(stated("SUCCESS", 10, task=f"t{n:03}") for n in range(2 * TOGETHER + 1))).changes
    calls = Calls(StoreOptions(history=True))
    calls.limit = 10_000
    assert slots(calls) == [TOGETHER, TOGETHER, 1]
    calls.together = 1
    assert slots(calls) == [1] * len(changes)


def test_a_refused_task_costs_those_of_its_call_nothing(redis_url: str) -> None:
    """However many there are, and whatever stood there: another's key is named and stays, the rest is written once."""
    sink = registry.open_sink(redis_url, StoreOptions(history=True))
    sink.open()
    first = batch(*(stated("STARTED", 5, task=f"t{n:03}") for n in range(100)))
    sink.write(first)
    with redis.Redis.from_url(redis_url) as client:
        client.delete("celery-task-meta-t042")
        client.rpush("celery-task-meta-t042", "x")
        with pytest.raises(Rejected) as caught:
            sink.write(batch(*(stated("SUCCESS", 10, task=f"t{n:03}") for n in range(200))))
        assert [each for each, _ in caught.value.reasons] == ["t042"]
        assert client.lrange("celery-task-meta-t042", 0, -1) == [b"x"]
        names = [f"t{n:03}" for n in range(200) if n != 42]
        found = documents(redis_url, *names)
        assert found.keys() == set(names)
        assert all(b"SUCCESS" in document for document in found.values())
        assert {client.zcard(f"{{celery-task-meta-{each}}}:h") for each in names[:41]} == {2}
    sink.close()


@pytest.mark.parametrize("key", ["celery-task-meta-READONLY", "{celery-task-meta-t}:h", "celery-kafka-chord-g"])
def test_a_key_of_another_type_is_named_to_who_reads_all(redis_url: str, key: str) -> None:
    view = registry.open_view(redis_url, StoreOptions())
    with redis.Redis.from_url(redis_url) as client:
        client.set(b"celery-task-meta-\xff", b"of somebody who does not write Unicode")
        assert [row.table for row in view.rows()] == ["document"]
        client.rpush(key, "somebody's")
        with pytest.raises(SettingsError, match=re.escape(key)):
            list(view.rows())
    view.close()


def test_what_celery_counts_its_own_chords_by_is_no_saved_group(redis_url: str) -> None:
    """Such keys are there for as long as chords are open that a view counts, and minutes longer."""
    app = Celery(broker="memory://", backend=redis_url, set_as_current=False)
    for group, parts in (("open", 1), ("fired", 2)):
        app.backend.set_chord_size(group, 2)
        for n in range(parts):
            request = SimpleNamespace(id=f"{group}-{n}", group=group, group_index=n, chord=app.signature("body"))
            app.backend.on_chord_part_return(request, "SUCCESS", n)
    app.backend.add_to_chord("open", None)
    with redis.Redis.from_url(redis_url) as client:
        assert len(client.keys("celery-taskset-meta-*")) >= 3
    view = registry.open_view(redis_url, StoreOptions())
    assert list(view.rows()) == []
    assert [found for page in view.stock("") for found in page.found] == []
    view.close()


def test_registering_more_than_a_script_call_takes_reads_all_and_ends_all(redis_url: str) -> None:
    ids = [f"t{number}" for number in range(2 * REGISTERED + 1)]
    view = registry.open_view(redis_url, StoreOptions())
    with redis.Redis.from_url(redis_url) as client:
        client.set(f"celery-task-meta-{ids[0]}", b"first")
        client.set(f"celery-task-meta-{ids[-1]}", b"last")
        assert view.register("me", ids, 60) == {ids[0]: b"first", ids[-1]: b"last"}
        for one in (ids[0], ids[REGISTERED], ids[-1]):
            waiters = f"{{celery-task-meta-{one}}}:w"
            assert client.smembers(waiters) == {b"me"}
            assert 0 < client.pttl(waiters) <= 60_000
    view.close()


def test_the_bytes_of_a_side_record_do_not_depend_on_the_order(redis_url: str) -> None:
    names = ["celery@b", "zebra@x", "celery@a", "ä@x", "Z@x"]
    found = set()
    sink = registry.open_sink(redis_url, StoreOptions())
    with redis.Redis.from_url(redis_url) as client:
        for order in itertools.permutations(names):
            client.flushdb()
            for name in order:
                sink.write(batch(stated("STARTED", names.index(name), worker=name)))
            found.add(client.get("{celery-task-meta-t}:k"))
    assert len(found) == 1
    sink.close()


def test_the_packed_record_is_what_it_was(redis_url: str) -> None:
    """The bytes that other versions will find; see redis_write.lua."""
    from celery_kafka_backend.changes import Side  # noqa: PLC0415
    from celery_kafka_backend.sinks.redis_wire import pack, unpack  # noqa: PLC0415

    side = Side(run=7, seen=R, sent=1, received=2, started=3, attempts=70_000, workers=("celery@a", "b"), expires_at=4)
    packed = pack((1 << 63) - 1, event_id("x"), side)
    times = f"{R:012x}" + "".join(f"{n:012x}" for n in (1, 2, 3, 4))
    assert packed.hex() == f"7fffffffffffffff00000007{times}011170fe{event_id('x')}01610a62"
    assert unpack(packed) == (
        (1 << 63) - 1,
        event_id("x"),
        Side(**{f: getattr(side, f) for f in side.__struct_fields__ if f != "workers"}, workers=("b", "celery@a")),
    )
