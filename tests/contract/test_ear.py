"""The ear of a client, on every store: what is there is met at once, what comes is heard, whoever waits."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from celery_kafka_backend.reader import Ear, Reader
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import batch, json_document, stated
from tests.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.contract.conftest import Place


@pytest.fixture
def ear(place: Place) -> Iterator[Ear]:
    reader = Reader(place.url, StoreOptions())
    found = Ear(reader, poll_interval_s=0.05)
    yield found
    found.close()
    reader.close()


def heard(ear: Ear, task: str) -> bytes:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (document := ear.hear(0.1).get(task)) is not None:
            return document
    raise AssertionError(f"nothing heard of {task}")


def test_a_result_that_is_there_is_met_at_once_and_again_by_a_second_waiter(place: Place, ear: Ear) -> None:
    place.sink().write(batch(stated("SUCCESS", 10)))
    shown = {"t": json_document("t", "SUCCESS")}
    assert ear.meet(["t", "nobody"]) == shown
    assert ear.meet(["t"]) == shown, "it may wait for the same task in another thread"


def test_a_result_that_comes_later_is_heard(place: Place, ear: Ear) -> None:
    sink = place.sink()
    assert ear.meet(["t"]) == {}
    sink.write(batch(stated("SUCCESS", 10)))
    assert heard(ear, "t") == json_document("t", "SUCCESS")


def test_what_was_heard_and_did_not_arrive_is_heard_again(place: Place, ear: Ear) -> None:
    sink = place.sink()
    ear.meet(["t"])
    sink.write(batch(stated("SUCCESS", 10)))
    assert heard(ear, "t") == json_document("t", "SUCCESS")
    ear.again(["t", "nobody"])
    assert heard(ear, "t") == json_document("t", "SUCCESS")


def test_a_task_is_met_while_another_thread_hears(place: Place, ear: Ear) -> None:
    sink = place.sink()
    ear.meet(["slow"])
    found: list[bytes] = []
    hearing = threading.Thread(target=lambda: found.append(heard(ear, "slow")))
    hearing.start()
    sink.write(batch(stated("SUCCESS", 10)))
    assert ear.meet(["t"]) == {"t": json_document("t", "SUCCESS")}
    sink.write(batch(stated("SUCCESS", 10, task="slow")))
    hearing.join(PATIENCE_S)
    assert found == [json_document("slow", "SUCCESS")]


def test_a_dropped_task_is_not_heard_of(place: Place, ear: Ear) -> None:
    sink = place.sink()
    ear.meet(["t", "u"])
    ear.drop("t")
    sink.write(batch(stated("SUCCESS", 10)))
    sink.write(batch(stated("SUCCESS", 20, task="u")))
    said: set[str] = set()
    deadline = time.monotonic() + PATIENCE_S
    while "u" not in said and time.monotonic() < deadline:
        said |= set(ear.hear(0.1))
    assert said == {"u"}
