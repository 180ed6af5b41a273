"""Topics of a test that makes them itself, and what a test's own producers do when Kafka takes a record of theirs not."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tests.patience import PATIENCE_S, until

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Message
    from confluent_kafka.admin import AdminClient, NewTopic


def create(admin: AdminClient, *wanted: NewTopic) -> None:
    """Make topics, and return when the broker takes records for them.

    It answers when the controller has them, and learns of them itself a moment later; what comes in between is refused.
    """
    for made in admin.create_topics(list(wanted)).values():
        made.result(PATIENCE_S)
    for one in wanted:
        until(partial(_led, admin, one.topic), f"{one.topic} is led")


def _led(admin: AdminClient, topic: str) -> bool:
    partitions = admin.list_topics(topic, timeout=PATIENCE_S).topics[topic].partitions.values()
    return bool(partitions) and all(one.leader >= 0 for one in partitions)


def must_arrive(error: KafkaError | None, message: Message) -> None:
    """A producer's ``on_delivery``: let ``flush``, which only says that nothing waits, raise for what was refused."""
    assert error is None, f"{message.topic()}/{message.partition()}: {error}"
