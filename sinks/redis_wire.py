"""How the Redis store talks: the packed side record, connections, errors, and many commands at a time."""

from __future__ import annotations

import hashlib
import re
import select
import struct
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import redis
import redis.connection
import redis.sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_kafka_backend.changes import GROUP, TASK, Side
from celery_kafka_backend.errors import SettingsError, Unavailable
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.patience import at_most, left_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from celery_kafka_backend.sinks.contract import StoreOptions

NATIVE: Final = {TASK: b"celery-task-meta-", GROUP: b"celery-taskset-meta-"}
STOCK_CHORD: Final = (b".j", b".t", b".s", b".d", b".c")
"""How keys end by which Celery's own backend counts a chord; they begin as the key of its saved group."""
CHORD: Final = b"celery-kafka-chord-"
CHORD_EXPIRY: Final = b""
"""The one field of a chord's hash that is no fact: no fact's name is empty."""
PIPELINE_BYTES: Final = 1 << 19
"""Sent before the replies to the ones before are read: Redis works while we encode. This keeps it busy for 10 ms:
where another thread is at work, as in a replay, we wait 5 ms for the interpreter after each turn."""
SENTINEL_PORT: Final = 26379
AWAY: Final = re.compile(
    r"\b(OOM|READONLY|LOADING|MASTERDOWN|MISCONF|BUSY|TRYAGAIN|CLUSTERDOWN|NOREPLICAS|UNKILLABLE|MOVED|ASK|UNBLOCKED)\b"
    r"|max number of clients"
)
DENIED: Final = re.compile(
    r"\b(NOAUTH|WRONGPASS|NOPERM)\b|invalid (username-)?password|no password is set"
    r"|ACL failure in script|user executing the script can't"  # of what a script calls
)
_NO_DATABASE: Final = re.compile(r"DB index|SELECT is not allowed in cluster mode")
_OF_A_PIPELINE: Final = " of pipeline caused error: "
"""As redis-py tells which command of a pipeline was refused."""

# -- the packed side record --------------------------------------------------------------------

_FIELDS: Final = struct.Struct(">QIQIQIQB")  # Python has no 6-byte integers: two of them are 8 bytes and 4
_ID: Final = _FIELDS.size
_USUAL: Final = "celery@"
"""How nearly every node name starts: one byte in the record."""
MAX_48: Final = (1 << 48) - 1
MAX_24: Final = (1 << 24) - 1
_LOW: Final = 0xFFFFFFFF
_UUID_TAG: Final = 255
_HEX_TAG: Final = 254


def _dashed(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def pack_id(event_id: str) -> bytes:
    """Return an event id behind its length; a UUID in 16 bytes."""
    if len(event_id) in (36, 32):
        try:
            raw = bytes.fromhex(event_id if len(event_id) == 32 else event_id.replace("-", ""))
        except ValueError:
            raw = b""
        if len(raw) == 16:
            if event_id == raw.hex():
                return b"\xfe" + raw
            if event_id == _dashed(raw.hex()):
                return b"\xff" + raw
    encoded = event_id.encode()
    if len(encoded) >= _HEX_TAG:
        raise ValueError(f"an event id of {len(encoded)} bytes; at most {_HEX_TAG - 1} fit")
    return bytes((len(encoded),)) + encoded


@lru_cache(1024)
def _names(workers: tuple[str, ...]) -> bytes:
    return "\n".join(workers).replace(_USUAL, "\1").encode()


def pack(key: int, event_id: str, side: Side) -> bytes:
    """Return a side record as redis_write.lua reads it."""
    seen, sent, received, started, expires_at = side.seen, side.sent, side.received, side.started, side.expires_at
    attempts = side.attempts
    if attempts > MAX_24 or (seen | sent | received | started | expires_at) > MAX_48:
        attempts = min(attempts, MAX_24)
        seen, sent, received, started, expires_at = (
            min(each, MAX_48) for each in (seen, sent, received, started, expires_at)
        )
    # fmt: off
    fields = _FIELDS.pack(
        key, side.run, seen << 16 | sent >> 32, sent & _LOW, received << 16 | started >> 32, started & _LOW,
        expires_at << 16 | attempts >> 8, attempts & 0xFF,
    )
    # fmt: on
    return fields + pack_id(event_id) + _names(side.workers)


def unpack(packed: bytes) -> tuple[int, str, Side]:
    """Return order key, event id and side record."""
    key, run, seen, sent, received, started, expires_at, attempts = _FIELDS.unpack_from(packed)
    sent, started, attempts = (
        (high & 0xFFFF) << bits | low
        for high, bits, low in ((seen, 32, sent), (received, 32, started), (expires_at, 8, attempts))
    )
    tag = packed[_ID]
    end = _ID + 1 + (16 if tag >= _HEX_TAG else tag)
    raw = packed[_ID + 1 : end]
    event_id = raw.decode() if tag < _HEX_TAG else raw.hex() if tag == _HEX_TAG else _dashed(raw.hex())
    workers = packed[end:].decode().replace("\1", _USUAL)
    side = Side(
        run=run,
        seen=seen >> 16,
        sent=sent,
        received=received >> 16,
        started=started,
        attempts=attempts,
        workers=tuple(sorted(workers.split("\n"))) if workers else (),
        expires_at=expires_at >> 16,
    )
    return key, event_id, side


# -- connections and errors --------------------------------------------------------------------


def connect(url: str, options: StoreOptions, retries: int) -> redis.Redis:
    """Return a client with its pool; nothing is connected yet.

    Raises:
        SettingsError: The URL or an option is not one that the driver takes.
    """
    given: dict[str, Any] = {"socket_timeout": 30.0, "socket_connect_timeout": 5.0, "socket_keepalive": True}
    given |= options.options
    # Retry lives in the host. RESP2, because replies are read in bulk and pushes would come between.
    given |= {"retry": Retry(NoBackoff(), retries), "decode_responses": False, "protocol": 2}
    # Celery writes ssl_cert_reqs=CERT_REQUIRED, redis-py required.
    url = re.sub(r"(ssl_cert_reqs=)CERT_(\w+)", lambda found: found[1] + found[2].lower(), url)
    try:
        _check_database(url)
        client = _by_sentinels(url, given) if url.startswith("sentinel:") else redis.Redis.from_url(url, **given)
    except (ValueError, TypeError, redis.RedisError) as exc:
        raise SettingsError("view", f"{mask(url)}: {exc}") from exc
    pool = client.connection_pool
    pool.connection_class = type("Bounded", (_Bounded, pool.connection_class), {})
    connection(client)  # else an option that it does not take were a TypeError of whoever reads first
    return client


def _check_database(url: str) -> None:
    """Refuse a path that is no number, of which redis-py makes database 0: others may keep something there."""
    for each in url.split(";"):
        database = unquote(urlsplit(each).path).replace("/", "")
        if database and not database.isdecimal():
            raise SettingsError("view", f"{mask(url)}: {database!r} is no number of a database", "redis://host:6379/0")


def _by_sentinels(url: str, given: dict[str, Any]) -> redis.Redis:
    """Return a client of the primary that the sentinels of a URL name; user, password and database are the primary's."""
    service = given.pop("master_name", None)
    if not service:
        remedy = "result_backend_transport_options = {'master_name': …}"
        raise SettingsError("view", f"{mask(url)}: which primary the sentinels are to be asked for is not set", remedy)
    known = {"socket_timeout": 5.0, "socket_connect_timeout": 5.0}
    asking = {
        "min_other_sentinels": given.pop("min_other_sentinels", 0),
        "sentinel_kwargs": known | given.pop("sentinel_kwargs", {}),
    }
    parse: Any = redis.connection.parse_url  # these two are without types
    places = [parse(each.replace("sentinel://", "redis://", 1)) for each in url.split(";")]
    for place in reversed(places):  # what the first one says counts, as in Celery
        given |= {name: value for name, value in place.items() if name not in ("host", "port")}
    hosts = [(place.get("host", "localhost"), place.get("port", SENTINEL_PORT)) for place in places]
    sentinels: Any = redis.sentinel.Sentinel
    client: redis.Redis = sentinels(hosts, **asking, **given).master_for(service)
    return client


class _Bounded:
    """In front of a connection of redis-py, whose timeouts belong to the connection: a waiter's belongs to the call."""

    _sock: Any
    socket_timeout: float | None
    socket_connect_timeout: float | None

    def _connect(self) -> Any:
        given = self.socket_connect_timeout
        self.socket_connect_timeout = at_most(given)
        try:
            return super()._connect()  # type: ignore[misc]
        finally:
            self.socket_connect_timeout = given

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        sock = self._sock
        if sock is None or left_s() is None:
            return super().read_response(*args, **kwargs)  # type: ignore[misc]
        sock.settimeout(at_most(self.socket_timeout))
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self._sock is sock:  # else it was given up
                sock.settimeout(self.socket_timeout)


def connection(client: redis.Redis) -> Any:
    """Return a connection of our own, outside the pool."""
    pool = client.connection_pool
    try:
        return pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, redis.RedisError) as exc:
        problem = f"redis-py does not take the view's options: {exc}"
        raise SettingsError("view", problem, "correct kafka_backend_settings['view_options'] or the URL") from exc


def tells_expiry(client: redis.Redis) -> bool:
    """Return whether the server says when a key expires (PEXPIRETIME, 7.0); an older one only how long that is from now."""
    info: Any = client.info("server")
    return int(str(info["redis_version"]).partition(".")[0]) >= 7


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn redis-py's errors into ours."""
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.AuthorizationError, redis.exceptions.NoPermissionError) as exc:
        raise SettingsError("view", f"{url} refuses us: {exc}", "check user, password and ACL") from exc
    except (redis.ConnectionError, redis.TimeoutError, OSError) as exc:
        raise Unavailable(f"{url}: {exc}") from exc
    except redis.InvalidResponse as exc:
        raise SettingsError("view", f"{url}: what answers there is no Redis", "check host and port") from exc
    except redis.ResponseError as exc:
        said = str(exc).rpartition(_OF_A_PIPELINE)[2]  # what comes before it repeats the command, with words of others
        if DENIED.search(said):
            raise SettingsError("view", f"{url} refuses us: {exc}", "check user, password and ACL") from exc
        if AWAY.search(said):
            raise Unavailable(f"{url}: {exc}") from exc
        if _NO_DATABASE.search(said):
            remedy = "name a database that the server has: it has as many as its setting `databases` says, from 0 on"
            raise SettingsError("view", f"{url}: {exc}", remedy) from exc
        if said.startswith("WRONGTYPE"):
            remedy = "delete it, or take another database or topic_prefix"
            raise SettingsError(
                "view", f"{url}: somebody keeps something else under a key of ours: {exc}", remedy
            ) from exc
        raise


class Wire:
    """One connection for many commands at a time, whose replies are each a single line.

    redis-py spends 5 µs on packing a command and 4 on reading a reply; here they are bytes already,
    and replies are counted, not parsed, unless one is an error.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._connection = connection(client)
        self._rest = b""

    def connect(self) -> None:
        self._connection.connect()

    def call(self, *command: bytes | str) -> Any:
        self._connection.send_command(*command)
        return self._connection.read_response()

    def run(self, commands: Iterable[bytes], meanwhile: Callable[[], bool] | None = None) -> dict[int, str]:
        """Send commands in a pipeline; return the errors by place.

        Args:
            commands: As bytes.
            meanwhile: See `Sink.meanwhile`.
        """
        errors: dict[int, str] = {}
        source, sent, read = iter(commands), 0, 0
        while chunk := list(_up_to(source, PIPELINE_BYTES)):
            self._connection.send_packed_command([b"".join(chunk)], check_health=False)
            if sent > read:
                self._read(read, sent, errors, meanwhile)
            read, sent = sent, sent + len(chunk)
        if sent > read:
            self._read(read, sent, errors, meanwhile)
        return errors

    def _read(self, start: int, end: int, errors: dict[int, str], meanwhile: Callable[[], bool] | None) -> None:
        pieces, lines = [self._rest], self._rest.count(b"\n")
        sock = self._connection._sock  # noqa: SLF001
        while lines < end - start:
            if meanwhile is not None:
                self._until_answered(sock, meanwhile)
            piece = sock.recv(65536)
            if not piece:
                raise redis.ConnectionError("closed by the server")
            pieces.append(piece)
            lines += piece.count(b"\n")
        data = b"".join(pieces)
        replies = data.split(b"\r\n", end - start)
        self._rest = replies.pop()
        if b"-" in data:
            for place, reply in enumerate(replies, start):
                if reply.startswith(b"-"):
                    errors[place] = reply[1:].decode(errors="replace")

    @staticmethod
    def _until_answered(sock: Any, meanwhile: Callable[[], bool]) -> None:
        answer = select.poll()
        answer.register(sock, select.POLLIN)
        while not answer.poll(0) and meanwhile():
            pass

    def close(self) -> None:
        self._connection.disconnect()


def _up_to(commands: Iterator[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (command := next(commands, b"")):
        size -= len(command)
        yield command


def bulk(value: bytes) -> bytes:
    """Return an argument as RESP bytes."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


def packed(*arguments: bytes) -> bytes:
    """Return a command as RESP bytes."""
    return b"*%d\r\n%b" % (len(arguments), b"".join(map(bulk, arguments)))


def sha(script: bytes) -> bytes:
    """Return a script's name."""
    return hashlib.sha1(script).hexdigest().encode()  # noqa: S324 - Redis' name for it, not security


def evalsha(script: bytes, key: bytes, *arguments: bytes) -> bytes:
    """Return the command that runs a script on one key."""
    return packed(b"EVALSHA", sha(script), b"1", key, *arguments)
