"""From Kafka's messages to what they say: events, chord facts, and what nobody can read.

Shared by everything that folds the log. No I/O: messages in, values out.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from celery_kafka_backend import chord_records, codec
from celery_kafka_backend.changes import Logged
from celery_kafka_backend.errors import CodecError
from celery_kafka_backend.processors import progress

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from confluent_kafka import Message

    from celery_kafka_backend.changes import ChordFact

Poison: TypeAlias = "tuple[Message, str]"
"""A message, and why it is no use."""


class Intake(NamedTuple):
    """What a batch of messages says.

    Attributes:
        logged: Events of the log, in the order read.
        facts: What the chords' records show; tombstones show nothing.
        poison: Messages that are neither.
    """

    logged: list[Logged]
    facts: list[ChordFact]
    poison: list[Poison]


def read(messages: Sequence[Message], chords_topic: str, keep_facts_ms: int) -> Intake:
    """Return what messages without errors say.

    Args:
        messages: As consumed. What is not from ``chords_topic`` is an event.
        chords_topic: Name of the chords' topic.
        keep_facts_ms: How long after its record was written a view shows a chord's fact.
    """
    logged: list[Logged] = []
    facts: list[ChordFact] = []
    poison: list[Poison] = []
    # The hot loop of every processor: one iteration is about 2 us, most of it codec.decode.
    decode, keep = codec.decode, logged.append
    made = partial(tuple.__new__, Logged)  # half of what Logged(…) costs
    for message in messages:
        value = message.value()
        try:
            if message.topic() == chords_topic:
                facts += _facts(message, keep_facts_ms)
            else:
                keep(made((decode(value), value)))  # None is refused by decode
        except CodecError as exc:
            poison.append((message, f"{type(exc).__name__}: {exc}"))
    return Intake(logged, facts, poison)


def about(messages: Sequence[Message], subjects: Container[str], chords_topic: str) -> list[tuple[Message, str]]:
    """Return the messages that speak of some tasks or groups, each with whom it speaks of."""
    found = []
    for message in messages:
        try:
            if message.topic() == chords_topic:
                subject = chord_records.parse_key(message.key()).group
            else:
                subject = codec.decode(message.value()).task
        except CodecError:
            continue
        if subject in subjects:
            found.append((message, subject))
    return found


def _facts(message: Message, keep_ms: int) -> list[ChordFact]:
    record = chord_records.decode(message.key(), message.value())
    # The broker's clock (LogAppendTime), so that a host at 2099 cannot make a fact stay for ever,
    # and a replay gives the same expiry.
    _, written = message.timestamp()
    offset = message.offset()
    assert offset is not None
    return progress.facts(record, offset, written + keep_ms if written > 0 else 0)
