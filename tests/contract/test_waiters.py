"""A thousand waiters of one process, on every store that is polled: they are asked for together, once per tick."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from celery_kafka_backend.reader import Ear, Reader
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import batch, json_document, stated
from tests.contract.test_ear import heard
from tests.services.doorman import Doorman

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.contract.conftest import Place

WAITING = [f"waiting-{n}" for n in range(1_000)]
TICKS = 20


@contextlib.contextmanager
def waiting(url: str) -> Iterator[tuple[Reader, Ear]]:
    """A thousand waiters, the connection of their process open."""
    reader = Reader(url, StoreOptions())
    ear = Ear(reader, poll_interval_s=0.05)
    reader.view.documents(["nobody"])
    for each in WAITING:
        ear.add(each)
    yield reader, ear
    ear.close()
    reader.close()


def tick(ear: Ear) -> None:
    for _ in range(TICKS):
        assert ear.hear(0.05) == {}


def test_a_thousand_waiters_are_one_read_per_tick(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = place.sink()
    with waiting(place.url) as (reader, ear):
        if reader.view.push:
            pytest.skip("this store pushes")
        asked: list[int] = []
        documents = reader.view.documents

        def counted(ids: Any) -> Any:
            asked.append(len(ids))
            return documents(ids)

        monkeypatch.setattr(reader.view, "documents", counted)
        tick(ear)
        assert asked == [len(WAITING)] * TICKS
        sink.write(batch(*(stated("SUCCESS", 10, task=each) for each in WAITING[::100])))
        assert heard(ear, WAITING[-100]) == json_document(WAITING[-100], "SUCCESS")


@pytest.mark.elasticsearch
@pytest.mark.parametrize("place", ["elasticsearch"], indirect=True)
def test_of_which_elasticsearch_hears_as_one_request(place: Place) -> None:
    place.sink()
    port = int(place.url.rpartition(":")[2].partition("/")[0])
    with contextlib.closing(Doorman(port)) as doorman, waiting(doorman.url(place.url)) as (_, ear):
        doorman.seen.clear()
        tick(ear)
        assert len(doorman.seen) == TICKS


@pytest.mark.cassandra
@pytest.mark.parametrize("place", ["cassandra"], indirect=True)
def test_of_which_cassandra_hears_as_two_queries(place: Place) -> None:
    """One in our table and one in Celery's, which are asked at once."""
    place.sink()
    with waiting(place.url) as (reader, ear):
        sent: Counter[str] = Counter()
        session: Any = reader.view._connection._session  # type: ignore[attr-defined]
        session.add_request_init_listener(lambda future: sent.update([type(future.message).__name__]))
        tick(ear)
        assert sum(sent.values()) == 2 * TICKS, sent
