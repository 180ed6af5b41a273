"""A history with a retention of its own, played into every store: it outlives the result, or is gone before it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from celery_kafka_backend import codec
from celery_kafka_backend.changes import TASK, Batch, Change
from celery_kafka_backend.query import Query
from tests.contract.factories import FAR, R, batch, forgotten, group_saved, logged, sent, stated

if TYPE_CHECKING:
    from celery_kafka_backend.sinks.contract import View
    from tests.contract.conftest import Place

PAST = 1_000_000_000_000
LONG = FAR - R
"""A retention that keeps what happened at `R` until `FAR`."""
SHORT = 86_400_000
"""One by which everything that the factories make is long over."""


def remembered(view: View, task: str = "t") -> list[str]:
    return [codec.decode(value).kind for value in view.history(task)]


def expiries(place: Place, retention_ms: int | None) -> dict[tuple[str, str], int]:
    """What is there, by table and task; of the history, by the event's time."""
    found = {}
    for row in place.dump(history_retention_ms=retention_ms):
        task, _, rest = row.key.partition("/")
        found[row.table, f"{task}+{int(rest.partition('/')[0]) - R}" if rest else task] = row.expires_at
    return found


def test_history_outlives_the_result(place: Place) -> None:
    kept = {"history_retention_ms": LONG}
    events = [sent(0, expires_at=PAST), stated("SUCCESS", 10, expires_at=PAST), group_saved("g", 20, expires_at=PAST)]
    place.sink(**kept).write(batch(*events))
    view = place.view(**kept)
    assert (view.documents(["t"]), view.shown(["t"]), view.groups(["g"])) == ({}, {}, {})
    assert (remembered(view), remembered(view, "g")) == (["sent", "success"], ["group-saved"])
    assert {event.kind for event, _ in view.search(Query())} == {"sent", "success", "group-saved"}
    assert expiries(place, LONG) == {
        ("history", f"{each}+{at}"): FAR + at for each, at in (("t", 0), ("t", 10), ("g", 20))
    }


def test_history_is_gone_before_the_result(place: Place) -> None:
    kept = {"history_retention_ms": SHORT}
    sink, view = place.sink(**kept), place.view(**kept)
    sink.write(batch(sent(0), stated("SUCCESS", 10), stated("SUCCESS", 10, task="never", expires_at=None)))
    sink.write(batch(stated("STARTED", 5)))  # late, and over on arrival
    assert view.documents(["t", "never"]).keys() == {"t", "never"}
    assert (remembered(view), list(view.search(Query()))) == ([], [])
    assert expiries(place, SHORT) == {
        ("document", "t"): FAR,
        ("side", "t"): FAR,
        ("document", "never"): 0,
        ("side", "never"): 0,
    }


def test_history_is_kept_for_ever_beside_a_result_that_expires(place: Place) -> None:
    place.sink(history_retention_ms=0).write(batch(stated("SUCCESS", 10, expires_at=FAR), sent(0, expires_at=PAST)))
    found = expiries(place, 0)
    assert (found["document", "t"], found["history", "t+10"], found["history", "t+0"]) == (FAR, 0, 0)


def test_a_result_that_never_expires_outlives_its_history(place: Place) -> None:
    place.sink(history_retention_ms=LONG).write(batch(stated("SUCCESS", 10, expires_at=None)))
    assert expiries(place, LONG) == {("document", "t"): 0, ("side", "t"): 0, ("history", "t+10"): FAR + 10}


def test_a_forget_takes_the_result_and_not_its_history(place: Place) -> None:
    """And guards for as long as it says, whatever the history does."""
    kept = {"history_retention_ms": LONG}
    sink, view = place.sink(**kept), place.view(**kept)
    sink.write(batch(stated("SUCCESS", 10)))
    sink.write(batch(forgotten(20, expires_at=FAR + 500)))
    sink.write(batch(stated("STARTED", 5)))
    assert view.documents(["t"]) == {}
    assert remembered(view) == ["started", "success", "forgotten"]
    history = {("history", f"t+{at}"): FAR + at for at in (5, 10, 20)}
    assert expiries(place, LONG) == {("side", "t"): FAR + 500, **history}


def test_what_is_late_for_the_result_is_in_the_history(place: Place) -> None:
    kept = {"history_retention_ms": LONG}
    sink, view = place.sink(**kept), place.view(**kept)
    sink.write(batch(stated("SUCCESS", 10, expires_at=PAST)))
    sink.write(batch(stated("STARTED", 5, expires_at=PAST), stated("FAILURE", 5, task="u", expires_at=PAST)))
    assert view.documents(["t", "u"]) == {}
    assert (remembered(view), remembered(view, "u")) == (["started", "success"], ["failure"])


def test_each_event_goes_at_its_own_time_and_the_result_stays(place: Place) -> None:
    """One by one, also where a store lets a task's history go as a whole."""
    kept = {"history_retention_ms": SHORT}
    sink, view = place.sink(**kept), place.view(**kept)
    ends = time.time_ns() // 1_000_000 + place.soon_ms
    at = ends - SHORT - R
    gone, first, last = (
        stated("STARTED", at - 3_600_000, run=None),
        sent(at),
        stated("SUCCESS", at + 3_600_000, run=None),
    )
    sink.write(batch(gone, first, last))
    before = remembered(view)
    assert before == ["sent", "success"] or time.time() * 1000 >= ends
    time.sleep(max(0.0, ends / 1000 - time.time()) + 0.1)
    assert remembered(view) == ["success"]
    assert [event.kind for event, _ in view.search(Query())] == ["success"]
    sink.write(batch(first))
    history = [name for table, name in expiries(place, SHORT) if table == "history"]
    assert history == [f"t+{at + 3_600_000}"]
    assert view.documents(["t"])


def test_what_is_only_for_the_history_leaves_no_other_trace(place: Place) -> None:
    kept = {"history_retention_ms": LONG}
    sink = place.sink(**kept)
    sink.write(batch(stated("SUCCESS", 20, worker="celery@one", attempt=1)))
    before = expiries(place, LONG)
    old = [stated("FAILURE", 30, worker="celery@two", attempt=5), sent(-50)]
    alone = [stated("SUCCESS", 10, task="u", expires_at=None)]
    sink.write(Batch([_only_history("t", old), _only_history("u", alone)]))
    side = place.view(**kept).shown(["t", "u"])
    assert (side["t"].side.attempts, side["t"].side.workers, side.keys()) == (1, ("celery@one",), {"t"})
    history = {("history", "t+30"): FAR + 30, ("history", "t+-50"): FAR - 50, ("history", "u+10"): FAR + 10}
    assert expiries(place, LONG) == {**before, **history}
    place.empty()
    off = place.sink(history=False, **kept)
    off.write(Batch([_only_history("t", old)]))
    assert place.dump(**kept) == []


def _only_history(task: str, events: list[Any]) -> Change:
    return Change(TASK, task, winner=None, side=None, history=[logged(event) for event in events], only_history=True)
