"""The read side of the Redis store; keys and guarantee are in `redis`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from celery_kafka_backend.changes import GROUP, TASK, Partition
from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.order import KEY_DIGITS, system_wall_ms
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.contract import (
    SIDES,
    Page,
    Row,
    Shown,
    StoreOptions,
    Subscription,
    document_row,
    or_unreadable,
    side_row,
)
from celery_kafka_backend.sinks.per_process import DriverView, PerProcess
from celery_kafka_backend.sinks.redis_stock import stock
from celery_kafka_backend.sinks.redis_wire import (
    CHORD,
    CHORD_EXPIRY,
    NATIVE,
    STOCK_CHORD,
    connect,
    connection,
    tells_expiry,
    translated,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import redis

    from celery_kafka_backend.query import Query

CHUNK: Final = 1000
"""Ids per round trip of a read."""
REGISTERED: Final = 250
"""Ids per script call: it holds up everybody else for a millisecond."""
SAME_MS: Final = 1_000
"""Expiries that differ by less are the same."""

_REGISTER: Final = """-- KEYS: native keys. ARGV: client, milliseconds until its registrations end. What comes after this is heard.
for _, native in ipairs(KEYS) do
  local waiters = '{' .. native .. '}:w'
  redis.call('SADD', waiters, ARGV[1])
  redis.call('PEXPIRE', waiters, ARGV[2])
end
return redis.call('MGET', unpack(KEYS))
"""


class RedisSubscription(Subscription):
    """A client's channel, on a connection of its own."""

    def __init__(self, url: str, client: redis.Redis, channel: str) -> None:
        self._url = url
        self._connection: Any = connection(client)
        self._closed = False
        try:
            with translated(url):
                self._connection.connect()
                self._connection.send_command("SUBSCRIBE", channel)
                self._connection.read_response()
        except BaseException:
            self.close()
            raise

    def wait(self, timeout_s: float) -> dict[str, bytes]:
        """Return the ids that were heard, with documents of up to 8 KB."""
        if self._closed:
            raise Unavailable(f"{self._url}: the subscription is closed")
        heard = {}
        try:
            with translated(self._url):
                ready = self._connection.can_read(timeout=max(timeout_s, 0.0))
                while ready:
                    length, _, said = self._connection.read_response()[2].partition(b":")
                    heard[said[: int(length)].decode()] = said[int(length) :]
                    ready = self._connection.can_read(timeout=0)
        except BaseException:
            self.close()
            raise
        return heard

    def fileno(self) -> int:
        """Return the socket's descriptor; `wait` empties what it has buffered."""
        return -1 if self._closed else int(self._connection._sock.fileno())  # noqa: SLF001

    def close(self) -> None:
        """Disconnect."""
        self._closed = True
        self._connection.disconnect()


class RedisView(DriverView["redis.Redis"]):
    """Reads a view in Redis."""

    push = True
    keeps_history = False

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = mask(url)
        self._options = options
        connect(url, options, retries=1).close()  # says what is wrong with them now, and not to whoever reads first
        self._own = PerProcess(lambda: connect(url, options, retries=1), _disconnect)
        self._prefixes = {subject: options.key_prefix.encode() + name for subject, name in NATIVE.items()}
        self._chord_prefix = options.key_prefix.encode() + CHORD
        self._channel = f"celery-kafka:{options.namespace}:client:"
        self._history_ms = options.history_retention_ms

    @property
    def _client(self) -> redis.Redis:
        return self._own.client

    def _natives(self, ids: Iterable[str], subject: str = TASK) -> list[bytes]:
        return [self._prefixes[subject] + each.encode() for each in ids]

    def documents(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read by MGET, a thousand at a time."""
        return self._documents(ids, TASK)

    def groups(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read by MGET, a thousand at a time."""
        return self._documents(ids, GROUP)

    def _documents(self, ids: Sequence[str], subject: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        with translated(self.url):
            for start in range(0, len(ids), CHUNK):
                chunk = ids[start : start + CHUNK]
                found |= _present(chunk, cast("list[bytes | None]", self._client.mget(self._natives(chunk, subject))))
        return found

    def shown(self, ids: Sequence[str]) -> dict[str, Shown]:
        """Read documents and side records of a task in one command, so that they agree."""
        found: dict[str, Shown] = {}
        with translated(self.url):
            for start in range(0, len(ids), CHUNK):
                chunk = ids[start : start + CHUNK]
                natives = self._natives(chunk)
                keys = [key for native in natives for key in (native, b"{%b}:k" % native)]
                values = cast("list[bytes | None]", self._client.mget(keys))
                for place, each in enumerate(chunk):
                    document, packed = values[2 * place], values[2 * place + 1]
                    if packed is not None:
                        found[each] = Shown(document, *unpack(packed))
                    elif document is not None:
                        found[each] = Shown(document, 0, "", None)
        return found

    def history(self, task_id: str) -> list[bytes]:
        """Return the sorted sets' members, a task's and a group's: of one HLC in the order of their bytes, hence of event ids."""
        pipe = self._client.pipeline(transaction=False)
        for prefix in self._prefixes.values():
            pipe.zrangebyscore(b"{%b%b}:h" % (prefix, task_id.encode()), self._alive(), "+inf", withscores=True)
        with translated(self.url):
            found: list[tuple[bytes, float]] = [entry for entries in pipe.execute() for entry in entries]
        return [member for member, _ in sorted(found, key=lambda entry: entry[::-1])]

    def _alive(self) -> str:
        """Return after which HLC a history entry is there: each goes by itself, although a task's key goes as a whole."""
        return f"({system_wall_ms() - self._history_ms}" if self._history_ms else "-inf"

    def chord(self, group_id: str) -> dict[str, bytes]:
        """Read the chord's hash."""
        with translated(self.url):
            found = cast("dict[bytes, bytes]", self._client.hgetall(self._chord_prefix + group_id.encode()))
        return {name.decode(): value[KEY_DIGITS:] for name, value in found.items() if name != CHORD_EXPIRY}

    def positions(self) -> dict[Partition, int]:
        """Read the positions' hash."""
        with translated(self.url):
            name = f"celery-kafka:{self._options.namespace}:positions"
            found = cast("dict[bytes, bytes]", self._client.hgetall(name))
        parts = [(field.decode().rpartition(":"), int(offset)) for field, offset in found.items()]
        return {Partition(topic, int(partition)): offset for (topic, _, partition), offset in parts}

    def register(self, client: str, ids: Sequence[str], ttl_s: float) -> dict[str, bytes]:
        """Add the client to each task's set of waiters and read behind that, by one script.

        As three commands for each task they cost the client ten times as much, again and again as long as it waits.
        """
        found: dict[str, bytes] = {}
        ttl_ms = str(max(int(ttl_s * 1000), 1))
        with translated(self.url):
            for start in range(0, len(ids), REGISTERED):
                chunk = ids[start : start + REGISTERED]
                natives: list[Any] = self._natives(chunk)
                found |= _present(
                    chunk, cast("Any", self._client.eval(_REGISTER, len(natives), *natives, client, ttl_ms))
                )
        return found

    def subscribe(self, client: str) -> Subscription:
        """Listen on the client's channel."""
        return RedisSubscription(self.url, self._client, self._channel + client)

    def candidates(self, query: Query) -> Iterator[bytes]:  # noqa: ARG002 - Redis cannot look into its values
        """Scan the whole database for histories; one that moves while Redis resizes may come twice."""
        with translated(self.url):
            cursor = -1
            while cursor:
                cursor, keys = self._client.scan(max(cursor, 0), match=b"{*}:h", count=CHUNK)
                pipe = self._client.pipeline(transaction=False)
                for key in dict.fromkeys(cast("list[bytes]", keys)):
                    if self._place(key) is not None:
                        pipe.zrangebyscore(key, self._alive(), "+inf")
                for members in pipe.execute():
                    yield from members

    def stock(self, after: str = "") -> Iterator[Page]:
        """Scan the whole database for Celery's own keys."""
        return stock(self.url, self._client, self._options.key_prefix.encode(), after)

    def rows(self) -> Iterator[Row]:
        """Scan the whole database; a key that moves while Redis resizes may come twice."""
        with translated(self.url):
            absolute = tells_expiry(self._client)
            cursor = -1
            while cursor:
                cursor, keys = self._client.scan(max(cursor, 0), match=b"*celery-*", count=CHUNK)
                yield from self._rows_of(cast("list[bytes]", keys), absolute=absolute)

    def _rows_of(self, keys: Iterable[bytes], *, absolute: bool) -> Iterator[Row]:
        found = [(key, *place) for key in dict.fromkeys(keys) if (place := self._place(key)) is not None]
        pipe = self._client.pipeline(transaction=False)
        for key, _, kind, _ in found:
            if kind == "history":
                pipe.zrangebyscore(key, self._alive(), "+inf", withscores=True)
            elif kind == "chord":
                pipe.hgetall(key)
            else:
                pipe.get(key)
            pipe.pexpiretime(cast("str", key)) if absolute else pipe.pttl(key)
        replies: list[Any] = pipe.execute()
        now_ms = 0 if absolute else system_wall_ms()
        for (_, subject, kind, subject_id), value, expiry in zip(found, replies[::2], replies[1::2], strict=True):
            if not value or expiry == -2:
                continue  # expired between SCAN and here
            expires_at = 0 if expiry < 0 else now_ms + expiry
            if kind == "document":
                yield document_row(subject, subject_id, value, expires_at)
            elif kind == "side":
                yield from or_unreadable(SIDES[subject], subject_id, _side_rows(subject, subject_id, value, expires_at))
            elif kind == "history":
                for member, hlc in value:
                    at = f"{subject_id}/{hlc:.0f}/"
                    made = _history_rows(subject_id, member, hlc, self._history_ms, expires_at)
                    yield from or_unreadable("history", at, made)
            else:
                for name, fact in value.items():
                    if name != CHORD_EXPIRY:
                        at = f"{subject_id}/{_text(name)}"
                        yield from or_unreadable("chord", at, _fact_rows(at, fact, expires_at))

    def _place(self, key: bytes) -> tuple[str, str, str] | None:
        """Return subject, kind of key and id, or None if it is not ours or only bookkeeping."""
        if key.startswith(self._chord_prefix):
            return GROUP, "chord", _text(key[len(self._chord_prefix) :])
        for subject, prefix in self._prefixes.items():
            if key.startswith(prefix):
                if subject == GROUP and key.endswith(STOCK_CHORD):
                    return None
                return subject, "document", _text(key[len(prefix) :])
            if key.startswith(b"{" + prefix) and key.endswith((b"}:k", b"}:h")):
                kind = "side" if key.endswith(b"k") else "history"
                return subject, kind, _text(key[len(prefix) + 1 : -3])
        return None


def _side_rows(subject: str, subject_id: str, value: bytes, expires_at: int) -> Iterator[Row]:
    row = side_row(subject, subject_id, *unpack(value))
    if abs(row.expires_at - expires_at) > SAME_MS:  # Redis goes by the one, and the next write by the other
        row = row._replace(columns={**row.columns, "ttl": expires_at})
    yield row


def _history_rows(
    subject_id: str, member: bytes, score: float, history_ms: int | None, expires_at: int
) -> Iterator[Row]:
    hlc, event_id = int(score), msgspec.json.decode(member, type=_Identified).id
    until = min(filter(None, (hlc + history_ms if history_ms else 0, expires_at)), default=0)
    yield Row("history", f"{subject_id}/{hlc}/{event_id}", {"value": member}, until)


def _fact_rows(key: str, fact: bytes, until: int) -> Iterator[Row]:
    yield Row("chord", key, {"k": int(fact[:KEY_DIGITS]), "value": fact[KEY_DIGITS:]}, until)


def _text(subject_id: bytes) -> str:
    return subject_id.decode(errors="backslashreplace")  # a foreign one may be anything


def _disconnect(client: redis.Redis) -> None:
    client.close()
    client.connection_pool.disconnect()


def _present(ids: Sequence[str], values: Sequence[bytes | None]) -> dict[str, bytes]:
    return {each: value for each, value in zip(ids, values, strict=True) if value is not None}


class _Identified(msgspec.Struct):
    id: str
