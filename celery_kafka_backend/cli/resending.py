"""Tasks' messages sent again, none twice: announced in a transaction of Kafka's, sent to the broker, said as sent.

The transactional id is the one of `dealing`: whoever begins shuts out who began before, and what is read after that is
all that was ever announced. The broker knows nothing of that transaction. So whoever announced sends at once or not at
all (`LEASE_S`), and who comes later waits as long, and then sends what nobody is known to have sent, as the same run.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
from confluent_kafka import KafkaException
from kombu.exceptions import KombuError
from kombu.utils import json as kombu_json

from celery_kafka_backend import codec, events
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.records import batches
from celery_kafka_backend.cli.sources import log_of
from celery_kafka_backend.cli.transaction import SHUT_OUT, commit, is_shut_out, undo
from celery_kafka_backend.errors import CodecError
from celery_kafka_backend.events import Event
from celery_kafka_backend.producer import headers as names
from celery_kafka_backend.rerunning import candidate, message_of, next_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from celery_kafka_backend.cli.broker import Broker
    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.pace import Pace
    from celery_kafka_backend.past import At
    from celery_kafka_backend.query import Query
    from celery_kafka_backend.rerunning import Candidate, Message

BATCH: Final = 100
LEASE_S: Final = 10.0
"""So long after it was announced a message may be sent by whoever did that."""
CLOCKS_S: Final = 5.0
"""Two operators' clocks may differ by so much."""
LOOK_S: Final = 0.5

_HEADERS: Final = (names.RUN, names.HLC, names.SENT_AT, names.TASK)


class Lives:
    """The events of some tasks, read from the log as far as it goes.

    Args:
        broker: Kafka.
        tasks: Their ids.
    """

    def __init__(self, broker: Broker, tasks: Iterable[str]) -> None:
        self._broker = broker
        self._topic = log_of(broker)
        self._keys = {task.encode() for task in tasks}
        self._next: dict[At, int] = {}
        self.events: dict[str, list[Event]] = {}

    def go_on(self) -> None:
        """Read what has come since, to the end as it is now."""
        marks = {(self._topic, n): ends for n, ends in self._broker.ends(self._topic).items()}
        parts = {at: (max(self._next.get(at, low), low), high) for at, (low, high) in marks.items()}
        for found in batches(self._broker, parts):
            for message in found:
                value = message.value()
                if value is not None and message.key() in self._keys:
                    self._take(value)
        self._next = {at: high for at, (_, high) in marks.items()}

    def _take(self, value: bytes) -> None:
        try:
            event = codec.decode(value)
        except CodecError:
            return
        self.events.setdefault(event.task, []).append(event)

    def candidates(self, query: Query) -> list[Candidate]:
        """Return those that are as asked for, oldest first."""
        found = [one for life in self.events.values() if (one := candidate(life, query)) is not None]
        return sorted(found, key=lambda one: (one.said.at, one.task))


class Resending:
    """An operator at work.

    Args:
        pipeline: Whose tasks.
        broker: Kafka.
        by: Who.
        reason: Why.
    """

    def __init__(self, pipeline: Pipeline, broker: Broker, by: str, reason: str) -> None:
        self._app = pipeline.app
        self._recorder: Any = pipeline.app.backend.recorder
        self._broker = broker
        self._by = by
        self._reason = reason
        self._producer: Any = None
        self.sent: list[str] = []

    def begin(self) -> None:
        """Shut out whoever was at it.

        Raises:
            Stop: Kafka does not let us, or does not answer.
        """
        self._producer = self._broker.transactional()

    def settled(self, lives: Lives, query: Query) -> list[Candidate]:
        """Return what is left to do, once it is certain what another operator, who was shut out, has done."""
        while True:
            lives.go_on()
            found = lives.candidates(query)
            latest = max((one.announced_at for one in found), default=0)
            if time.time() - latest / 1000 > LEASE_S + CLOCKS_S:
                return found
            time.sleep(LOOK_S)

    def run(self, lives: Lives, found: Sequence[Candidate], pace: Pace, at_once: int) -> Iterator[int]:
        """Send messages again; yield how many, as it goes.

        Raises:
            Stop: Somebody else has begun, or the broker or Kafka does not take it; what is announced and not sent is
                sent by whoever asks for it again.
        """
        for start in range(0, len(found), at_once):
            some = found[start : start + at_once]
            pace.take(len(some))
            now = self._recorder.clock.wall_ms()
            runs = [one.run or next_run(lives.events[one.task], now) for one in some]
            self._announce(some, runs)
            deadline = time.monotonic() + LEASE_S
            said = []
            for one, run in zip(some, runs, strict=True):
                if time.monotonic() > deadline:
                    raise self._stopped("the broker is slow, and what was announced is now for others to send")
                said.append(self._send(one, run))
            for delivery in said:
                delivery.wait(self._broker.timeout_s)
            yield len(some)

    def _announce(self, some: Sequence[Candidate], runs: Sequence[int]) -> None:
        recorder, producer = self._recorder, self._producer
        try:
            producer.begin_transaction()
            for one, run in zip(some, runs, strict=True):
                record = recorder.record(self._intent(one, run))
                producer.produce(record.topic, record.value, record.key, headers=list(record.headers))
            commit(producer, self._broker.timeout_s)
        except (KafkaException, SystemError) as exc:
            error = undo(producer, self._broker.timeout_s, exc)
            if is_shut_out(error):
                raise self._stopped(SHUT_OUT) from exc
            raise self._broker.translated(error, f"{len(self.sent)} sent, then") from exc

    def _intent(self, one: Candidate, run: int) -> Event:
        clock = self._recorder.clock
        clock.observe(one.said.hlc)
        return Event(
            id=os.urandom(16).hex(),
            kind=events.RERUN,
            task=one.task,
            at=clock.wall_ms(),
            hlc=clock.tick(),
            role=events.OPERATOR,
            host=self._recorder.host,
            pid=os.getpid(),
            run=run,
            name=one.said.name,
            by=self._by,
            message=self._reason,
            expires_at=self._recorder.knowledge_expires(),
        )

    def _send(self, one: Candidate, run: int) -> Any:
        """Hand a message to the broker, and say so; return that event's delivery."""
        assert one.sent is not None
        clock = self._recorder.clock
        now, hlc = clock.wall_ms(), clock.tick()
        message = message_of(one.sent, run, hlc, now, _HEADERS)
        try:
            self._publish(message)
        except (KombuError, OSError, *self._app.connection_for_write().connection_errors) as exc:
            raise self._stopped(f"the broker did not take {one.task}: {exc}") from exc
        self.sent.append(one.task)
        event = msgspec.structs.replace(
            one.sent,
            id=os.urandom(16).hex(),
            at=now,
            hlc=hlc,
            run=run,
            role=events.OPERATOR,
            host=self._recorder.host,
            pid=os.getpid(),
            attempt=0,
            eta=one.sent.eta if message.headers.get("eta") else None,
            sent_at=now,
            by=self._by,
            parcel=msgspec.structs.replace(message.parcel, headers=message.headers),
            expires_at=self._recorder.knowledge_expires(),
        )
        return self._recorder.publisher.publish(self._recorder.record(event), wait_s=self._broker.timeout_s)

    def _publish(self, message: Message) -> None:
        app, parcel = self._app, message.parcel
        # To the default exchange the queue is the key; a broker that has lost it would drop the message.
        queue = app.amqp.queues[message.routing_key] if not message.exchange else None
        with app.producer_or_acquire() as producer:
            producer.publish(
                parcel.body,
                content_type=parcel.content_type,
                content_encoding=parcel.content_encoding,
                headers=kombu_json.loads(msgspec.json.encode(message.headers)),
                exchange=message.exchange,
                routing_key=message.routing_key,
                declare=[queue] if queue is not None else [],
                retry=True,
                retry_policy={**app.conf.task_publish_retry_policy, "max_retries": 3},
                delivery_mode=app.conf.task_default_delivery_mode,
                **kombu_json.loads(msgspec.json.encode(parcel.properties)),
            )

    def _stopped(self, why: str) -> Stop:
        return Stop(
            Exit.NOT_DONE,
            f"{why}; {len(self.sent)} were sent",
            "the same command, with the same --until, sends the rest",
        )
