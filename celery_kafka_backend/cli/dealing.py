"""Dealing with dead letters, none twice: each batch is a transaction of what is appended again and of the record of it.

The transactional id is the same for every operator. So whoever begins shuts out who began before, Kafka first ends
what that one left open, and what is read after that is all that was ever done.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Producer

from celery_kafka_backend import topics
from celery_kafka_backend.cli.exits import Exit, Stop, no_topic
from celery_kafka_backend.cli.records import batches, firsts
from celery_kafka_backend.cli.transaction import SHUT_OUT, commit, is_shut_out, undo
from celery_kafka_backend.letters import (
    DROP,
    HEADER_ACTION,
    KEY,
    REQUEUE,
    Cases,
    Deeds,
    Done,
    Log,
    Place,
    Raw,
    encode,
    refusal,
    theirs,
)
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.rights import OPERATOR, Right

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from confluent_kafka import Message

    from celery_kafka_backend.cli.broker import Broker
    from celery_kafka_backend.letters import Case
    from celery_kafka_backend.past import At, Span
    from celery_kafka_backend.settings import Settings

BATCH: Final = 100
BATCH_BYTES: Final = 8 << 20
SETTLE_S: Final = 0.02


class Refused(NamedTuple):
    """A case that is left as it is, and why."""

    case: Case
    why: str


def log_of(settings: Settings) -> Log:
    """Return whose records may be dead letters."""
    prefix = settings.topic_prefix
    return Log(topics.task_events(prefix), topics.chords(prefix), settings.chord_key, settings.retention_ms)


class Reading:
    """The dead letters, read so far.

    Args:
        broker: Kafka.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.topic = topics.dead_letters(broker.settings.topic_prefix)
        self.cases = Cases(log_of(broker.settings))
        self._next: dict[At, int] = {}

    def go_on(self) -> None:
        """Read what has come since, to the end as it is now."""
        if not self._broker.partitions(self.topic):
            raise no_topic(self.topic)
        marks = {(self.topic, n): ends for n, ends in self._broker.ends(self.topic).items()}
        parts = {at: (max(self._next.get(at, low), low), high) for at, (low, high) in marks.items()}
        for found in batches(self._broker, parts):
            for record in map(_raw, found):
                self.cases.take(record)
        self._next = {at: high for at, (_, high) in marks.items()}


def _raw(message: Message) -> Raw:
    headers: Any = message.headers() or ()
    place = Place(message.topic() or "", message.partition() or 0, message.offset() or 0)
    return Raw(place, message.key(), message.value(), headers)


def letters_of(broker: Broker, cases: Sequence[Case]) -> Iterator[tuple[Case, Raw]]:
    """Yield the first letter of each case."""
    wanted = {case.letters[0].place: case for case in cases}
    parts: dict[At, Span] = {}
    for place in wanted:
        start, end = parts.get((place.topic, place.partition), (place.offset, place.offset + 1))
        parts[place.topic, place.partition] = min(start, place.offset), max(end, place.offset + 1)
    for found in batches(broker, parts):
        for letter in map(_raw, found):
            case = wanted.get(letter.place)
            if case is not None:
                yield case, letter


def original(broker: Broker, case: Case, letter: Raw) -> Raw | None:
    """Return a record as it was; None if its letter was cut, and it is not in its own topic any more."""
    if not case.content.cut:
        return letter._replace(place=case.record, headers=theirs(letter.headers))
    at = (case.record.topic, case.record.partition)
    low, high = broker.ends(at[0]).get(at[1], (0, 0))
    if not low <= case.record.offset < high:
        return None
    found = firsts(broker, {at: (case.record.offset, high)}).get(at)
    if found is None or found.offset() != case.record.offset:
        return None
    return _raw(found)


class Dealing:
    """An operator at work. Nobody else is, from `begin` on.

    Args:
        broker: Kafka.
        by: Who.
        reason: Why.
    """

    def __init__(self, broker: Broker, by: str, reason: str) -> None:
        self._broker = broker
        self._by = by
        self._reason = reason
        self._log = log_of(broker.settings)
        self._producer: Producer | None = None
        self._written: dict[At, int] = {}
        self.done: list[Done] = []
        self.refused: list[Refused] = []

    def begin(self) -> None:
        """Shut out whoever was at it.

        Raises:
            Stop: Kafka does not let us, or does not answer.
        """
        self._producer = self._broker.transactional()

    def sort(self, cases: Iterable[Case], action: str) -> list[Case]:
        """Return the cases for which an action is right; the others are `refused`."""
        now = system_wall_ms()
        able = []
        for case in cases:
            why = refusal(self._log, case, now, action=action)
            if why:
                self.refused.append(Refused(case, why))
            else:
                able.append(case)
        return able

    def drop(self, cases: Sequence[Case]) -> Iterator[int]:
        """Record that nothing will be done about some cases; yield how many, as it goes."""
        for start in range(0, len(cases), BATCH):
            some = cases[start : start + BATCH]
            self._commit([], DROP, [Done(case.record) for case in some])
            yield len(some)

    def requeue(self, cases: Sequence[Case]) -> Iterator[int]:
        """Append the records of some cases again; yield how many cases were seen to, as it goes."""
        some: list[tuple[Case, Raw]] = []
        seen = 0
        for case, letter in letters_of(self._broker, cases):
            seen += 1
            found = original(self._broker, case, letter)
            if found is None:
                self.refused.append(Refused(case, "the letter was cut, and the record is no longer in its topic"))
                continue
            some.append((case, found))
            if len(some) == BATCH or sum(len(one.value or b"") for _, one in some) > BATCH_BYTES:
                self._commit(some, REQUEUE, [])
                yield seen
                some, seen = [], 0
        if some:
            self._commit(some, REQUEUE, [])
        yield seen

    def _commit(self, originals: Sequence[tuple[Case, Raw]], action: str, done: list[Done]) -> None:
        """Append records and what says so, all or nothing."""
        producer = self._producer
        assert producer is not None
        try:
            producer.begin_transaction()
            done = [*done, *self._append(producer, originals)]
            now = system_wall_ms()
            deeds = Deeds(action=action, at=now, by=self._by, reason=self._reason, done=done)
            topic = topics.dead_letters(self._broker.settings.topic_prefix)
            if done:
                headers: Any = [(HEADER_ACTION, action.encode())]
                producer.produce(topic, encode(deeds), KEY, headers=headers, on_delivery=self._note)
            commit(producer, self._broker.timeout_s)
        except (KafkaException, SystemError) as exc:
            raise self._failed(undo(producer, self._broker.timeout_s, exc)) from exc
        self.done += done

    def _note(self, error: KafkaError | None, message: Message) -> None:
        if error is None:  # otherwise the commit says it
            place = _raw(message).place
            self._written[place.topic, place.partition] = place.offset

    def settle(self) -> None:
        """Return when what was done can be read: a transaction's end takes a moment to reach its partitions."""
        deadline = time.monotonic() + self._broker.timeout_s
        while time.monotonic() < deadline:
            ends = {topic: self._broker.ends(topic) for topic, _ in self._written}
            if all(ends[topic][n][1] > offset for (topic, n), offset in self._written.items()):
                return
            time.sleep(SETTLE_S)

    def _append(self, producer: Producer, originals: Sequence[tuple[Case, Raw]]) -> list[Done]:
        """Append records as they were, and return where they stand."""
        done: list[Done] = []
        errors: list[KafkaError] = []

        def of(case: Case) -> Callable[[KafkaError | None, Message], None]:
            def delivered(error: KafkaError | None, message: Message) -> None:
                if error is None:
                    self._note(None, message)
                    done.append(Done(case.record, _raw(message).place))
                else:
                    errors.append(error)

            return delivered

        expected = len(originals)
        for case, one in originals:
            # A chord lives in one partition for ever; a task where its key says, however many there are by now.
            partition = case.record.partition if case.record.topic == self._log.chords else -1
            headers: Any = list(one.headers)
            try:
                producer.produce(
                    case.record.topic, one.value, one.key, partition=partition, headers=headers, on_delivery=of(case)
                )
            except KafkaException as exc:
                if exc.args[0].code() != KafkaError.MSG_SIZE_TOO_LARGE:
                    raise
                self.refused.append(Refused(case, f"larger than max_message_bytes: {len(one.value or b'')} bytes"))
                expected -= 1
        producer.flush(self._broker.timeout_s)
        if errors:
            raise KafkaException(errors[0])
        if len(done) < expected:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))  # noqa: SLF001
        return done

    def _failed(self, error: KafkaError) -> Stop:
        if is_shut_out(error):
            return Stop(
                Exit.NOT_DONE,
                f"{SHUT_OUT} after {len(self.done)}",
                "`pipeline dead-letters list` shows what was done; what was not can be asked for again",
            )
        writes = [Right(OPERATOR, "topic", name, "Write") for name in (self._log.events, self._log.chords)]
        return self._broker.translated(error, f"{len(self.done)} dealt with, then", *writes)
