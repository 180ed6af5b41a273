"""Reading a range of the log, from a consumer that answers as it is told."""

from __future__ import annotations

import time
from types import SimpleNamespace

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
