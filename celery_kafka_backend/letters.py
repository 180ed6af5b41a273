"""What the dead letters' topic says: which records were given up, and what an operator has done about each. Pure.

`processors.deadletters` describes a letter. What an operator did is a record of the same topic::

    key       "deeds"
    value     one JSON object, `Deeds`: "v", what was done, by whom, why, when, and to which records
    headers   action    "requeue" or "drop"

A record may be given up more than once: by each view that cannot take it, and again by a processor that died before
its commit. So what is listed, and dealt with once, is the record that was given up, a `Case`, by its place in its topic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec

from celery_kafka_backend import chord_records, codec
from celery_kafka_backend.chord_records import Cancelled, Declared, Resent
from celery_kafka_backend.errors import CodecError, Unreadable
from celery_kafka_backend.query import like

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VERSION: Final = 1
HEADER_ACTION: Final = "action"
KEY: Final = b"deeds"

REQUEUE: Final = "requeue"
DROP: Final = "drop"

OPEN: Final = "open"
REQUEUED: Final = "requeued"
DROPPED: Final = "dropped"
STATES: Final = {None: OPEN, REQUEUE: REQUEUED, DROP: DROPPED}

OURS: Final = ("reason", "topic", "partition", "offset", "at", "by", "size")
"""Headers that a letter adds to those of the record; of two with one name the last is ours."""


Headers: TypeAlias = "Sequence[tuple[str, str | bytes | None]]"


class Place(msgspec.Struct, frozen=True, order=True):
    """Where a record stands, or stood."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}@{self.offset}"


class Raw(NamedTuple):
    """A record as Kafka has it."""

    place: Place
    key: bytes | None
    value: bytes | None
    headers: Headers


class Letter(msgspec.Struct, frozen=True):
    """One time that a record was given up.

    Attributes:
        at: When, ms since 1970.
        by: The consumer group that gave it up.
        reason: Why.
        place: Where the letter stands.
    """

    at: int
    by: str
    reason: str
    place: Place


class Done(msgspec.Struct, frozen=True, omit_defaults=True):
    """A record that was dealt with.

    Attributes:
        record: Where it was given up.
        to: Where it stands now, if it was appended again.
    """

    record: Place
    to: Place | None = None


class Deeds(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What an operator did to some records, all or none of it.

    Attributes:
        v: Version of this schema.
        action: `REQUEUE` or `DROP`.
        at: When, ms since 1970.
        by: Who.
        reason: Why.
        done: To which records.
    """

    v: int = VERSION
    action: str
    at: int
    by: str
    reason: str
    done: list[Done]


class Deed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was done to one record: as in `Deeds` and `Done`."""

    action: str
    at: int
    by: str
    reason: str
    to: Place | None = None


class Content(msgspec.Struct, frozen=True, omit_defaults=True):
    """What can be told of a record that was given up.

    Attributes:
        subject: Id of the task or group it speaks of; "" if nobody can tell.
        what: State or kind of event, or of a chord's fact.
        name: The task's name.
        happened: When, ms since 1970; 0 if nobody can tell.
        problem: Why this version cannot read it; "" if it can.
        size: Bytes of its value.
        cut: The letter does not have all of it.
        empty: It has no value.
    """

    subject: str = ""
    what: str = ""
    name: str = ""
    happened: int = 0
    problem: str = ""
    size: int = 0
    cut: bool = False
    empty: bool = False


class Case(msgspec.Struct):
    """A record that was given up, and what became of it.

    Attributes:
        record: Where it stood.
        letters: Each time that it was given up, oldest first.
        content: What it says.
        deed: What was done about it, if anything was.
        again: The record whose requeueing made this one: it was given up before.
    """

    record: Place
    letters: list[Letter]
    content: Content
    deed: Deed | None = None
    again: Place | None = None

    @property
    def state(self) -> str:
        """`OPEN`, `REQUEUED` or `DROPPED`."""
        return STATES[self.deed.action if self.deed else None]


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which cases. Everything that is set must hold; patterns as in `query`.

    Attributes:
        places: These records, as `Place` writes them.
        state: `OPEN`, `REQUEUED` or `DROPPED`.
        because: Pattern of the reason for which it was given up.
        topic: Pattern of its topic.
        by: Pattern of who gave it up.
        name: Pattern of the task's name.
        task: Id of the task or group.
        since: Given up not before, ms since 1970.
        until: Given up before.
    """

    places: tuple[str, ...] = ()
    state: str = ""
    because: str = ""
    topic: str = ""
    by: str = ""
    name: str = ""
    task: str = ""
    since: int | None = None
    until: int | None = None

    def matches(self, case: Case) -> bool:
        """Return whether a case is one of those: of its letters one must do so in all."""
        return (
            (not self.places or str(case.record) in self.places)
            and (not self.state or case.state == self.state)
            and like(self.topic, case.record.topic)
            and like(self.name, case.content.name)
            and (not self.task or self.task == case.content.subject)
            and any(map(self._fits, case.letters))
        )

    def _fits(self, letter: Letter) -> bool:
        return (
            like(self.because, letter.reason)
            and like(self.by, letter.by)
            and (self.since is None or letter.at >= self.since)
            and (self.until is None or letter.at < self.until)
        )


class Log(NamedTuple):
    """Whose records may be dead letters.

    Attributes:
        events: Topic of the events.
        chords: Topic of the chords' records.
        chord_key: The secret that declarations are signed with.
        retention_ms: How long the log keeps events.
    """

    events: str
    chords: str
    chord_key: str
    retention_ms: int


class Cases:
    """All cases of a dead letters' topic, from its records in whatever order; about a kilobyte each.

    Args:
        log: Whose.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._cases: dict[Place, Case] = {}
        self._deeds: dict[Place, Deed] = {}
        self._again: dict[Place, Place] = {}
        self.strange = 0
        """Records that are neither letters nor deeds."""

    def __iter__(self) -> Iterator[Case]:
        for case in self._cases.values():
            case.deed = self._deeds.get(case.record)
            case.again = self._again.get(case.record)
            yield case

    def take(self, record: Raw) -> None:
        """Take one record, without an error."""
        headers = _texts(record.headers)
        try:
            if HEADER_ACTION in headers and "topic" not in headers:
                self._take_deeds(record.value or b"")
            else:
                self._take_letter(record, headers)
        except (LookupError, ValueError, msgspec.MsgspecError):  # a ValueError only since msgspec 0.20
            self.strange += 1

    def _take_deeds(self, value: bytes) -> None:
        deeds = msgspec.json.decode(value, type=Deeds)
        for done in deeds.done:
            self._deeds.setdefault(done.record, Deed(deeds.action, deeds.at, deeds.by, deeds.reason, done.to))
            if done.to is not None:
                self._again[done.to] = done.record

    def _take_letter(self, raw: Raw, headers: dict[str, bytes]) -> None:
        record = Place(headers["topic"].decode(), int(headers["partition"]), int(headers["offset"]))
        by, reason = headers.get("by", b"").decode(), headers["reason"].decode(errors="replace")
        letter = Letter(int(headers["at"]), by, reason, raw.place)
        case = self._cases.get(record)
        if case is None:
            size = int(headers["size"]) if "size" in headers else None
            self._cases[record] = Case(record, [letter], content(self._log, record, raw.key, raw.value, size))
        else:
            case.letters.append(letter)


def _texts(headers: Headers) -> dict[str, bytes]:
    """Return the last header of each name, as bytes."""
    return {name: value if isinstance(value, bytes) else (value or "").encode() for name, value in headers}


def theirs(headers: Headers) -> Headers:
    """Return the headers that a record had before it became a letter with these: ours are the last ones."""
    ours = len(OURS) if headers and headers[-1][0] == "size" else len(OURS) - 1
    return headers[:-ours]


def content(log: Log, record: Place, key: bytes | None, value: bytes | None, size: int | None = None) -> Content:
    """Return what a record says that was given up.

    Args:
        log: Whose it is.
        record: Where it stood.
        key: Its key.
        value: Its value, or the beginning of it.
        size: Of the value, if only its beginning is there.
    """
    known = {"size": len(value or b"") if size is None else size, "cut": size is not None, "empty": value is None}
    chord = record.topic == log.chords
    try:
        found = _of_chord(log, key, value) if chord else _of_event(value)
    except CodecError as exc:
        found = {"problem": f"{type(exc).__name__}: {exc}"}
        found["subject"] = _group(key) if chord else (key or b"").decode(errors="replace")
    return Content(**{**found, **known})


def _of_event(value: bytes | None) -> dict[str, Any]:
    event = codec.decode(value)
    return {"subject": event.task, "what": event.state or event.kind, "name": event.name or "", "happened": event.at}


def _of_chord(log: Log, key: bytes | None, value: bytes | None) -> dict[str, Any]:
    place = chord_records.parse_key(key)
    found = {"subject": place.group, "what": f"chord {place.kind}", "happened": place.generation}
    record = chord_records.decode(key, value)
    if isinstance(record, Declared):
        found["name"] = record.body_name
    if isinstance(record, Declared | Cancelled | Resent) and not chord_records.verify(record, log.chord_key):
        found["problem"] = "not signed with our chord_key"
    return found


def _group(key: bytes | None) -> str:
    try:
        return chord_records.parse_key(key).group
    except Unreadable:
        return ""


def refusal(log: Log, case: Case, now: int, *, action: str = REQUEUE) -> str:
    """Return why something may not be done to a case; "" if it may.

    Args:
        log: Whose record it is.
        case: The case.
        now: ms since 1970.
        action: `REQUEUE` or `DROP`.
    """
    if case.deed is not None:
        return f"{case.state} by {case.deed.by}: {case.deed.reason}"
    if action == DROP:
        return ""
    record, found = case.record, case.content
    if record.topic not in (log.events, log.chords):
        return f"it is from {record.topic}, which is no topic of ours"
    if found.empty:
        return "it has no value: a tombstone, which could only erase something"
    if found.problem and not found.cut:
        return f"it would be given up again: {found.problem}"
    if found.happened and now - found.happened > log.retention_ms:
        return "it is older than the log: what forgot its task, or decided its chord, may be gone"
    return ""


def encode(deeds: Deeds) -> bytes:
    """Return the record value of some deeds."""
    # omit_defaults leaves v out, as it is the default: a reader needs it, so it is put in front.
    return b'{"v":%d,%s' % (VERSION, msgspec.json.encode(deeds)[1:])
