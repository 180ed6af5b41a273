"""librdkafka's producer handle, answering as it is told: no broker takes part."""

from __future__ import annotations

import time
from collections import deque
from types import SimpleNamespace

from confluent_kafka import KafkaError, KafkaException

OK = None
TIMED_OUT = KafkaError._MSG_TIMED_OUT
ANSWER = SimpleNamespace(topic=lambda: "t", partition=lambda: 0, offset=lambda: 7)


class Handle:
    """Keeps what it is given; ``poll`` answers each record.

    Attributes:
        answers: Error codes for the next records, one each; a `BufferError` or `KafkaException` is raised instead.
        refuses: Error codes by value.
        produced: The values, in their order.
        is_silent: Whether it keeps its answers for later.
    """

    def __init__(self):
        self.answers = deque()
        self.refuses = {}
        self.produced = []
        self.is_silent = False
        self._due = deque()

    def produce(self, topic, value=None, key=None, headers=None, partition=-1, on_delivery=None):
        code = self.answers.popleft() if self.answers else self.refuses.get(value, OK)
        if code is BufferError or isinstance(code, KafkaException):
            raise code
        self.produced.append(value)
        self._due.append((on_delivery, code))

    def __len__(self):
        return len(self._due)

    def poll(self, timeout):
        time.sleep(min(timeout, 0.001))
        while self._due and not self.is_silent:
            answer, code = self._due.popleft()
            answer(None if code is OK else KafkaError(code), ANSWER)

    def flush(self, _timeout):
        self.poll(0)
        return len(self._due)

    def list_topics(self, topic, timeout):
        return SimpleNamespace(topics={topic: SimpleNamespace(error=None, partitions=range(4))})
