"""The ledger, fact by fact; what may happen to it in a fleet is in tests/property/test_chord_protocol.py."""

from __future__ import annotations

import json

import pytest

from celery_kafka_backend import chord_records as records
from celery_kafka_backend.chord_records import (
    Cancelled,
    Chosen,
    Decided,
    Declared,
    Extended,
    Fired,
    Part,
    Resent,
    Sized,
)
from celery_kafka_backend.order import run_at
from celery_kafka_backend.processors import decision
from celery_kafka_backend.processors.decision import Append, Fire, Forget, Ledger, Resend
from celery_kafka_backend.processors.progress import facts

NOW = 1_790_000_000_000
DAY = 86_400_000
HERE = {"group": "g", "generation": 7}
DECLARED = Declared(**HERE, body=b"{}", body_task_id="b")


def part(task, index=None, *, event="e", key=1, state="SUCCESS"):
    return Part(**HERE, task=task, index=index, id=event, key=key, state=state)


class Log:
    """Feeds a ledger, as the log would: what it asks to append comes back to it."""

    def __init__(self, owner="me", **options):
        self.ledger = Ledger(owner, DAY, **options)
        self.offset = 0
        self.live()

    def live(self):
        self.ledger.caught_up()
        return self

    def add(self, *added, at=NOW):
        for record in added:
            self.ledger.apply(record, self.offset, at)
            self.offset += 1
        return self.ledger.due(at)

    def tombstone(self, *keys):
        return self.add(*(records.decode(key, None) for key in keys))


def decided_of(actions):
    ((*_, decided),) = (action.records for action in actions if isinstance(action, Append))
    return decided


def test_it_waits_for_declared_sized_and_every_part():
    log = Log()
    assert log.add(part("a", 0)) == []
    assert log.add(Sized(**HERE, size=2)) == []
    assert log.add(part("b", 1)) == []
    decided = decided_of(log.add(DECLARED))
    assert [(choice.task, choice.offset) for choice in decided.parts] == [("a", 0), ("b", 2)]
    assert (decided.body_task_id, decided.body_run, decided.outcome) == ("b", run_at(NOW), "success")
    assert decided.last == 1


def test_a_chord_is_open_from_its_declaration_to_its_decision():
    log = Log()
    log.add(part("a", 0), Sized(**HERE, size=1))
    assert log.ledger.undecided() == 0, "a part of nothing that is known"
    decided = decided_of(log.add(DECLARED))
    assert log.ledger.undecided() == 1
    log.add(decided)
    assert log.ledger.undecided() == 0
    log.add(Fired(**HERE, owner="me", body_task_id="b"))
    assert log.ledger.undecided() == 0


def test_it_asks_once():
    log = Log()
    assert len(log.add(DECLARED, Sized(**HERE, size=1), part("a", 0))) == 1
    assert log.add(part("a", 0, event="again")) == []


def test_an_empty_header_is_complete():
    assert decided_of(Log().add(DECLARED, Sized(**HERE, size=0))).parts == ()


def test_the_same_task_at_two_places_is_two_members():
    log = Log()
    assert log.add(DECLARED, Sized(**HERE, size=2), part("a", 0)) == []
    assert len(decided_of(log.add(part("a", 1))).parts) == 2


def test_values_are_not_counted():
    log = Log()
    assert log.add(DECLARED, Sized(**HERE, size=2), part("a", 0), part("a", 0), part("a", 0, event="f")) == []


def test_generations_have_nothing_to_do_with_each_other():
    log = Log()
    other = Part(group="g", generation=8, task="b", index=1, id="e", key=1)
    assert log.add(DECLARED, Sized(**HERE, size=2), part("a", 0), other) == []


def test_an_extension_is_waited_for_and_comes_after_its_parent():
    log = Log()
    added = Extended(**HERE, task="0-added")
    assert log.add(DECLARED, Sized(**HERE, size=2), added, part("a", 0), part("b", 1)) == []
    decided = decided_of(log.add(part("0-added", 0)))
    assert [choice.task for choice in decided.parts] == ["a", "0-added", "b"]


@pytest.mark.parametrize(
    ("first", "second", "wins"),
    [
        (part("a", event="x", key=1), part("a", event="y", key=2), "y"),
        (part("a", event="x", key=2), part("a", event="y", key=1), "x"),
        (part("a", event="x", key=1), part("a", event="y", key=1), "y"),
        (part("a", event="x", key=1), part("a", event="y", key=9, state="FAILURE"), "x"),
        (part("a", event="x", key=9, state="REVOKED"), part("a", event="y", key=1), "y"),
    ],
)
def test_of_two_parts_of_a_member_a_success_then_the_greater_key_wins(first, second, wins):
    decided = decided_of(Log().add(first, second, DECLARED, Sized(**HERE, size=1)))
    assert [choice.id for choice in decided.parts] == [wins]


def test_a_failed_member_fails_the_chord_only_when_all_are_in_and_the_first_in_order_is_named():
    log = Log()
    assert log.add(DECLARED, Sized(**HERE, size=3), part("c", 2, state="FAILURE")) == []
    assert log.add(part("b", 1, state="REVOKED")) == []
    decided = decided_of(log.add(part("a", 0)))
    assert (decided.outcome, decided.failed) == ("failure", "b")


def test_only_the_author_of_the_first_decision_carries_it_out():
    log = Log("me")
    mine = decided_of(log.add(DECLARED, Sized(**HERE, size=1), part("a", 0)))
    theirs = Decided(**HERE, owner="other", body_task_id="b", body_run=1, parts=mine.parts, size=1)
    assert log.add(theirs, mine) == []
    winner = Log("me")
    winner.add(DECLARED, Sized(**HERE, size=1), part("a", 0))
    (fire,) = winner.add(mine, theirs)
    assert (fire.decided, fire.look_first, fire.declared) == (mine, False, 0)


def test_anothers_decision_is_taken_over_at_once_by_a_rebuild_and_later_otherwise():
    theirs = Decided(**HERE, owner="other", body_task_id="b", body_run=1, size=0)
    rebuild = Ledger("me", DAY)
    for offset, record in enumerate([DECLARED, Sized(**HERE, size=0), theirs]):
        rebuild.apply(record, offset, NOW)
    assert rebuild.due(NOW) == []
    rebuild.caught_up()
    (fire,) = rebuild.due(NOW)
    assert (fire.look_first, fire.since_ms) == (True, NOW)
    log = Log("me")
    assert log.add(DECLARED, theirs) == []
    assert log.ledger.due(NOW + decision.TAKE_OVER_AFTER_MS - 1) == []
    (fire,) = log.ledger.due(NOW + decision.TAKE_OVER_AFTER_MS)
    assert fire.look_first
    assert log.ledger.due(NOW + 2 * decision.TAKE_OVER_AFTER_MS) == []


def test_a_part_sent_again_is_read_where_it_is_now():
    log = Log()
    mine = decided_of(log.add(DECLARED, Sized(**HERE, size=1), part("a", 0)))
    (fire,) = log.add(part("a", 0), mine)
    assert mine.parts[0].offset == 2
    assert fire.parts[0].offset == 3


def test_after_fired_parts_and_what_lost_are_forgotten():
    log = Log()
    parts = [part("a", 0), part("b", 1), part("b", 1, event="f")]
    mine = decided_of(log.add(DECLARED, Sized(**HERE, size=2), *parts))
    loser = Decided(**HERE, owner="late", body_task_id="b", body_run=1)
    log.add(mine, loser)
    fired = Fired(**HERE, owner="me", body_task_id="b")
    ((keys,),) = log.add(fired)
    expected = [Sized(**HERE, size=2), *parts, loser]
    assert set(keys) == {records.key_of(record) for record in expected}
    assert log.tombstone(*keys) == []
    late = part("c", 2)
    assert log.add(late) == [Forget((records.key_of(late),))]
    assert log.add(DECLARED) == []
    assert log.add(Sized(**HERE, size=2)) == [Forget((records.key_of(Sized(**HERE, size=2)),))]


def test_after_the_retention_fired_is_the_last_to_go():
    log = Log()
    mine = decided_of(log.add(DECLARED, Sized(**HERE, size=0)))
    fired = Fired(**HERE, owner="me", body_task_id="b")
    log.add(mine, fired)
    log.tombstone(records.key_of(Sized(**HERE, size=0)))
    assert log.ledger.sweep(NOW + DAY - 1) == []
    ((keys,),) = log.ledger.sweep(NOW + DAY)
    assert set(keys) == {records.key_of(DECLARED), records.key_of(mine), records.key_of(fired)}
    assert keys[-1] == records.key_of(fired)
    log.tombstone(*keys)
    assert len(log.ledger) == 0


def test_a_chord_that_never_completes_is_given_up_in_the_end():
    log = Log()
    log.add(DECLARED, part("a", 0))
    assert log.ledger.sweep(NOW + DAY) == []
    assert len(log.ledger.sweep(NOW + decision.ABANDON_FACTOR * DAY)) == 1
    undeclared = Log()
    undeclared.add(part("a", 0))
    assert len(undeclared.ledger.sweep(NOW + DAY)) == 1


def test_a_lost_tombstone_is_repeated_by_the_sweep():
    log = Log()
    mine = decided_of(log.add(DECLARED, Sized(**HERE, size=0)))
    (first,) = log.add(mine, Fired(**HERE, owner="me", body_task_id="b"))
    assert log.ledger.sweep(NOW + 1) == [first]


def test_large_decisions_are_sliced_and_put_together_again():
    log = Log(slice_size=2)
    parts = [part(f"t{n}", n) for n in range(5)]
    (append,) = log.add(DECLARED, Sized(**HERE, size=5), *parts)
    *slices, decided = append.records
    assert [len(one.parts) for one in slices] == [2, 2, 1]
    assert all(isinstance(one, Chosen) for one in slices)
    assert (decided.slices, decided.size, decided.parts) == (3, 5, ())
    (fire,) = log.add(*append.records)
    assert isinstance(fire, Fire)
    assert [choice.task for choice in fire.parts] == ["t0", "t1", "t2", "t3", "t4"]


def test_nothing_is_open_after_fired():
    log = Log()
    mine = decided_of(log.add(DECLARED, Sized(**HERE, size=0)))
    assert not log.ledger.is_open(mine)
    log.add(mine)
    assert log.ledger.is_open(mine)
    log.add(Fired(**HERE, owner="other", body_task_id="b"))
    assert not log.ledger.is_open(mine)


# -- ended before it was complete ------------------------------------------------------------------


def cancel(*, fire=False, request="c", by="ann"):
    return Cancelled(**HERE, id=request, by=by, reason="stuck", fire=fire)


def test_a_cancelled_chord_fails_with_what_is_there_in_whatever_order_it_came():
    for facts_ in ([DECLARED, part("a", 0), cancel()], [cancel(), part("a", 0), DECLARED]):
        log = Log()
        assert log.add(*facts_[:2]) == []
        decided = decided_of(log.add(facts_[2]))
        assert (decided.outcome, decided.failed, decided.size) == ("failure", None, 1)
        assert decided.why == "cancelled by ann with 1 of ? members in: stuck"


def test_a_chord_may_be_fired_with_the_successes_that_are_there():
    log = Log()
    log.add(DECLARED, Sized(**HERE, size=4), part("c", 2), part("b", 1, state="FAILURE"), part("a", 0))
    decided = decided_of(log.add(cancel(fire=True)))
    assert (decided.outcome, [one.task for one in decided.parts], decided.last) == ("success", ["a", "c"], 0)
    assert decided.why == "fired by ann with 3 of 4 members in: stuck"
    (fire,) = log.add(decided)
    assert isinstance(fire, Fire)
    assert log.add(part("d", 3)) == [], "frozen"


def test_a_complete_chord_hears_no_cancel():
    log = Log()
    decided = decided_of(log.add(DECLARED, Sized(**HERE, size=1), part("a", 0), cancel()))
    assert (decided.outcome, decided.why) == ("success", "")
    assert [type(one) for one in log.add(decided, cancel(request="late"))] == [Fire]


def test_of_two_requests_the_first_counts():
    decided = decided_of(Log().add(DECLARED, cancel(fire=True), cancel(request="d", by="bob")))
    assert decided.why.startswith("fired by ann")


def test_a_deadline_ends_a_chord_and_a_part_that_comes_later_changes_nothing():
    limited = Declared(**HERE, body=b"{}", body_task_id="b", deadline=NOW + 1000)
    log = Log()
    assert log.add(limited, Sized(**HERE, size=2), part("a", 0)) == []
    assert log.ledger.due(NOW + 999) == []
    decided = decided_of(log.ledger.due(NOW + 1000))
    assert (decided.outcome, decided.why) == ("failure", "ended by its deadline with 1 of 2 members in")
    assert log.ledger.due(NOW + 2000) == []
    assert [type(one) for one in log.add(decided, part("b", 1))] == [Fire]


def test_a_deadline_that_passed_while_nobody_ran_ends_only_what_is_not_complete():
    limited = Declared(**HERE, body=b"{}", body_task_id="b", deadline=NOW - 1000)
    for parts, outcome in (([part("a", 0)], "success"), ([], "failure")):
        rebuild = Ledger("me", DAY)
        for offset, record in enumerate([limited, Sized(**HERE, size=1), *parts]):
            rebuild.apply(record, offset, NOW)
        assert rebuild.due(NOW) == []
        rebuild.caught_up()
        assert decided_of(rebuild.due(NOW)).outcome == outcome


def test_the_deadline_of_the_latest_declaration_counts():
    first, again = (Declared(**HERE, body=b"{}", body_task_id="b", deadline=NOW + ms) for ms in (1000, 5000))
    log = Log()
    log.add(first, again)
    assert log.ledger.due(NOW + 1000) == []
    assert decided_of(log.ledger.due(NOW + 5000)).outcome == "failure"


def fired_log(size=1, **options):
    """A log with a chord that has fired, and the offsets of what it kept."""
    log = Log(**options)
    (append,) = log.add(DECLARED, Sized(**HERE, size=size), *(part(f"t{n}", n) for n in range(size)))
    log.add(*append.records)
    log.add(Fired(**HERE, owner="me", body_task_id="b"))
    kept = {records.key_of(one): log.offset - 2 for one in append.records[-1:]}
    return log, kept | {records.key_of(DECLARED): 0}


def test_a_fired_chord_is_sent_again_once_per_request():
    log, kept = fired_log()
    asked = Resent(**HERE, id="r", by="ann", reason="lost")
    (resend,) = log.add(asked, at=NOW + 5)
    assert resend == Resend(asked, NOW + 5, kept)
    assert log.ledger.is_asked(asked)
    assert log.ledger.due(NOW + 6) == []
    done = Resent(**HERE, id="r", by="ann", reason="lost", done=9, outcome="success")
    assert log.add(done) == []
    assert not log.ledger.is_asked(asked)
    assert [type(one) for one in log.add(Resent(**HERE, id="s"))] == [Resend]


def test_a_request_waits_for_the_chord_to_fire_and_survives_the_owner():
    log = Log()
    decided = decided_of(log.add(DECLARED, Sized(**HERE, size=0), Resent(**HERE, id="r")))
    assert [type(one) for one in log.add(decided)] == [Fire]
    (_, resend) = log.add(Fired(**HERE, owner="me", body_task_id="b"))
    assert isinstance(resend, Resend)
    rebuild = Ledger("other", DAY)
    fired = Fired(**HERE, owner="me", body_task_id="b")
    for offset, record in enumerate([DECLARED, decided, fired, Resent(**HERE, id="r")]):
        rebuild.apply(record, offset, NOW)
    rebuild.caught_up()
    (again,) = rebuild.due(NOW)
    assert isinstance(again, Resend)


def test_what_a_large_chord_is_sent_again_with_is_kept():
    log, _ = fired_log(size=5, slice_size=2)
    (resend,) = log.add(Resent(**HERE, id="r"))
    kinds = sorted(records.parse_key(key).kind for key in resend.wanted)
    assert kinds == ["chosen", "chosen", "chosen", "decided", "declared"]


def test_what_operators_asked_is_kept_until_the_retention_is_over():
    log = Log()
    decided = decided_of(log.add(DECLARED, part("a", 0), cancel()))
    ((keys,),) = (log.add(decided, Fired(**HERE, owner="me", body_task_id="b", outcome="failure")),)
    assert keys == Forget((records.key_of(part("a", 0)),))
    log.tombstone(*keys.keys)
    ((keys,),) = log.ledger.sweep(NOW + DAY)
    assert {records.parse_key(key).kind for key in keys} == {"declared", "cancelled", "decided", "fired"}
    log.tombstone(*keys)
    assert len(log.ledger) == 0


def test_facts_show_progress_without_results():
    failed = Part(**HERE, task="a", index=0, id="e", key=42, state="FAILURE", result=b"secret", exception="X" * 999)
    (fact,) = facts(failed, 5, 99)
    assert (fact.group, fact.name, fact.order, fact.expires_at) == ("g", "7|part|a|0", 42, 99)
    shown = json.loads(fact.value)
    assert (shown["kind"], shown["state"], len(shown["exception"])) == ("part", "FAILURE", 200)
    assert b"secret" not in fact.value
    (declared,) = facts(DECLARED, 3, 0)
    assert json.loads(declared.value)["body"] == "b"


def test_of_two_decisions_the_first_is_shown():
    (first,) = facts(Decided(**HERE, owner="a", body_task_id="b", body_run=1), 10, 0)
    (second,) = facts(Decided(**HERE, owner="z", body_task_id="b", body_run=1), 11, 0)
    assert first.name == second.name
    assert first.order > second.order
    assert 0 <= second.order < 1 << 63


def test_tombstones_and_slices_are_not_shown():
    assert facts(records.decode(records.key_of(DECLARED), None), 1, 0) == []
    assert facts(Chosen(**HERE, owner="o", n=0, parts=()), 1, 0) == []
