"""Searching a history, played into every store that keeps one: the same questions, the same answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from celery_kafka_backend.query import Query
from celery_kafka_backend.sinks.contract import matching
from tests.contract.factories import FAR, R, batch, group_saved, logged, sent, stated

if TYPE_CHECKING:
    from celery_kafka_backend.events import Event
    from tests.contract.conftest import Place

PAID = {"name_": "shop.pay", "worker": "celery@w1", "queue": "money", "host": "w1", "runtime_s": 0.25}
MAILED = {"name_": "shop.mail", "worker": "celery@w2", "queue": "celery", "host": "w2", "runtime_s": 4.0}
ODD = {"name_": "odd.[a]*(b).\\d", "worker": "w[1]", "queue": "q?", "runtime_s": 1.0}


def said(state: str, at: int, **more: Any) -> Event:
    """An event that a document may show, of a task with a name."""
    name = more.pop("name_")
    return msgspec.structs.replace(stated(state, at, **more), name=name)


WORLD: dict[str, Event] = {
    "sent": sent(0, task="pay-1", name="shop.pay", queue="money", args=["order-17", 5], root="flow"),
    "paid": said("SUCCESS", 1_000, task="pay-1", root="flow", args=["order-17", 5], **PAID),
    "retried": said("RETRY", 2_000, task="pay-2", exception="requests.exceptions.ConnectTimeout", message="30 s over", **PAID),
    "failed": said(
        "FAILURE", 3_000, task="pay-2", attempt=3, exception="builtins.ValueError", message="Order-17 is paid", group="g", **PAID
    ),
    "mailed": said("SUCCESS", 4_000, task="mail-1", kwargs={"to": "jürgen@example.org"}, group="g", parent="pay-1", root="flow", **MAILED),
    "as text": said("SUCCESS", 5_000, task="mail-2", args="('order-17', 6)", attempt=1, **MAILED),
    "odd": said("PROGRESS", 6_000, task="odd", **ODD),
    "group": group_saved("g", 7_000, members=("pay-2", "mail-1")),
    "over": said("SUCCESS", 8_000, task="over", expires_at=1, **PAID),
}  # fmt: skip

QUESTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "everything": ({}, set(WORLD) - {"over"}),
    "a name": ({"name": "shop.pay"}, {"sent", "paid", "retried", "failed"}),
    "a pattern": ({"name": "shop.*"}, {"sent", "paid", "retried", "failed", "mailed", "as text"}),
    "one character": ({"name": "shop.pa?"}, {"sent", "paid", "retried", "failed"}),
    "no part of a name": ({"name": "shop"}, set()),
    "a name is not a regular expression": ({"name": "odd.[a]*(b).\\d"}, {"odd"}),
    "brackets stand for themselves": ({"name": "shop.[p]ay"}, set()),
    "a state": ({"states": ("FAILURE",)}, {"failed"}),
    "a kind": ({"states": ("sent",)}, {"sent"}),
    "states of one's own": ({"states": ("PROGRESS", "RETRY")}, {"odd", "retried"}),
    "a worker": ({"worker": "celery@w2"}, {"mailed", "as text"}),
    "a worker with brackets": ({"worker": "w[1]"}, {"odd"}),
    "a queue": ({"queue": "mon*"}, {"sent", "paid", "retried", "failed"}),
    "a class": ({"exception": "ValueError"}, {"failed"}),
    "a dotted class": ({"exception": "requests.*"}, {"retried"}),
    "the end of a class is not the class": ({"exception": "Error"}, set()),
    "since": ({"since": R + 5_000}, {"as text", "odd", "group"}),
    "until": ({"until": R + 1_000}, {"sent"}),
    "a time range": ({"since": R + 2_000, "until": R + 4_000}, {"retried", "failed"}),
    "slow": ({"least_s": 1.0}, {"mailed", "as text", "odd"}),
    "fast": ({"most_s": 0.25}, {"paid", "retried", "failed"}),
    "as long": ({"least_s": 4.0, "most_s": 4.0}, {"mailed", "as text"}),
    "retries": ({"retries": 1}, {"failed", "as text"}),
    "many retries": ({"retries": 3}, {"failed"}),
    "text in arguments and messages": ({"text": "ORDER-17"}, {"sent", "paid", "failed", "as text"}),
    "text of keyword arguments": ({"text": "jürgen@"}, {"mailed"}),
    "a workflow": ({"root": "flow"}, {"sent", "paid", "mailed"}),
    "a group": ({"group": "g"}, {"failed", "mailed", "group"}),
    "several at once": ({"name": "shop.*", "text": "order-17", "retries": 1, "least_s": 1.0}, {"as text"}),
}


@pytest.fixture
def world(place: Place) -> Place:
    place.sink().write(batch(*WORLD.values()))
    return place


def found(place: Place, **asked: Any) -> list[str]:
    names = {event.id: name for name, event in WORLD.items()}
    return [names[logged.event.id] for logged in place.view().search(Query(**asked))]


def test_every_question_has_its_answer(world: Place) -> None:
    wrong = {}
    for name, (asked, expected) in QUESTIONS.items():
        if (answer := found(world, **asked)) and len(answer) != len(set(answer)):
            wrong[name] = answer
        if set(answer) != expected:
            wrong[name] = sorted(set(answer) ^ expected)
    assert wrong == {}


def test_what_matches_is_what_the_query_says_of_the_event_itself() -> None:
    for asked, expected in QUESTIONS.values():
        query = Query(**asked)
        assert {name for name, event in WORLD.items() if query.matches(event)} - {"over"} == expected, asked


def test_a_limit_keeps_the_first_or_the_last_in_their_order(world: Place) -> None:
    assert found(world, limit=3) == ["sent", "paid", "retried"]
    assert found(world, limit=3, newest_first=True) == ["group", "odd", "as text"]
    assert found(world, name="shop.*", states=("SUCCESS",), limit=2, newest_first=True) == ["as text", "mailed"]
    assert found(world, limit=100) == [name for name in WORLD if name != "over"]


def test_the_bytes_are_those_that_were_recorded(world: Place) -> None:
    from celery_kafka_backend import codec  # noqa: PLC0415 - one case's

    (failed,) = world.view().search(Query(states=("FAILURE",)))
    assert failed.value == codec.encode(WORLD["failed"])
    assert failed.event == WORLD["failed"]


def test_a_page_does_not_end_a_search(place: Place) -> None:
    sink = place.sink()
    for start in range(0, 2_500, 500):
        sink.write(batch(*(sent(n, task=f"t-{n}", expires_at=FAR) for n in range(start, start + 500))))
    view = place.view()
    assert sum(1 for _ in view.search(Query())) == 2_500
    assert sum(1 for _ in view.search(Query(limit=1_700))) == 1_700


def test_a_store_with_nothing_in_it_has_nothing_to_find(place: Place) -> None:
    place.sink().write(batch())
    assert list(place.view().search(Query(name="*", limit=5))) == []


def test_an_event_that_the_log_has_twice_is_found_once() -> None:
    found = [logged(stated("SUCCESS", at, task=f"t{at}")).value for at in (5, 1, 4, 2, 3)]
    for newest, first in ((False, [1, 2, 3]), (True, [5, 4, 3])):
        told = matching([*found, *found], Query(limit=3, newest_first=newest), by_time=False)
        assert [one.event.at - R for one in told] == first
