"""Replay: a part of the log into a store. Nothing is run again.

For a store that is new, lost, or to be compared. It reads without a consumer group, beside whatever else runs, and
folds as the materializer does: the same events give the same rows, in any batches. Of the chords it reads facts to
show; it fires none. What has expired meanwhile is left out, and nothing lives longer than it would have (`bygone`).

**It can be killed at any moment.** How far it is stands in the store that it fills (`marks`), written with each batch,
behind what it promises; `plan.prepare` with ``go_on`` takes it up there.

**A view's own positions** are moved only where everything before the start is in the view already, or is gone from the
log: whoever reads them takes them for a promise. So not after a start in the middle, nor for a selection of tasks.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec
from confluent_kafka import KafkaException

from celery_kafka_backend import topics as names
from celery_kafka_backend.changes import GROUP, TASK, Batch, Partition
from celery_kafka_backend.errors import Rejected, Unavailable
from celery_kafka_backend.kafka import translate
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.pace import Pace
from celery_kafka_backend.past import BATCH, batches, reader
from celery_kafka_backend.processors import intake, marks
from celery_kafka_backend.processors.ahead import ahead
from celery_kafka_backend.processors.backoff import PATIENCE_S, insist
from celery_kafka_backend.processors.bygone import Bygone
from celery_kafka_backend.processors.plan import begin, prepare
from celery_kafka_backend.processors.selection import Chosen
from celery_kafka_backend.sinks.registry import keeps_history, open_sink, open_view

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping, Sequence

    from confluent_kafka import Message

    from celery_kafka_backend.changes import Change
    from celery_kafka_backend.processors.bygone import Life
    from celery_kafka_backend.processors.extent import Edge
    from celery_kafka_backend.processors.plan import Job, Target
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import View

logger = logging.getLogger(__name__)

NEVER: Final = 1 << 62

PACE_S: Final = 0.2
"""With a rate, how much of the log a batch holds."""


_WOULD: Final = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE would (subject TEXT, id TEXT, k INTEGER, event_id TEXT, kept INTEGER, PRIMARY KEY (subject, id)) WITHOUT ROWID;
"""
_NOTE_WOULD: Final = """
INSERT INTO would VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
SET k = excluded.k, event_id = excluded.event_id, kept = excluded.kept
WHERE excluded.k IS NOT NULL AND (k IS NULL OR (excluded.k, excluded.event_id) > (k, event_id))
"""


class Replayed(msgspec.Struct):
    """What a replay has done so far.

    Attributes:
        records: Records read.
        total: Records to read, by offsets (control records and compacted ones included).
        read: Of that total, what is behind us.
        events: Events folded.
        facts: Facts about chords written.
        changes: Tasks and groups written, once per batch; dry, when it is done: once each.
        shown: Dry, when it is done: how many of these say what a task shows …
        kept: … and in how many of these cases the store has that already, or something newer.
        expired: Tasks, groups and facts left out because they have expired, once per batch.
        remembered: Of these, tasks and groups of which the history keeps events for longer.
        unwanted: Events left out because their task is not wanted.
        poison: Records that nobody can read.
        rejected: Tasks and groups that the store refused.
    """

    records: int = 0
    total: int = 0
    read: int = 0
    events: int = 0
    facts: int = 0
    changes: int = 0
    shown: int = 0
    kept: int = 0
    expired: int = 0
    remembered: int = 0
    unwanted: int = 0
    poison: int = 0
    rejected: int = 0

    def __add__(self, other: Replayed) -> Replayed:
        """Return what both have done."""
        return Replayed(*(getattr(self, name) + getattr(other, name) for name in self.__struct_fields__))


def replay(
    settings: Settings,
    target: Target,
    *,
    from_: Edge = None,
    until: Edge = None,
    partitions: Collection[Partition] | None = None,
    on_progress: Callable[[Replayed], None] = lambda _: None,
    patience_s: float = PATIENCE_S,
) -> Replayed:
    """Feed a part of the log into a store, in this process. Arguments and errors as of `prepare` and `feed`."""
    prepared = prepare(settings, target, from_=from_, until=until, partitions=partitions, patience_s=patience_s)
    begin(target, prepared, patience_s)
    return feed(settings, target, prepared.job, on_progress, patience_s=patience_s)


def feed(
    settings: Settings,
    target: Target,
    job: Job,
    on_progress: Callable[[Replayed], None] = lambda _: None,
    *,
    patience_s: float = PATIENCE_S,
    wall_ms: Callable[[], int] = system_wall_ms,
) -> Replayed:
    """Do a job.

    Args:
        settings: The user's.
        target: The store.
        job: What.
        on_progress: Called after each batch.
        patience_s: How long to try again when the store is away.
        wall_ms: The wall clock, ms since 1970.

    Raises:
        Unavailable: The store was away for longer than ``patience_s``.
        SettingsError: The store refuses us.
        PublishError: Kafka does not answer.
    """
    done = Replayed(total=sum(end - start for start, end in job.spans.values()))
    if not job.spans:
        return done
    pen: _Pen = _DryPen(target) if job.dry else _SinkPen(target, patience_s)
    kept_ms = target.options.history_retention_ms if keeps_history(*target) else None
    pace = Pace(job.per_s)
    count = BATCH if job.per_s is None else max(1, min(BATCH, int(job.per_s * PACE_S)))
    # While the store works on a batch the next one is read and folded.
    coming = ahead(_read(settings, job, count, wall_ms, kept_ms))
    # Into an empty store, until something lives there, what has expired cannot matter.
    settled = not job.fresh
    try:
        pen.open()
        for batch, over, past, read in coming:
            done += read
            settled = settled or bool(batch.changes)
            late = pen.living(over) if settled and over else []
            for apart in filter(None, (late, past)):  # of some of these tasks the batch has a change, too
                pen.write(Batch(apart), done)
            pen.write(batch, done)
            on_progress(done)
            pace.take(read.records)
        pen.write(Batch([], (), marks.moved(job.number, {at: end for at, (_, end) in job.spans.items()})), done)
        pen.sum_up(done)
    except KafkaException as exc:
        raise translate(exc, "replay") from exc
    finally:
        coming.close()
        pen.close()
    return done


class _Read(NamedTuple):
    """What a batch of messages means to the store.

    Attributes:
        batch: What to write.
        over: What is over.
        past: What the history keeps of that.
        done: What was read.
    """

    batch: Batch
    over: list[Life]
    past: list[Change]
    done: Replayed


def _read(
    settings: Settings, job: Job, count: int, wall_ms: Callable[[], int], history_retention_ms: int | None
) -> Generator[_Read, None, None]:
    """Read what a job asks for, so many records at a time."""
    consumer = reader(settings)
    part = _Part(settings, job, wall_ms, history_retention_ms)
    try:
        for messages, moved in batches(consumer, job.spans, count):
            yield part.read(messages, moved)
    finally:
        consumer.close()
        part.close()


class _Part:
    """What a job's messages mean to the store."""

    def __init__(
        self, settings: Settings, job: Job, wall_ms: Callable[[], int], history_retention_ms: int | None
    ) -> None:
        self._job = job
        self._chords = names.chords(settings.topic_prefix)
        self._retention_ms = settings.retention_ms
        self._wall_ms = wall_ms
        self._chosen = Chosen(job.chosen) if job.chosen else None
        self._bygone = Bygone(history_retention_ms=history_retention_ms)
        self._at = {at: start for at, (start, _) in job.spans.items()}
        # When the log got the latest record that we looked at of each partition that has more.
        self._times = {at: 0 for at in job.spans if at.topic != self._chords}
        # What is kept of expired things is gone with this process: until when it is needed, and where it was read.
        self._needed: deque[tuple[int, dict[Partition, int]]] = deque()

    def read(self, messages: list[Message], moved: Mapping[Partition, int]) -> _Read:
        """Take in a batch of messages."""
        before, records, unwanted = dict(self._at), len(messages), 0
        self._at |= moved
        for at, position in moved.items():
            if position >= self._job.spans[at][1]:
                self._times.pop(at, None)
        if self._chosen is not None:
            messages = self._chosen.among(messages)
            unwanted = records - len(messages)
        found = intake.read(messages, self._chords, self._retention_ms)
        for message, reason in found.poison:
            logger.warning("unreadable: %s/%s@%s: %s", message.topic(), message.partition(), message.offset(), reason)
        now_ms = self._wall_ms()
        changes, over, past = self._bygone.settle(found.logged, lambda: self._came(messages, found.poison), now_ms)
        self._note_needed(before, messages)
        facts = [fact for fact in found.facts if not 0 < fact.expires_at <= now_ms]
        done = Replayed(
            records=records,
            read=sum(position - before[at] for at, position in moved.items()),
            events=len(found.logged),
            facts=len(facts),
            changes=len(changes),
            expired=len(over) + len(found.facts) - len(facts),
            remembered=len(past),
            unwanted=unwanted,
            poison=len(found.poison),
        )
        return _Read(Batch(changes, facts, self._positions(moved)), over, past, done)

    def _note_needed(self, before: dict[Partition, int], messages: Sequence[Message]) -> None:
        if self._bygone.kept_until_ms:
            self._needed.append((self._bygone.kept_until_ms, before))
        elif self._needed:
            self._came(messages, ())
        horizon_ms = min(self._times.values(), default=NEVER)
        while self._needed and self._needed[0][0] <= horizon_ms:
            self._needed.popleft()

    def _came(self, messages: Sequence[Message], poison: Sequence[intake.Poison]) -> tuple[list[int], int]:
        """Return when the log got each event, and before when none will come any more."""
        bad = {id(message) for message, _ in poison}
        came = []
        for message in messages:
            topic, number, (_, at) = message.topic(), message.partition(), message.timestamp()
            if topic == self._chords:
                continue
            if (place := Partition(topic or "", number or 0)) in self._times:
                self._times[place] = at
            if id(message) not in bad:
                came.append(at)
        return came, min(self._times.values(), default=NEVER)

    def _positions(self, moved: Mapping[Partition, int]) -> dict[Partition, int]:
        own = {at: position for at, position in moved.items() if at in self._job.promised}
        safe = self._needed[0][1] if self._needed else self._at
        return {**own, **marks.moved(self._job.number, safe)}

    def close(self) -> None:
        self._bygone.close()
        if self._chosen is not None:
            self._chosen.close()


# -- the store ---------------------------------------------------------------------------------


class _Pen(Protocol):
    """What batches are written with."""

    def open(self) -> None:
        """Be ready."""

    def living(self, over: list[Life]) -> list[Change]:
        """Return what of these, which have expired, has to be told to the store, for something of it lives there."""

    def write(self, batch: Batch, done: Replayed) -> None:
        """Write a batch, and count what became of it."""

    def sum_up(self, done: Replayed) -> None:
        """Say what only all batches together tell."""

    def close(self) -> None:
        """Let go of the store."""


class _SinkPen:
    """A sink, with patience."""

    def __init__(self, target: Target, patience_s: float) -> None:
        self._sink = open_sink(target.url, target.options)
        self._view = open_view(target.url, target.options)
        self._patience_s = patience_s

    def open(self) -> None:
        insist(self._sink.open, self._patience_s)

    def living(self, over: list[Life]) -> list[Change]:
        tasks = [each for (subject, each), *_ in over if subject == TASK]
        groups = [each for (subject, each), *_ in over if subject == GROUP]
        there = {
            TASK: insist(lambda: self._view.shown(tasks), self._patience_s).keys(),
            GROUP: insist(lambda: self._view.groups(groups), self._patience_s).keys(),
        }
        return [life.change() for life in over if life.subject[1] in there[life.subject[0]]]

    def write(self, batch: Batch, done: Replayed) -> None:
        try:
            insist(lambda: self._sink.write(batch), self._patience_s)
        except Rejected as exc:
            for subject, why in exc.reasons:
                logger.warning("refused by the store: %s: %s", subject, why)
            done.rejected += len(exc.reasons)

    def sum_up(self, done: Replayed) -> None:
        pass

    def close(self) -> None:
        self._sink.close()
        self._view.close()


class _DryPen:
    """Writes nothing, and compares what it would write with what is there.

    A task is in many batches: what would be written of each is in a temporary file, some 150 bytes per task.
    """

    def __init__(self, target: Target) -> None:
        self._view: View | None = open_view(target.url, target.options)
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(_WOULD)

    def open(self) -> None:
        assert self._view is not None
        try:
            self._view.positions()
        except Unavailable as exc:
            logger.warning("nothing to compare with: %s", exc)
            self._view.close()
            self._view = None

    def living(self, over: list[Life]) -> list[Change]:  # noqa: ARG002 - nothing is told to anybody
        return []

    def write(self, batch: Batch, done: Replayed) -> None:  # noqa: ARG002 - only all batches together tell
        changes = [each for each in batch.changes if not each.only_history]
        winners = {each.id: each.winner for each in changes if each.subject == TASK and each.winner is not None}
        there = self._view.shown(list(winners)) if self._view is not None else {}
        rows: list[tuple[str, str, int | None, str | None, bool]] = []
        for each in changes:
            winner = winners.get(each.id) if each.subject == TASK else None
            key, event_id = (winner.key, winner.id) if winner is not None else (None, None)
            found = there.get(each.id) if winner is not None else None
            rows.append(
                (each.subject, each.id, key, event_id, bool(found and (found.key, found.event_id) >= (key, event_id)))
            )
        self._db.execute("BEGIN")
        self._db.executemany(_NOTE_WOULD, rows)
        self._db.execute("COMMIT")

    def sum_up(self, done: Replayed) -> None:
        (counted,) = self._db.execute("SELECT count(*), count(k), coalesce(sum(kept), 0) FROM would")
        done.changes, done.shown, done.kept = counted

    def close(self) -> None:
        self._db.close()
        if self._view is not None:
            self._view.close()
