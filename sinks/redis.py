"""Redis: the view that stock Celery clients read, and the fastest.

Keys (``P`` is Celery's ``global_keyprefix``, ``N`` the pipeline's namespace)::

    Pcelery-task-meta-<id>         the document, as Celery's Redis backend stores it; also its channel
    Pcelery-taskset-meta-<gid>     a saved group, likewise
    {<either key>}:k               order key, event id and side record, packed (see redis_write.lua)
    {<either key>}:h               history, if on: a sorted set by HLC of record values, the latest n; it goes with the
                                   side record, or by a retention of its own
    {<task's key>}:w               clients that wait for this task, for a minute
    Pcelery-kafka-chord-<gid>      facts about a chord: name → 19 digits of order, then the value
    celery-kafka:N:positions       topic:partition → next offset
    celery-kafka:N:client:<c>      channel of a client: ids of tasks whose document changed

All keys of a task share a hash slot (unless its id holds braces), so every write is one script on
one slot. A stock client that is blocked in ``get()`` hears the document on the native channel.

A stock SUCCESS is told by its text, which a compressed document hides: there, ours replaces it.
Numbers in the packed record are below 2**48 (attempts 2**24) and are cut there.

Guarantee: a batch is applied at least once and each task atomically; any order, duplication or
zombie writer gives the same keys. What Redis itself loses (a crash within its fsync interval, an
asynchronous failover, an eviction under another policy than ``noeviction``) stays lost here until
the log is replayed; an evicted side key lets an older event show again. Notifications are
best-effort and may repeat: a client that was disconnected reads again.
"""

from __future__ import annotations

import re
import struct
from importlib import resources
from typing import TYPE_CHECKING, Final, cast

import redis

from celery_kafka_backend.changes import TASK, Side
from celery_kafka_backend.errors import Rejected, SettingsError
from celery_kafka_backend.order import key_text, system_wall_ms
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.contract import (
    Sink,
    StoreOptions,
    View,
)
from celery_kafka_backend.sinks.redis_view import RedisView
from celery_kafka_backend.sinks.redis_wire import (
    AWAY,
    CHORD,
    DENIED,
    MAX_48,
    NATIVE,
    Wire,
    connect,
    evalsha,
    pack,
    packed,
    sha,
    translated,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from celery_kafka_backend.changes import Batch, Change, ChordFact

MAX_VALUE: Final = 512 * 1024 * 1024
OLDEST: Final = (6, 2)
"""The first version with PXAT."""
OVER: Final = Side(expires_at=1)
"""A side record that leaves nothing, and changes nothing where there is one."""

_WRITE: Final = resources.files(__package__).joinpath("redis_write.lua").read_bytes()
_FACTS: Final = b"""-- ARGV: expiry, then name, order .. value
local digits = 19
for i = 2, #ARGV, 2 do
  local old = redis.call('HGET', KEYS[1], ARGV[i])
  if not old or old:sub(1, digits) < ARGV[i + 1]:sub(1, digits) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
local new, old = tonumber(ARGV[1]), tonumber(redis.call('HGET', KEYS[1], '') or ARGV[1])
local at = (new == 0 or old == 0) and 0 or math.max(new, old)
redis.call('HSET', KEYS[1], '', string.format('%.0f', at))
if at == 0 then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIREAT', KEYS[1], at) end
return 1
"""
_POSITIONS: Final = b"""-- ARGV: topic:partition, offset ... as decimal text, which may exceed Lua's numbers
for i = 1, #ARGV, 2 do
  local old, new = redis.call('HGET', KEYS[1], ARGV[i]), ARGV[i + 1]
  if not old or #old < #new or (#old == #new and old < new) then redis.call('HSET', KEYS[1], ARGV[i], new) end
end
return 1
"""


# -- the write side ----------------------------------------------------------------------------


class RedisSink(Sink):
    """Writes a view in Redis."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = mask(url)
        self._options = options
        self._client = connect(url, options, retries=0)
        self._wire: Wire | None = None
        self._limit = MAX_VALUE
        self._prefixes = {subject: options.key_prefix.encode() + name for subject, name in NATIVE.items()}
        self._chord_prefix = options.key_prefix.encode() + CHORD
        self._positions_key = f"celery-kafka:{options.namespace}:positions".encode()
        # Only Redis' memory is dear: elsewhere history is on by default.
        self._history = bool(options.history)
        self._keep = b"%d" % options.history_limit
        self._history_ms = options.history_retention_ms
        channel = f"celery-kafka:{options.namespace}:client:".encode()
        # array, sha, keys | side, shows, document, both expiries, id, channel, history; lengths in front.
        field = b"$%d\r\n%b\r\n"
        self._template = b"".join(
            [
                b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n" + sha(_WRITE) + b"\r\n$1\r\n%d\r\n",
                field + b"$%d\r\n{%b}:k\r\n$%d\r\n{%b}:w\r\n%b",
                field * 6 + b"$%d\r\n" % len(channel) + channel.replace(b"%", b"%%") + b"\r\n%b",
            ]
        )

    def open(self) -> None:
        """Connect, load the scripts, and refuse a server that cannot keep absolute expiries."""
        self.close()
        wire = Wire(self._client)
        try:
            with translated(self.url):
                wire.connect()
                info = wire.call("INFO", "server").decode()
                self._check_version(info)
                self._load(wire)
                try:
                    _, limit = wire.call("CONFIG", "GET", "proto-max-bulk-len")
                    self._limit = min(int(limit), MAX_VALUE)
                except (redis.ResponseError, ValueError):
                    self._limit = MAX_VALUE  # managed services have no CONFIG
        except BaseException:
            wire.close()
            raise
        self._wire = wire

    def _check_version(self, info: str) -> None:
        found = re.search(r"^redis_version:(\d+)\.(\d+)", info, re.MULTILINE)
        if found and (int(found[1]), int(found[2])) < OLDEST:
            version = found[0].partition(":")[2]
            raise SettingsError("view", f"{self.url} is Redis {version}", "6.2 or newer is needed, for PXAT")

    def close(self) -> None:
        """Drop the connection."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def warnings(self) -> list[str]:
        """Return what about the server endangers guards or documents."""
        with translated(self.url):
            policy = self._client.info("memory").get("maxmemory_policy", "noeviction")
            self._client.close()
        if policy == "noeviction":
            return []
        danger = "under memory pressure Redis drops results and the keys that guard them, without a word"
        return [f"{self.url}: maxmemory-policy is {policy}: {danger}; set it to noeviction"]

    def write(self, batch: Batch) -> None:
        """Send one script call per task, pipelined; then the positions."""
        if self._wire is None:
            self.open()
        refused: list[tuple[str, str]] = []
        names: list[str] = []
        try:
            with translated(self.url):
                commands = self._commands(batch, names, refused)
                self._run(commands, names, refused)
                if batch.positions:
                    flat = [each for (t, p), offset in batch.positions.items() for each in (f"{t}:{p}", str(offset))]
                    command = evalsha(_POSITIONS, self._positions_key, *(each.encode() for each in flat))
                    self._move(command)
        except BaseException:
            self.close()  # replies may be outstanding: this connection is of no use any more
            raise
        if refused:
            raise Rejected(refused)

    def _move(self, command: bytes) -> None:
        refused: list[tuple[str, str]] = []
        self._run([command], [""], refused)
        for _, why in refused:
            raise redis.ResponseError(why)

    def _load(self, wire: Wire) -> None:
        for script in (_WRITE, _FACTS, _POSITIONS):
            wire.call("SCRIPT", "LOAD", script)

    def _run(self, commands: Iterable[bytes], names: list[str], refused: list[tuple[str, str]]) -> None:
        wire = cast("Wire", self._wire)
        kept: list[bytes] = []

        def keeping() -> Iterator[bytes]:
            for command in commands:
                kept.append(command)
                yield command

        errors = wire.run(keeping(), self.meanwhile)
        missing = [place for place, error in errors.items() if error.startswith("NOSCRIPT")]
        if missing:  # SCRIPT FLUSH, or a failover to a server that never saw them
            self._load(wire)
            again = wire.run([kept[place] for place in missing])
            errors = {place: error for place, error in errors.items() if place not in missing}
            errors |= {missing[place]: error for place, error in again.items()}
        for error in errors.values():
            if AWAY.search(error) or DENIED.search(error) or error.startswith("NOSCRIPT"):
                raise redis.ResponseError(error if not error.startswith("NOSCRIPT") else f"TRYAGAIN {error}")
        refused += [(names[place], error) for place, error in errors.items()]

    def _commands(self, batch: Batch, names: list[str], refused: list[tuple[str, str]]) -> Iterator[bytes]:
        now_ms = system_wall_ms()
        for change in batch.changes:
            try:
                command = self._command(change, now_ms)
            except (ValueError, struct.error) as exc:  # UnicodeEncodeError is one
                refused.append((change.id, str(exc)))
            else:
                names.append(change.id)
                yield command
        chords: dict[str, list[ChordFact]] = {}
        for fact in batch.chords:
            chords.setdefault(fact.group, []).append(fact)
        for group, facts in chords.items():
            names.append(group)
            never = any(not fact.expires_at for fact in facts)
            expiry = 0 if never else max(fact.expires_at for fact in facts)
            flat = [(fact.name.encode(), key_text(fact.order).encode() + fact.value) for fact in facts]
            arguments = [each for pair in flat for each in pair]
            yield evalsha(_FACTS, self._chord_prefix + group.encode(), b"%d" % expiry, *arguments)

    def _command(self, change: Change, now_ms: int) -> bytes:
        subject_id = change.id.encode()
        native = self._prefixes[change.subject] + subject_id
        winner = change.winner
        side = change.side
        if side is None:
            side = OVER if change.only_history else Side(expires_at=change.expires_at)
        shows, document, expiry = b"", b"", b"0"
        if winner is None:
            record = pack(0, "", side)
        else:
            record = pack(winner.key, winner.id, side)
            expires_at = winner.expires_at or 0
            shown = change.document if not 0 < expires_at <= now_ms else None
            shows = b"x"
            if shown is not None:
                shows, document, expiry = b"d", shown, b"%d" % expires_at
                if len(document) > self._limit:
                    raise ValueError(f"a document of {len(document)} bytes; the server takes {self._limit}")
        ends = b"%d" % min(side.expires_at, MAX_48)
        task_id = subject_id if change.subject == TASK else b""
        n, history_key, history = len(native), b"", b""
        if self._history and change.history:
            largest = max(len(value) for _, value in change.history)
            if largest > self._limit:
                raise ValueError(f"an event of {largest} bytes; the server takes {self._limit}")
            history_key = b"$%d\r\n{%b}:h\r\n" % (n + 4, native)
            entries = [each for event, value in change.history for each in (b"%d" % event.hlc, value)]
            kept = self._history_ms
            term = (b"", b"") if kept is None else (b"%d" % kept, b"%d" % (now_ms - kept))
            history = packed(self._keep, *term, *entries).partition(b"\r\n")[2]
        # fmt: off
        return self._template % (
            13 + (4 + 2 * len(change.history) if history else 0), 4 if history else 3,
            n, native, n + 4, native, n + 4, native, history_key,
            len(record), record, len(shows), shows, len(document), document, len(expiry), expiry,
            len(ends), ends, len(task_id), task_id, history,
        )
        # fmt: on


def sink(url: str, options: StoreOptions) -> Sink:
    """Return the write side of ``redis://…`` or ``rediss://…``."""
    return RedisSink(url, options)


def view(url: str, options: StoreOptions) -> View:
    """Return the read side of ``redis://…`` or ``rediss://…``."""
    return RedisView(url, options)
