"""From the spool into Kafka. Only librdkafka's handle is replaced, by one that answers as it is told."""

from __future__ import annotations

from collections import Counter

import pytest
from confluent_kafka import KafkaError

from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.errors import NotAcknowledged, SpoolError
from celery_kafka_backend.producer.drain import drain
from celery_kafka_backend.producer.publisher import Publisher, Record
from celery_kafka_backend.producer.spool import Spool
from tests.unit.scripted_handle import TIMED_OUT, Handle


@pytest.fixture
def handle():
    return Handle()


@pytest.fixture
def publisher(handle):
    made = Publisher(settings_module.parse("kafka://127.0.0.1:9/?view=memory://x"), make=lambda _config: handle)
    yield made
    made.close()


@pytest.fixture
def spool(tmp_path):
    return SmallBatches(tmp_path / "s.spool", 1 << 24)


class SmallBatches(Spool):
    """Read five records at a time instead of 500: each is fsynced when it is put there."""

    def oldest(self, after=0, *, most=5, **bounds):
        return super().oldest(after, most=most, **bounds)


def event(value, group=b""):
    return Record("events", b"task-" + value, value, [("g", group)] if group else [])


def part(value, group):
    return Record("chords", b"key", value, [], group)


def left(spool):
    return [one.record.value for one in spool.oldest()]


def test_everything_is_published_in_order_and_gone(spool, publisher, handle):
    values = [b"%d" % number for number in range(12)]
    for value in values:
        spool.append(event(value))
    found = drain(spool, publisher, 5)
    assert found == (12, 0, None)
    assert handle.produced == values
    assert spool.empty()


def test_the_parts_of_chords_go_first_and_hold_back_the_events_of_their_group_alone(spool, publisher, handle):
    for record in (event(b"1", b"A"), part(b"pB", "B"), event(b"2", b"B"), part(b"pA", "A"), event(b"3")):
        spool.append(record)
    handle.refuses[b"pB"] = TIMED_OUT
    found = drain(spool, publisher, 5)
    assert handle.produced == [b"pB", b"pA", b"1", b"3"]
    assert left(spool) == [b"pB", b"2"]
    assert isinstance(found.why, NotAcknowledged)
    handle.refuses.clear()
    assert drain(spool, publisher, 5) == (2, 0, None)
    assert handle.produced[4:] == [b"pB", b"2"]


def test_a_partition_that_does_not_answer_does_not_hold_up_the_others(spool, publisher, handle):
    for number in range(10):
        spool.append(event(b"%d" % number))
    handle.refuses = dict.fromkeys((b"0", b"4"), TIMED_OUT)
    assert drain(spool, publisher, 5).sent == 8
    assert left(spool) == [b"0", b"4"]


def test_a_pass_in_vain_ends_after_one_batch(spool, publisher, handle):
    for number in range(12):
        spool.append(event(b"%d" % number))
    handle.refuses = {b"%d" % number: TIMED_OUT for number in range(12)}
    assert drain(spool, publisher, 5).sent == 0
    assert len(handle.produced) == 5
    assert len(left(spool)) == 5


def test_what_kafka_will_never_take_is_set_aside_and_said(spool, publisher, handle):
    for value in (b"1", b"huge", b"2"):
        spool.append(event(value))
    handle.refuses[b"huge"] = KafkaError.MSG_SIZE_TOO_LARGE
    found = drain(spool, publisher, 5)
    assert (found.sent, found.aside, found.why) == (2, 1, None)
    assert left(spool) == []
    (reason,) = spool.state().aside
    assert "MSG_SIZE_TOO_LARGE" in reason


def test_a_missing_right_keeps_everything(spool, publisher, handle):
    spool.append(event(b"1"))
    handle.refuses[b"1"] = KafkaError.TOPIC_AUTHORIZATION_FAILED
    found = drain(spool, publisher, 5)
    assert "lacks Write on topic" in str(found.why)
    assert left(spool) == [b"1"]


def test_a_crash_before_the_removal_publishes_the_same_records_again(spool, publisher, handle, monkeypatch):
    for number in range(3):
        spool.append(event(b"%d" % number))

    def crash(_places):
        raise SpoolError("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(spool, "remove", crash)
        with pytest.raises(SpoolError):
            drain(spool, publisher, 5)
    drain(spool, publisher, 5)
    assert Counter(handle.produced) == {b"0": 2, b"1": 2, b"2": 2}
    assert spool.empty()


def test_a_retired_file_is_drained_too(spool, publisher, handle):
    spool.append(event(b"old"))
    spool.retire()
    spool.append(event(b"new"))
    drain(spool, publisher, 5)
    assert sorted(handle.produced) == [b"new", b"old"]
    assert spool.empty()
