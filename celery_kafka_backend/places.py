"""Where in the log the events of an id are: where its key belongs, and where it belonged before partitions were added.

Kafka keeps no history of how many partitions a topic had. So it is read off the log. A partition's oldest records tell
whether any are left of an earlier count: of every two keys at least one belonged elsewhere then. Where that is so, and
where the keys are too few to tell, all earlier counts are thought of. While there were `n` partitions, the last of them
was there, and got its share of the keys; once it has something, and until producers have heard that another was added,
an id may lie where it belongs among `n`. Knows no view and no Celery. Rights: Describe and Read on the log.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from confluent_kafka import KafkaException, TopicPartition

from celery_kafka_backend import past, topics
from celery_kafka_backend.kafka import translate
from celery_kafka_backend.order import system_wall_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from confluent_kafka import Consumer, Message

    from celery_kafka_backend.past import At, Span
    from celery_kafka_backend.settings import Settings

HEARD_MS: Final = 300_000
"""Within so long every record is where it belongs by the new count: producers ask every 30 s, and try for two minutes."""
SAMPLE: Final = 100
"""The oldest records of a partition, of which none is out of place if there was no other count …"""
ENOUGH: Final = 20
"""… and they have so many keys: of fewer, each may have stayed where it was."""
DEEPER: Final = 20_000
"""So many are looked at where those are few."""
SHARE: Final = 1_000
"""No partition gets so many records before the next one gets its first."""
STEP_MS: Final = 1_000
"""How late `first_written` may be."""


def earlier(key: str, firsts: Sequence[int]) -> list[tuple[int, Span]]:
    """Return in which other partitions events of a key may be, and from when to when they were written there, ms.

    Args:
        key: The key.
        firsts: Of each partition, in order, by when it had something.
    """
    home = topics.partition_of(key, len(firsts))
    found: list[tuple[int, Span]] = []
    more_by = firsts[-1]
    for count in range(len(firsts) - 1, 0, -1):
        more_by = min(more_by, firsts[count])
        place = topics.partition_of(key, count)
        if place != home:
            found.append((place, (firsts[count - 1] - HEARD_MS, more_by + HEARD_MS)))
    return _joined(found)


def _joined(found: Iterable[tuple[int, Span]]) -> list[tuple[int, Span]]:
    """Return spans with those that overlap as one."""
    joined: list[tuple[int, Span]] = []
    for place, span in sorted(found):
        last, known = joined[-1] if joined else (-1, span)
        if last == place and span[0] <= known[1]:
            joined[-1] = place, (known[0], max(span[1], known[1]))
        else:
            joined.append((place, span))
    return joined


class Oldest:
    """The oldest records of some partitions: whether any is left there of an earlier count.

    Args:
        topic: The log.
        marks: Of each of these partitions its first and its next offset.
        partitions: How many the topic has.
    """

    def __init__(self, topic: str, marks: Mapping[int, Span], partitions: int) -> None:
        self._topic = topic
        self._partitions = partitions
        self._left = {n: (low, high) for n, (low, high) in marks.items() if low < high}
        """Of each what was not looked at."""
        self._begins = {n: low for n, (low, _) in self._left.items()}
        self._keys: dict[int, set[bytes]] = {n: set() for n in self._left}
        self._moved: set[int] = set()

    @property
    def spans(self) -> dict[At, Span]:
        """The records to `see` first."""
        return self._next(SAMPLE)

    def see(self, message: Message) -> None:
        """Look at a record."""
        n, key = message.partition() or 0, message.key()
        self._left[n] = (message.offset() or 0) + 1, self._left[n][1]
        if key:
            self._keys[n].add(key)
            if topics.place_of(key, self._partitions) != n:
                self._moved.add(n)

    def moved(self, make: Callable[[], Consumer]) -> set[int]:
        """Return the partitions that have records of an earlier count, or of too few keys to tell.

        Args:
            make: Makes a consumer as `past.reader` does, for one read.

        Raises:
            PublishError: Kafka refused, or gave nothing for long.
        """
        for most in (SAMPLE, DEEPER):
            if wanted := self._next(most):
                consumer = make()
                try:
                    for found, _ in past.batches(consumer, wanted, SAMPLE):
                        for message in found:
                            self.see(message)
                finally:
                    consumer.close()
        return self._moved | self._unsure()

    def _next(self, most: int) -> dict[At, Span]:
        """Return what of the first ``most`` records is still to be looked at."""
        ends = {n: min(self._begins[n] + most, self._left[n][1]) for n in self._unsure()}
        return {(self._topic, n): (self._left[n][0], end) for n, end in ends.items() if self._left[n][0] < end}

    def _unsure(self) -> set[int]:
        few = {n for n, keys in self._keys.items() if len(keys) < ENOUGH and self._left[n][0] < self._left[n][1]}
        return few - self._moved


def oldest(topic: str, key: str, marks: Mapping[int, Span]) -> Oldest:
    """Return the oldest records of every other partition in which events of a key may be.

    Args:
        topic: The log.
        key: The key.
        marks: Of each partition its first and its next offset.
    """
    places = [topics.partition_of(key, count) for count in range(1, len(marks) + 1)]
    return Oldest(topic, {n: marks[n] for n in places if n != places[-1]}, len(marks))


def elsewhere(
    make: Callable[[], Consumer],
    topic: str,
    key: str,
    marks: Mapping[int, Span],
    held: Collection[int],
    timeout_s: float,
) -> list[tuple[At, Span]]:
    """Return the spans of other partitions in which events of a key may be.

    Args:
        make: Makes a consumer as `past.reader` does, for one read.
        topic: The log.
        key: The key.
        marks: Of each partition its first and its next offset.
        held: The partitions of which the oldest records are out of place, as `Oldest.moved` has them.
        timeout_s: Bound on each question to Kafka.

    Raises:
        KafkaException: It did not answer.
    """
    if not held:
        return []
    found = []
    consumer = make()
    try:
        for n, times in earlier(key, first_written(consumer, topic, marks, timeout_s)):
            if n in held:
                at, (low, high) = (topic, n), marks[n]
                start, end = (past.offsets_at(consumer, [at], time, timeout_s).get(at, high) for time in times)
                found.append((n, (max(low, start - SHARE), min(end, high))))
    finally:
        consumer.close()
    return [((topic, n), (start, end)) for n, (start, end) in _joined(found) if start < end]


def first_written(consumer: Consumer, topic: str, marks: Mapping[int, Span], timeout_s: float) -> list[int]:
    """Return of each partition by when it had something, ms since 1970: 0 where that was deleted, now where it has nothing.

    By the time index alone, which asks for the right Describe only; too late by `STEP_MS` at most.
    """
    now = system_wall_ms()
    bounds = {n: (0, 0) if low else (0 if high else now, now) for n, (low, high) in marks.items()}
    searched = [n for n, (low, high) in marks.items() if low == 0 < high]
    while searched and max(late - early for early, late in bounds.values()) > STEP_MS:
        middle = {n: sum(bounds[n]) // 2 for n in searched}
        asked = [TopicPartition(topic, n, at) for n, at in middle.items()]
        for answer in consumer.offsets_for_times(asked, timeout=timeout_s):
            n = answer.partition
            if answer.error is not None:
                raise KafkaException(answer.error)
            early, late = bounds[n]
            bounds[n] = (middle[n], late) if answer.offset == 0 else (early, middle[n])
    return [bounds[n][1] for n in sorted(marks)]


def of_task(
    settings: Settings, task_id: str, since_ms: int | None = None, until_ms: int | None = None, timeout_s: float = 10.0
) -> list[bytes]:
    """Return the record values of a task's events, those of each partition in the order of the log.

    Args:
        settings: The user's.
        task_id: The task.
        since_ms: Only what Kafka wrote since then, ms since 1970, by its time index; None: all that it has.
        until_ms: … and before then; None: up to now.
        timeout_s: Bound on each question to Kafka.

    Raises:
        PublishError: Kafka does not answer, or refuses; there is no such topic.
    """
    make = partial(past.reader, settings)
    consumer = make()
    topic, key = topics.task_events(settings.topic_prefix), task_id.encode()
    try:
        known = consumer.list_topics(topic, timeout=timeout_s)
        found = known.topics[topic]
        if found.error is not None:
            raise translate(found.error, topic)
        marks = {
            n: consumer.get_watermark_offsets(TopicPartition(topic, n), timeout=timeout_s) for n in found.partitions
        }
        home = (topic, topics.partition_of(task_id, len(marks)))
        embedded = str(known.cluster_id or "").startswith(past.EMBEDDED)  # it adds no partitions, and keeps no times
        span = marks[home[1]]
        if not embedded:
            span = _within(consumer, home, span, since_ms, until_ms, timeout_s)
        aside = oldest(topic, task_id, {} if embedded else marks)
        values = list(_values(make, home, span, key, aside))
        for at, there in elsewhere(make, topic, task_id, marks, aside.moved(make), timeout_s):
            span = _within(consumer, at, there, since_ms, until_ms, timeout_s)
            values += _values(make, at, span, key)
    except KafkaException as exc:
        raise translate(exc, f"reading {topic}") from exc
    else:
        return values
    finally:
        consumer.close()


def _within(
    consumer: Consumer, at: At, span: Span, since_ms: int | None, until_ms: int | None, timeout_s: float
) -> Span:
    start, end = span
    if since_ms is not None:
        start = max(start, past.offsets_at(consumer, [at], since_ms, timeout_s).get(at, end))
    if until_ms is not None:
        end = min(end, past.offsets_at(consumer, [at], until_ms, timeout_s).get(at, end))
    return start, end


def _values(
    make: Callable[[], Consumer], at: At, span: Span, key: bytes, aside: Oldest | None = None
) -> Iterator[bytes]:
    """Yield what a span has of a key, and look at the first of those aside."""
    consumer = make()
    try:
        for found, _ in past.batches(consumer, {at: span, **(aside.spans if aside else {})}):
            for message in found:
                if message.partition() == at[1]:
                    if message.key() == key:
                        yield message.value() or b""
                elif aside is not None:
                    aside.see(message)
    finally:
        consumer.close()
