"""A store in this process's memory: the reference of the contract, and a view for tests and demos.

``memory://name``: everything that opens the same name in one process sees the same view. It
encodes for real: a cell holds bytes, so nothing survives a write that would not survive a store.

Guarantee: a batch is applied whole or, when it raises `Unavailable`, not at all; nothing is lost,
duplicated or reordered while the process lives, and everything is gone with it. A forked child has
a copy of its own from then on.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Final

import msgspec

from celery_kafka_backend.changes import GROUP, TASK, Side, history_expiry, later_expiry, merge_sides
from celery_kafka_backend.errors import Rejected, Unavailable
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.sinks.contract import (
    Row,
    Shown,
    Sink,
    StoreOptions,
    Subscription,
    View,
    document_row,
    id_refusal,
    side_row,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from celery_kafka_backend.changes import Batch, Change, ChordFact, Partition


class Cell(msgspec.Struct, frozen=True, omit_defaults=True):
    """What there is about one task or saved group.

    Attributes:
        key: Order key of the winner; 0 without one of ours.
        event_id: The winner's event id.
        document: What is shown, or None.
        document_expires_at: ms since 1970; 0: never.
        side: The side record; of a group only its ``expires_at`` is used.
    """

    key: int = 0
    event_id: str = ""
    document: bytes | None = None
    document_expires_at: int = 0
    side: Side = Side()


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Cell).decode
_EMPTY: Final = Cell()


class Space:
    """One named view. Tests may look inside, and set ``available`` to False."""

    def __init__(self) -> None:
        self.available = True
        self.lock = threading.Lock()
        self.cells: dict[tuple[str, str], bytes] = {}
        """By subject and id."""
        self.histories: dict[str, dict[tuple[int, str], tuple[bytes, int]]] = {}
        """By id, then (HLC, event id): value and expiry."""
        self.chords: dict[str, dict[str, tuple[int, bytes]]] = {}
        self.chord_expiries: dict[str, int] = {}
        self.positions: dict[Partition, int] = {}
        self.waiters: dict[str, dict[str, float]] = {}
        """By task id: client to the monotonic time until which it wants to hear."""
        self.ears: dict[str, list[queue.SimpleQueue[str]]] = {}


_spaces: dict[str, Space] = {}
_spaces_lock = threading.Lock()


def space(url: str) -> Space:
    """Return the view that a ``memory://name`` names, made if need be."""
    with _spaces_lock:
        return _spaces.setdefault(url.partition("://")[2].strip("/"), Space())


def discard(url: str) -> None:
    """Forget a view and all it holds."""
    with _spaces_lock:
        _spaces.pop(url.partition("://")[2].strip("/"), None)


def _renew_locks() -> None:
    """Another thread of the parent may have held any of them when we were forked."""
    global _spaces_lock  # noqa: PLW0603
    _spaces_lock = threading.Lock()
    for each in _spaces.values():
        each.lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


def _gone(expires_at: int, now_ms: int) -> bool:
    return 0 < expires_at <= now_ms


def _cell(found: bytes | None, now_ms: int) -> Cell:
    """Return a cell as it is now: what has expired is not there."""
    if found is None:
        return _EMPTY
    cell = _decode(found)
    if cell.side.expires_at and _gone(cell.side.expires_at, now_ms):
        return _EMPTY
    if _gone(cell.document_expires_at, now_ms):
        return msgspec.structs.replace(cell, document=None, document_expires_at=0)
    return cell


class MemorySink(Sink):
    """Writes a view in memory. ``options.options['max_document_bytes']`` refuses larger documents."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = url
        self._options = options
        self._limit = int(options.options.get("max_document_bytes", 512 * 1024 * 1024))
        self._history = options.history is not False

    def open(self) -> None:
        if not space(self.url).available:
            raise Unavailable(f"{self.url} is switched off")

    def close(self) -> None:
        pass

    def write(self, batch: Batch) -> None:
        view = space(self.url)
        now_ms = system_wall_ms()
        refused = []
        heard = []
        with view.lock:
            if not view.available:
                raise Unavailable(f"{self.url} is switched off")
            for change in batch.changes:
                reason = self._refusal(change)
                if reason:
                    refused.append((change.id, reason))
                elif self._apply(view, change, now_ms) and change.subject == TASK:
                    heard.append(change.id)
            for fact in batch.chords:
                _apply_fact(view, fact, now_ms)
            for partition, offset in batch.positions.items():
                view.positions[partition] = max(offset, view.positions.get(partition, 0))
            _notify(view, heard)
        if refused:
            raise Rejected(refused)

    def _refusal(self, change: Change) -> str:
        if reason := id_refusal(change.id):
            return reason
        size = len(change.document or b"")
        return f"a document of {size} bytes; the limit is {self._limit}" if size > self._limit else ""

    def _apply(self, view: Space, change: Change, now_ms: int) -> bool:
        """Apply one change; return whether what is shown changed."""
        if self._history:
            self._log(view, change)
        if change.only_history:
            return False
        place = (change.subject, change.id)
        before = view.cells.get(place)
        old = _cell(before, now_ms)
        side = change.side or Side(expires_at=change.expires_at)
        if old is not _EMPTY:
            side = merge_sides(old.side, side)
        new = msgspec.structs.replace(old, side=side)
        winner, document = change.winner, change.document
        # Key 0 with a document: a stock backend's, by Space.cells. Its SUCCESS stays.
        stock = old.document if not old.key else None
        stays = stock is not None and document is not None and b'"status": "SUCCESS"' in stock
        wins = winner is not None and (winner.key, winner.id) > (old.key, old.event_id) and not stays
        if winner is not None and wins:
            expires_at = winner.expires_at or 0
            if _gone(expires_at, now_ms):
                document = None
            new = Cell(winner.key, winner.id, document, expires_at if document is not None else 0, side)
        view.cells[place] = _encode(new)
        return wins

    def _log(self, view: Space, change: Change) -> None:
        entries = view.histories.setdefault(change.id, {})
        for event, value in change.history:
            entries[event.hlc, event.id] = (bytes(value), history_expiry(event, self._options.history_retention_ms))
        limit = self._options.history_limit
        for excess in sorted(entries)[:-limit] if limit else ():
            del entries[excess]


def _apply_fact(view: Space, fact: ChordFact, now_ms: int) -> None:
    if _gone(view.chord_expiries.get(fact.group, 0), now_ms):
        view.chords.pop(fact.group)
        view.chord_expiries.pop(fact.group)
    facts = view.chords.setdefault(fact.group, {})
    facts[fact.name] = max((fact.order, bytes(fact.value)), facts.get(fact.name, (-1, b"")))
    view.chord_expiries[fact.group] = later_expiry(
        view.chord_expiries.get(fact.group, fact.expires_at), fact.expires_at
    )


def _notify(view: Space, ids: Iterable[str]) -> None:
    now = time.monotonic()
    for task_id in ids:
        for client, until in view.waiters.pop(task_id, {}).items():
            if until > now:
                view.waiters.setdefault(task_id, {})[client] = until
                for ear in view.ears.get(client, ()):
                    ear.put(task_id)


class MemorySubscription(Subscription):
    """An ear that is a queue."""

    def __init__(self, url: str, client: str) -> None:
        self._url = url
        self._client = client
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        view = space(url)
        with view.lock:
            view.ears.setdefault(client, []).append(self._heard)

    def wait(self, timeout_s: float) -> dict[str, bytes]:
        if not space(self._url).available:
            raise Unavailable(f"{self._url} is switched off")
        try:
            heard = {self._heard.get(timeout=max(timeout_s, 0.0)): b""}
        except queue.Empty:
            return {}
        while not self._heard.empty():
            heard[self._heard.get()] = b""
        return heard

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        view = space(self._url)
        with view.lock:
            ears = view.ears.get(self._client, [])
            if self._heard in ears:
                ears.remove(self._heard)
            if not ears:
                view.ears.pop(self._client, None)


class MemoryView(View):
    """Reads a view in memory."""

    push = True

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = url
        self._options = options

    def _open(self) -> Space:
        view = space(self.url)
        if not view.available:
            raise Unavailable(f"{self.url} is switched off")
        return view

    def _cells(self, subject: str, ids: Iterable[str]) -> dict[str, Cell]:
        view, now_ms = self._open(), system_wall_ms()
        with view.lock:
            cells = {each: _cell(view.cells.get((subject, each)), now_ms) for each in ids}
        return {each: cell for each, cell in cells.items() if cell is not _EMPTY}

    def documents(self, ids: Sequence[str]) -> dict[str, bytes]:
        return {each: c.document for each, c in self._cells(TASK, ids).items() if c.document is not None}

    def shown(self, ids: Sequence[str]) -> dict[str, Shown]:
        return {each: Shown(c.document, c.key, c.event_id, c.side) for each, c in self._cells(TASK, ids).items()}

    def groups(self, ids: Sequence[str]) -> dict[str, bytes]:
        return {each: c.document for each, c in self._cells(GROUP, ids).items() if c.document is not None}

    def history(self, task_id: str) -> list[bytes]:
        view, now_ms = self._open(), system_wall_ms()
        with view.lock:
            entries = sorted(view.histories.get(task_id, {}).items())
        return [value for _, (value, expires_at) in entries if not _gone(expires_at, now_ms)]

    def chord(self, group_id: str) -> dict[str, bytes]:
        view = self._open()
        with view.lock:
            if _gone(view.chord_expiries.get(group_id, 0), system_wall_ms()):
                return {}
            return {name: value for name, (_, value) in view.chords.get(group_id, {}).items()}

    def positions(self) -> dict[Partition, int]:
        view = self._open()
        with view.lock:
            return dict(view.positions)

    def rows(self) -> Iterator[Row]:
        view, now_ms = self._open(), system_wall_ms()
        with view.lock:
            cells = sorted((place, _cell(cell, now_ms)) for place, cell in view.cells.items())
            entries = [(each, at, entry) for each, log in view.histories.items() for at, entry in log.items()]
            facts = [(group, name, *fact) for group, found in view.chords.items() for name, fact in found.items()]
            expiries = dict(view.chord_expiries)
        for (subject, each), cell in cells:
            if cell.document is not None:
                yield document_row(subject, each, cell.document, cell.document_expires_at)
            if cell is not _EMPTY:
                yield side_row(subject, each, cell.key, cell.event_id, cell.side)
        for each, (hlc, event_id), (value, expires_at) in entries:
            if not _gone(expires_at, now_ms):
                yield Row("history", f"{each}/{hlc}/{event_id}", {"value": value}, expires_at)
        for group, name, order, value in facts:
            if not _gone(expiries[group], now_ms):
                yield Row("chord", f"{group}/{name}", {"k": order, "value": value}, expiries[group])

    def register(self, client: str, ids: Sequence[str], ttl_s: float) -> dict[str, bytes]:
        view, until = self._open(), time.monotonic() + ttl_s
        with view.lock:
            for each in ids:
                view.waiters.setdefault(each, {})[client] = until
        return self.documents(ids)

    def subscribe(self, client: str) -> Subscription:
        self._open()
        return MemorySubscription(self.url, client)

    def close(self) -> None:
        pass

    def after_fork(self) -> None:
        pass


def sink(url: str, options: StoreOptions) -> Sink:
    """Return the write side of ``memory://name``."""
    return MemorySink(url, options)


def view(url: str, options: StoreOptions) -> View:
    """Return the read side of ``memory://name``."""
    return MemoryView(url, options)
