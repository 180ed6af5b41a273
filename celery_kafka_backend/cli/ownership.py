"""How an app claims a log (`celery_kafka_backend.ownership`), and how a second app is refused.

Where nobody has claimed it, or Kafka has forgotten who did, the owner is whoever's workers wrote the
latest events, if there are any. Only a *worker's* events count (header ``a`` and the event's role): a
web application with another name that merely sends tasks is no second app.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from celery_kafka_backend import codec, events, ownership, topics
from celery_kafka_backend.cli.records import last_records
from celery_kafka_backend.errors import CodecError
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.ownership import Mark
from celery_kafka_backend.rights import PROCESSOR, Right

if TYPE_CHECKING:
    from confluent_kafka import Message

    from celery_kafka_backend.cli.broker import Broker

LOOK_BACK: Final = 20
"""Records per partition in which a worker's event is looked for."""


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
        raise ownership.foreign(broker.settings, found, app)
    _write(broker, app)
    # Two that claim at once: the last one wins, and both read who that is.
    written = _read(broker)
    if written is not None and written.app != app:
        raise ownership.foreign(broker.settings, written, app)
    return found or Mark(app)


def owner(broker: Broker) -> Mark | None:
    """Return whose log it is, None if nobody's yet."""
    return _read(broker) or latest_worker(broker)


def _read(broker: Broker) -> Mark | None:
    prefix = broker.settings.topic_prefix
    group = ownership.group(prefix)
    needed = Right(PROCESSOR, "group", group, "Read")
    return ownership.mark_of(broker.noted(group, ownership.place(prefix), "asking whose log it is", needed))


def _write(broker: Broker, app: str) -> None:
    prefix = broker.settings.topic_prefix
    group = ownership.group(prefix)
    needed = Right(PROCESSOR, "group", group, "Read"), Right(PROCESSOR, "topic", topics.chords(prefix), "Read")
    broker.note(group, ownership.place(prefix, Mark(app, system_wall_ms())), "noting whose log it is", *needed)


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
