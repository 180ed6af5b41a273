"""Two views compared as of one instant, although both are being written; or a view and the log itself.

An instant is a position in each partition of the log. Both sides are brought there: a view is waited for, the log is
folded that far into a temporary file. Then all rows are compared. What differs and was spoken of in the log since is not
known to differ: it is compared again, as of a later instant, when both have passed what was said of it.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
from confluent_kafka import KafkaException

from celery_kafka_backend import chord_records, topics
from celery_kafka_backend.changes import Partition
from celery_kafka_backend.errors import CodecError, SettingsError
from celery_kafka_backend.kafka import translate
from celery_kafka_backend.order import run_start_ms, system_wall_ms
from celery_kafka_backend.past import batches, reader
from celery_kafka_backend.processors import marks
from celery_kafka_backend.processors.extent import extent
from celery_kafka_backend.processors.replay import replay
from celery_kafka_backend.processors.verify import CHORD, HISTORY, TABLES, Comparison, Key, compare, subject_of
from celery_kafka_backend.sinks.contract import UNREADABLE
from celery_kafka_backend.sinks.native_columns import PREFIX
from celery_kafka_backend.sinks.registry import open_view

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from confluent_kafka import Consumer, Message

    from celery_kafka_backend.processors.plan import Target
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import Row, View

ROUNDS: Final = 8
"""How often what is being written is compared again."""
TICK_S: Final = 0.1


class Instant(msgspec.Struct, frozen=True):
    """When, by the machine's clock in ms since 1970, and where in the log."""

    at: int
    positions: Mapping[Partition, int]


class Side(Protocol):
    """One of the two."""

    def rows(self) -> Iterator[Row]:
        """Return all rows."""

    def positions(self) -> dict[Partition, int]:
        """Return how far it is."""

    def reach(self, to: Mapping[Partition, int], within_s: float) -> int:
        """Bring it there; return how many records it lacks."""

    def earliest(self, task_ids: Sequence[str]) -> dict[str, int]:
        """Return when each of these tasks is known to have begun, ms since 1970."""


class ViewSide:
    """A view, which its processors bring on.

    Args:
        view: The view.
        say: Told now and then how far its rows are read.
    """

    # ruff: noqa: D102 - as `Side` says

    def __init__(self, view: View, say: Callable[[str], None] = lambda _: None) -> None:
        self._view = view
        self._say = say

    def rows(self) -> Iterator[Row]:
        for number, row in enumerate(self._view.rows(), 1):
            if number % 1_000 == 0:
                self._say(f"{self._view.url}: {number} rows")
            yield row

    def positions(self) -> dict[Partition, int]:
        return marks.own(self._view.positions())

    def reach(self, to: Mapping[Partition, int], within_s: float) -> int:
        deadline = time.monotonic() + within_s
        while True:
            there = self.positions()
            # A view that says nothing is brought on by nobody.
            lacks = sum(max(offset - there.get(at, 0), 0) for at, offset in to.items()) if there else 0
            if not lacks or time.monotonic() >= deadline:
                return lacks
            time.sleep(TICK_S)

    def earliest(self, task_ids: Sequence[str]) -> dict[str, int]:
        try:
            known = self._view.shown(task_ids)
        except UNREADABLE:  # something of one of them is damaged
            half = len(task_ids) // 2
            return {**self.earliest(task_ids[:half]), **self.earliest(task_ids[half:])} if half else {}
        found = {}
        for task, shown in known.items():
            side = shown.side
            if side is not None:
                times = (side.sent, side.received, side.started, side.run and run_start_ms(side.run))
                found[task] = min((at for at in times if at), default=0)
        return found


class LogSide(ViewSide):
    """The log itself, folded into a temporary store.

    Args:
        settings: The user's.
        target: A store that is not there yet.
        say: Told now and then how far that is.
    """

    def __init__(self, settings: Settings, target: Target, say: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(open_view(target.url, target.options), say)
        self._settings = settings
        self._target = target
        self._there: dict[Partition, int] = {}

    def rows(self) -> Iterator[Row]:
        for row in super().rows():  # Celery's own columns are as we have just written them
            yield row._replace(columns={name: row.columns[name] for name in row.columns if not name.startswith(PREFIX)})

    def positions(self) -> dict[Partition, int]:
        return dict(self._there)

    def reach(self, to: Mapping[Partition, int], within_s: float) -> int:  # noqa: ARG002 - it has only us to wait for
        ahead = {at: offset for at, offset in to.items() if offset > self._there.get(at, 0)}
        if ahead or not self._there:
            until = {**to, **self._there, **ahead}
            replay(
                self._settings,
                self._target,
                from_=self._there,
                until=until,
                partitions=list(until),
                on_progress=lambda done: self._say(f"folding the log: {done.read} of {done.total}"),
            )
            self._there = until
        return 0

    def close(self) -> None:
        """Let go of the file."""
        self._view.close()


class Verdict(msgspec.Struct):
    """What came out.

    Attributes:
        instants: As of when the rows were compared; the later ones are for what was being written at the earlier.
        found: The comparison.
        lacks: How many records each side lacked, when it was not waited for any longer.
        changing: Rows that were written all the while, and are not known to be the same.
        again: Rows that were compared again.
        beyond: Rows of which the log has only a part, for it does not reach back to their beginning; not compared.
    """

    instants: list[Instant]
    found: Comparison
    lacks: tuple[int, int] = (0, 0)
    changing: int = 0
    again: int = 0
    beyond: int = 0


def verify(
    settings: Settings, a: Side, b: Side, *, tables: Collection[str] = TABLES, limit: int = 20, within_s: float = 10.0
) -> Verdict:
    """Compare two sides as of one instant.

    Args:
        settings: The user's.
        a: One side.
        b: The other.
        tables: What to compare.
        limit: How many differences to describe.
        within_s: How long a view is waited for.

    Raises:
        SettingsError: The view does not say how far it is, and is to be held against the log.
        PublishError: Kafka does not answer.
        Unavailable: A store does not.
    """
    with _log(settings, "asking where the log begins and ends") as consumer:
        kept = extent(consumer, settings, None, None).kept
    counts = Counter(at.topic for at in kept)
    place = _Places(settings, counts)
    if isinstance(b, LogSide) and not a.positions():
        raise SettingsError(
            "--view", "it does not say how far it is: it was filled from the middle of the log, or with some tasks",
            "compare it with another view",
        )  # fmt: skip
    instant, lacks = _meet(a, b, {}, within_s)
    verdict = Verdict([instant], Comparison(), lacks)
    same = partial(compare, a, b, tables=tables, limit=limit, history_expires=settings.history_retention_ms is not None)
    since = _least(a, b)
    verdict.found = same(partition=place)
    sure: set[Key] = set()
    for _ in range(ROUNDS):
        open_ones = [key for key in verdict.found.keys if key not in sure]
        spoken, ends = (
            _spoken_of(settings, since, {subject_of(*key) for key in open_ones}) if open_ones else (set(), {})
        )
        changing = {key for key in open_ones if subject_of(*key) in spoken}
        sure.update(key for key in open_ones if key not in changing)
        verdict.changing = len(changing)
        if not changing or any(verdict.lacks):
            break
        instant, verdict.lacks = _meet(a, b, ends, within_s)
        verdict.instants.append(instant)
        verdict.again += len(changing)
        since = _least(a, b)
        _replace(verdict.found, changing, same(only=changing), limit)
    else:
        verdict.changing = len([key for key in verdict.found.keys if key not in sure])
    if isinstance(b, LogSide):
        _leave_out_older(settings, a, b, kept, place, verdict)
    return verdict


class _Places:
    """Which partition a row's subject is in, by the topics as they are now."""

    def __init__(self, settings: Settings, counts: Mapping[str, int]) -> None:
        self._log = counts[topics.task_events(settings.topic_prefix)]
        self._chords = counts[topics.chords(settings.topic_prefix)]

    def __call__(self, table: str, subject: str) -> int:
        return topics.partition_of(subject, self._chords if table == CHORD else self._log)


def _meet(a: Side, b: Side, least: Mapping[Partition, int], within_s: float) -> tuple[Instant, tuple[int, int]]:
    """Bring both to where the one is that is further."""
    there = [a.positions(), b.positions(), least]
    to = {at: max(each.get(at, 0) for each in there) for at in {at for each in there for at in each}}
    lacks = (a.reach(to, within_s), b.reach(to, within_s))
    return Instant(system_wall_ms(), to), lacks


def _least(a: Side, b: Side) -> dict[Partition, int]:
    """Return from where on one of them may not have everything; a side that says nothing is not asked."""
    both = [each for each in (a.positions(), b.positions()) if each]
    return {at: min(each.get(at, 0) for each in both) for at in {at for each in both for at in each}}


def _spoken_of(
    settings: Settings, since: Mapping[Partition, int], subjects: Collection[str]
) -> tuple[set[str], dict[Partition, int]]:
    """Return which of these tasks and groups the log spoke of since, and where it ends now."""
    chords = topics.chords(settings.topic_prefix)
    found: set[str] = set()
    with _log(settings, "reading what was written meanwhile") as consumer:
        part = extent(consumer, settings, since, None, list(since))
        for messages, _ in batches(consumer, part.spans):
            found.update({subject for message in messages if (subject := _spoken(message, chords)) in subjects})
    return found, {at: end for at, (_, end) in part.bounds.items() if at in since}


def _spoken(message: Message, chords: str) -> str:
    key: Any = message.key() or b""  # of a consumed message bytes, whatever the stubs say
    if message.topic() == chords:
        try:
            return chord_records.parse_key(key).group
        except CodecError:
            return ""
    return bytes(key).decode(errors="replace")


def _replace(found: Comparison, keys: set[Key], newer: Comparison, limit: int) -> None:
    """Put in the place of what was known of some rows what is known of them now."""
    found.different += newer.different - len(keys)
    found.expired += newer.expired
    found.keys = sorted({*found.keys} - keys | {*newer.keys})
    found.only_a = found.only_a - keys | newer.only_a
    kept = [each for each in found.differences if (each.table, each.key) not in keys]
    found.differences = sorted([*kept, *newer.differences], key=lambda each: each[:2])[:limit]


def _leave_out_older(
    settings: Settings, a: Side, b: Side, kept: Mapping[Partition, tuple[int, int]], place: _Places, verdict: Verdict
) -> None:
    """Take out what the log can say nothing of: what began before it, and what compaction took from it."""
    log = topics.task_events(settings.topic_prefix)
    begins = _begins(settings, kept)
    older: set[Key] = set()
    by_task = [key for key in verdict.found.keys if key[0] != CHORD]
    for start in range(0, len(by_task), 1_000):
        chunk = by_task[start : start + 1_000]
        ids = list({subject_of(*key) for key in chunk})
        known = [a.earliest(ids), b.earliest(ids)]
        for key in chunk:
            subject = subject_of(*key)
            told = [each[subject] for each in known if each.get(subject)]
            if key[0] == HISTORY and (hlc := key[1].rsplit("/", 2)[1]).isdecimal():  # else it is damaged
                told.append(int(hlc))  # it may outlive all else that is known of its task
            began = min(told, default=0)
            if began < begins.get(Partition(log, place(key[0], subject)), 0):
                older.add(key)
    older |= {key for key in verdict.found.keys if key[0] == CHORD and key in verdict.found.only_a}
    _replace(verdict.found, older, Comparison(), len(verdict.found.differences))
    verdict.beyond = len(older)


def _begins(settings: Settings, kept: Mapping[Partition, tuple[int, int]]) -> dict[Partition, int]:
    """Return when the first record was written of each partition of which Kafka has deleted some."""
    spans = {at: (low, min(low + 1, high)) for at, (low, high) in kept.items() if low}
    found = dict.fromkeys(spans, system_wall_ms())
    if spans:
        with _log(settings, "asking when the log begins") as consumer:
            for messages, _ in batches(consumer, spans):
                for message in messages:
                    found[Partition(message.topic() or "", message.partition() or 0)] = message.timestamp()[1]
    return found


@contextmanager
def _log(settings: Settings, what: str) -> Iterator[Consumer]:
    consumer = reader(settings)
    try:
        yield consumer
    except KafkaException as exc:
        raise translate(exc, what) from exc
    finally:
        consumer.close()
