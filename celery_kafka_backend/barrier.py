"""The read barrier: what the log says of a task or a saved group beyond what a view shows.

A view lags, by milliseconds or, while no processor runs, for ever. A reader that must not be fooled
asks Kafka where the partition of that one id ends, waits a moment for the view to get there, and
else reads the rest itself, from the view's position to that end. Everything is bounded.

Who needs it and what is safe where nobody can tell is the backend's to know; docs/adr/0013 has the
reasons. Knows no Celery. Rights: Describe and Read on the log; no consumer group is joined.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from celery_kafka_backend import codec, events, kafka, order, past, places, topics
from celery_kafka_backend.changes import GROUP, TASK, Partition, beats
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import PublishError, UnknownVersion, Unreadable, Unsure
from celery_kafka_backend.producer import greenlets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from confluent_kafka import Message

    from celery_kafka_backend.events import Event
    from celery_kafka_backend.producer.publisher import Stored
    from celery_kafka_backend.reader import Reader
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import Shown

    Positions = Callable[[], Mapping[Partition, int]]

WAIT_S: Final = 0.5
WAIT_SHARE: Final = 0.25
"""How long, and for which share of the time there is, the view may catch up before the log is read instead."""
POLL_FIRST_S: Final = 0.002
POLL_MAX_S: Final = 0.02
SILENT_S: Final = 5.0
"""A Kafka that did not answer is not asked again for so long: a worker's loop must not stand still for each id of
a revoke."""
ALLOWANCE_S: Final = 4.0
ALLOWANCE_SHARE: Final = 0.2
LEADER_S: Final = 0.05
"""Pause before asking again for a partition that has no leader at the moment."""
CHUNK: Final = 1000
KEPT: Final = 1000
"""Writes of this process that the view has not shown yet."""

_Answer = TypeVar("_Answer")

_parked: Final[list[Any]] = []


# -- what is shown: pure -----------------------------------------------------------------------


def greatest(found: Sequence[Event]) -> Event | None:
    """Return the event that a document shows, of those that one may show; None if there are none."""
    winner = None
    for event in found:
        if event.shows and (winner is None or beats(event, winner)):
            winner = event
    return winner


def document_after(shown: Shown | None, event: Event | None, now_ms: int) -> bytes | None:
    """Return the document that a view will show once it has folded an event, or None for nothing.

    Args:
        shown: What it shows now.
        event: The winner of what it has not folded yet, if any.
        now_ms: The wall clock, ms since 1970; what has expired is not shown.
    """
    if event is None or (shown is not None and (shown.key, shown.event_id) >= (event.key, event.id)):
        return shown.document if shown is not None else None
    return document_of(event, now_ms)


def document_of(event: Event, now_ms: int) -> bytes | None:
    """Return what an event shows: None for a tombstone, or if it has expired."""
    if event.kind in events.TOMBSTONES or 0 < (event.expires_at or 0) <= now_ms:
        return None
    return event.document


# -- the barrier -------------------------------------------------------------------------------


class Allowance:
    """How long an event loop may stand still for reads: so much at once, and a share of the time in the long run.

    Args:
        most_s: What may be spent after a long rest.
        share: What comes back per second.
        clock: Seconds, monotonic.
    """

    def __init__(self, most_s: float, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_s = self._left_s = most_s
        self._share = share
        self._clock = clock
        self._at = clock()

    def left_s(self) -> float:
        """Return what may be spent now, 0 or less for nothing."""
        now = self._clock()
        self._left_s = min(self._left_s + (now - self._at) * self._share, self._most_s)
        self._at = now
        return self._left_s

    def spend(self, seconds: float) -> None:
        """Take it away."""
        self._left_s -= seconds


class Barrier:
    """Asks the log, for one process and all its threads.

    Args:
        settings: The user's.
    """

    def __init__(self, settings: Settings) -> None:
        self._log = _Log(settings)
        self._silent: tuple[float, str] | None = None
        self._stuck: dict[Partition, int] = {}
        self.allowance = Allowance(ALLOWANCE_S, ALLOWANCE_SHARE)
        """For whoever reads in an event loop: a revoke of a thousand ids is a thousand reads in a row."""
        self._unshown: OrderedDict[tuple[str, str], tuple[Stored, Event]] = OrderedDict()

    def task_document(
        self, reader: Reader, task_id: str, timeout_s: float, now_ms: int, spooled: Sequence[Event] = ()
    ) -> bytes | None:
        """Return the document of a task as of now, whatever the view shows.

        Args:
            reader: Reads the view.
            task_id: The task's id.
            timeout_s: Bound on asking the log.
            now_ms: The wall clock, ms since 1970.
            spooled: Events that this host has stored and Kafka may not have yet.

        Raises:
            Unsure: As `beyond`, unless a success is spooled: Kafka has nothing to say against it.
            Unavailable: As `beyond`.
        """
        try:
            event = self.beyond(TASK, task_id, reader.positions, timeout_s)
        except Unsure:
            event = greatest(spooled)
            if event is None or event.kind != events.SUCCESS:
                raise
        else:
            event = greatest([*spooled, event]) if event is not None else greatest(spooled)
        return document_after(reader.shown(task_id), event, now_ms)

    def group_document(self, reader: Reader, group_id: str, timeout_s: float, now_ms: int) -> bytes | None:
        """Return the document of a saved group as of now, whatever the view shows.

        A view does not tell a group's order key: what it has not folded yet counts as later than what it shows.

        Raises:
            Unsure: As `beyond`.
            Unavailable: As `beyond`.
        """
        event = self.beyond(GROUP, group_id, reader.positions, timeout_s)
        return document_of(event, now_ms) if event is not None else reader.groups([group_id]).get(group_id)

    def beyond(self, subject: str, subject_id: str, positions: Positions, timeout_s: float) -> Event | None:
        """Return the winner among the events that the view had not folded when asked; None: it has them all.

        To be combined with what the view shows *after* this by `document_after`.

        Args:
            subject: `changes.TASK` or `changes.GROUP`.
            subject_id: Its id.
            positions: How far the view is.
            timeout_s: Bound on all of it.

        Raises:
            Unsure: Kafka did not answer, refused, or there was too much to read in that time.
            Unavailable: The view does not say how far it is.
        """
        with self._bounded(timeout_s) as deadline:
            ends = self._log.ends([subject_id], deadline, positions)
            wait_s = min(WAIT_S, WAIT_SHARE * (deadline - time.monotonic()))
            behind = self._behind(ends, positions, time.monotonic() + wait_s)
            found: list[Event] = []
            for partition, (start, end) in behind.items():
                found += self._log.events_of(subject, subject_id, partition, (start, end), deadline)
            return greatest(found)

    def caught_up(self, ids: Sequence[str], positions: Positions, timeout_s: float, *, patient: bool = True) -> bool:
        """Wait until the view shows all that the log had of some ids when asked; return False if it did not in time.

        Needs the right Describe only. Who is not ``patient`` does not wait for a view that stands still.

        Raises:
            Unsure: As `beyond`, except that nothing is read.
            Unavailable: As `beyond`.
        """
        with self._bounded(timeout_s) as deadline:
            ends = self._log.ends(ids, deadline, positions)
            return not self._behind(ends, positions, deadline, patient=patient)

    def passed(self, stored: Stored, positions: Positions, timeout_s: float, *, patient: bool = True) -> bool:
        """Wait until the view has folded a record of this process; return False if it did not in time.

        Asks Kafka nothing: two questions less than `caught_up`. Who is not ``patient`` does as there.

        Raises:
            Unavailable: As `beyond`.
        """
        ends = {stored.partition: (0, stored.offset + 1)}
        return not self._behind(ends, positions, time.monotonic() + timeout_s, patient=patient)

    def complete(self, positions: Positions, timeout_s: float) -> bool:
        """Wait until a view shows all that the log holds now; return False if it did not in time.

        Raises:
            Unsure: As `caught_up`.
            Unavailable: As `beyond`.
        """
        with self._bounded(timeout_s) as deadline:
            return not self._behind(self._log.ends(None, deadline, positions), positions, deadline, patient=True)

    @contextmanager
    def _bounded(self, timeout_s: float) -> Iterator[float]:
        """Give a deadline; where Kafka did not answer a moment ago, say at once that it did not."""
        if self._silent is not None and time.monotonic() < self._silent[0]:
            raise Unsure(self._silent[1])
        try:
            yield time.monotonic() + timeout_s
        except PublishError as exc:
            self._silent = time.monotonic() + SILENT_S, str(exc)
            raise Unsure(str(exc)) from exc
        self._silent = None

    def _behind(
        self,
        ends: Mapping[Partition, tuple[int, int]],
        positions: Positions,
        wait_until: float,
        *,
        patient: bool = False,
    ) -> dict[Partition, tuple[int, int]]:
        """Wait for the view, and return the offsets of each partition that it has not folded, first and end.

        A view that has not moved since somebody waited for it in vain is not waited for again.
        """
        pause = POLL_FIRST_S
        while True:
            at = positions()
            # A partition without a position was empty, so far. What retention has deleted, nobody can read.
            behind = {
                partition: (max(at.get(partition, 0), low), end)
                for partition, (low, end) in ends.items()
                if max(at.get(partition, 0), low) < end
            }
            if not behind:
                return behind
            stuck = not patient and all(self._stuck.get(one) == at.get(one, 0) for one in behind)
            if stuck or time.monotonic() >= wait_until:
                self._stuck.update((one, at.get(one, 0)) for one in behind)
                return behind
            time.sleep(max(min(pause, wait_until - time.monotonic()), 0.0))
            pause = min(pause * 1.5, POLL_MAX_S)

    # -- what this process wrote itself ------------------------------------------------------

    def keep_unshown(self, event: Event, stored: Stored) -> None:
        """Remember a write of this process that the view has not shown, so that its own reads see it."""
        subject = _subject(event)
        self._unshown[subject, event.task] = stored, event
        while len(self._unshown) > KEPT:
            self._unshown.popitem(last=False)

    def documents(self, reader: Reader, subject: str, ids: Sequence[str], now_ms: int) -> dict[str, bytes]:
        """Return the documents that a view shows of some ids, as they are after this process's own last writes.

        Raises:
            Unavailable: The view does not answer.
        """
        # Asked before the documents are read: what the view has folded by now, they show.
        unshown = {
            one: event
            for one in (ids if self._unshown else ())
            if (event := self._still_unshown(subject, one, reader.positions)) is not None
        }
        found = reader.documents(ids) if subject == TASK else reader.groups(ids)
        for one, event in unshown.items():
            document = document_after(reader.shown(one) if subject == TASK else None, event, now_ms)
            if document is None:
                found.pop(one, None)
            else:
                found[one] = document
        return found

    def _still_unshown(self, subject: str, subject_id: str, positions: Positions) -> Event | None:
        kept = self._unshown.get((subject, subject_id))
        if kept is None:
            return None
        stored, event = kept
        if positions().get(stored.partition, 0) <= stored.offset:
            return event
        self._unshown.pop((subject, subject_id), None)
        return None


def _subject(event: Event) -> str:
    return GROUP if event.kind in events.GROUP_KINDS else TASK


class _Moved(NamedTuple):
    """Where events may be that belong elsewhere by now.

    Attributes:
        partitions: By how many that is said.
        since_ms: Since when all that is written is where it belongs; 0: it always was.
        ends: By partition: before which offset such events may stand. Those that the views have passed are taken out.
        final: Whether none can come to these.
    """

    partitions: int
    since_ms: int
    ends: dict[int, int]
    final: bool


class _Log:
    """Reads single partitions of the log, through a handle of its own that joins no group.

    Made when it is first needed and kept: the first answer takes tens of milliseconds, the next one less than one.
    After a fork it is parked, untouched, as a producer's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = topics.task_events(settings.topic_prefix)
        self._counts = {settings.partitions}
        self._moved = _Moved(0, 0, {}, final=False)
        self._reading = threading.Lock()
        self._making = threading.Lock()
        self._consumer: Any = None
        self._pid = 0

    def _handle(self) -> Any:
        if self._pid != os.getpid():
            if self._pid:  # a fork: another thread of the parent may have held these
                self._making, self._reading = threading.Lock(), threading.Lock()
            with self._making:
                if self._pid != os.getpid():
                    if self._consumer is not None:
                        _parked.append(self._consumer)
                    # Quiet: what it would complain of, the publisher does.
                    self._consumer = Complaints(self._settings, quiet=True).handle(Consumer, _config(self._settings))
                    self._pid = os.getpid()
        return self._consumer

    def ends(
        self, ids: Sequence[str] | None, deadline: float, positions: Positions
    ) -> dict[Partition, tuple[int, int]]:
        """Return first and end offset, as they are now, of every partition that may hold events of some ids; None: of all.

        Also where an id belonged before partitions were added, unless the view has passed all that was written then.

        Raises:
            PublishError: Kafka did not say.
        """
        handle = self._handle()
        while True:
            # Asked each time: a producer made after partitions were added uses them at once.
            partitions = self._partitions(handle, deadline)
            # Producers learn of new partitions within 30 s, and what they wrote before stays where it is.
            self._counts.add(len(partitions))
            known = set(partitions) if ids is None else self._places(ids, len(partitions))
            moved = {} if ids is None else self._moved_of(ids, len(partitions), positions, deadline)
            wanted = sorted({*known, *moved})
            leaderless = next((error for place in wanted if (error := partitions[place].error) is not None), None)
            if leaderless is None:
                break
            if time.monotonic() + LEADER_S > deadline:
                raise kafka.translate(leaderless, self._doing("Describe"))
            time.sleep(LEADER_S)  # the next leader is being chosen
        found = {}
        for place in wanted:
            at = TopicPartition(self._topic, place)
            with self._translated("Describe"):
                low, high = _ends(handle, at, deadline)
            found[Partition(self._topic, place)] = low, min(high, moved.get(place, high))
        return found

    def _places(self, ids: Sequence[str], there: int) -> set[int]:
        return {topics.partition_of(one, count) for one in ids for count in self._counts if count <= there}

    def _moved_of(self, ids: Sequence[str], there: int, positions: Positions, deadline: float) -> dict[int, int]:
        """Return where events of ids may be that belong elsewhere by now, and before which offset.

        A process that was started after partitions were added has never seen the earlier count: it may be any.
        """
        if self._moved.partitions != there or not self._moved.final:
            with self._translated("Describe"):
                _led(partial(self._look_for_moved, there, deadline), deadline)
        ends = self._moved.ends  # another thread may look again meanwhile
        if ends:
            at = positions()
            for n, end in list(ends.items()):
                if at.get(Partition(self._topic, n), 0) >= end:
                    ends.pop(n, None)
        if not ends:
            return {}
        may = {topics.partition_of(one, count) for one in ids for count in range(1, there)}
        home = self._places(ids, there)
        return {n: end for n, end in list(ends.items()) if n in may - home}

    def _look_for_moved(self, there: int, deadline: float) -> None:
        handle, now = self._handle(), order.system_wall_ms()
        count, since_ms, _, _ = self._moved
        if count != there:
            since_ms = self._all_home_since(handle, there, now, deadline)
        ends = self._first_offsets(handle, range(there), since_ms, deadline) if since_ms else {}
        final = since_ms < now
        for n in ends if final else ():
            if ends[n] == sys.maxsize:  # all that it has is older
                _, ends[n] = handle.get_watermark_offsets(TopicPartition(self._topic, n), timeout=_left(deadline))
        self._moved = _Moved(there, since_ms, ends, final)

    def _all_home_since(self, handle: Any, there: int, now: int, deadline: float) -> int:
        """Return since when, ms, all that is written is where it belongs; 0: it always was."""
        last = TopicPartition(self._topic, there - 1)
        low, high = handle.get_watermark_offsets(last, timeout=_left(deadline))
        if there == 1 or low:
            return 0  # as old as the log is kept
        begun = self._first_offsets(handle, range(there), now - places.HEARD_MS, deadline)
        # Not by these alone: a partition that has nothing new may be empty, or have nothing but what is older.
        if 0 in begun.values() and begun == self._first_offsets(handle, range(there), 0, deadline):
            return 0  # so young that nobody has added to it yet
        for age_ms in (7 * topics.DAY_MS, topics.DAY_MS, topics.DAY_MS // 8, places.HEARD_MS):
            if high and self._first_offsets(handle, [there - 1], now - age_ms, deadline)[there - 1]:
                return now - age_ms + places.HEARD_MS
        return now + places.HEARD_MS

    def _first_offsets(self, handle: Any, partitions: Iterable[int], since_ms: int, deadline: float) -> dict[int, int]:
        """Return of each partition the first offset that was written since then; `sys.maxsize` if there is none."""
        asked = [(self._topic, n) for n in partitions]
        found = past.offsets_at(handle, asked, since_ms, _left(deadline))
        return {at[1]: found.get(at, sys.maxsize) for at in asked}

    def _partitions(self, handle: Any, deadline: float) -> Mapping[int, Any]:
        ask = partial(handle.list_topics, self._topic, timeout=_left(deadline))
        with self._translated("Describe"):
            found = greenlets.aside(ask).topics[self._topic]
        if found.error is not None:
            raise kafka.translate(found.error, self._doing("Describe"))
        partitions: Mapping[int, Any] = found.partitions
        return partitions

    def events_of(
        self, subject: str, subject_id: str, partition: Partition, offsets: tuple[int, int], deadline: float
    ) -> list[Event]:
        """Return the events of one subject within some offsets of a partition.

        Raises:
            Unsure: There was too much to read in that time, or an event by newer software.
            PublishError: Kafka refused, or did not answer.
        """
        key = subject_id.encode()
        found = []
        # One scan at a time: threads share the handle.
        if not self._reading.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
            raise Unsure(f"other threads were reading {self._topic} all the time")
        try:
            for message in self._messages(partition, offsets, deadline):
                if message.key() != key:
                    continue
                try:
                    event = codec.decode(message.value())
                except UnknownVersion as exc:
                    raise Unsure(f"{self._topic} holds an event of {subject_id} that cannot be read: {exc}") from exc
                except Unreadable:
                    continue  # a dead letter: no view will ever show it
                if _subject(event) == subject:
                    found.append(event)
        finally:
            self._reading.release()
        return found

    def _messages(self, partition: Partition, offsets: tuple[int, int], deadline: float) -> Iterator[Message]:
        at, end = offsets
        handle = self._handle()
        try:
            with self._translated("Read"):
                handle.assign([TopicPartition(*partition, at)])
            while at < end:
                if time.monotonic() >= deadline:
                    raise Unsure(
                        f"the view is {end - offsets[0]} records behind in {partition.topic}/{partition.partition},"
                        f" of which {at - offsets[0]} could be read in time"
                    )
                for message in self._consume(handle, deadline):
                    error = message.error()
                    if error is None:
                        at = _offset(message) + 1
                        yield message
                    elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - how confluent-kafka names it
                        at = max(at, _offset(message))
                    elif error.code() in _FINAL:
                        raise kafka.translate(error, self._doing("Read"))
        finally:
            with self._translated("Read"):
                handle.unassign()

    def _consume(self, handle: Any, deadline: float) -> list[Message]:
        """Wait for the first message, then take what is there: ``consume(n, timeout)`` would wait for all n."""
        wait = partial(handle.poll, max(deadline - time.monotonic(), 0.0))
        with self._translated("Read"):
            first = greenlets.aside(wait)
            return [] if first is None else [first, *handle.consume(CHUNK, 0)]

    @contextmanager
    def _translated(self, right: str) -> Iterator[None]:
        try:
            yield
        except KafkaException as exc:
            raise kafka.translate(exc, self._doing(right)) from exc

    def _doing(self, right: str) -> str:
        return f"reading {self._topic} at {self._settings.bootstrap_servers} (with the right {right})"


_FINAL: Final = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
    KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
    KafkaError._AUTHENTICATION,  # noqa: SLF001
}
"""Errors that end a scan. A connection's are retried by librdkafka until the deadline. GROUP_AUTHORIZATION_FAILED means
nothing here: librdkafka looks for the coordinator of a group that it never joins."""


def _config(settings: Settings) -> dict[str, Any]:
    return {
        **kafka.consumer_config(settings, None),
        # The end of a partition is said even if it holds no record of ours: after control records.
        "enable.partition.eof": True,
        # A scan reads what is there already: Kafka need not wait for more.
        "fetch.wait.max.ms": 10,
    }


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)  # 0 would be librdkafka's "for ever"


def _ends(handle: Consumer, at: TopicPartition, deadline: float) -> tuple[int, int]:
    """Return where a partition begins and ends."""
    return _led(lambda: handle.get_watermark_offsets(at, timeout=_left(deadline)), deadline)


def _led(ask: Callable[[], _Answer], deadline: float) -> _Answer:
    """Return an answer; ask again while a new leader does not know yet that it is one."""
    while True:
        try:
            return greenlets.aside(ask)
        except KafkaException as exc:
            if exc.args[0].code() not in kafka.MOVING or time.monotonic() + LEADER_S > deadline:
                raise
        time.sleep(LEADER_S)


def _offset(message: Message) -> int:
    offset = message.offset()
    assert offset is not None
    return offset


_barriers: Final[dict[str, Barrier]] = {}


def barrier_for(settings: Settings) -> Barrier:
    """Return this process's barrier for some settings (``app.backend`` is per thread; this is not)."""
    return _barriers.setdefault(repr(msgspec.structs.asdict(settings)), Barrier(settings))
