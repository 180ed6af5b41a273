"""The chords' records: their bytes, their keys, their signature."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import chord_records as records
from celery_kafka_backend.chord_records import (
    Cancelled,
    Choice,
    Chosen,
    Decided,
    Declared,
    Extended,
    Fired,
    Gone,
    Part,
    Resent,
    Sized,
)
from celery_kafka_backend.errors import UnknownVersion, Unreadable
from tests.examples import tried_on

GOLDEN = Path(__file__).parents[1] / "golden" / "chords-v1.jsonl"
HERE = {"group": "5f3c|50%", "generation": 1_790_000_000_123}
CHOICES = (Choice("t-1", 0, "e-1", 17), Choice("t-2", None, "e-2", 9))

EVERYTHING = [
    records.sign(
        Declared(
            **HERE,
            body=b'{"task": "proj.xsum"}',
            content_type="application/json",
            content_encoding="utf-8",
            body_task_id="b-1",
            body_name="proj.xsum",
            immutable=True,
            root="root",
            parent="parent",
            priority=3,
            stamps={"stamped_headers": ["tenant"], "tenant": ["blue"]},
            group_result=b'[["g", null], []]',
            at=1_790_000_000_124,
            host="h",
            pid=42,
        ),
        "secret",
    ),
    Sized(**HERE, size=2, at=5),
    Extended(**HERE, task="x-1", index=1, delta=2, replaces="t-9", by="t-1", at=6),
    Part(
        **HERE,
        task="t-1",
        index=0,
        id="e-1",
        key=2**62 + 1,
        state="FAILURE",
        result=b"\x80\x05binary",
        content_type="application/x-python-serialize",
        content_encoding="binary",
        ignored=True,
        exception="ValueError('x')",
        root="root",
        parent="parent",
        priority=9,
        stamps={"stamped_headers": ["tenant"], "tenant": ["blue"]},
        at=7,
        worker="celery@h",
    ),
    Part(**HERE, task="t-2", id="e-2", key=0),
    Chosen(**HERE, owner="o|1", n=3, parts=CHOICES),
    Decided(
        **HERE,
        owner="o|1",
        outcome="failure",
        body_task_id="b-1",
        body_run=27_000_000,
        parts=CHOICES,
        slices=4,
        size=2,
        last=1,
        failed="t-1",
        at=8,
    ),
    Fired(**HERE, owner="o|1", outcome="failure", body_task_id="b-1", found=True, at=9),
    Cancelled(**HERE, id="c-1", by="ann", reason="stuck", at=10),
    Resent(**HERE, id="r-1", by="ann", reason="lost", at=11),
    records.sign(Declared(**HERE, body=b"{}", body_task_id="b-1", deadline=1_790_000_060_000), "secret"),
    Decided(
        **HERE,
        owner="o|1",
        outcome="failure",
        body_task_id="b-1",
        body_run=27_000_000,
        why="cancelled by ann with 0 of 2 members in: stuck",
        at=12,
    ),
    records.sign(Cancelled(**HERE, id="c-2", by="ann", reason="stuck", fire=True, at=13), "secret"),
    msgspec.structs.replace(
        records.sign(Resent(**HERE, id="r-2", by="ann", reason="lost", at=14), "secret"),
        done=15,
        owner="o|1",
        run=27_000_001,
        outcome="failure",
        found=True,
        why="gone",
    ),
]


@pytest.mark.parametrize("record", EVERYTHING, ids=lambda record: type(record).__name__)
def test_what_is_written_is_what_is_read(record):
    assert records.decode(*records.encode(record)) == record


def test_the_wire_format_of_version_1_has_not_changed():
    written = [tuple(text.encode() for text in json.loads(line)) for line in GOLDEN.read_text().splitlines()]
    assert [records.encode(record) for record in EVERYTHING] == written
    assert [records.decode(*pair) for pair in written] == EVERYTHING


def test_every_kind_is_in_the_golden_file():
    kinds = {records.parse_key(json.loads(line)[0].encode()).kind for line in GOLDEN.read_text().splitlines()}
    assert kinds == {member.__struct_config__.tag for member in records.Record.__args__}


def test_an_unknown_field_is_accepted():
    key, value = records.encode(Sized(**HERE, size=2))
    assert records.decode(key, value[:-1] + b',"new":[1]}') == Sized(**HERE, size=2)


def test_a_part_that_told_no_errbacks_is_as_the_first_writers_of_version_1_wrote_it():
    part = Part(**HERE, task="t-1", id="e-1", key=1)
    assert b"told" not in records.encode(part)[1]
    told = msgspec.structs.replace(part, told=("a", "b"))
    assert records.decode(*records.encode(told)) == told


def test_a_newer_version_is_told_apart_from_rubbish():
    key, value = records.encode(Sized(**HERE, size=2))
    with pytest.raises(UnknownVersion):
        records.decode(key, value.replace(b'"v":1', b'"v":2'))
    with pytest.raises(UnknownVersion):
        records.decode(key, b'{"v":2,"kind":"hologram"}')
    for rubbish in (b"", b"{", b"[]", b"\xff", b'{"v":1,"kind":"hologram"}', b'{"v":1}', b"[" * 100_000):
        with pytest.raises(Unreadable):
            records.decode(key, rubbish)


@pytest.mark.parametrize("key", [None, b"", b"a|b", b"g|x|part|t|0|e", b"\xff|1|part"])
def test_a_key_that_is_none_is_refused(key):
    with pytest.raises(Unreadable):
        records.decode(key, None)


def test_a_fact_under_the_key_of_another_is_refused():
    """Compaction goes by the key: it would erase the other."""
    _, value = records.encode(Sized(**HERE, size=2))
    other, _ = records.encode(Sized(group="other", generation=1, size=2))
    with pytest.raises(Unreadable):
        records.decode(other, value)


def test_a_tombstone_says_what_is_gone():
    key, _ = records.encode(EVERYTHING[3])
    gone = records.decode(key, None)
    assert gone == Gone(records.Key(HERE["group"], HERE["generation"], "part", ("t-1", "0", "e-1")))


@tried_on()
@given(st.lists(st.text(), min_size=1, max_size=4), st.integers(0, 2**60))
def test_any_text_survives_a_key(fields, generation):
    group, *rest = fields
    if any("\ud800" <= char <= "\udfff" for text in fields for char in text):
        return
    key = records.make_key(group, generation, "part", *rest)
    assert records.parse_key(key) == (group, generation, "part", tuple(rest))


def test_two_facts_never_share_a_key():
    facts = EVERYTHING[:10] + EVERYTHING[-2:]  # those between say more of the same declaration and decision
    assert len({records.key_of(record) for record in facts}) == len(facts)
    assert records.part_key("g", 1, "a|0", None, "e") != records.part_key("g", 1, "a", 0, "e")


@pytest.mark.parametrize("record", [r for r in EVERYTHING if getattr(r, "mac", "")], ids=lambda r: type(r).__name__)
def test_a_signature_covers_every_field(record):
    assert records.verify(record, "secret")
    assert records.verify(records.decode(*records.encode(record)), "secret")
    assert not records.verify(record, "other")
    assert not records.verify(msgspec.structs.replace(record, mac=""), "secret")
    unsigned = {"v", "mac"}
    if isinstance(record, Resent):  # what the processor adds once it is done
        unsigned |= {"done", "owner", "run", "outcome", "found", "why"}
    for field in set(record.__struct_fields__) - unsigned:
        was = getattr(record, field)
        other = {str: "other", int: 99, bytes: b"other", bool: not was, dict: {"stamped_headers": []}}
        changed = msgspec.structs.replace(record, **{field: other.get(type(was), "other")})
        assert not records.verify(changed, "secret"), field


def test_one_kind_s_signature_is_not_another_s():
    cancelled = records.sign(Cancelled(**HERE, id="x", by="ann", reason="stuck", at=1), "secret")
    resent = Resent(**HERE, id="x", by="ann", reason="stuck", at=1, mac=cancelled.mac)
    assert not records.verify(resent, "secret")


def test_without_a_secret_nothing_is_signed_and_all_is_accepted():
    declared = Declared(**HERE, body=b"", body_task_id="b")
    assert records.sign(declared, "") is declared
    assert records.verify(declared, "")
