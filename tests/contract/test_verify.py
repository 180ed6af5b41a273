"""`verify` finds each single field that is damaged, in each kind of row of each store."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest

from celery_kafka_backend.changes import ChordFact
from celery_kafka_backend.processors.verify import compare
from tests.contract.factories import FAR, batch, group_saved, sent, stated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from celery_kafka_backend.sinks.contract import Row
    from tests.contract.conftest import Place


SEARCHED = {"result", "k", "workers", "state", "text", "runtime_s"}
BOOKKEEPING = {
    "redis": (":h TTL", "taskset-meta-g}:k b"),  # a history's is its store's own affair; of a group only its key counts
    "mongodb": (" x", "ckb.d", "ckb.x", "celery_groupmeta"),
    "elasticsearch": (" x", " born"),
    "cassandra": (" hours", " expires_at", "tasks "),
}
"""Fields that are not compared: how long a store keeps what is over; and Celery's own, which `docs/replay.md` names."""


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
    found = [
        sent(1, task="t1"),
        stated("STARTED", 2, task="t1", **about),
        stated("FAILURE", 3, task="t1", value=["no"], **{**about, "name": "shop.pay", "args": "(1,)", "kwargs": "{}"}),
        sent(1, task="t2"),
        group_saved("g", 4, members=("t1", "t2")),
    ]
    return batch(*found, chords=[ChordFact("g", "1|sized", 5, b'{"size":2}', FAR)])


def wrong(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 2_000
    if isinstance(value, bytes):
        return value + b" "
    if isinstance(value, str):
        return value.replace("2025-", "2024-") if value.startswith("2025-") else value + "x"
    if isinstance(value, list):
        return [*value, "x"]
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

        refresh()
        seen = set()
        for found in client.search(index=f"{index}*", size=1000)["hits"]["hits"]:
            kept = found["_source"]
            for path, value in paths(kept):
                if path[-1] not in SEARCHED or (kept.get("what"), found["_index"], path) in seen:
                    continue  # a few, and each once: it takes a second until one can be seen
                seen.add((kept.get("what"), found["_index"], path))

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
    stamps = count((1 << 63) - 1_000_000)  # above all that the sink writes with

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
                if name in keys or name == "hours" or value is None:
                    continue
                changed = damaged(value)
                of = [key for key in keys if kind != "static" or columns[key] == "partition_key"]
                if any(getattr(row, key) is None for key in of):
                    continue
                at = [getattr(row, key) for key in of]
                where = " AND ".join(f"{key} = %s" for key in of)
                statement = f"UPDATE {keyspace}.{table} USING TIMESTAMP %s SET {name} = %s WHERE {where}"
                yield Damage(
                    f"{table} {at} {name}",
                    lambda s=statement, at=at, v=changed: session.execute(s, [next(stamps), v, *at]),
                    lambda s=statement, at=at, v=value: session.execute(s, [next(stamps), v, *at]),
                )


STORES = {"redis": of_redis, "mongodb": of_mongodb, "elasticsearch": of_elasticsearch, "cassandra": of_cassandra}


@pytest.mark.parametrize(
    "place", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in STORES], indirect=True
)
def test_every_field_that_is_damaged_is_found(place: Place) -> None:
    place.sink().write(every_kind())
    right = Kept(place.dump())
    missed = []
    with closing(place.view()) as view:
        assert compare(right, view, tables=None).equal
        scheme = place.url.partition(":")[0]
        for damage in STORES[scheme](place):
            if any(each in damage.where for each in BOOKKEEPING[scheme]):
                continue
            damage.do()
            if compare(right, view, tables=None).equal:
                missed.append(damage.where)
            damage.undo()
        assert missed == []
        assert compare(right, view, tables=None).equal
