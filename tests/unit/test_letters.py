"""Dead letters as cases: what is one, what was done about it, and what may be done."""

from __future__ import annotations

import itertools

import pytest

from celery_kafka_backend import chord_records, codec, letters
from celery_kafka_backend.chord_records import Declared, Sized
from celery_kafka_backend.events import Event
from celery_kafka_backend.letters import Cases, Deeds, Done, Log, Place, Raw, Selection, refusal, theirs
from celery_kafka_backend.processors.deadletters import letter_headers

NOW = 1_700_000_000_000
DAY = 86_400_000
LOG = Log("celery.task-events", "celery.chords", "secret", 7 * DAY)
EVENT = Event(id="e", kind="success", task="t", state="SUCCESS", name="shop.pay", at=NOW - 1000, hlc=NOW, key=5)
HEADERS = [("e", b"success"), ("x", None)]


def message(offset, value, headers, key=b"t"):
    return Raw(Place("celery.dead-letters", 0, offset), key, value, headers)


def letter(
    offset, at=NOW, by="celery.redis-1", *, value=None, topic=LOG.events, reason="too large", there=42, key=b"t"
):
    ours = letter_headers(topic, 3, there, reason, at, by)
    return message(offset, codec.encode(EVENT) if value is None else value, [*HEADERS, *ours], key)


def deeds(offset, action="requeue", to=None, there=42):
    done = [Done(Place(LOG.events, 3, there), to)]
    said = Deeds(action=action, at=NOW + 5, by="ann@ops", reason="fixed", done=done)
    return message(offset, letters.encode(said), [("action", action.encode())], letters.KEY)


def cases(*records, log=LOG):
    found = Cases(log)
    for record in records:
        found.take(record)
    return found


def only(*records, log=LOG):
    (case,) = cases(*records, log=log)
    return case


def test_a_record_that_two_views_gave_up_is_one_case():
    case = only(letter(0), letter(1, NOW + 9, "celery.sqlite-2", reason="no such column"))
    assert str(case.record) == "celery.task-events/3@42"
    assert [(one.by, one.reason, one.place.offset) for one in case.letters] == [
        ("celery.redis-1", "too large", 0), ("celery.sqlite-2", "no such column", 1),
    ]  # fmt: skip
    assert (case.content.subject, case.content.what, case.content.name) == ("t", "SUCCESS", "shop.pay")
    assert case.state == letters.OPEN


def test_what_was_done_is_known_in_whatever_order_the_records_are_read():
    again = letter(3, there=77)
    said = [letter(0), deeds(1, to=Place(LOG.events, 3, 77)), deeds(2, "drop"), again]
    seen = {
        tuple(sorted((str(case.record), case.state, str(case.again)) for case in cases(*order)))
        for order in itertools.permutations([said[0], said[1], said[3]])
    }
    assert seen == {
        (
            ("celery.task-events/3@42", "requeued", "None"),
            ("celery.task-events/3@77", "open", "celery.task-events/3@42"),
        )
    }
    assert [case.state for case in cases(*said)] == ["requeued", "open"]


def test_the_record_is_found_under_our_headers_byte_for_byte():
    assert theirs(letter(0).headers) == HEADERS
    cut = letter(0)
    cut.headers.append(("size", b"100000"))
    assert theirs(cut.headers) == HEADERS
    assert only(cut).content.cut
    assert only(cut).content.size == 100_000


def test_a_record_with_a_header_named_action_is_no_deed():
    record = letter(0)
    record.headers.insert(0, ("action", b"requeue"))
    assert only(record).state == letters.OPEN


def test_what_is_neither_letter_nor_deed_is_counted_and_does_no_harm():
    half = message(1, b"v", [("topic", b"t"), ("partition", b"x")])
    found = cases(letter(0), message(1, b"?", []), half, message(2, b"{", [("action", b"drop")]))
    assert len(list(found)) == 1
    assert found.strange == 3


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (Selection(), True),
        (Selection(because="too*"), True),
        (Selection(because="*small"), False),
        (Selection(because="too*", by="*sqlite*"), False),  # one letter must say both
        (Selection(name="shop.*", task="t", topic="*.task-events", since=NOW, until=NOW + 1), True),
        (Selection(until=NOW), False),
        (Selection(task="u"), False),
        (Selection(places=("celery.task-events/3@42",), state="open"), True),
        (Selection(places=("celery.task-events/3@4",)), False),
        (Selection(state="dropped"), False),
    ],
)
def test_everything_that_is_asked_for_must_hold(selection, chosen):
    case = only(letter(0), letter(1, NOW + 9, "celery.sqlite-2", reason="no such column"))
    assert selection.matches(case) is chosen


def test_what_may_be_requeued_once_may_not_be_twice():
    assert refusal(LOG, only(letter(0)), NOW) == ""
    assert refusal(LOG, only(letter(0), deeds(1)), NOW) == "requeued by ann@ops: fixed"
    for action in (letters.REQUEUE, letters.DROP):
        assert refusal(LOG, only(letter(0), deeds(1, "drop")), NOW, action=action) == "dropped by ann@ops: fixed"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (letter(0, value=b"\x00"), "given up again: Unreadable"),
        (letter(0, value=b'{"v":9,"id":"e","kind":"x","task":"t","at":1,"hlc":1}'), "given up again: UnknownVersion"),
        (letter(0, topic="payments"), "no topic of ours"),
        (letter(0, topic="other.chords"), "no topic of ours"),
    ],
)
def test_what_would_do_no_good_is_refused_and_may_be_dropped(record, why):
    assert why in refusal(LOG, only(record), NOW)
    assert refusal(LOG, only(record), NOW, action=letters.DROP) == ""


def test_a_tombstone_is_refused_for_it_could_only_erase():
    assert "tombstone" in refusal(LOG, only(letter(0)._replace(value=None)), NOW)


def test_an_event_older_than_the_log_is_refused_for_what_forgot_it_may_be_gone():
    case = only(letter(0))
    assert refusal(LOG, case, EVENT.at + LOG.retention_ms) == ""
    assert "older than the log" in refusal(LOG, case, EVENT.at + LOG.retention_ms + 1)


def chord_letter(record):
    key, value = chord_records.encode(record)
    return letter(0, topic=LOG.chords, key=key, value=value)


def test_a_chords_record_is_told_by_its_group_and_an_unsigned_declaration_is_refused():
    sized = only(chord_letter(Sized(group="g", generation=NOW, size=3)))
    assert (sized.content.subject, sized.content.what) == ("g", "chord sized")
    assert refusal(LOG, sized, NOW) == ""
    declared = Declared(group="g", generation=NOW, body=b"{}", body_task_id="b", body_name="total")
    assert "not signed" in refusal(LOG, only(chord_letter(declared)), NOW)
    signed = only(chord_letter(chord_records.sign(declared, "secret")))
    assert refusal(LOG, signed, NOW) == ""
    assert signed.content.name == "total"
    unreadable = only(letter(0, topic=LOG.chords, key=b"g|7|sized", value=b"{"))
    assert unreadable.content.subject == "g"
    assert "given up again" in refusal(LOG, unreadable, NOW)
