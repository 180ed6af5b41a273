"""Reading a range of the log, from a consumer that answers as it is told."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, KafkaException

from celery_kafka_backend import past

AT = ("t", 0)


class Message:
    """A record of one byte."""

    def __init__(self, offset):
        self.offset = lambda: offset

    def __len__(self):
        return 1

    def error(self):
        return None


class Prompt:
    """A consumer that has one record for each question."""

    def __init__(self):
        self.next = 0

    def assign(self, places):
        (self.next,) = (place.offset for place in places)

    def consume(self, _count, _timeout):
        self.next += 1
        return [Message(self.next - 1)]

    def position(self, places):
        return [SimpleNamespace(offset=self.next) for _ in places]

    def pause(self, _places):
        pass


def test_whoever_takes_long_for_a_batch_is_not_told_that_kafka_was_silent():
    found = []
    for messages, _ in past.batches(Prompt(), {AT: (0, 3)}, silence_s=0.01):
        time.sleep(0.02)
        found += [message.offset() for message in messages]
    assert found == [0, 1, 2]


class Leaderless:
    """A consumer whose second partition has no leader at the moment."""

    def offsets_for_times(self, asked, timeout):
        error = KafkaError(KafkaError.LEADER_NOT_AVAILABLE)
        return [SimpleNamespace(topic="t", partition=n, offset=-1, error=error if n else None) for n in range(2)]


def test_a_partition_of_which_nobody_says_when_is_an_error_and_not_one_without_records():
    with pytest.raises(KafkaException, match="LEADER_NOT_AVAILABLE"):
        past.offsets_at(Leaderless(), [("t", 0), ("t", 1)], 0, 1)
