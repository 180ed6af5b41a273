"""How far the import of a store has come, who began it and when; kept in Kafka.

It is the metadata of an offset that the group ``<prefix>.import.<name of the store>`` commits, as in `ownership`. Kafka
forgets it a week (``offsets.retention.minutes``) after the last page; then an import of the store begins anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from confluent_kafka import TopicPartition

from celery_kafka_backend import topics
from celery_kafka_backend.rights import OPERATOR, Right

if TYPE_CHECKING:
    from celery_kafka_backend.cli.broker import Broker


class Bookmark(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far an import is.

    Attributes:
        at: When it began, ms since 1970.
        by: Who began it.
        after: Where to go on; "" if it has not begun, or has come to the end.
    """

    at: int
    by: str
    after: str = ""


class Shelf:
    """Where the bookmark of one store is kept.

    Args:
        broker: Kafka.
        name: The store's, as ``status`` shows views.
    """

    def __init__(self, broker: Broker, name: str) -> None:
        prefix = broker.settings.topic_prefix
        self._broker = broker
        self._group = topics.group_id(prefix, f"import.{name}")
        self._topic = topics.task_events(prefix)
        self._needed = (Right(OPERATOR, "group", self._group, "Read"), Right(OPERATOR, "topic", self._topic, "Read"))

    def take(self) -> Bookmark | None:
        """Return what is there."""
        place = TopicPartition(self._topic, 0)
        found = self._broker.noted(self._group, place, "asking how far this import is", *self._needed)
        try:
            return msgspec.json.decode(found.metadata, type=Bookmark) if found.metadata else None
        except msgspec.MsgspecError:
            return None

    def put(self, mark: Bookmark) -> None:
        """Keep it."""
        place = TopicPartition(self._topic, 0, 0, msgspec.json.encode(mark).decode())
        self._broker.note(self._group, place, "noting how far this import is", *self._needed)
