"""What may stand in a log although no clock of ours would say it: kept or refused by name, and it harms nothing beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from celery_kafka_backend.changes import ChordFact, Partition
from celery_kafka_backend.errors import Rejected
from celery_kafka_backend.query import Query
from tests.contract.factories import FAR, batch, group_saved, json_document, stated
from tests.contract.test_native import job, pickles_only, read

if TYPE_CHECKING:
    from tests.contract.conftest import Place

LAST_MS = 253_370_764_799_999
"""The last time that an event may have: the year 9998."""
DONE = stated("SUCCESS", 10)
STARTED = stated("STARTED", 10)
ODD = {
    name: msgspec.structs.replace(
        event, id=name, task=name, doc=msgspec.Raw(json_document(name, event.state or "")), **about
    )
    for name, (event, about) in {
        "done in 9998": (DONE, {"at": LAST_MS, "hlc": LAST_MS}),
        "started in 9998": (STARTED, {"at": LAST_MS, "hlc": LAST_MS}),
        "never": (DONE, {"expires_at": None}),
        "till the end of 9999": (DONE, {"expires_at": 253_402_300_799_999}),
        "till the end of numbers": (DONE, {"expires_at": (1 << 53) - 1}),
        "says 9999": (DONE, {"date_done": "9999-12-31T23:59:59.999999"}),
        "says the year 1": (DONE, {"date_done": "0001-01-01T00:00:00+14:00"}),
        "says some time": (DONE, {"date_done": "some time"}),
    }.items()
}


def test_odd_times_are_kept_and_hide_nothing(place: Place) -> None:
    group = msgspec.structs.replace(group_saved(), at=LAST_MS, hlc=LAST_MS)
    place.sink().write(batch(DONE, group, *ODD.values()))
    view = place.view()
    assert view.documents(["t", *ODD]) == {each.task: each.document for each in (DONE, *ODD.values())}
    assert view.shown(["t", *ODD]).keys() == {"t", *ODD}
    assert view.groups(["g"]) == {"g": group.document}
    assert [len(view.history(task)) for task in ("g", "t", *ODD)] == [1] * (2 + len(ODD))
    assert {row.key for row in place.dump() if row.table == "document"} == {"t", *ODD}


def test_a_stock_client_reads_what_has_odd_times_or_never_expires(place: Place) -> None:
    """Its driver reads all that stands beside Celery's fields, too."""
    asked = job(place, list(ODD), [])
    if pickles_only(asked):
        return
    place.sink().write(batch(*ODD.values()))
    (answer,) = read([asked])
    assert {task: seen["state"] for task, seen in answer["tasks"].items()} == {
        task: event.state for task, event in ODD.items()
    }


@pytest.mark.parametrize("group", ["g" * 600, "g" * 70_000, "g\0"])
def test_any_name_of_a_chord_is_kept_or_refused_by_name_and_the_rest_is_written(place: Place, group: str) -> None:
    facts = [ChordFact(name, "sized", 1, b"1", FAR) for name in (group, "good")]
    refused: list[str] = []
    try:
        place.sink().write(batch(DONE, chords=facts, positions={Partition("t", 0): 7}))
    except Rejected as exc:
        refused = [each for each, _ in exc.reasons]
    view = place.view()
    assert refused == ([] if view.chord(group) == {"sized": b"1"} else [group])
    assert (view.chord("good"), view.positions()) == ({"sized": b"1"}, {Partition("t", 0): 7})
    assert view.documents(["t"])


def test_what_is_long_or_nothing_is_found(place: Place) -> None:
    """No index may leave out what is longer than it takes, or zero."""
    long = msgspec.structs.replace(DONE, name="n" * 600, worker="w" * 600, queue="q" * 600, exception="e" * 600)
    long = msgspec.structs.replace(long, group="g" * 600, root="r" * 600, runtime_s=0.0)
    place.sink().write(batch(long))
    asked = ("name", "worker", "queue", "exception", "group", "root")
    questions = [Query(**{name: getattr(long, name)}) for name in asked] + [Query(name="nn*"), Query(most_s=1.0)]
    view = place.view()
    assert [[found.event.id for found in view.search(query)] for query in questions] == [[long.id]] * len(questions)
