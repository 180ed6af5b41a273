"""Dead letters: records that could not be folded or written, kept with everything needed to look into them.

Record of ``<prefix>.dead-letters``::

    key       the original key
    value     the original value, byte for byte; cut to its first 64 KiB if Kafka finds the letter
              too large (the original is still in its topic, at the position given)
    headers   the original headers (none if even the cut letter was too large), then ours; of two
              with one name the last is ours
              reason      why, for people, at most 1,000 characters
              topic       where it came from,
              partition     decimal text
              offset        decimal text
              at          when it was given up, ms since 1970, decimal text
              by          who gave it up: the consumer group, or ``replay``
              size        bytes of the original value; only if it was cut

The same record may be here twice: a processor that dies between the acknowledgement and its commit
reads the record again, and gives it up again.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
from confluent_kafka import KafkaException, Producer

from celery_kafka_backend.errors import NotAcknowledged, PublishError, TooLarge
from celery_kafka_backend.kafka import translate
from celery_kafka_backend.order import system_wall_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from confluent_kafka import KafkaError, Message

REASON_LIMIT: Final = 1_000
CUT_BYTES: Final = 65_536

Headers: TypeAlias = "list[tuple[str, str | bytes | None]]"


class _Letter(msgspec.Struct):
    key: bytes | None
    value: bytes | None
    theirs: Headers
    ours: Headers
    in_flight: bool = False


class DeadLetters:
    """Sends dead letters. For one thread of one process.

    The producer is made with the first letter: most processors never need its threads.

    Args:
        producer_config: Options of a producer that waits for every replica (`kafka.producer_config`).
        topic: Where they go.
        by: Who gives records up.
        wall_ms: The wall clock, ms since 1970.
        make: What makes the producer.
    """

    def __init__(
        self,
        producer_config: Mapping[str, Any],
        topic: str,
        *,
        by: str = "",
        wall_ms: Callable[[], int] = system_wall_ms,
        make: Callable[[dict[str, Any]], Any] = Producer,
    ) -> None:
        self._make = make
        self._config = dict(producer_config)
        self._topic = topic
        self._by = by
        self._wall_ms = wall_ms
        self._producer: Producer | None = None
        self._pending: dict[int, _Letter] = {}
        self._numbers = count()
        self._error: PublishError | None = None

    def put(
        self,
        topic: str,
        partition: int,
        offset: int,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, str | bytes | None]] | None,
        reason: str,
    ) -> None:
        """Take a record from ``topic``; it is not safe before `flush` has returned."""
        ours = letter_headers(topic, partition, offset, reason, self._wall_ms(), self._by)
        self._pending[next(self._numbers)] = _Letter(key, value, list(headers or ()), ours)

    def flush(self, timeout_s: float = 1.0) -> None:
        """Return when every letter is acknowledged.

        After an error every unacknowledged letter is still held: call again.

        Raises:
            NotAcknowledged: Not all were within ``timeout_s``.
            Refused: Kafka will not take them: the topic is missing, or a right.
        """
        if not self._pending:
            return
        if self._producer is None:
            self._producer = self._make(self._config)
        self._error = None
        for number, letter in list(self._pending.items()):
            if not letter.in_flight:
                self._send(number, letter)
        self._producer.flush(timeout_s)
        if self._pending:
            waiting = f"{len(self._pending)} dead letters for {self._topic}"
            raise self._error or NotAcknowledged(f"{waiting} not acknowledged within {timeout_s:g} s")

    def _send(self, number: int, letter: _Letter) -> None:
        assert self._producer is not None

        def delivered(error: KafkaError | None, _message: Message) -> None:
            letter.in_flight = False
            if error is None:
                self._pending.pop(number, None)
            else:
                self._failed(letter, error)

        try:
            self._producer.produce(
                self._topic,
                value=letter.value,
                key=letter.key,
                headers=letter.theirs + letter.ours,
                on_delivery=delivered,
            )
            letter.in_flight = True
        except BufferError:  # librdkafka's queue is full: the flush makes room, the next one sends it
            pass
        except KafkaException as exc:
            self._failed(letter, exc)

    def _failed(self, letter: _Letter, error: KafkaError | KafkaException) -> None:
        self._error = translate(error, f"dead letter for {self._topic}")
        if isinstance(self._error, TooLarge):
            _cut(letter)


def letter_headers(topic: str, partition: int, offset: int, reason: str, at: int, by: str) -> Headers:
    """Return our headers of a letter."""
    return [
        ("reason", reason[:REASON_LIMIT].encode(errors="replace")),
        ("topic", topic.encode()),
        ("partition", b"%d" % partition),
        ("offset", b"%d" % offset),
        ("at", b"%d" % at),
        ("by", by.encode()),
    ]


def _cut(letter: _Letter) -> None:
    """Make a letter fit: a record just under the limit is over it with our headers."""
    value = letter.value or b""
    if len(value) > CUT_BYTES:
        letter.ours.append(("size", b"%d" % len(value)))
        letter.value = value[:CUT_BYTES]
    else:  # so it was the key or the headers
        letter.key, letter.theirs = (letter.key or b"")[:CUT_BYTES], []
