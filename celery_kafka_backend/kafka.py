"""librdkafka as this project uses it: configuration, and its errors in our words.

One place, so that every connection keeps the same promises. Settings under librdkafka's own names
are the user's, except those that a promise rests on (`settings` refuses these).
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaError, KafkaException

from celery_kafka_backend.complaints import named
from celery_kafka_backend.errors import NoSuchTopic, NotAcknowledged, PublishError, Refused, TooLarge
from celery_kafka_backend.rights import lacking
from celery_kafka_backend.topics import DEAD_LETTER_ROOM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from celery_kafka_backend.rights import Right
    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

SESSION_TIMEOUT_MS: Final = 8_000
"""A dead processor's partitions move within 10 s; a stop-the-world of half of it is survived."""

BUFFERED_LINGER_MS: Final = 5
"""How long a buffered result may wait for company."""

TRANSACTION_MS: Final = 10_000
"""How long an operator's transaction may be open."""

FETCH_BYTES: Final = 50 << 20
RECEIVE_BYTES: Final = 100_000_000
"""librdkafka's defaults."""
RESPONSE_ROOM: Final = 1 << 20
"""What a response may add to its records."""

_CALLABLES: Final = ("oauth_cb", "error_cb", "stats_cb", "throttle_cb", "on_delivery", "logger")
_TOO_LARGE: Final = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
_REFUSED: Final = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError._AUTHENTICATION,  # noqa: SLF001 - how confluent-kafka names its client-side codes
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_EXCEPTION,
    KafkaError.INVALID_CONFIG,
    KafkaError.POLICY_VIOLATION,
    KafkaError.INVALID_RECORD,
    KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT,
}
_NO_SUCH_TOPIC: Final = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
    KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
}
_REMEDIES: Final = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "grant the rights that `celery -A proj pipeline init --print` lists",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "grant the rights that `celery -A proj pipeline init --print` lists",
}


class OncePerInterval(logging.Filter):
    """Lets each complaint of a client library through once per interval: it repeats them at every reconnect."""

    def __init__(self, interval_s: float) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        text = _VARYING.sub("", record.getMessage())
        now = time.monotonic()
        if now - self._said.get(text, -self._interval_s) < self._interval_s:
            return False
        if len(self._said) > 1000:
            self._said.clear()
        self._said[text] = now
        return True


_VARYING: Final = re.compile(r"\d+ms|/\d+#|producer-\d+|consumer-\d+|\d+ identical error\(s\) suppressed")
_driver_logger: Final = logging.getLogger("celery_kafka_backend.librdkafka")
_driver_logger.addFilter(OncePerInterval(60.0))


def _common(settings: Settings, *extra: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "bootstrap.servers": settings.bootstrap_servers,
        # Shown by Kafka's own tools and by `pipeline status`: who folds, and where.
        "client.id": f"celery-kafka-backend/{settings.topic_prefix}/{socket.gethostname()}/{os.getpid()}",
        "topic.metadata.refresh.interval.ms": 30_000,
        "reconnect.backoff.max.ms": 2_000,
        "socket.keepalive.enable": True,
        # librdkafka's default only since 2.10: before, a small request could wait for the answer to the last one.
        "socket.nagle.disable": True,
        # librdkafka logs to stderr by itself otherwise, into the middle of a worker's log.
        "logger": _driver_logger,
    }
    for options in (settings.client, *extra):
        config.update(options)
    for name in _CALLABLES:
        if name in config:
            config[name] = named(config, name)
    return config


def producer_config(settings: Settings, linger_ms: int = 0) -> dict[str, Any]:
    """Return the configuration of every producer: idempotent, all replicas, one request at a time, Java's partitioner.

    Args:
        settings: The user's.
        linger_ms: How long a record waits for company, where whoever cannot wait flushes.
    """
    return _common(
        settings,
        {
            # Where nobody ever waits, a request for each result would only take the cores from the tasks.
            # Under load librdkafka batches what queues up behind the request in flight.
            "linger.ms": BUFFERED_LINGER_MS if settings.delivery == "buffered" else linger_ms,
            # ADR 11: zstd costs 0.16 ms more for each record that travels alone, as an awaited result does.
            "compression.type": "lz4",
            "partitioner": "murmur2_random",
            "message.max.bytes": settings.max_message_bytes,
            "delivery.timeout.ms": int(settings.delivery_timeout_s * 1000),
            # librdkafka cannot tell a slow broker from a dead one within less.
            "request.timeout.ms": min(10_000, int(settings.delivery_timeout_s * 1000)),
            # How long an unknown topic may be one that is being made; with librdkafka's 30 s a result timed out first, and
            # the log did not say why.
            "topic.metadata.propagation.max.ms": min(5_000, int(settings.delivery_timeout_s * 500)),
            "queue.buffering.max.messages": 100_000,
            "retry.backoff.ms": 50,
        },
        settings.producer,
        {
            "acks": "all",
            "enable.idempotence": True,
            # ADR 29: with a second request under way librdkafka takes its acknowledgement for that of the first as well,
            # though the broker refused the first: a record that is reported as stored, and is nowhere.
            "max.in.flight.requests.per.connection": 1,
        },
    )


def transaction_config(settings: Settings, name: str) -> dict[str, Any]:
    """Return the configuration of a producer whose records appear together or not at all.

    Args:
        settings: The user's.
        name: Its transactional id. Of two producers of one name the later one shuts the earlier one out.
    """
    return {
        **producer_config(settings),
        "transactional.id": name,
        # What a transaction has written hides all that follows in its partitions, until it ends: not longer than this
        # when whoever began it was killed.
        "transaction.timeout.ms": TRANSACTION_MS,
        "delivery.timeout.ms": TRANSACTION_MS,
        "request.timeout.ms": TRANSACTION_MS,
        "socket.timeout.ms": TRANSACTION_MS,
    }


def consumer_config(settings: Settings, group: str | None) -> dict[str, Any]:
    """Return the configuration of a consumer.

    Args:
        settings: The user's.
        group: Consumer group to join; None for a reader that assigns partitions itself (Kafka
            needs a name all the same; no offset is ever committed under it). librdkafka looks for
            the group's coordinator all the same: whoever has no right to the group, as a worker,
            is told so once, by a message with GROUP_AUTHORIZATION_FAILED, and reads on.
    """
    largest = settings.max_message_bytes + DEAD_LETTER_ROOM
    return _common(
        settings,
        {
            "session.timeout.ms": SESSION_TIMEOUT_MS,
            # A broker that was frozen holds a commit that nobody will answer, and every heartbeat behind it. At the
            # default of 60 s the group stood still for so long after the broker was back.
            "socket.timeout.ms": 10_000,
            # A dead member is missed 8 s after its last heartbeat, and the others hear of that with their next one.
            "heartbeat.interval.ms": 1_000,
            "max.poll.interval.ms": 300_000,
            "partition.assignment.strategy": "cooperative-sticky",
            "fetch.wait.max.ms": 100,
            "fetch.min.bytes": 1,
            # A fetch error must not put a waiting client to sleep for half a second.
            "fetch.error.backoff.ms": 50,
            # A record as large as the topic allows, with a dead letter's room, must fit everywhere on its way in.
            "fetch.message.max.bytes": max(1 << 20, largest),
            "message.max.bytes": largest,
            "fetch.max.bytes": max(FETCH_BYTES, largest),
            "receive.message.max.bytes": max(RECEIVE_BYTES, 2 * largest + RESPONSE_ROOM),
            # Both bound the memory of a consumer that falls behind; the first alone does not.
            "queued.min.messages": 20_000,
            "queued.max.messages.kbytes": 32_768,
            # Once one of these is reached librdkafka stops fetching for a second by default, longer than it takes
            # to work that off: bare consuming of 400-byte events made 114 k/s instead of 300-400 k/s.
            "fetch.queue.backoff.ms": 20,
        },
        settings.consumer,
        {
            "group.id": group or f"{settings.topic_prefix}.reader",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "enable.partition.eof": False,
        },
    )


MOVING: Final = {KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE}
"""For a moment a partition has no leader, or one that does not know yet that it is."""
DENIED: Final = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}


def refusal(
    settings: Settings, error: KafkaError | KafkaException | None, what: str, needed: Sequence[Right]
) -> PublishError:
    """Return our error as `translate` does; where a right is missing it is named, with what grants it."""
    found = error.args[0] if isinstance(error, KafkaException) else error
    if isinstance(found, KafkaError) and found.code() in DENIED:
        problem, remedy = lacking(settings, needed)
        return Refused(f"{what}: {found.str()} ({found.name()}); {problem}; {remedy}")
    return translate(error, what)


def translate(error: KafkaError | KafkaException | None, what: str = "") -> PublishError:
    """Return our error for one of librdkafka's.

    Args:
        error: From a delivery report or an exception.
        what: What was being done, for the message.
    """
    if isinstance(error, KafkaException):
        error = error.args[0]
    if not isinstance(error, KafkaError):
        return NotAcknowledged(f"{what}: {error}" if what else str(error))
    code = error.code()
    text = f"{what}: {error.str()} ({error.name()})" if what else f"{error.str()} ({error.name()})"
    if code in _TOO_LARGE:
        return TooLarge(text)
    if code in _NO_SUCH_TOPIC:
        return NoSuchTopic(f"{text}; create the topics: `celery -A proj pipeline init`")
    if code in _REFUSED:
        remedy = _REMEDIES.get(code)
        return Refused(f"{text}; {remedy}" if remedy else text)
    return NotAcknowledged(text)
