"""What is missing from a partition is gone only if the broker that was asked has all that was read before."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError

from celery_kafka_backend import topics
from celery_kafka_backend.places import HEARD_MS
from celery_kafka_backend.processors.chord_reader import ChordReader, KafkaAway

TOPIC = "celery.chords"
NOON = 1_750_000_000_000


class Message:
    def __init__(self, offset, key=None, error=None):
        self._offset, self._key, self._error = offset, key, error

    def error(self):
        return self._error

    def partition(self):
        return 0

    def offset(self):
        return self._offset

    def key(self):
        return self._key

    def value(self):
        return None


class Consumer:
    """A partition of so many records, as one broker has it; read from anywhere else, it begins at the beginning."""

    def __init__(self, end):
        self._end = end
        self._due = deque()

    def assign(self, partitions):
        (at,) = partitions
        start = at.offset if at.offset <= self._end else 0
        self._due.extend(Message(offset, b"other") for offset in range(start, self._end))
        self._due.append(Message(self._end, error=KafkaError(KafkaError._PARTITION_EOF)))

    def poll(self, _timeout):
        return self._due.popleft() if self._due else None

    def consume(self, _count, _timeout):
        return []

    def unassign(self):
        self._due.clear()


def reader_of(end):
    reader = ChordReader.__new__(ChordReader)
    reader._consumer, reader._ends, reader.end = Consumer(end), {}, 0
    return reader


@pytest.mark.parametrize("end", [0, 30, 60])
def test_a_leader_that_was_frozen_and_lacks_records_does_not_make_them_gone(end):
    """Found by the fault suite: a chord was failed for a part that every other broker had."""
    with pytest.raises(KafkaAway, match="stale leader"):
        reader_of(end).read(TOPIC, 0, {b"part": 60, b"another": 12})


def test_what_is_missing_from_a_partition_that_reaches_further_is_gone():
    reader = reader_of(61)
    assert reader.read(TOPIC, 0, {b"part": 60}) == {}
    assert reader.end == 61


class Index:
    """A log of six partitions, the last of which has records of these times."""

    def __init__(self, *times):
        self._times = times

    def list_topics(self, topic, timeout):
        return SimpleNamespace(topics={topic: SimpleNamespace(error=None, partitions=range(6))})

    def offsets_for_times(self, asked, timeout):
        (at,) = asked
        assert at.partition == 5
        offset = next((n for n, time in enumerate(self._times) if time >= at.offset), -1)
        return [SimpleNamespace(topic=at.topic, partition=at.partition, offset=offset, error=None)]

    def get_watermark_offsets(self, at, timeout):
        return 0, len(self._times)


@pytest.mark.parametrize(
    ("times", "known"),
    [((), False), ((NOON,), False), ((NOON - 60_000,), False), ((NOON - HEARD_MS - 1,), True), ((1, NOON), True)],
)
def test_a_body_that_was_sent_while_partitions_were_added_is_looked_for_wherever_it_may_be(times, known):
    reader = ChordReader.__new__(ChordReader)
    reader._consumer = Index(*times)
    ids = ["body"]
    everywhere = sorted({topics.partition_of("body", count) for count in range(1, 7)})
    assert len(everywhere) > 1
    assert reader.homes(TOPIC, ids, NOON) == ([topics.partition_of("body", 6)] if known else everywhere)
