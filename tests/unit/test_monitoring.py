"""What the figures on a board mean for health, and what a producer handle writes on it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import msgspec
import pytest
from confluent_kafka import KafkaException

from celery_kafka_backend import metrics
from celery_kafka_backend.board import Board
from celery_kafka_backend.changes import Partition
from celery_kafka_backend.processors import metering, monitoring
from celery_kafka_backend.processors.metering import BEAT, STORE, TURN, VIEW, Report
from celery_kafka_backend.processors.monitoring import PATIENCE, ProcessorsSource, Role
from celery_kafka_backend.producer.metering import _LAYOUT, _SINCE, MeteredProducer
from tests.patience import PATIENCE_S

HEALTH_S = 60.0
NAME = "redis-1/1"


class Processor:
    """A source with one processor, which is this process."""

    def __init__(self):
        self.source = ProcessorsSource([Role(NAME, "redis-1")], [], HEALTH_S)
        self._seat = self.source.place(0).board.take(0)

    def was(self, *, turn_s=0.0, beat_s=0.0, store_s=None, **report):
        """Say what happened how long ago."""
        now = time.monotonic()
        self._seat.put(VIEW.at(TURN), now - turn_s)
        self._seat.put(VIEW.at(BEAT), now - beat_s)
        self._seat.put(VIEW.at(STORE), 0.0 if store_s is None else now - store_s)
        self._seat.say(msgspec.json.encode(Report(at=now - turn_s, **report)))

    def series(self):
        return {(one.metric.name, *one.labels): one.numbers[0] for one in self.source.series()}


def test_a_processor_that_has_not_come_up_yet_is_unready_and_not_unhealthy():
    source = ProcessorsSource([Role(NAME, "redis-1")], [], HEALTH_S)
    assert source.unready() == [f"{NAME}: its process does not run (yet)"]
    assert source.unhealthy() == []


@pytest.mark.parametrize(
    ("what", "healthy", "why"),
    [
        ({}, True, None),
        ({"turn_s": 20}, True, "its loop has not turned for 20 s"),
        ({"turn_s": 61}, False, "its loop has not turned for 61 s"),
        # It waits for its store: that is the store's fault, as long as the process runs ...
        ({"turn_s": 70, "store_s": 70}, True, "it has waited 70 s for its view to take a batch"),
        ({"turn_s": 70, "store_s": 70, "beat_s": 65}, False, "its loop has not turned for 65 s"),
        # ... and not for ever.
        ({"turn_s": 601, "store_s": PATIENCE * HEALTH_S + 1}, False, "its loop has not turned for 601 s"),
        ({"wrong": ["paused, writing: away"]}, True, "paused, writing: away"),
    ],
)
def test_health_is_the_loops_and_readiness_is_that_of_all_it_needs(what, healthy, why, monkeypatch):
    processor = Processor()
    now = time.monotonic()
    monkeypatch.setattr(
        monitoring, "time", SimpleNamespace(monotonic=lambda: now)
    )  # it stands still between both looks
    processor.was(**what)
    assert processor.source.unhealthy() == ([] if healthy else [f"{NAME}: {why}"])
    assert processor.source.unready() == ([] if why is None else [f"{NAME}: {why}"])


def test_what_a_view_lacks_grows_older_while_its_processor_says_nothing():
    processor = Processor()
    processor.was(turn_s=30.0, lag={"log": [(0, 7, 2.0), (1, 0, 0.0)]})
    found = processor.series()
    assert found[metrics.VIEW_LAG.name, "redis-1", "log", "0"] == 7
    assert found[metrics.VIEW_LAG_SECONDS.name, "redis-1", "log", "0"] == pytest.approx(32, abs=5)
    assert found[metrics.VIEW_LAG_SECONDS.name, "redis-1", "log", "1"] == 0


def test_partitions_are_behind_since_they_were_last_level():
    work = SimpleNamespace(behind=lambda: dict(behind))
    meter = metering.ViewMeter.__new__(metering.ViewMeter)
    meter._level = {}
    at = Partition("log", 0)
    found = []
    for now, records in ((10.0, 0), (11.0, 5), (15.0, 9), (16.0, 0), (17.0, 1)):
        behind = {at: records}
        found.append(meter._lag(work, now)["log"][0])
    assert found == [(0, 0, 0.0), (0, 5, 1.0), (0, 9, 5.0), (0, 0, 0.0), (0, 1, 1.0)]


def test_a_handle_counts_what_it_delivers_what_fails_and_what_waits():
    seat = Board(1, _LAYOUT.size, 0).take()
    recorder = SimpleNamespace(
        publisher=SimpleNamespace(dropped=3, waiting=lambda: 2), courier=SimpleNamespace(sent_again=0, lost=0)
    )
    nowhere = MeteredProducer(
        {"bootstrap.servers": "127.0.0.1:9", "message.timeout.ms": 1000, "log_level": 0}, seat, recorder
    )
    said = []
    nowhere.produce("t", b"v", b"k", on_delivery=lambda error, _: said.append(error))
    recorder.publisher.dropped += 4
    nowhere.poll(0)
    assert seat.get(_LAYOUT.at(metrics.QUEUED)) == 3
    assert 0 < seat.get(_LAYOUT.at(_SINCE)) <= time.monotonic()
    assert seat.get(_LAYOUT.at(metrics.DROPPED)) == 4, "what was dropped before this handle was counted by another"
    assert nowhere.flush(PATIENCE_S) == 0
    assert len(said) == 1
    assert seat.get(_LAYOUT.at(metrics.PUBLISH_ERRORS, "not_acknowledged")) == 1
    assert seat.get(_LAYOUT.at(_SINCE)) == 0
    with pytest.raises(KafkaException):
        nowhere.produce("t", b"v" * 2_000_000, b"k")
    assert not nowhere._pending, "what was not taken does not wait for an answer"
