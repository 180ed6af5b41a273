"""The wire format: its golden file, what a reader accepts, and what it refuses."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import codec, events
from celery_kafka_backend.errors import CodecError, UnknownVersion, Unreadable
from celery_kafka_backend.events import Event, Opaque
from celery_kafka_backend.order import Rank, forget_key, order_key, run_at
from tests.examples import tried_on

GOLDEN = Path(__file__).parent.parent / "golden" / "events-v1.jsonl"

AT = 1_795_000_003_000
RUN = run_at(AT)
TASK = "6f1c1f0e-5b7e-4d27-9a34-0d8f3f0a7a11"
DOC = (
    b'{"status": "SUCCESS", "result": {"sum": 123456789012345678901234567890, "none": [], "z": 1.0, "a": "\\u00fc"}, '
    b'"traceback": null, "children": [[["c1", null], null]], "date_done": "2026-11-18T08:26:43.500000+00:00", '
    b'"name": "proj.add", "args": [2, 3], "kwargs": {}, "worker": "celery@w1", "retries": 1, "queue": "high", '
    b'"stamped_headers": ["tenant", "visit"], "tenant": ["acme"], "visit": 7, "task_id": "6f1c1f0e"}'
)
NAN_DOC = b'{"status": "SUCCESS", "result": NaN, "traceback": null, "children": [], "date_done": null}'


def said(event_id: str, /, kind: str, **fields: Any) -> Event:
    common = {"task": TASK, "at": AT, "hlc": AT + 1, "host": "w1.example", "pid": 4711, "run": RUN}
    return Event(id=event_id, kind=kind, **(common | fields))


def shown(event_id: str, /, kind: str, rank: Rank, state: str, **fields: Any) -> Event:
    doc = msgspec.Raw(json.dumps({"status": state, "result": None, "task_id": TASK}).encode())
    return said(event_id, kind, **({"key": order_key(rank, AT + 1, RUN), "state": state, "doc": doc} | fields))


EXPECTED = [
    said(
        "e01", events.SENT, role=events.CLIENT, name="proj.add", queue="high", exchange="", routing_key="high.rk",
        priority=9, eta=AT + 60_000, message_expires=AT + 90_000, parent="p1", root="r1", group="g1", index=0,
        chord="b1", args=[2, 3, 123456789012345678901234567890], kwargs={"wer": "Jürgen ✓ 東京 🎉"}, sent_at=AT,
        beat="nightly", stamps={"tenant": ["acme"], "visit": 7}, expires_at=AT + 86_400_000,
    ),
    said("e02", events.RECEIVED, role=events.PARENT, worker="celery@w1", redelivered=True, received_at=AT + 5),
    shown("e03", events.STARTED, Rank.UNREADY, "STARTED", started_at=AT + 9, worker="celery@w1"),
    shown("e04", events.STATE, Rank.UNREADY, "PROGRESS"),
    shown(
        "e05", events.RETRY, Rank.UNREADY, "RETRY", attempt=1, due=AT + 180_000, exception="builtins.OSError",
        message="disk \x00 full\n", runtime_s=0.25,
    ),
    shown(
        "e06", events.SUCCESS, Rank.SUCCEEDED, "SUCCESS", doc=msgspec.Raw(DOC), attempt=1,
        date_done="2026-11-18T08:26:43.500000+00:00", expires_at=AT + 86_400_000, runtime_s=1.5, children=("c1", "c2"),
    ),
    shown(
        "e07", events.SUCCESS, Rank.SUCCEEDED, "SUCCESS", doc=msgspec.Raw(b""),
        opaque=Opaque(
            meta=pickle.dumps({"status": "SUCCESS", "result": {1}}, protocol=2), content_type="application/x-python-serialize",
            result=pickle.dumps({1}, protocol=2), children=pickle.dumps([], protocol=2),
            args=pickle.dumps((2,), protocol=2), kwargs=pickle.dumps({}, protocol=2), stamps=pickle.dumps({}, protocol=2),
        ),
    ),
    shown(
        "e08", events.SUCCESS, Rank.SUCCEEDED, "SUCCESS", doc=msgspec.Raw(b""),
        opaque=Opaque(meta=NAN_DOC, content_type="application/json", result=b"NaN"),
    ),
    said("e09", events.SUCCESS, ignored=True),
    shown("e10", events.FAILURE, Rank.FAILED, "FAILURE", exception="proj.Böse", message="nein"),
    shown("e11", events.WORKER_LOST, Rank.FAILED, "FAILURE", role=events.PARENT),
    shown(
        "e12", events.REVOKED, Rank.FAILED, "REVOKED", role=events.PARENT, terminated=True, signum=15, by="ops",
        message="terminated",
    ),
    shown("e13", events.EXPIRED, Rank.FAILED, "REVOKED", role=events.PARENT),
    said("e14", events.REJECTED, role=events.PARENT, requeue=True),
    said("e15", events.UNKNOWN_TASK, role=events.PARENT, run=None, name="proj.gone"),
    said("e16", events.FORGOTTEN, role=events.CLIENT, key=forget_key(RUN), expires_at=AT + 604_800_000),
    said(
        "e17", events.GROUP_SAVED, role=events.PROCESSOR, task="g1", group="g1", key=order_key(Rank.UNREADY, AT, RUN),
        doc=msgspec.Raw(b'{"result":[["g1",null],[[["a",null],null]]]}'),
    ),
    said("e18", events.GROUP_DELETED, role=events.OPERATOR, task="g1", group="g1", key=forget_key(RUN)),
    said("e19", events.SUCCESS, key=(1 << 63) - 1, run=(1 << 28) - 1, host="", pid=0),
]  # fmt: skip


def comparable(event: Event) -> dict[str, Any]:
    values = {name: getattr(event, name) for name in event.__struct_fields__}
    return values | {"doc": bytes(event.doc)}


def golden() -> list[bytes]:
    return GOLDEN.read_bytes().splitlines()


@pytest.mark.parametrize("index", range(len(EXPECTED)), ids=[event.id for event in EXPECTED])
def test_version_1_is_read_and_written_byte_for_byte(index: int):
    """The golden file is never edited: a difference here needs a new version."""
    line = golden()[index]
    assert comparable(codec.decode(line)) == comparable(EXPECTED[index])
    assert codec.encode(EXPECTED[index]) == line
    assert codec.encode(codec.decode(line)) == line


def test_the_golden_file_has_every_kind_and_every_field():
    """A field that no golden event uses could change its meaning unseen."""
    assert len(golden()) == len(EXPECTED)
    assert {event.kind for event in EXPECTED} | {events.RERUN} == events.KINDS
    assert {event.role for event in EXPECTED} == {
        events.CLIENT, events.PARENT, events.CHILD, events.PROCESSOR, events.OPERATOR,
    }  # fmt: skip
    later = [  # what came within the version
        line
        for field in ("claim", "imported", "rerun")
        for line in GOLDEN.with_name(f"events-v1-{field}.jsonl").read_bytes().splitlines()
    ]
    used = {name for line in [*golden(), *later] for name in json.loads(line)}
    assert used >= set(Event.__struct_fields__)
    assert used - set(Event.__struct_fields__) == set()


def test_an_empty_document_is_left_out():
    """A field without a value would make the whole record unreadable."""
    event = Event(id="e", kind="k", task="t", at=1, hlc=1, doc=msgspec.Raw(b""))
    assert codec.encode(event) == b'{"v":1,"id":"e","kind":"k","task":"t","at":1,"hlc":1}'


def test_every_record_says_its_version_first():
    """A reader of a later version must be able to tell."""
    assert all(line.startswith(b'{"v":1,"id":"') for line in golden())


def test_a_document_survives_byte_for_byte():
    """Big integers, key order, spacing, escapes and empty lists are the worker's."""
    assert codec.decode(golden()[5]).document == DOC
    assert DOC in golden()[5]


def test_a_document_with_nan_travels_opaque():
    """Python's JSON writes NaN, which is not JSON: embedded, it would make the whole event unreadable."""
    assert not codec.is_json_document(NAN_DOC)
    event = codec.decode(golden()[7])
    assert event.document == NAN_DOC
    assert not bytes(event.doc)


def test_a_tombstone_and_an_ignored_result_have_no_document():
    """They show nothing."""
    assert codec.decode(golden()[15]).document is None
    assert codec.decode(golden()[8]).document is None
    assert not codec.decode(golden()[8]).shows
    assert codec.decode(golden()[15]).shows


def test_headers_hold_key_kind_group_and_app():
    """So that a filter needs no decode; what is absent has no header."""
    assert dict(codec.headers(EXPECTED[0], "proj")) == {"e": b"sent", "g": b"g1", "a": b"proj"}
    success = dict(codec.headers(EXPECTED[5]))
    assert success == {"e": b"success", "k": f"{EXPECTED[5].key:019d}".encode()}
    assert dict(codec.headers(EXPECTED[18]))["k"] == b"9223372036854775807"


BASE = b'"id":"e","kind":"success","task":"t","at":1,"hlc":1'


def test_unknown_fields_are_accepted():
    """A newer writer of the same version may add some, of any shape."""
    event = codec.decode(b'{"v":1,' + BASE + b',"later":{"a":[1,null,1e5]},"also":"x"}')
    assert event == codec.decode(b'{"v":1,' + BASE + b"}")


def test_an_unknown_kind_is_accepted():
    """Its history is kept."""
    assert codec.decode(b'{"v":1,"id":"e","kind":"slept","task":"t","at":1,"hlc":1}').kind == "slept"


@pytest.mark.parametrize(
    "value",
    [
        b'{"v":2}',
        b'{"v":2,' + BASE + b"}",
        b'{"v":2,"id":7,"kind":null}',
        b'{"v":99999999999999999999999,' + BASE + b"}",
        b'{"v":2,' + BASE + b',"key":-1}',
    ],
)
def test_a_newer_version_is_told_apart_from_rubbish(value: bytes):
    """It can be read again after an upgrade, whatever has changed in it."""
    with pytest.raises(UnknownVersion, match="reads up to 1"):
        codec.decode(value)


DEEP = b"[" * 100_000 + b"]" * 100_000

JUNK = {
    "a tombstone": None,
    "nothing": b"",
    "a byte-order mark": b"\xef\xbb\xbf{}",
    "binary": b"\x80\x04\x95",
    "half a record": b'{"v":1,"id":"e"',
    "two values": b'{"v":1,' + BASE + b"} {}",
    "null": b"null",
    "a list": b"[]",
    "an empty object": b"{}",
    "a version below one": b'{"v":0,' + BASE + b"}",
    "a negative version": b'{"v":-1,' + BASE + b"}",
    "a version in text": b'{"v":"1",' + BASE + b"}",
    "a version that is true": b'{"v":true,' + BASE + b"}",
    "a missing task": b'{"v":1,"id":"e","kind":"success","at":1,"hlc":1}',
    "an empty task": b'{"v":1,"id":"e","kind":"success","task":"","at":1,"hlc":1}',
    "an empty id": b'{"v":1,"id":"","kind":"success","task":"t","at":1,"hlc":1}',
    "a negative key": b'{"v":1,' + BASE + b',"key":-1}',
    "a key of 64 bits": b'{"v":1,' + BASE + b',"key":9223372036854775808}',
    "a time in text": b'{"v":1,"id":"e","kind":"k","task":"t","at":"1","hlc":1}',
    "a negative time": b'{"v":1,"id":"e","kind":"k","task":"t","at":-1,"hlc":1}',
    "a time that no store can hold": b'{"v":1,"id":"e","kind":"k","task":"t","at":1,"hlc":99999999999999999999}',
    "a time that no calendar has": b'{"v":1,"id":"e","kind":"k","task":"t","at":253370764800000,"hlc":1}',
    "a run of 29 bits": b'{"v":1,' + BASE + b',"run":268435456}',
    "a negative attempt": b'{"v":1,' + BASE + b',"attempt":-1}',
    "a document that is null": b'{"v":1,' + BASE + b',"doc":null}',
    "a document that is a number": b'{"v":1,' + BASE + b',"doc":7}',
    "a document that is a list": b'{"v":1,' + BASE + b',"doc":[1]}',
    "a document of NaN": b'{"v":1,' + BASE + b',"doc":{"result":NaN}}',
    "base64 that is none": b'{"v":1,' + BASE + b',"opaque":{"meta":"!!!"}}',
    "an opaque without its document": b'{"v":1,' + BASE + b',"opaque":{}}',
    "a lone surrogate": b'{"v":1,' + BASE + b',"name":"\\ud800"}',
    "half a character": b'{"v":1,' + BASE + b',"name":"\xc3"}',
    "half a character in a document": b'{"v":1,' + BASE + b',"doc":{"a":"\xc3"}}',
    "half a character in an unknown field": b'{"v":1,' + BASE + b',"later":"\xc3"}',
    "an infinite number": b'{"v":1,' + BASE + b',"args":1e999}',
    "5,000 digits": b'{"v":1,' + BASE + b',"args":1' + b"0" * 5_000 + b"}",
    "deep nesting": DEEP,
    "deep nesting in a document": b'{"v":1,' + BASE + b',"doc":{"a":' + DEEP + b"}}",
    "deep nesting in arguments": b'{"v":1,' + BASE + b',"args":' + DEEP + b"}",
    "deep nesting in an unknown field": b'{"v":1,' + BASE + b',"later":' + DEEP + b"}",
}


def test_a_record_on_several_lines_says_the_same_on_one():
    value = b'{"v":1,\r\n' + BASE + b',\n "name":"a\\nb", "doc":{"a": \n[1]}}'
    one = codec.one_line(value)
    assert b"\n" not in one
    assert b"\r" not in one
    assert json.loads(one) == json.loads(value)
    assert codec.decode(one).name == codec.decode(value).name == "a\nb"


@pytest.mark.parametrize("value", JUNK.values(), ids=JUNK)
def test_rubbish_is_unreadable_and_nothing_else(value: bytes | None):
    """A dead letter with a reason, never a crash of the reader."""
    with pytest.raises(Unreadable) as caught:
        codec.decode(value)
    assert 0 < len(str(caught.value)) < 300


def decodes_or_refuses(value: bytes) -> None:
    try:
        event = codec.decode(value)
    except CodecError:
        return
    assert isinstance(event, Event)
    assert codec.decode(codec.encode(event)) is not None


@given(st.binary(max_size=200))
@tried_on(200)
def test_any_bytes_are_an_event_or_a_codec_error(value: bytes):
    """Also behind a plausible beginning."""
    decodes_or_refuses(value)
    decodes_or_refuses(b'{"v":1,' + BASE + b"," + value)


@given(st.sampled_from(range(len(EXPECTED))), st.data())
@tried_on(200)
def test_a_damaged_record_is_an_event_or_a_codec_error(index: int, data: st.DataObject):
    """Bytes overwritten, cut out or doubled anywhere in a golden record."""
    line = golden()[index]
    at = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(at, min(at + 8, len(line))))
    decodes_or_refuses(line[:at] + data.draw(st.binary(max_size=6)) + line[end:])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(Event.__struct_fields__)), json_values))
@tried_on(60)
def test_any_value_in_any_field_is_an_event_or_a_codec_error(fields: dict[str, Any]):
    """Whatever JSON stands where something else was expected."""
    base = {"v": 1, "id": "e", "kind": "k", "task": "t", "at": 1, "hlc": 1}
    decodes_or_refuses(json.dumps(base | fields).encode())


@given(json_values, st.text(st.characters(exclude_categories=["Cs"])), st.binary())
@tried_on()
def test_what_is_written_is_read_back(args: Any, text: str, meta: bytes):
    """Arguments, text and opaque bytes of any content."""
    event = Event(id="e", kind="k", task="t", at=1, hlc=1, args=args, message=text, opaque=Opaque(meta=meta))
    assert comparable(codec.decode(codec.encode(event))) == comparable(event)


def test_text_that_is_not_unicode_is_written_as_escapes():
    """An exception about an undecodable file name must not make its FAILURE impossible to store."""
    doc = msgspec.Raw(b'{"status":"FAILURE"}')
    event = Event(
        id="e", kind="failure", task="t", at=1, hlc=1, message="no such file: \udcff", doc=doc,
        opaque=Opaque(meta=b"\xff", traceback="OSError: \udcff", plain={"args": ["\udcff"]}),
        args=["\udcff", {"\ud800": ("\ud800",)}], children=("c",),
    )  # fmt: skip
    read = codec.decode(codec.encode(event))
    assert read.message == "no such file: \\udcff"
    assert read.args == ["\\udcff", {"\\ud800": ["\\ud800"]}]
    assert read.opaque == Opaque(meta=b"\xff", traceback="OSError: \\udcff", plain={"args": ["\\udcff"]})
    assert (read.document, read.children) == (bytes(doc), ("c",))


def test_nan_in_arguments_becomes_null():
    """Arguments are recorded for people; the document is what must survive."""
    event = Event(id="e", kind="k", task="t", at=1, hlc=1, args=[math.nan, math.inf], runtime_s=math.nan)
    read = codec.decode(codec.encode(event))
    assert (read.args, read.runtime_s) == ([None, None], None)


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("encoded", "embeddable"),
    [
        (DOC, True),
        (b"{}", True),
        (b'{"a": 1, "a": 2}', True),
        (b'{"a":' + b"[" + b",".join([b"[]"] * 1_000) + b"]}", True),
        (nested(256), True),
        (nested(257), False),
        (nested(100_000), False),
        (NAN_DOC, False),
        (b'{"a":-Infinity}', False),
        (b'{"a":"\xff"}', False),
        (b'{"a":"\\udcff"}', False),
        (b"[]", False),
        (b"null", False),
        (b"", False),
        (b"{", False),
        (pickle.dumps({}), False),
    ],
)
def test_what_can_be_embedded(encoded: bytes, embeddable: bool):
    """Everything else travels opaque; what is embedded can be read again at any recursion limit."""
    assert codec.is_json_document(encoded) is embeddable
    if embeddable:
        event = Event(id="e", kind="k", task="t", at=1, hlc=1, doc=msgspec.Raw(encoded))
        assert codec.decode(codec.encode(event)).document == encoded


def test_native_parts_are_still_encoded_as_in_the_document():
    """A store with columns keeps the worker's bytes."""
    parts = codec.native_parts(DOC)
    assert bytes(parts.result) == (b'{"sum": 123456789012345678901234567890, "none": [], "z": 1.0, "a": "\\u00fc"}')
    assert bytes(parts.children) == b'[[["c1", null], null]]'
    assert bytes(parts.date_done) == b'"2026-11-18T08:26:43.500000+00:00"'
    assert (bytes(parts.args), bytes(parts.kwargs)) == (b"[2, 3]", b"{}")
    assert (parts.status, parts.traceback, parts.name, parts.worker) == ("SUCCESS", None, "proj.add", "celery@w1")
    assert (parts.retries, parts.queue, parts.stamped_headers) == (1, "high", ["tenant", "visit"])


def test_native_parts_of_an_almost_empty_document():
    """What is absent is empty, and the state is Celery's default."""
    parts = codec.native_parts(b"{}")
    assert (parts.status, bytes(parts.result), bytes(parts.children)) == ("PENDING", b"", b"")


NO_DOCUMENT = [
    b"", b"[]", b"null", b'{"status":null}', b'{"status":"\xff"}', b'{"status":7}', b'{"traceback":5}',
    b'{"retries":99999999999999999999}', b'{"x":' + DEEP + b"}", pickle.dumps({}),
]  # fmt: skip


@pytest.mark.parametrize("document", NO_DOCUMENT)
def test_what_is_no_native_document_is_unreadable(document: bytes):
    """One error, whatever the matter."""
    with pytest.raises(Unreadable):
        codec.native_parts(document)


def test_native_stamps_are_what_the_sql_backend_keeps():
    """Every stamped header that the document has, its value still as the worker wrote it."""
    stamps = codec.native_stamps(DOC, ["tenant", "visit", "absent"])
    assert json.loads(stamps) == {
        "stamped_headers": ["tenant", "visit", "absent"],
        "stamps": {"tenant": ["acme"], "visit": 7},
    }


@pytest.mark.parametrize("document", [b"", b"[]", b'{"a":\xff}', b'{"x":' + DEEP + b"}"])
def test_stamps_of_no_document_are_unreadable(document: bytes):
    """As for its other parts."""
    with pytest.raises(Unreadable):
        codec.native_stamps(document, ["a"])
