"""Whose log it is: one topic prefix serves one app.

The owner's name is kept in Kafka, as the metadata of an offset that the group ``<prefix>.app``
commits for partition 0 of ``<prefix>.chords``. No record of ours is a better place: whatever stands
in the chords' topic has to be a chord's record for every reader of every version, and the other
topics forget. Kafka forgets such an offset too, a week (``offsets.retention.minutes``) after the last
``init`` or ``run``. An app's name is what ``Celery("name")`` was given.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from confluent_kafka import Consumer, KafkaException, TopicPartition

from celery_kafka_backend import kafka, topics
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import ForeignLog

if TYPE_CHECKING:
    from celery_kafka_backend.settings import Settings


class Mark(msgspec.Struct, frozen=True):
    """Who owns a log.

    Attributes:
        app: The app's name.
        at: When it was written, ms since 1970; 0 if it was found in the events instead.
    """

    app: str
    at: int = 0


_decoder = msgspec.json.Decoder(Mark)


def group(prefix: str) -> str:
    """Return the group that keeps the mark."""
    return topics.group_id(prefix, "app")


def place(prefix: str, mark: Mark | None = None) -> TopicPartition:
    """Return the offset whose metadata is the mark: to ask for, or to commit."""
    topic = topics.chords(prefix)
    return TopicPartition(topic, 0) if mark is None else TopicPartition(topic, 0, 0, msgspec.json.encode(mark).decode())


def mark_of(found: TopicPartition) -> Mark | None:
    """Return the mark that a committed offset carries, None if there is none."""
    try:
        return _decoder.decode(found.metadata) if found.metadata else None
    except msgspec.DecodeError:
        return None


def read(settings: Settings, timeout_s: float) -> Mark | None:
    """Return whose log it is, None if nobody has claimed it.

    Raises:
        PublishError: Kafka did not answer in time, or refused: it takes the right to read the group.
    """
    what = "asking whose log it is"
    consumer = Complaints(settings).handle(Consumer, kafka.consumer_config(settings, group(settings.topic_prefix)))
    try:
        (found,) = consumer.committed([place(settings.topic_prefix)], timeout=timeout_s)
    except KafkaException as exc:
        raise kafka.translate(exc, what) from exc
    finally:
        consumer.close()
    if found.error is not None:
        raise kafka.translate(found.error, what)
    return mark_of(found)


def foreign(settings: Settings, found: Mark, app: str) -> ForeignLog:
    """Return the error for a log that is another app's."""
    prefix = settings.topic_prefix
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.at / 1000))
    how = f"since {since}" if found.at else "its workers write the events"
    return ForeignLog(
        f"the topics {prefix}.* at {settings.bootstrap_servers} belong to the app {found.app!r} ({how}), "
        f"and this app is {app!r}\n"
        "One prefix serves one app: set kafka_backend_settings['topic_prefix'] to another one. If it is the same app "
        "under a new name: `celery -A proj pipeline init --take-over`"
    )
