"""The event: one state change of a task or a saved group, immutable, and complete in itself.

An event that a document may show is self-sufficient: it carries everything the worker knew, so
that a document is a function of that one event. Everything here is data; how it is written down
is `codec`, and which one wins is `order`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

# -- kinds: what happened ----------------------------------------------------------------------

SENT: Final = "sent"
RECEIVED: Final = "received"
STARTED: Final = "started"
STATE: Final = "state"
"""Any state of a task's own, by ``update_state``; `Event.state` names it."""
RETRY: Final = "retry"
SUCCESS: Final = "success"
FAILURE: Final = "failure"
WORKER_LOST: Final = "worker-lost"
"""A failure that the parent stored, because the child that ran the task is gone."""
REVOKED: Final = "revoked"
EXPIRED: Final = "expired"
REJECTED: Final = "rejected"
UNKNOWN_TASK: Final = "unknown-task"
FORGOTTEN: Final = "forgotten"
GROUP_SAVED: Final = "group-saved"
GROUP_DELETED: Final = "group-deleted"
RERUN: Final = "rerun"
"""An operator is about to send the task's message again, as a new run."""

KINDS: Final = frozenset(
    {
        SENT, RECEIVED, STARTED, STATE, RETRY, SUCCESS, FAILURE, WORKER_LOST, REVOKED, EXPIRED,
        REJECTED, UNKNOWN_TASK, FORGOTTEN, GROUP_SAVED, GROUP_DELETED, RERUN,
    }
)  # fmt: skip
"""Every kind this version writes. A reader keeps the history of kinds that it does not know."""

GROUP_KINDS: Final = frozenset({GROUP_SAVED, GROUP_DELETED})
TOMBSTONES: Final = frozenset({FORGOTTEN, GROUP_DELETED})
"""Kinds that win by showing nothing."""

_OF_STATES: Final = {
    "STARTED": STARTED, "RETRY": RETRY, "SUCCESS": SUCCESS, "FAILURE": FAILURE, "REVOKED": REVOKED,
}  # fmt: skip


def kind_of(state: str) -> str:
    """Return the kind of event that brings a task into a state of Celery's, or into one of its own."""
    return _OF_STATES.get(state, STATE)


# -- roles: who said it ------------------------------------------------------------------------

CLIENT: Final = "client"
PARENT: Final = "parent"
"""A worker's main process."""
CHILD: Final = "child"
"""The process (or thread) of a worker that runs tasks."""
PROCESSOR: Final = "processor"
OPERATOR: Final = "operator"

NOTHING: Final = msgspec.Raw(b"")

# JSON has integers of any size, stores do not: the bounds are checked when bytes are decoded, so that a number that
# no store can hold is a dead letter instead of a sink's crash.
_Key = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Run = Annotated[int, msgspec.Meta(ge=0, le=(1 << 28) - 1)]
LATEST_MS: Final = 253_370_764_799_999
"""The end of the year 9998: Python, Cassandra's driver and SQL's texts have no dates for what lies far behind it."""
_Ms = Annotated[int, msgspec.Meta(ge=0, le=LATEST_MS)]
"""When something was."""
_Until = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]
"""When something is to be, which people may put off as far as they like. And a number of bytes."""
_THOUSAND_YEARS_S: Final = 1_000 * 366 * 86_400
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
_Int = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 31) - 1)]


class Opaque(msgspec.Struct, frozen=True, omit_defaults=True):
    """A document that is not JSON (pickle, msgpack, yaml, compression), and its parts.

    Attributes:
        meta: The whole document, as Celery's own key-value backends would store it.
        content_type: MIME type of ``meta`` and of the parts before any compression.
        result: The result alone, encoded the same way, for stores with a column of its own.
        traceback: The traceback, text.
        children: The list of children alone, encoded the same way.
        args: Positional arguments alone, when ``result_extended`` is on.
        kwargs: Keyword arguments alone, likewise.
        stamps: ``{"stamped_headers": …, "stamps": …}`` alone, likewise.
        plain: ``children``, ``args`` and ``kwargs`` as JSON (of a saved group its members as ``children``), for stores
            that keep them unencoded; what JSON cannot say is left out.
    """

    meta: bytes
    content_type: str = ""
    result: bytes | None = None
    traceback: str | None = None
    children: bytes | None = None
    args: bytes | None = None
    kwargs: bytes | None = None
    stamps: bytes | None = None
    plain: dict[str, Any] | None = None


class Claim(msgspec.Struct, frozen=True):
    """Where a document lies that is too large for the log.

    Attributes:
        path: Below ``claim_check``: ``<last day, UTC>/<event id>``, or ``never/<event id>``.
        bytes: Its size.
        sha256: Its checksum, hexadecimal.
    """

    path: str
    bytes: _Until
    sha256: str


class Imported(msgspec.Struct, frozen=True, rename={"source": "from"}):
    """Where an event comes from that nobody saw happen here.

    Attributes:
        source: URL of the store that Celery's own backend wrote, password masked; on the wire ``from``.
        at: When its import began.
        by: Who asked for it.
    """

    source: str
    at: _Ms
    by: str


class Parcel(msgspec.Struct, frozen=True, omit_defaults=True):
    """A task's message, so that it can be sent again; queue and exchange are the event's.

    Attributes:
        body: As the task's serializer wrote it, not compressed.
        content_type: Of the body.
        content_encoding: Of the body.
        headers: As JSON.
        properties: As JSON: priority, correlation_id, reply_to …
        why_not: Why all these are empty.
    """

    body: bytes = b""
    content_type: str = ""
    content_encoding: str = ""
    headers: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    why_not: str = ""


class Event(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """One state change.

    Times are integers, milliseconds since 1970, UTC. Every field from ``state`` on is absent when
    unknown. Source of the values: Celery's signals and requests in the process named by
    ``role``/``host``/``pid``.

    Attributes:
        v: Version of the wire schema.
        id: Unique per event; a re-send after an error has the same one.
        kind: What happened, one of `KINDS`.
        task: The task's id; for a group's kinds the group's id.
        key: The order key (see `order`); 0 if this event never touches a document.
        at: Wall clock of the process that says so.
        hlc: The same process's hybrid logical clock.
        role: One of client, parent, child, processor, operator.
        host: Host name.
        pid: Process id.
        run: The run, or None if unknown.
        state: The state that the document shows, when the event has a document.
        doc: The native document, byte for byte as Celery's Redis backend would store it, when
            that is JSON.
        opaque: The native document when it is not JSON.
        claim: Where the native document lies, when it was too large; ``doc`` is the stub that refers to it.
        date_done: As in the document (ISO 8601), for ready states.
        expires_at: When the document (or, without one, this knowledge) is to vanish; None: never.
        name: The task's name.
        worker: Node name of the worker, ``celery@host``.
        attempt: Number of retries before this attempt.
        redelivered: The broker said that it delivered the message before.
        queue: Queue it was sent to, where known; else its routing key.
        exchange: Exchange.
        routing_key: Routing key.
        priority: Message priority.
        eta: Not to be started before.
        message_expires: Not to be started after.
        parent: Id of the task that sent it.
        root: Id of the first task of its workflow.
        group: Group id.
        index: Position in the group's header.
        chord: Body's task id of the chord that it is a member of.
        args: Positional arguments as JSON or as text, if recorded.
        kwargs: Keyword arguments likewise.
        sent_at: When the client published it.
        received_at: When the parent got it.
        started_at: When this attempt started.
        runtime_s: Run time of this attempt, seconds, measured by us.
        due: When the next attempt is due (retry).
        beat: Name of the schedule entry that sent it.
        stamps: Stamped headers.
        children: Ids of tasks that it sent, when ``trail`` is on and there is no document.
        exception: Class of the exception, dotted.
        message: The exception's text, or why it was revoked or rejected (bounded).
        by: Who revoked it.
        terminated: The running task was killed.
        signum: … by this signal.
        requeue: Rejected to be delivered again.
        ignored: ``ignore_result`` was on: the payload was left out on purpose.
        parcel: The message that was sent, where ``record_messages`` says so.
        imported: The event was made of another store's document, and tells what that knew.
    """

    v: int = 1
    id: str
    kind: str
    task: str
    key: _Key = 0
    at: _Ms
    hlc: _Ms
    role: str = CHILD
    host: str = ""
    pid: _Count = 0
    run: _Run | None = None
    state: str | None = None
    doc: msgspec.Raw = NOTHING
    opaque: Opaque | None = None
    claim: Claim | None = None
    date_done: str | None = None
    expires_at: _Until | None = None
    name: str | None = None
    worker: str | None = None
    attempt: _Count = 0
    redelivered: bool = False
    queue: str | None = None
    exchange: str | None = None
    routing_key: str | None = None
    priority: _Int | None = None
    eta: _Until | None = None
    message_expires: _Until | None = None
    parent: str | None = None
    root: str | None = None
    group: str | None = None
    index: _Count | None = None
    chord: str | None = None
    args: Any = None
    kwargs: Any = None
    sent_at: _Ms | None = None
    received_at: _Ms | None = None
    started_at: _Ms | None = None
    runtime_s: float | None = None
    due: _Until | None = None
    beat: str | None = None
    stamps: dict[str, Any] | None = None
    children: tuple[str, ...] | None = None
    exception: str | None = None
    message: str | None = None
    by: str | None = None
    terminated: bool = False
    signum: _Int | None = None
    requeue: bool = False
    ignored: bool = False
    parcel: Parcel | None = None
    imported: Imported | None = None

    @property
    def shows(self) -> bool:
        """Whether a document may show this event."""
        return self.key > 0

    @property
    def document(self) -> bytes | None:
        """The native document's bytes, or None for a tombstone or an event without one."""
        return bytes(self.doc) or (self.opaque.meta if self.opaque is not None else None)


class NativeParts(msgspec.Struct, frozen=True):
    """A JSON document's parts, still encoded, for stores with a column for each; empty if absent."""

    status: str = "PENDING"
    result: msgspec.Raw = NOTHING
    traceback: str | None = None
    children: msgspec.Raw = NOTHING
    date_done: msgspec.Raw = NOTHING
    name: str | None = None
    args: msgspec.Raw = NOTHING
    kwargs: msgspec.Raw = NOTHING
    worker: str | None = None
    retries: _Int | None = None
    queue: str | None = None
    stamped_headers: list[str] | None = None


def kept_ms(kept_s: float | None) -> int:
    """Return how long something is kept, ms; 0: for ever, as is what is to be kept for a thousand years and more."""
    return int(1000 * kept_s) if kept_s and kept_s < _THOUSAND_YEARS_S else 0
