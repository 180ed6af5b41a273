"""The contract of a store: a `Sink` to write a view, a `View` to read it.

A store is one file with both, and one line in `registry`. It knows neither Celery nor Kafka.

**Guards live in the write.** A sink is handed changes that may be old, repeated or out of order,
by a processor that may be a zombie. Each write must compare inside the store: a document is
replaced only by a greater ``(order key, event id)``; side records are merged field by field;
history is a set by event id; positions never go back. Never read, decide, then write.

A document without our key (written by Celery's own backend) counts as key 0, but a stock
SUCCESS stays: only a forget removes it. Where workers with Celery's own backend may write beside
us (Redis, MongoDB, Elasticsearch, Cassandra: docs/switching.md), nothing unready of ours replaces a stock failure either,
and a stock document over one of ours is known as such.

**What has expired is not there.** A document whose ``expires_at`` has passed is not shown, also
if it arrives only then; its key guards on for as long as the side record lives. A side record
(or the key of a saved group) that has expired counts as absent, so a sweep may come at any time.

**History expires by itself**, each event as `history_expiry` says, before or after the result that it shows. So a store
keeps its rows apart from all else of their task; and a change that is `only_history` adds rows, and does nothing else.

Retry, batching, backoff and pause live in the host, once. Two errors matter:

* `Unavailable` - the host pauses, backs off and calls `write` again with the same batch.
* `Rejected` - the store will never take some changes; the host sends those to the dead letters.
  Everything else of the batch must have been written.

Anything else is a bug and ends the process.
"""

from __future__ import annotations

import heapq
import logging
import struct
from abc import ABC, abstractmethod
from contextlib import nullcontext
from itertools import islice
from operator import index
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from celery_kafka_backend import codec
from celery_kafka_backend.changes import GROUP, TASK, Logged
from celery_kafka_backend.errors import CodecError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from celery_kafka_backend.changes import Batch, Partition, Side
    from celery_kafka_backend.events import Event
    from celery_kafka_backend.query import Query

logger = logging.getLogger(__name__)

UNREADABLE: Final = (
    ArithmeticError, AttributeError, CodecError, LookupError, TypeError, ValueError, msgspec.MsgspecError, struct.error,
)  # fmt: skip
"""What comes of taking apart a row of ours that somebody has damaged."""
DOCUMENTS: Final = {TASK: "document", GROUP: "group"}
"""The dump's tables by subject."""
SIDES: Final = {TASK: "side", GROUP: "group-side"}


class StoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a store needs beside its URL.

    Attributes:
        namespace: Keeps two pipelines in one store apart; the topic prefix.
        key_prefix: Celery's ``global_keyprefix``, already with its separator; "" if unset.
        history: Keep the history of every task in this store. None: the store's own default.
        history_limit: Keep at most so many events per task, the latest by HLC; 0: all. A store on disk, such as SQLite,
            keeps all.
        history_retention_ms: How long an event stays in the history: see `history_expiry`.
        serializer: Name of the app's result serializer (the SQL columns need none).
        options: The store's own options, as Celery names them.
        pauses_s: How long a reader waits before it asks a store again that did not answer, once each.
    """

    namespace: str = "celery"
    key_prefix: str = ""
    history: bool | None = None
    history_limit: int = 200
    history_retention_ms: int | None = None
    serializer: str = "json"
    options: Mapping[str, Any] = {}
    pauses_s: tuple[float, ...] = (0.05, 0.2, 0.8)


class Shown(NamedTuple):
    """What a view has about one task.

    Attributes:
        document: The native document, or None.
        key: Order key of what is (or, forgotten, is not) shown; 0 without one of ours.
        event_id: Its event's id; "" without one of ours.
        side: The side record, or None.
    """

    document: bytes | None
    key: int
    event_id: str
    side: Side | None


class Row(NamedTuple):
    r"""One row of a dump.

    Two stores that folded the same events have the same rows in the tables that every store has
    (in any order; only how long a *history* entry stays may differ, unless history has a retention of its own)::

        table       key               columns
        document    task id           document (and by `native_columns` what Celery's own columns have wrong)
        side        task id           k, event_id, run, seen, sent, received, started, attempts, workers (one text, "\n" between)
        group       group id          document (likewise)
        group-side  group id          k, event_id
        history     id/hlc/event id   value (and by `history_row` what a store has wrong beside it)
        chord       group id/name     k, value

    What has expired has no row. What cannot be read is a row that says so, by `or_unreadable`.

    Attributes:
        table: document, side, group, group-side, history or chord.
        key: Unique within the table.
        columns: Every column, bytes, text, numbers or None.
        expires_at: ms since 1970; 0: never.
    """

    table: str
    key: str
    columns: Mapping[str, Any]
    expires_at: int


class Stock(NamedTuple):
    """What Celery's own backend has in its store.

    Attributes:
        subject: `TASK` or `GROUP`.
        id: The task's or group's id.
        document: As a key-value backend of Celery's would hold it, compressed or not; None: see ``problem``.
        expires_at: ms since 1970; 0: never; None: the store leaves that to Celery's ``result_expires``.
        done: When it was written, ms since 1970; None: the store does not say, but perhaps the document does.
        key: Order key of ours that stands beside it, 0 if there is none: it is ours, unless it shows an end that the
            key's event was not.
        problem: Why there is no document.
    """

    subject: str
    id: str
    document: bytes | None
    expires_at: int | None = None
    done: int | None = None
    key: int = 0
    problem: str = ""


class Page(NamedTuple):
    """Some of what Celery's own backend has.

    Attributes:
        found: That.
        after: Where to go on, for `View.stock`; "" at the end.
    """

    found: list[Stock]
    after: str


def document_row(
    subject: str, subject_id: str, document: bytes | None, expires_at: int, wrong: Mapping[str, Any] | None = None
) -> Row:
    """Return the dump's row of a task's or group's document.

    Args:
        subject: `TASK` or `GROUP`.
        subject_id: The task's or group's id.
        document: As it is shown.
        expires_at: ms since 1970; 0: never.
        wrong: What Celery's own columns beside it have wrong, by `native_columns`.
    """
    columns = {"document": document, **(wrong or {})}
    return Row(DOCUMENTS[subject], subject_id, columns, expires_at)


def side_row(subject: str, subject_id: str, key: int, event_id: str, side: Side) -> Row:
    """Return the dump's row of a task's side record, or of a group's key."""
    columns: dict[str, Any] = {"k": key, "event_id": event_id}
    if subject == TASK:
        columns |= {
            "run": side.run,
            "seen": side.seen,
            "sent": side.sent,
            "received": side.received,
            "started": side.started,
            "attempts": side.attempts,
            "workers": "\n".join(side.workers),
        }
    return Row(SIDES[subject], subject_id, columns, side.expires_at)


def id_refusal(name: str, limit: int | None = None) -> str:
    """Return why a text cannot be an id, or be a part of one, of at most ``limit`` bytes; "" if it can."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError as exc:
        return f"the id is not UTF-8: {exc}"
    return f"an id of {size} bytes; the limit is {limit}" if limit is not None and size > limit else ""


def history_row(
    key: str, value: bytes, expires_at: int, beside: Mapping[str, Any], said: Callable[[Event], Mapping[str, Any]]
) -> Row:
    """Return the dump's row of a history entry: its value, and what stands beside it and is not what the value says.

    Args:
        key: The row's.
        value: The event's record value.
        expires_at: ms since 1970; 0: never.
        beside: What the store keeps beside the value, to search by.
        said: Returns what it is to keep there of an event.
    """
    try:
        right = said(codec.decode(value))
    except UNREADABLE:  # as it was recorded, or damaged: what cannot be read is compared as it is
        right = beside
    wrong = {name for name in {*beside, *right} if beside.get(name) != right.get(name)}
    return Row("history", key, {"value": value, **{name: beside.get(name) for name in wrong}}, expires_at)


def or_unreadable(table: str, key: str, made: Iterable[Row]) -> Iterator[Row]:
    """Yield rows; where what the store has cannot be made into one, a row in its place that says why.

    Args:
        table: Of the row in its place.
        key: Likewise.
        made: Makes the rows, one after the other, of what has been read already.
    """
    try:
        for row in made:
            index(row.expires_at)  # SQLite keeps a text in any column
            yield row
    except UNREADABLE as exc:
        yield Row(table, key, {"unreadable": f"{type(exc).__name__}: {exc}"}, 0)


class Sink(ABC):
    """The write side of a store, used by one thread of one process."""

    url: str
    """As configured, password masked."""

    meanwhile: Callable[[], bool] | None = None
    """Something else to do, set by the host. A `write` that waits for its store may call it as long as no answer has come
    and it returns True; each call takes 0.2 ms, and never fails."""

    @abstractmethod
    def open(self) -> None:
        """Connect and make what is missing (tables, scripts).

        Called once, in the process that will write, before anything else; again after `close`.

        Raises:
            Unavailable: The store cannot be reached.
            SettingsError: It can, and refuses: credentials, rights, a foreign schema.
        """

    @abstractmethod
    def write(self, batch: Batch) -> None:
        """Apply a batch; return when all of it is durable by the store's own measure.

        Called for each batch, also for an empty one, and again with the same batch after an
        error: every part must be idempotent. ``batch.positions`` is stored last.

        Raises:
            Unavailable: Perhaps nothing, perhaps part of it was written.
            Rejected: Everything but the named changes was written.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the store. Called any number of times, also before `open`."""

    def warnings(self) -> list[str]:
        """Return what about the store's configuration endangers the view, for ``status``."""
        return []


class Subscription(ABC):
    """A client's ear: hears the ids of tasks whose document changed."""

    @abstractmethod
    def wait(self, timeout_s: float) -> dict[str, bytes]:
        """Return the ids heard within ``timeout_s``, {} if none: each with its document, or b"" to read it.

        Raises:
            Unavailable: The connection broke: subscribe anew, then read everything again.
        """

    @abstractmethod
    def fileno(self) -> int:
        """Return a descriptor that becomes readable with the next id; -1 if there is none."""

    @abstractmethod
    def close(self) -> None:
        """Stop hearing. Called any number of times."""


class View(ABC):
    """The read side of a store. Thread-safe; opened lazily; told about forks by `after_fork`.

    Every method may raise `Unavailable`.
    """

    url: str
    push: bool = False
    """Whether `subscribe` works; else the reader polls, in batches, and tries `watch`."""
    keeps_history: bool = True
    """Whether its sink does, unless `StoreOptions.history` says otherwise."""
    by_time: bool = False
    """Whether `candidates` come in the order of `Event.at`, as the query asks; else they come in any."""

    @abstractmethod
    def documents(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Return the documents there are of these tasks, as Celery's key-value backends encode them."""

    @abstractmethod
    def shown(self, ids: Sequence[str]) -> dict[str, Shown]:
        """Return all that is known of these tasks; ids with nothing are absent."""

    @abstractmethod
    def groups(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Return the saved groups there are of these, encoded."""

    @abstractmethod
    def history(self, task_id: str) -> list[bytes]:
        """Return the record values of a task's events, by (HLC, event id); [] if none is kept."""

    @abstractmethod
    def chord(self, group_id: str) -> dict[str, bytes]:
        """Return the facts about a chord by name."""

    @abstractmethod
    def positions(self) -> dict[Partition, int]:
        """Return the next offset of each partition that this view has not folded yet.

        And the marks of a replay (``replay:…``) and the cut-over pointer (``…/primary/…``), as positions in topics that
        no log has.
        """

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Return every document, side record, group, history entry and chord fact; no bookkeeping."""

    def candidates(self, query: Query) -> Iterator[bytes]:  # noqa: ARG002 - a store narrows down what it can
        """Yield the record values of a superset of what matches, streaming; the limit is not theirs to keep."""
        return (row.columns["value"] for row in self.rows() if row.table == "history")

    def search(self, query: Query) -> Iterator[Logged]:
        """Yield the events of the history that match.

        With a limit in the order of time, the same in every store but for events of one millisecond; without one in
        any order. Streams: memory is bounded by the limit. What newer software wrote is left out, with a warning.
        """
        return matching(self.candidates(query), query, by_time=self.by_time)

    @abstractmethod
    def close(self) -> None:
        """Let go of the store. Called any number of times."""

    @abstractmethod
    def after_fork(self) -> None:
        """Forget inherited connections without touching them."""

    def within(self, timeout_s: float) -> AbstractContextManager[None]:  # noqa: ARG002 - for stores that can be silent
        """Have what this thread asks for inside end after ``timeout_s``, with `Unavailable`.

        Around everything that a ``get(timeout=…)`` does. A file or a memory answers at once, and needs no bound.
        """
        return nullcontext()

    def register(self, client: str, ids: Sequence[str], ttl_s: float) -> dict[str, bytes]:
        """Ask that `client` hear of these tasks for ``ttl_s``, and return their documents as they are after that.

        In one: it is the way of every ``get()``, and each round trip would be felt.
        """
        raise NotImplementedError

    def subscribe(self, client: str) -> Subscription:
        """Return the ear of a client; one per process."""
        raise NotImplementedError

    def stock(self, after: str = "") -> Iterator[Page]:  # noqa: ARG002 - for stores that can
        """Yield what Celery's own backend has in this store, a page at a time, streaming.

        What is there all the time comes at least once; what is written or deleted meanwhile may or may not come.

        Args:
            after: Where to go on: `Page.after`, also of another process. "": from the start.

        Raises:
            SettingsError: This store cannot.
        """
        raise SettingsError("view", f"nothing can be imported from {self.url}", "redis://…, mongodb://… can")

    def watch(self, ids: Sequence[str]) -> Subscription | None:  # noqa: ARG002 - for stores that can
        """Return the ear for these tasks: what is there now is heard first, then what changes; None if there is no such.

        For a view without `push`, whose reader otherwise polls; one per process.
        """
        return None


def matching(values: Iterable[bytes], query: Query, *, by_time: bool) -> Iterator[Logged]:
    """Yield the events that match, as `View.search` promises; ``by_time``: the values come as the query orders them."""
    found = (logged for logged in _decoded(values) if query.matches(logged.event))
    if not query.limit:
        return found
    if by_time:
        return islice(found, query.limit)
    return iter(_first(found, query.limit, -1 if query.newest_first else 1))


def _first(found: Iterable[Logged], limit: int, way: int) -> list[Logged]:
    """Return the first by time, or with ``way`` -1 the last, each once: the log may have an event twice."""
    kept: list[tuple[int, int, Logged]] = []  # a heap, the one that is to go next at its top
    ids: set[str] = set()
    for number, logged in enumerate(found):
        rank = -way * logged.event.at
        if logged.event.id in ids or (len(kept) == limit and rank <= kept[0][0]):
            continue
        ids.add(logged.event.id)
        if len(kept) < limit:
            heapq.heappush(kept, (rank, -number, logged))
        else:
            ids.discard(heapq.heappushpop(kept, (rank, -number, logged))[2].event.id)
    return [logged for _, _, logged in sorted(kept, reverse=True)]


def _decoded(values: Iterable[bytes]) -> Iterator[Logged]:
    unreadable = 0
    for value in values:
        try:
            yield Logged(codec.decode(value), value)
        except CodecError as exc:
            unreadable += 1
            if unreadable == 1:
                logger.warning("a search leaves out what this software cannot read: %s", exc)
