"""Batches of messages, cut into stretches of the log without a gap."""

from __future__ import annotations

import random
from typing import Any

import pytest

from celery_kafka_backend.changes import Logged
from celery_kafka_backend.events import Event
from celery_kafka_backend.processors.emitting import _stretches
from celery_kafka_backend.processors.intake import Intake

LOG = "log"


class Message:
    """As much of Kafka's as is looked at."""

    def __init__(self, topic: str, partition: int, offset: int) -> None:
        self.place = topic, partition, offset

    def topic(self) -> str:
        return self.place[0]

    def partition(self) -> int:
        return self.place[1]

    def offset(self) -> int:
        return self.place[2]


def batch(rng: random.Random, chords: float, poison: float, gaps: float) -> tuple[list[Any], list[Logged | None]]:
    """Runs of messages from some partitions, and what each of those of the log says."""
    offsets = [rng.randrange(5_000) for _ in range(3)]
    messages: list[Any] = []
    said: list[Logged | None] = []
    for _ in range(rng.randrange(12)):
        partition = rng.randrange(len(offsets))
        for _ in range(rng.randrange(1, 30)):
            offsets[partition] += 1 + (rng.random() < gaps)
            if rng.random() < chords:
                messages.append(Message("chords", partition, len(messages)))
            messages.append(Message(LOG, partition, offsets[partition]))
            event = Event(id=f"{partition}/{offsets[partition]}", kind="sent", task="t", at=1, hlc=1)
            said.append(None if rng.random() < poison else Logged(event, b"x"))
    return messages, said


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("chords", "poison", "gaps"), [(0, 0, 0), (0, 0, 0.1), (0.1, 0, 0.1), (0, 0.1, 0.1), (0.1, 0.1, 0)]
)
def test_each_record_of_the_log_is_said_once_at_its_offset(seed: int, chords: float, poison: float, gaps: float):
    """Whatever lies between: records of chords, ones that nobody can read, other partitions, and offsets that are not there."""
    messages, said = batch(random.Random(seed), chords, poison, gaps)
    of_log = [message for message in messages if message.topic() == LOG]
    unreadable = [(message, "") for message, one in zip(of_log, said, strict=True) if one is None]
    intake = Intake([one for one in said if one is not None], [], unreadable)
    found = {
        (partition, first + number): one
        for partition, first, items in _stretches(messages, intake, LOG)
        for number, one in enumerate(items)
    }
    assert found == {(m.partition(), m.offset()): one for m, one in zip(of_log, said, strict=True)}
    assert list(found) == [(message.partition(), message.offset()) for message in of_log], "in order"
