"""`verify` finds each single field that is damaged, in each kind of row of each store, whatever that is compared with."""

from __future__ import annotations

import pickle
import re
import sqlite3
import uuid
from contextlib import closing
from datetime import datetime
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest

from celery_kafka_backend.changes import ChordFact
from celery_kafka_backend.documents import PICKLE
from celery_kafka_backend.events import NOTHING, Opaque
from celery_kafka_backend.processors.instant import ViewSide
from celery_kafka_backend.processors.verify import compare, subject_of
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.conftest import Place
from tests.contract.factories import FAR, batch, forgotten, group_saved, imported, sent, stated
from tests.contract.test_native import documents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from celery_kafka_backend.changes import Batch
    from celery_kafka_backend.events import Event
    from celery_kafka_backend.processors.verify import Difference
    from celery_kafka_backend.sinks.contract import Row

SEARCHED = {
    "result",
    "k",
    "workers",
    "state",
    "text",
    "runtime_s",
    "status",
    "children",
    "traceback",
    "args",
    "retries",
}
NOT_COMPARED = {
    "sqlite": r"^ckb_(position|schema) |^ckb_history expires_at,|^celery_\w+ id,",
    "postgresql": r"^ckb_(position|schema) |^ckb_history expires_at,|^celery_\w+ id,|^ckb_task (run|se\w+|received|started|attempts|workers), \['group'",
    "redis": r":h TTL|taskset-meta-\w\}:k b",  # a history's is its store's own affair; of a group only its key counts
    "mongodb": r"^celery_kafka_(history|chord) .* x$|^celery_taskmeta .* ckb\.x$",
    "elasticsearch": r" x$| born$",
    "cassandra": r" hours$| expires_at$",
}
"""Fields that are not compared: how long a store keeps what is over."""


class Damage(NamedTuple):
    """One field that is wrong.

    Attributes:
        where: The field.
        do: Damages it.
        undo: Puts it right.
    """

    where: str
    do: Callable[[], Any]
    undo: Callable[[], Any]


class Kept:
    """A view as it was."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def rows(self) -> Iterator[Row]:
        return iter(self._rows)


def every_kind() -> Any:
    about = {
        "worker": "celery@a",
        "received_at": 5,
        "started_at": 6,
        "attempt": 1,
        "exception": "shop.Declined",
        "queue": "q",
    }
    pickled = pickle.dumps({"result": [["h", None], [[["t1", None], None]]]})
    opaque = Opaque(
        meta=pickled, content_type=PICKLE, result=pickle.dumps([1]), plain={"children": [[["t1", None], None]]}
    )
    found = [
        *shown_in("json"),
        *shown_in("pickle"),
        *shown_in("json", "gzip"),
        stated("SUCCESS", 3, task="t3", group="g", parent="t1", value=[1]),
        forgotten(9, task="t4"),
        msgspec.structs.replace(group_saved("h", 5), doc=NOTHING, opaque=opaque),
        sent(1, task="t1"),
        stated("STARTED", 2, task="t1", **about),
        stated("FAILURE", 3, task="t1", value=["no"], **{**about, "name": "shop.pay", "args": "(1,)", "kwargs": "{}"}),
        sent(1, task="t2"),
        group_saved("g", 4, members=("t1", "t2")),
    ]
    return batch(*found, chords=[ChordFact("g", "1|sized", 5, b'{"size":2}', FAR)])


def shown_in(serializer: str, compression: str | None = None) -> list[Event]:
    """One that is ready and one that is not, as Celery encodes them."""
    conf = {"result_serializer": serializer, "result_compression": compression, "result_extended": True}
    every = documents(conf, f"{serializer}-{compression}")
    return [event for event in every if event.state in {"SUCCESS", "STARTED"}]


def wrong(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 2_000
    if isinstance(value, bytes):
        return value + b" "
    if isinstance(value, str):
        return value.replace("202", "201", 1) if value.startswith("202") else value + "x"
    if isinstance(value, datetime):
        return value.replace(year=2001)
    if isinstance(value, list):
        return [wrong(value[0]), *value[1:]] if value else ["x"]
    return "x"


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the place of each leaf of a document, and what stands there."""
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from paths(each, (*path, name))
    else:
        yield path, value


def replaced(value: Any, path: tuple[Any, ...], leaf: Any) -> Any:
    """Return a document with another leaf."""
    if not path:
        return leaf
    return {**value, path[0]: replaced(value[path[0]], path[1:], leaf)}


# -- the stores ----------------------------------------------------------------------------------


KEYS = {
    "celery_taskmeta": ["task_id"],
    "celery_tasksetmeta": ["taskset_id"],
    "ckb_group": ["task_id"],
    "ckb_history": ["task_id", "hlc", "event_id"],
    "ckb_chord": ["group_id", "name"],
    "ckb_chord_expiry": ["group_id"],
}


def of_sql(run: Callable[..., Any], keys: dict[str, list[str]], mark: str, nothing: dict[str, Any]) -> Iterator[Damage]:
    for table, key in keys.items():
        found = run(f"SELECT * FROM {table}")
        names = [column[0] for column in found.description]
        for row in found.fetchall():
            kept = dict(zip(names, row, strict=True))
            where, at = " AND ".join(f"{name} = {mark}" for name in key), [kept[name] for name in key]
            for name, value in kept.items():
                if name in key or (name == "shown_until" and kept["document"] is None):
                    continue  # of what is not shown nobody asks until when it is
                statement = f"UPDATE {table} SET {name} = {mark} WHERE {where}"
                changed = nothing.get(name, "x") if value is None else wrong(value)
                yield Damage(
                    f"{table} {name}, {at}",
                    lambda s=statement, v=changed, at=at: run(s, v, *at),
                    lambda s=statement, v=value, at=at: run(s, v, *at),
                )
            if table.startswith("celery_"):
                insert = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join([mark] * len(names))})"
                yield Damage(
                    f"{table} gone, {at}",
                    lambda t=table, w=where, at=at: run(f"DELETE FROM {t} WHERE {w}", *at),
                    lambda i=insert, row=row: run(i, *row),
                )


def of_sqlite(place: Place) -> Iterator[Damage]:
    with closing(sqlite3.connect(place.url.removeprefix("sqlite:///"), isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        yield from of_sql(
            lambda statement, *values: db.execute(statement, values), {**KEYS, "ckb_task": ["task_id"]}, "?", {}
        )


def of_postgresql(place: Place) -> Iterator[Damage]:
    import psycopg  # noqa: PLC0415

    binary = dict.fromkeys(("document", "result", "children", "args", "kwargs", "stamps"), b"x")
    nothing = {**binary, "retries": 7, "date_done": datetime(2001, 1, 1)}  # noqa: DTZ001 - as the column
    keys = {table: key for table, key in KEYS.items() if table != "ckb_group"}
    with psycopg.connect(place.url, autocommit=True) as db:
        yield from of_sql(
            lambda statement, *values: db.execute(statement, values),
            {**keys, "ckb_task": ["subject", "id"]},
            "%s",
            nothing,
        )


def of_redis(place: Place) -> Iterator[Damage]:
    from redis import Redis  # noqa: PLC0415 - the cases of the other stores run without it

    from celery_kafka_backend.sinks.redis_wire import pack, unpack  # noqa: PLC0415

    with Redis.from_url(place.url) as client:
        for key in client.scan_iter(b"*celery-*"):
            kept, until = client.dump(key), client.pexpiretime(key)

            def undo(key: bytes = key, kept: bytes = kept, until: int = until) -> None:
                client.restore(key, max(until, 0), kept, replace=True, absttl=True)

            what, kind = key.decode(), client.type(key)
            yield Damage(f"{what} TTL", lambda key=key, until=until: client.pexpireat(key, until - 2_000), undo)
            if kind == b"zset":
                for member, score in client.zrange(key, 0, -1, withscores=True):
                    yield Damage(f"{what} score", lambda key=key, m=member, s=score: client.zadd(key, {m: s + 1}), undo)
                    yield Damage(
                        f"{what} member",
                        lambda key=key, m=member, s=score: (client.zrem(key, m), client.zadd(key, {m + b" ": s})),
                        undo,
                    )
            elif kind == b"hash":
                for name, value in client.hgetall(key).items():
                    if name:  # how long it stays, of which the key's own TTL is made
                        for changed in (value + b" ", b"1" + value[1:]):
                            yield Damage(
                                f"{what} {name}", lambda key=key, n=name, v=changed: client.hset(key, n, v), undo
                            )
            elif key.endswith(b":k"):
                order, event_id, side = unpack(client.get(key))
                sides = [
                    msgspec.structs.replace(
                        side, **{name: ("celery@x",) if name == "workers" else getattr(side, name) + 2_000}
                    )
                    for name in side.__struct_fields__
                ]
                for changed in (
                    pack(order + 1, event_id, side),
                    pack(order, "x", side),
                    *(pack(order, event_id, s) for s in sides),
                ):
                    yield Damage(
                        f"{what} {changed!r}", lambda key=key, v=changed: client.set(key, v, keepttl=True), undo
                    )
            else:
                value = client.get(key)
                yield Damage(what, lambda key=key, v=value: client.set(key, v + b" ", keepttl=True), undo)


def of_mongodb(place: Place) -> Iterator[Damage]:
    import pymongo  # noqa: PLC0415
    from bson.codec_options import CodecOptions, DatetimeConversion  # noqa: PLC0415

    plain: CodecOptions[Any] = CodecOptions(datetime_conversion=DatetimeConversion.DATETIME_MS)
    with pymongo.MongoClient(place.url) as client:
        database = client.get_default_database()
        for name in database.list_collection_names():
            if name == "celery_kafka_position":
                continue
            collection = database.get_collection(name, codec_options=plain)
            for kept in list(collection.find()):
                for path, value in paths(kept):
                    if path[0] == "_id":
                        continue
                    field = ".".join(path)
                    changed = type(value)(int(value) + 2_000) if type(value).__name__ == "DatetimeMS" else wrong(value)
                    yield Damage(
                        f"{name} {kept['_id']} {field}",
                        lambda c=collection, k=kept, f=field, v=changed: c.update_one(
                            {"_id": k["_id"]}, {"$set": {f: v}}
                        ),
                        lambda c=collection, k=kept: c.replace_one({"_id": k["_id"]}, k),
                    )


def of_elasticsearch(place: Place) -> Iterator[Damage]:
    import elasticsearch  # noqa: PLC0415

    base, _, index = place.url.replace("elasticsearch://", "http://").rpartition("/")
    with elasticsearch.Elasticsearch(base) as client:

        def refresh() -> None:
            client.indices.refresh(index=f"{index}*")

        def of(kept: Any, key: str) -> str:
            """Return what is the same with all that one is enough of."""
            return key if "result" in kept else str(kept.get("what"))

        refresh()
        seen = set()
        for found in client.search(index=f"{index}*", size=1000)["hits"]["hits"]:
            kept = found["_source"]
            for path, value in paths(kept):
                if path[-1] not in SEARCHED or (which := (of(kept, found["_id"]), path)) in seen:
                    continue  # a few, and each once: it takes a while until one can be seen
                seen.add(which)

                def write(source: Any, found: Any = found, **more: Any) -> None:
                    client.index(index=found["_index"], id=found["_id"], document=source, **more)

                yield Damage(
                    f"{found['_index']} {found['_id']} {'.'.join(path)}",
                    lambda write=write, k=kept, p=path, v=value: (write(replaced(k, p, wrong(v))), refresh()),
                    lambda write=write, k=kept: write(k),
                )


def of_cassandra(place: Any) -> Iterator[Damage]:
    from cassandra.util import SortedSet  # noqa: PLC0415

    keyspace, session = place._keyspace, place._session
    above = count((1 << 63) - 1_000_000)  # above all that the sink writes with …
    native = count(-1_000_000)  # … into Celery's own table, and below the clock by which Celery's backend writes

    def damaged(value: Any) -> Any:
        if isinstance(value, datetime):
            return value.replace(microsecond=7_000)
        if isinstance(value, bytes):
            at = 5 if len(value) == 16 else len(value) - 3  # a minute, of what is packed; and no longer than before
            return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
        if isinstance(value, SortedSet):
            return {
                msgspec.msgpack.encode(
                    [part + 1 if isinstance(part, int) else part for part in msgspec.msgpack.decode(each)]
                )
                for each in value
            }
        return wrong(value)

    query = "SELECT column_name, kind FROM system_schema.columns WHERE keyspace_name = %s AND table_name = %s"
    for table in ("tasks", "celery_kafka_view", "celery_kafka_history"):
        columns = {row.column_name: row.kind for row in session.execute(query, [keyspace, table])}
        keys = [name for name, kind in columns.items() if kind in ("partition_key", "clustering")]
        for row in list(session.execute(f"SELECT * FROM {keyspace}.{table}")):
            for name, kind in columns.items():
                value = getattr(row, name)
                if name in keys or name == "hours" or value is None or (name == "guard" and row.document is None):
                    continue  # of what is not shown nobody asks until when it is
                changed = damaged(value)
                of = [key for key in keys if kind != "static" or columns[key] == "partition_key"]
                if any(getattr(row, key) is None for key in of):
                    continue
                at = [getattr(row, key) for key in of]
                where = " AND ".join(f"{key} = %s" for key in of)
                statement = f"UPDATE {keyspace}.{table} USING TIMESTAMP %s SET {name} = %s WHERE {where}"
                stamps = native if table == "tasks" else above
                yield Damage(
                    f"{table} {at} {name}",
                    lambda s=statement, n=stamps, at=at, v=changed: session.execute(s, [next(n), v, *at]),
                    lambda s=statement, n=stamps, at=at, v=value: session.execute(s, [next(n), v, *at]),
                )


STORES = {
    "sqlite": of_sqlite,
    "postgresql": of_postgresql,
    "redis": of_redis,
    "mongodb": of_mongodb,
    "elasticsearch": of_elasticsearch,
    "cassandra": of_cassandra,
}
EVERY = [pytest.param(name, marks=[getattr(pytest.mark, name)] if name != "sqlite" else []) for name in STORES]


def another_store(found: Batch) -> Kept:
    """What a store of another kind, without columns of Celery's, has of a batch."""
    reference = f"memory://{uuid.uuid4().hex}"
    with closing(registry.open_sink(reference, StoreOptions(history_limit=0))) as sink:
        sink.write(found)
    with closing(registry.open_view(reference, StoreOptions())) as view:
        return Kept(list(view.rows()))


def missed(place: Place, right: Kept, **options: Any) -> list[str]:
    """Damage one field after the other; return what is not found."""
    found = []
    with closing(place.view(**options)) as view:
        assert compare(right, view).differences == []
        scheme = place.url.partition(":")[0]
        for damage in STORES[scheme](place):
            if re.search(NOT_COMPARED[scheme], damage.where):
                continue
            damage.do()
            if compare(right, view).equal:
                found.append(damage.where)
            damage.undo()
        assert compare(right, view).differences == []
    return found


@pytest.mark.parametrize("place", EVERY, indirect=True)
def test_every_field_that_is_damaged_is_found(place: Place) -> None:
    """Celery's own too, although what the view is compared with has none: neither memory nor the log do."""
    everything = every_kind()
    place.sink().write(everything)
    assert missed(place, another_store(everything)) == []


@pytest.mark.elasticsearch
def test_every_field_of_a_document_that_is_kept_as_an_object_is_found(elasticsearch_url: str) -> None:
    everything = batch(*shown_in("json"), *shown_in("pickle"), group_saved("g", 4, members=("t1", "t2")))
    kept = {"options": {"save_meta_as_text": False}}
    with closing(Place(elasticsearch_url)) as place:
        place.sink(**kept).write(everything)
        assert missed(place, another_store(everything), **kept) == []


@pytest.mark.parametrize("place", [one for one in EVERY if one.values[0] != "redis"], indirect=True)
def test_what_celery_s_own_backend_wrote_is_no_difference(place: Place) -> None:
    """Nor is what an import brought. In Redis it stands under the same key, and is what readers see."""
    place.sink().write(batch(sent(1, task="other"), imported("SUCCESS", 2, task="there", value=1)))
    place.stock("t", "SUCCESS")
    right = another_store(batch(sent(1, task="other"), imported("SUCCESS", 2, task="there", value=1)))
    with closing(place.view()) as view:
        assert compare(right, view).differences == []


@pytest.mark.parametrize("place", EVERY, indirect=True)
def test_without_a_history_what_a_document_says_is_still_compared(place: Place) -> None:
    """And what only the event would say is not: a time, of a document in pickle anything."""
    everything = every_kind()
    place.sink(history=False).write(everything)
    right = Kept([row for row in another_store(everything).rows() if row.table != "history"])
    with closing(place.view(history=False)) as view:
        assert compare(right, view).differences == []


# -- what cannot be taken apart ------------------------------------------------------------------


def broken_sqlite(place: Place) -> Iterator[Damage]:
    with closing(sqlite3.connect(place.url.removeprefix("sqlite:///"), isolation_level=None)) as db:
        for changed in ("X'07'", "CAST(X'FF' AS TEXT)"):
            yield Damage(
                "t1",
                lambda v=changed: db.execute(f"UPDATE ckb_task SET workers = {v} WHERE task_id = 't1'"),
                lambda: db.execute("UPDATE ckb_task SET workers = 'celery@a' WHERE task_id = 't1'"),
            )
        for table, column, which, subject in (
            ("ckb_task", "expires_at", "task_id = 't1'", "t1"),
            ("ckb_task", "shown_until", "task_id = 't1'", "t1"),
            ("ckb_group", "shown_until", "task_id = 'g'", "g"),
            ("ckb_chord_expiry", "expires_at", "group_id = 'g'", "g"),
        ):
            (kept,) = db.execute(f"SELECT {column} FROM {table} WHERE {which}").fetchone()
            for changed in ("'x'", "1e300"):
                yield Damage(
                    subject,
                    lambda t=table, c=column, w=which, v=changed: db.execute(f"UPDATE {t} SET {c} = {v} WHERE {w}"),
                    lambda t=table, c=column, w=which, v=kept: db.execute(f"UPDATE {t} SET {c} = {v} WHERE {w}"),
                )


def broken_redis(place: Place) -> Iterator[Damage]:
    from redis import Redis  # noqa: PLC0415

    with Redis.from_url(place.url) as client:
        side, history, chord = "{celery-task-meta-t1}:k", "{celery-task-meta-t1}:h", "celery-kafka-chord-g"
        kept = client.get(side)
        yield Damage("t1", lambda: client.set(side, b"x", keepttl=True), lambda: client.set(side, kept, keepttl=True))
        yield Damage("t1", lambda: client.zadd(history, {b"\xff": 5}), lambda: client.zrem(history, b"\xff"))
        ((entry, hlc),) = client.zrange(history, 0, -1, withscores=True)
        yield Damage("t1", lambda: client.zadd(history, {entry: "inf"}), lambda: client.zadd(history, {entry: hlc}))
        yield Damage("g", lambda: client.hset(chord, b"1|bad", b"x"), lambda: client.hdel(chord, b"1|bad"))


def broken_mongodb(place: Place) -> Iterator[Damage]:
    import pymongo  # noqa: PLC0415

    fields = [
        ("celery_kafka_side", {"_id": "t1"}, "run", "t1"),
        ("celery_taskmeta", {"_id": "t1"}, "ckb.k", "t1"),
        ("celery_groupmeta", {"_id": "g"}, "ckb.d", "g"),
        ("celery_kafka_history", {"_id.t": "t1"}, "value", "t1"),
        ("celery_kafka_chord", {"_id.g": "g"}, "v", "g"),
    ]
    with pymongo.MongoClient(place.url) as client:
        for name, which, field, subject in fields:
            collection = client.get_default_database()[name]
            kept = collection.find_one(which)
            yield Damage(
                subject,
                lambda c=collection, w=which, f=field: c.update_one(w, {"$unset": {f: 1}}),
                lambda c=collection, k=kept: c.replace_one({"_id": k["_id"]}, k),
            )


def broken_elasticsearch(place: Place) -> Iterator[Damage]:
    import elasticsearch  # noqa: PLC0415

    base, _, index = place.url.replace("elasticsearch://", "http://").rpartition("/")
    with elasticsearch.Elasticsearch(base) as client:
        client.indices.refresh(index=f"{index}*")
        for found in client.search(index=f"{index}*", size=1000)["hits"]["hits"]:
            source = found["_source"]
            if found["_id"] == "celery-task-meta-t1":
                subject, gone = "t1", replaced(source, ("ckb", "seen"), "x")
                gone["ckb"].pop("run")
            elif source.get("task") == "t1" or source.get("what") == "fact":
                subject = source.get("task", "g")
                gone = {name: value for name, value in source.items() if name not in ("hlc", "k")}
            else:
                continue
            write = {"index": found["_index"], "id": found["_id"], "refresh": True}
            yield Damage(
                subject,
                lambda w=write, g=gone: client.index(document=g, **w),
                lambda w=write, k=source: client.index(document=k, **w),
            )


def broken_cassandra(place: Any) -> Iterator[Damage]:
    table, session, stamps = f"{place._keyspace}.celery_kafka_view", place._session, count((1 << 63) - 1_000_000)
    for row in list(session.execute(f"SELECT * FROM {table}")):
        if row.subject == "task" and row.id == "t1" and row.name is not None:
            own = "subject = %s AND id = %s", [row.subject, row.id]
            claim = f"{own[0]} AND name = %s AND k = %s AND event_id = %s", [*own[1], row.name, row.k, row.event_id]
            for name, value, (where, at) in (
                ("pieces", {b"\xc1"}, own),
                ("expiry", b"x", own),
                ("guard", b"x", claim),
            ):
                statement, kept = f"UPDATE {table} USING TIMESTAMP %s SET {name} = %s WHERE {where}", getattr(row, name)
                yield Damage(
                    row.id,
                    lambda s=statement, v=value, at=at: session.execute(s, [next(stamps), v, *at]),
                    lambda s=statement, v=kept, at=at: session.execute(s, [next(stamps), v, *at]),
                )


BROKEN = {
    "sqlite": broken_sqlite,
    "redis": broken_redis,
    "mongodb": broken_mongodb,
    "elasticsearch": broken_elasticsearch,
    "cassandra": broken_cassandra,
}


@pytest.mark.parametrize("place", [one for one in EVERY if one.values[0] in BROKEN], indirect=True)
def test_a_row_that_cannot_be_taken_apart_is_a_difference_of_its_key_and_the_rest_is_compared(place: Place) -> None:
    said = [stated("SUCCESS", 3, task=task, worker="celery@a") for task in ("t1", "t2")]
    everything = batch(*said, group_saved("g", 4), chords=[ChordFact("g", "1|sized", 5, b'{"size":2}', FAR)])
    place.sink().write(everything)
    right = another_store(everything)
    with closing(place.view()) as view:
        assert compare(right, view).differences == []
        for number, damage in enumerate(BROKEN[place.url.partition(":")[0]](place)):
            damage.do()
            found = compare(right, view).differences
            assert {subject_of(each.table, each.key) for each in found} == {damage.where}, (number, found)
            told = [each.b["unreadable"] for each in found if each.b and "unreadable" in each.b]
            assert told or each_is_text(found), (number, found)
            assert "t2" in ViewSide(view).earliest(["t1", "t2"])
            damage.undo()
            assert compare(right, view).differences == [], number


def each_is_text(found: list[Difference]) -> bool:
    """Whether what is no text is shown as far as it can be."""
    return [each.b for each in found] == [{"workers": "\\xff"}]
