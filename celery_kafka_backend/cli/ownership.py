"""One topic prefix serves one app: who owns it, and how a second app is refused.

The owner's name is kept in Kafka, as the metadata of an offset that the group ``<prefix>.app``
commits for partition 0 of ``<prefix>.chords``. No record of ours is a better place: whatever stands
in the chords' topic has to be a chord's record for every reader of every version, and the other
topics forget. Kafka forgets such an offset too, a week (``offsets.retention.minutes``) after the last
``init`` or ``run``; then the owner is whoever's workers wrote the latest events, if there are any.

Only a *worker's* events count (header ``a`` and the event's role): a web application with another
name that merely sends tasks is no second app. An app's name is what ``Celery("name")`` was given.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec
from confluent_kafka import TopicPartition

from celery_kafka_backend import codec, events, topics
from celery_kafka_backend.cli.records import last_records
from celery_kafka_backend.errors import CodecError, ForeignLog

if TYPE_CHECKING:
    from confluent_kafka import Message

    from celery_kafka_backend.cli.broker import Broker

LOOK_BACK: Final = 20
"""Records per partition in which a worker's event is looked for."""


class Mark(msgspec.Struct, frozen=True):
    """Who owns a log.

    Attributes:
        app: The app's name.
        at: When it was written, ms since 1970; 0 if it was found in the events instead.
    """

    app: str
    at: int = 0


def claim(broker: Broker, app: str, *, take_over: bool = False) -> Mark:
    """Make the log this app's, or find that it is.

    Args:
        broker: Kafka.
        app: The app's name, "" if it has none.
        take_over: The log is this app's from now on, whoever's it was.

    Returns:
        Whose it was before.

    Raises:
        ForeignLog: It is another app's.
        Stop: Kafka did not answer, or refused.
    """
    found = owner(broker)
    if found is not None and found.app != app and not take_over:
        raise foreign(broker, found, app)
    _write(broker, app)
    # Two that claim at once: the last one wins, and both read who that is.
    written = _read(broker)
    if written is not None and written.app != app:
        raise foreign(broker, written, app)
    return found or Mark(app)


def foreign(broker: Broker, found: Mark, app: str) -> ForeignLog:
    """Return the error for a log that is another app's."""
    prefix = broker.settings.topic_prefix
    how = f"since {_date(found.at)}" if found.at else "its workers write the events"
    return ForeignLog(
        f"the topics {prefix}.* at {broker.settings.bootstrap_servers} belong to the app {found.app!r} ({how}), "
        f"and this app is {app!r}\n"
        "One prefix serves one app: set kafka_backend_settings['topic_prefix'] to another one. If it is the same app "
        "under a new name: `celery -A proj pipeline init --take-over`"
    )


def owner(broker: Broker) -> Mark | None:
    """Return whose log it is, None if nobody's yet."""
    return _read(broker) or latest_worker(broker)


def _date(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_ms / 1000))


def _where(broker: Broker) -> tuple[str, str]:
    prefix = broker.settings.topic_prefix
    return topics.group_id(prefix, "app"), topics.chords(prefix)


def _read(broker: Broker) -> Mark | None:
    group, topic = _where(broker)
    consumer = broker.member_of(group)
    try:
        found = broker.ask(
            "asking whose log it is",
            lambda: consumer.committed([TopicPartition(topic, 0)], timeout=broker.timeout_s),
        )[0]
    finally:
        consumer.close()
    if found.error is not None:
        raise broker.translated(found.error, "asking whose log it is")
    if not found.metadata:
        return None
    try:
        return msgspec.json.decode(found.metadata, type=Mark)
    except msgspec.DecodeError:
        return None


def _write(broker: Broker, app: str) -> None:
    group, topic = _where(broker)
    consumer = broker.member_of(group)
    mark = msgspec.json.encode(Mark(app, time.time_ns() // 1_000_000)).decode()
    try:
        answered = broker.ask(
            "noting whose log it is",
            lambda: consumer.commit(offsets=[TopicPartition(topic, 0, 0, mark)], asynchronous=False),
        )
    finally:
        consumer.close()
    for one in answered or ():
        if one.error is not None:
            raise broker.translated(one.error, "noting whose log it is")


def latest_worker(broker: Broker) -> Mark | None:
    """Return the app whose workers wrote the latest of the last events, None if there is none."""
    found: list[tuple[int, str]] = []
    for message in last_records(broker, topics.task_events(broker.settings.topic_prefix), LOOK_BACK):
        app = worker_app(message)
        if app:
            found.append((message.timestamp()[1], app))
    return Mark(max(found)[1]) if found else None


def worker_app(message: Message) -> str:
    """Return the app that a worker's event names, "" if it is not a worker's."""
    app = dict(message.headers() or ()).get(codec.HEADER_APP)
    try:
        event = codec.decode(message.value())
    except CodecError:
        return ""
    if event.role not in (events.PARENT, events.CHILD) and not event.worker:
        return ""
    return app.decode(errors="replace") if isinstance(app, bytes) else app or ""
