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

All keys of a task share a hash slot (unless its id holds braces). A call of the script serves many tasks, in a cluster
one, so that it stays on one slot. A stock client that is blocked in ``get()`` hears the document on the native channel.

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
from itertools import chain
from typing import TYPE_CHECKING, Final, cast

import redis

from celery_kafka_backend.errors import Rejected, SettingsError
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.contract import Sink, StoreOptions, View
from celery_kafka_backend.sinks.redis_calls import SCRIPTS, TOGETHER, Calls
from celery_kafka_backend.sinks.redis_view import RedisView
from celery_kafka_backend.sinks.redis_wire import AWAY, DENIED, Wire, connect, translated

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from celery_kafka_backend.changes import Batch, Change
    from celery_kafka_backend.sinks.redis_calls import Call

MAX_VALUE: Final = 512 * 1024 * 1024
OLDEST: Final = (6, 2)
"""The first version with PXAT."""


# -- the write side ----------------------------------------------------------------------------


class RedisSink(Sink):
    """Writes a view in Redis."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = mask(url)
        self._options = options
        self._client = connect(url, options, retries=0)
        self._wire: Wire | None = None
        self._calls = Calls(options)

    def open(self) -> None:
        """Connect, load the scripts, and refuse a server that cannot keep absolute expiries."""
        self.close()
        wire = Wire(self._client)
        try:
            with translated(self.url):
                wire.connect()
                info = wire.call("INFO", "server").decode()
                self._check_version(info)
                self._calls.together = 1 if "redis_mode:cluster" in info else TOGETHER
                self._load(wire)
                try:
                    _, limit = wire.call("CONFIG", "GET", "proto-max-bulk-len")
                    self._calls.limit = min(int(limit), MAX_VALUE)
                except (redis.ResponseError, ValueError):
                    self._calls.limit = MAX_VALUE  # managed services have no CONFIG
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
        """Send script calls for many tasks each, pipelined; then the positions."""
        if self._wire is None:
            self.open()
        refused: list[tuple[str, str]] = []
        now_ms = system_wall_ms()
        try:
            with translated(self.url):
                changes = self._calls.of_changes(batch.changes, now_ms, refused)
                self._apply(chain(changes, self._calls.of_chords(batch.chords)), now_ms, refused)
                if batch.positions:
                    self._move(self._calls.of_positions(batch.positions.items()))
        except BaseException:
            self.close()  # replies may be outstanding: this connection is of no use any more
            raise
        if refused:
            raise Rejected(refused)

    def _load(self, wire: Wire) -> None:
        for script in SCRIPTS:
            wire.call("SCRIPT", "LOAD", script)

    def _move(self, call: Call) -> None:
        for _, error in self._run([call]):
            raise redis.ResponseError(error)

    def _apply(self, calls: Iterable[Call], now_ms: int, refused: list[tuple[str, str]]) -> None:
        suspects: list[Change] = []
        for call, error in self._run(calls):
            if len(call.changes) < 2:
                refused.append((call.subject, error))
                continue
            suspects += call.changes
            if error.startswith("CROSSSLOT"):  # a cluster, behind a proxy that says nothing of it
                self._calls.together = 1
        if suspects:
            self._apply(self._calls.of_changes(suspects, now_ms, refused, alone=True), now_ms, refused)

    def _run(self, calls: Iterable[Call]) -> list[tuple[Call, str]]:
        """Send calls; return which were refused, and why. What tells of the server rather than of a call is raised."""
        wire = cast("Wire", self._wire)
        kept: list[Call] = []

        def commands() -> Iterator[bytes]:
            for call in calls:
                kept.append(call)
                yield call.command

        errors = wire.run(commands(), self.meanwhile)
        missing = [place for place, error in errors.items() if error.startswith("NOSCRIPT")]
        if missing:  # SCRIPT FLUSH, or a failover to a server that never saw them
            self._load(wire)
            again = wire.run([kept[place].command for place in missing])
            errors = {place: error for place, error in errors.items() if place not in missing}
            errors |= {missing[place]: error for place, error in again.items()}
        for error in errors.values():
            if AWAY.search(error) or DENIED.search(error) or error.startswith("NOSCRIPT"):
                raise redis.ResponseError(error if not error.startswith("NOSCRIPT") else f"TRYAGAIN {error}")
        return [(kept[place], error) for place, error in errors.items()]


def sink(url: str, options: StoreOptions) -> Sink:
    """Return the write side of ``redis://…`` or ``rediss://…``."""
    return RedisSink(url, options)


def view(url: str, options: StoreOptions) -> View:
    """Return the read side of ``redis://…`` or ``rediss://…``."""
    return RedisView(url, options)
