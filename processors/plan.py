"""What a replay is to do, decided before it does anything: what to read, which tasks, and what the store has already."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from confluent_kafka import KafkaException

from celery_kafka_backend import topics as names
from celery_kafka_backend.changes import Batch, Partition
from celery_kafka_backend.errors import SettingsError, Unavailable
from celery_kafka_backend.kafka import translate
from celery_kafka_backend.past import batches, reader
from celery_kafka_backend.processors import intake, marks
from celery_kafka_backend.processors.backoff import PATIENCE_S, insist
from celery_kafka_backend.processors.extent import Extent, extent
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.processors.marks import Marks
from celery_kafka_backend.processors.selection import ALL, Survey, Wanted
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink, open_view

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from celery_kafka_backend.past import Span
    from celery_kafka_backend.processors.extent import Edge
    from celery_kafka_backend.settings import Settings


class Target(NamedTuple):
    """The store to fill.

    Attributes:
        url: Its URL.
        options: What it needs beside that.
    """

    url: str
    options: StoreOptions = StoreOptions()


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A replay, decided: what one process is to read. Can be pickled.

    Attributes:
        spans: From which offset to before which one.
        promised: The partitions whose positions the view may be told.
        number: The replay's, for its marks.
        chosen: The file of `Chosen`; "" for all tasks.
        per_s: At most so many records per second; None: as fast as it goes.
        fresh: The store was empty.
        dry: Write nothing.
    """

    spans: Mapping[Partition, Span]
    promised: frozenset[Partition]
    number: int
    chosen: str = ""
    per_s: float | None = None
    fresh: bool = False
    dry: bool = False

    def divided(self, processes: int) -> list[Job]:
        """Return as many jobs, fewer if there are not so many partitions, with about as much to read."""
        shares: list[dict[Partition, Span]] = [{} for _ in range(min(processes, len(self.spans)))]
        loads = [0] * len(shares)
        for at, (start, end) in sorted(self.spans.items(), key=lambda each: each[1][0] - each[1][1]):
            least = loads.index(min(loads))
            shares[least][at] = (start, end)
            loads[least] += end - start
        per_s = self.per_s / len(shares) if self.per_s and shares else self.per_s
        return [msgspec.structs.replace(self, spans=share, per_s=per_s) for share in shares]


class Prepared(NamedTuple):
    """What is to be replayed, and where from.

    Attributes:
        job: All of it.
        extent: The part of the log that is left.
        whole: All of it, which decides which tasks are wanted.
        marks: What the store is to be told before the first batch.
        before: What it said of an earlier replay.
    """

    job: Job
    extent: Extent
    whole: Mapping[Partition, Span]
    marks: Marks
    before: Marks


def prepare(
    settings: Settings,
    target: Target,
    *,
    from_: Edge = None,
    until: Edge = None,
    partitions: Collection[Partition] | None = None,
    wanted: Wanted = ALL,
    go_on: bool = False,
    dry: bool = False,
    patience_s: float = PATIENCE_S,
) -> Prepared:
    """Find out what is to be read, and whether the store is one to be filled. Nothing is written but its schema.

    Args:
        settings: The user's.
        target: The store.
        from_: Where to begin.
        until: Where to end.
        partitions: Read only these.
        wanted: Which tasks. Who they are is found out by `survey`.
        go_on: Take up the replay that the store's marks tell of; without any, go on where its positions say. ``from_``
            and ``until`` are not for this.
        dry: Not even its schema; a store that is not there is an empty one.
        patience_s: How long to try again when the store is away.

    Raises:
        Unavailable: The store was away for longer than ``patience_s``.
        SettingsError: The store refuses us, holds another log's view, or the earlier replay was of other tasks.
        PublishError: Kafka does not answer, or a topic is missing.
    """
    if not dry:
        sink = open_sink(target.url, target.options)
        with closing(sink):
            insist(sink.open, patience_s)
    positions = _positions(target, patience_s, dry=dry)
    _refuse_foreign(settings, target, positions)
    before = marks.read(positions)
    if go_on and before.number and before.what != wanted.digest:
        raise SettingsError(
            "--continue", f"the replay into {mask(target.url)} that was not finished took other tasks",
            "repeat its --task-name and --state, or begin a new one without --continue",
        )  # fmt: skip
    if go_on:
        told = {} if wanted else marks.own(positions)
        from_ = before.next if before.number else told
        until = before.ends or None
    consumer = reader(settings)
    try:
        found = extent(consumer, settings, from_, until, partitions)
    except KafkaException as exc:
        raise translate(exc, "asking where the log begins and ends") from exc
    finally:
        consumer.close()
    spans = found.spans
    promised = frozenset(
        at for at, (start, _) in spans.items() if not wanted and start <= max(found.kept[at][0], positions.get(at, 0))
    )
    if go_on and before.number:
        whole = {at: (start, before.ends[at]) for at, start in before.starts.items()}
        begun = before
    else:
        whole, begun = spans, _begun(before.number + 1, found, wanted, ends=until is not None)
    job = Job(spans=spans, promised=promised, number=begun.number, fresh=not positions, dry=dry)
    return Prepared(job, found, whole, begun, before)


def _begun(number: int, found: Extent, wanted: Wanted, *, ends: bool) -> Marks:
    """Return the marks of a new replay; ``ends``: it does not go on to wherever the log ends when it is taken up."""
    starts = {at: start for at, (start, _) in found.bounds.items()}
    # Which tasks are wanted depends on where it ends: one that had failed may have been tried again.
    until = {at: end for at, (_, end) in found.bounds.items()} if ends or wanted else {}
    return Marks(number, wanted.digest, next=starts, ends=until, starts=starts if wanted else {})


def _positions(target: Target, patience_s: float, *, dry: bool) -> dict[Partition, int]:
    with closing(open_view(target.url, target.options)) as view:
        try:
            return insist(view.positions, 0.0 if dry else patience_s)
        except Unavailable:
            if dry:
                return {}
            raise


def _refuse_foreign(settings: Settings, target: Target, positions: Mapping[Partition, int]) -> None:
    ours = {names.task_events(settings.topic_prefix), names.chords(settings.topic_prefix)}
    foreign = sorted({at.topic for at in marks.own(positions)} - ours)
    if foreign:
        raise SettingsError(
            "--to", f"{mask(target.url)} holds the view of another log: {', '.join(foreign)}",
            f"give an empty store, or set kafka_backend_settings['topic_prefix'] (now {settings.topic_prefix!r})",
        )  # fmt: skip


def begin(target: Target, prepared: Prepared, patience_s: float = PATIENCE_S) -> None:
    """Write the marks from which the replay can be taken up, before anything else."""
    sink = open_sink(target.url, target.options)
    with closing(sink):
        insist(sink.open, patience_s)
        insist(lambda: sink.write(Batch([], (), marks.positions(prepared.marks))), patience_s)


def survey(
    settings: Settings,
    spans: Mapping[Partition, Span],
    wanted: Wanted,
    path: Path,
    on_progress: Callable[[int, int], None],
) -> int:
    """Find out which tasks are wanted, for `Job.chosen`; return how many.

    All partitions in one process, for a task's events may be in two of them, where partitions were added.

    Args:
        settings: The user's.
        spans: The part of the log that decides.
        wanted: Which tasks.
        path: A file that is not there yet.
        on_progress: Called after each batch with how many records were read, and of how many.

    Raises:
        PublishError: Kafka does not answer.
    """
    log = names.task_events(settings.topic_prefix)
    spans = {at: span for at, span in spans.items() if at.topic == log}
    inquiry, read, total = Survey(path, wanted), 0, sum(end - start for start, end in spans.values())
    consumer = reader(settings)
    try:
        for messages, _ in batches(consumer, spans):
            inquiry.look(fold(intake.read(messages, "", 0).logged))
            read += len(messages)
            on_progress(read, total)
    except KafkaException as exc:
        raise translate(exc, "replay") from exc
    finally:
        consumer.close()
    return inquiry.finish()
