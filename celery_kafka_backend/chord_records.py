"""The records of the chords' topic: the facts from which a chord is decided, and their bytes.

Record of ``<prefix>.chords`` (compacted; partition = murmur2 of the group id, `topics.chord_partition`)::

    key       text, its fields joined by "|": group | generation | kind | what makes the fact unique
                  declared                       sized          fired
                  extended | task                cancelled | id           resent | id
                  part | task | index | id       ("-" where there is no index)
                  chosen | owner | n             decided | owner
              "%" and "|" inside a field are written %25 and %7C
    value     one JSON object: "v", "kind", then the fields of the record that are not at their
              default; or null, a tombstone: this fact is no longer needed

* Compaction keeps the last record of a key, so a key names one fact. Two records with one key say
  the same (a re-send after a lost acknowledgement); whoever needs one may read either. But `Resent`
  is written a second time when it is done, and says so.
* ``v`` is the schema's version, 1 today, always written. A reader refuses a greater one
  (`UnknownVersion`; the record stays in the topic and is read again after an upgrade), accepts
  unknown *fields*, and refuses unknown kinds (`Unreadable`).
* Times are integers, ms since 1970. ``bytes`` are base64. A version is never edited in place:
  tests/golden holds one file for each.

What the facts mean together is `processors.decision`. Nothing here does I/O.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import msgspec

from celery_kafka_backend.errors import UnknownVersion, Unreadable

VERSION: Final = 1

DECLARED: Final = "declared"
SIZED: Final = "sized"
EXTENDED: Final = "extended"
PART: Final = "part"
CHOSEN: Final = "chosen"
DECIDED: Final = "decided"
FIRED: Final = "fired"
CANCELLED: Final = "cancelled"
RESENT: Final = "resent"

SUCCESS: Final = "success"
FAILURE: Final = "failure"

EXCEPTION_LIMIT: Final = 1024
"""Characters of an exception's text that a part carries beside its encoded result."""

CHUNK: Final = 4000
"""Members per `chosen` record: some 500 kB at 125 bytes each, half of the default record limit."""


class _Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False, tag_field="kind"):
    v: int = VERSION
    group: str
    generation: int


class Declared(_Record, frozen=True, omit_defaults=True, kw_only=True, tag=DECLARED):
    """A chord exists, and this is its body; acknowledged before any header task is sent.

    Attributes:
        group: The header's group id.
        generation: The declaration's HLC, ms since 1970; for a chord frozen inside a parent's
            message that message's HLC, so that a redelivered parent declares the same one.
        body: The body's signature (a dict), encoded by the app's *task* serializer.
        content_type: Of ``body``, as kombu's ``dumps`` gave it.
        content_encoding: Likewise.
        body_task_id: The task id that the body is sent with.
        body_name: The body's task name, for showing.
        immutable: The body takes no results, so parts carry none.
        root: Root id of the task that declared it.
        parent: Id of the task that declared it.
        priority: That task's priority.
        stamps: That task's stamps: ``{"stamped_headers": […], header: …}``, JSON-able.
        group_result: The header's ``GroupResult.as_tuple()``, encoded as ``body`` is.
        deadline: When the chord fails if it is not complete by then; None: never.
        at: Wall clock of the declaring process.
        host: Its host.
        pid: Its process id.
        mac: HMAC-SHA256, hexadecimal, see `sign`; "" if no secret is configured.
    """

    body: bytes
    content_type: str = "application/json"
    content_encoding: str = "utf-8"
    body_task_id: str
    body_name: str = ""
    immutable: bool = False
    root: str | None = None
    parent: str | None = None
    priority: int | None = None
    stamps: dict[str, Any] | None = None
    group_result: bytes | None = None
    deadline: int | None = None
    at: int = 0
    host: str = ""
    pid: int = 0
    mac: str = ""


class Sized(_Record, frozen=True, omit_defaults=True, kw_only=True, tag=SIZED):
    """How many parts the header's own members make; acknowledged before its last task is sent.

    Attributes:
        size: Number of distinct (task, index) that will send a part.
        at: Wall clock of the process that says so.
    """

    size: int
    at: int = 0


class Extended(_Record, frozen=True, omit_defaults=True, kw_only=True, tag=EXTENDED):
    """A running member added members (``add_to_chord``); acknowledged before they are sent.

    Attributes:
        task: The new member's task id; for a delta over 1 any id that names this extension.
        index: The new member's header index, if it has one.
        delta: By how many parts the chord grows.
        replaces: Id of the member that it stands in for, if any (shown, not counted).
        by: Id of the task that added it.
        at: Wall clock of the process that says so.
    """

    task: str
    index: int | None = None
    delta: int = 1
    replaces: str | None = None
    by: str | None = None
    at: int = 0


class Part(_Record, frozen=True, omit_defaults=True, kw_only=True, tag=PART):
    """One member's outcome.

    Attributes:
        task: The member's task id.
        index: Its header index, None if the request has none.
        id: Id of the event that tells the same state; a re-send has the same one.
        key: The order key of that event (63 bits).
        state: A ready state; ``SUCCESS`` is one, every other counts as a failure.
        result: What Celery would store as ``result`` (for a failure the encoded exception),
            encoded by the app's *result* serializer; empty for an immutable body's success, and
            where it is no longer known: it contributes None.
        content_type: Of ``result``; "" if it is empty.
        content_encoding: Likewise.
        ignored: ``ignore_result`` was on: no store keeps the result, the body gets it all the same.
        exception: ``repr`` of a failed member's exception, bounded by `EXCEPTION_LIMIT`; what is
            said of it when ``result`` cannot be decoded.
        root: The member's root id; the body inherits the completing member's.
        parent: The member's parent id.
        priority: The member's priority, from its ``delivery_info``.
        stamps: The member's stamps: ``{"stamped_headers": […], header: …}``, JSON-able.
        at: Wall clock of the process that says so.
        worker: Node name of the worker.
        told: Of a member that is the body of a failed chord: fingerprints of the errbacks that have
            heard of that failure, here and further in. They do not hear of it again.
    """

    task: str
    index: int | None = None
    id: str
    key: int
    state: str = "SUCCESS"
    result: bytes = b""
    content_type: str = ""
    content_encoding: str = ""
    ignored: bool = False
    exception: str = ""
    root: str | None = None
    parent: str | None = None
    priority: int | None = None
    stamps: dict[str, Any] | None = None
    at: int = 0
    worker: str = ""
    told: tuple[str, ...] = ()

    @property
    def succeeded(self) -> bool:
        """Whether the body can have this member's result."""
        return self.state == "SUCCESS"


class Choice(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A part that a decision chose, written as an array.

    Attributes:
        task: The member's task id.
        index: Its header index.
        id: The part's event id; with task and index it makes the record key.
        offset: Where the part was when the decision was taken. Compaction may have left only a
            later record of the same key, which says the same.
    """

    task: str
    index: int | None
    id: str
    offset: int


class Chosen(_Record, frozen=True, omit_defaults=True, kw_only=True, tag=CHOSEN):
    """A slice of a large decision's members; all slices stand in the log before their `Decided`.

    Attributes:
        owner: Author of the decision.
        n: Number of the slice, from 0.
        parts: Its members, in the order in which the body gets them.
    """

    owner: str
    n: int
    parts: tuple[Choice, ...]


class Decided(_Record, frozen=True, omit_defaults=True, kw_only=True, tag=DECIDED):
    """A chord's outcome. Of several the first by offset counts, for ever.

    Attributes:
        owner: The author: one incarnation of a processor, in one assignment of the partition.
        outcome: ``success`` or ``failure``.
        body_task_id: As declared.
        body_run: The run that the body is sent with, by whoever sends it.
        parts: The members chosen, in the order in which the body gets their results; empty if
            ``slices`` is not 0.
        slices: Number of `Chosen` records of this owner that hold the members instead.
        size: Number of members.
        last: Position in the members of the one that completed the chord; the body inherits its
            root, priority and stamps.
        failed: Id of the first failed member in that order, for ``failure``.
        why: Of a chord that was ended before it was complete: who or what ended it; the members
            are those that were in, of one that fires only those that had succeeded.
        at: Wall clock of the author.
    """

    owner: str
    outcome: str = SUCCESS
    body_task_id: str
    body_run: int
    parts: tuple[Choice, ...] = ()
    slices: int = 0
    size: int = 0
    last: int = 0
    failed: str | None = None
    why: str = ""
    at: int = 0


class Fired(_Record, frozen=True, omit_defaults=True, kw_only=True, tag=FIRED):
    """The broker has the body (or the errbacks have run): nothing is left to do.

    Attributes:
        owner: Who says so.
        outcome: As decided.
        body_task_id: As decided.
        found: It was not sent by the one who says so: its events were found in the log.
        at: Wall clock of the one who says so.
    """

    owner: str
    outcome: str = SUCCESS
    body_task_id: str
    found: bool = False
    at: int = 0


class Cancelled(_Record, frozen=True, omit_defaults=True, kw_only=True, tag=CANCELLED):
    """A chord that is not decided is not to wait any longer: an operator says so. The first one counts.

    Attributes:
        id: Unique per request.
        by: Who asks.
        reason: Why, for people.
        fire: Send the body with the results that are there, instead of failing it.
        at: Wall clock of the one who asks.
        mac: As in `Declared`.
    """

    id: str
    by: str = ""
    reason: str = ""
    fire: bool = False
    at: int = 0
    mac: str = ""


class Resent(_Record, frozen=True, omit_defaults=True, kw_only=True, tag=RESENT):
    """An operator asks for the body of a fired chord to be sent again; then, under the same key, that this is done.

    Attributes:
        id: Unique per request.
        by: Who asks.
        reason: Why, for people.
        at: Wall clock of the one who asks.
        mac: As in `Declared`, over what the one who asks says: none of what follows.
        done: Wall clock of the owner that has carried it out; 0: it is still to be done.
        owner: That owner.
        run: The run that the body was sent with.
        outcome: ``success``, or ``failure``: it was not sent.
        found: It was not sent by the one who says so: its events of that run were found in the log.
        why: Of a failure: why.
    """

    id: str
    by: str = ""
    reason: str = ""
    at: int = 0
    mac: str = ""
    done: int = 0
    owner: str = ""
    run: int | None = None
    outcome: str = ""
    found: bool = False
    why: str = ""


Record: TypeAlias = Declared | Sized | Extended | Part | Chosen | Decided | Fired | Cancelled | Resent


class Key(NamedTuple):
    """A record key, taken apart.

    Attributes:
        group: The group id.
        generation: The generation.
        kind: What kind of fact.
        rest: What makes it unique within its kind.
    """

    group: str
    generation: int
    kind: str
    rest: tuple[str, ...]


class Gone(NamedTuple):
    """A tombstone: the fact with this key is no longer needed."""

    key: Key


_encoder = msgspec.json.Encoder()
_canonical = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(Record)


class _Probe(msgspec.Struct):
    v: int = VERSION


_probe = msgspec.json.Decoder(_Probe)


def encode(record: Record) -> tuple[bytes, bytes]:
    """Return a record's Kafka key and value."""
    body = _encoder.encode(record)
    # omit_defaults leaves v out, as it is the default: a reader needs it, so it is put in front.
    if record.v == VERSION:
        body = b'{"v":%d,%s' % (record.v, body[1:])
    return key_of(record), body


def decode(key: bytes | None, value: bytes | None) -> Record | Gone:
    """Return the record of a Kafka key and value, or what a tombstone removes.

    Raises:
        UnknownVersion: It was written by a newer version.
        Unreadable: It is no record at all, or its key is not its own.
    """
    found = parse_key(key)
    if value is None:
        return Gone(found)
    try:
        record: Record = _decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise _why(value, exc) from exc
    if record.v != VERSION:
        raise UnknownVersion(f"schema version {record.v}; this software reads up to {VERSION}")
    if key_of(record) != key:
        # Compaction works by key: a fact under another's key would one day erase it.
        raise Unreadable(f"the record of {key_of(record)!r} under the key {key!r}")
    if isinstance(record, Part) and not 0 <= record.key < 1 << 63:
        raise Unreadable(f"an order key outside 63 bits: {record.key}")
    return record


def _why(value: bytes, exc: Exception) -> Unreadable | UnknownVersion:
    try:
        version = _probe.decode(value).v
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Unreadable(f"not JSON: {exc}")
    if version != VERSION:
        return UnknownVersion(f"schema version {version}; this software reads up to {VERSION}")
    return Unreadable(f"not a chord's record: {exc}")


def key_of(record: Record) -> bytes:
    """Return the record key of a record."""
    match record:
        case Declared():
            return make_key(record.group, record.generation, DECLARED)
        case Sized():
            return make_key(record.group, record.generation, SIZED)
        case Fired():
            return make_key(record.group, record.generation, FIRED)
        case Extended():
            return make_key(record.group, record.generation, EXTENDED, record.task)
        case Part():
            return part_key(record.group, record.generation, record.task, record.index, record.id)
        case Chosen():
            return make_key(record.group, record.generation, CHOSEN, record.owner, str(record.n))
        case Decided():
            return make_key(record.group, record.generation, DECIDED, record.owner)
        case Cancelled():
            return make_key(record.group, record.generation, CANCELLED, record.id)
        case Resent():
            return make_key(record.group, record.generation, RESENT, record.id)


def part_key(group: str, generation: int, task: str, index: int | None, event_id: str) -> bytes:
    """Return the record key of a part."""
    return make_key(group, generation, PART, task, "-" if index is None else str(index), event_id)


def make_key(group: str, generation: int, kind: str, *rest: str) -> bytes:
    """Return a record key from its fields."""
    return "|".join([_escape(group), str(generation), kind, *map(_escape, rest)]).encode()


def parse_key(key: bytes | None) -> Key:
    """Return a record key's fields.

    Raises:
        Unreadable: It is not a key of this topic.
    """
    if key is None:
        raise Unreadable("no record key")
    try:
        group, generation, kind, *rest = key.decode().split("|")
        return Key(_unescape(group), int(generation), kind, tuple(map(_unescape, rest)))
    except (ValueError, UnicodeDecodeError) as exc:
        raise Unreadable(f"not a chord's record key: {key[:200]!r}") from exc


def _escape(field: str) -> str:
    return field.replace("%", "%25").replace("|", "%7C")


def _unescape(field: str) -> str:
    return field.replace("%7C", "|").replace("%25", "%")


Signed = TypeVar("Signed", Declared, Cancelled, Resent)
"""What only those may write who know the secret: it sends tasks, or keeps them from being sent."""


def sign(record: Signed, secret: str) -> Signed:
    """Return the record with its HMAC, or as it is when the secret is empty."""
    return msgspec.structs.replace(record, mac=_mac(record, secret)) if secret else record


def verify(record: Declared | Cancelled | Resent, secret: str) -> bool:
    """Return whether a record was made by someone who knows the secret; any was, if it is empty."""
    return not secret or hmac.compare_digest(record.mac.encode(), _mac(record, secret).encode())


def _mac(record: Declared | Cancelled | Resent, secret: str) -> str:
    """HMAC-SHA256 over a JSON array of what is signed, maps sorted."""
    return hmac.new(secret.encode(), _canonical.encode(_signed(record)), hashlib.sha256).hexdigest()


def _signed(record: Declared | Cancelled | Resent) -> list[Any]:
    """Return what is signed, in an order that is never changed; a later field comes last, and only if it is there."""
    if isinstance(record, Cancelled | Resent):
        kind = CANCELLED if isinstance(record, Cancelled) else RESENT
        asked = [1, kind, record.group, record.generation, record.id, record.by, record.reason, record.at]
        return [*asked, record.fire] if isinstance(record, Cancelled) else asked
    signed = [
        1,
        record.group,
        record.generation,
        record.body,
        record.content_type,
        record.content_encoding,
        record.body_task_id,
        record.body_name,
        record.immutable,
        record.root,
        record.parent,
        record.priority,
        record.stamps,
        record.group_result,
        record.at,
        record.host,
        record.pid,
    ]
    return signed if record.deadline is None else [*signed, record.deadline]
