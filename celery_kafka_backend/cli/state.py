"""What `pipeline status` knows: gathered from Kafka and the views, as plain data. Shown by `status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from celery_kafka_backend import topics
from celery_kafka_backend.cli.cutover import Standing, standing
from celery_kafka_backend.cli.exits import Exit, Stop, no_topic
from celery_kafka_backend.cli.records import firsts
from celery_kafka_backend.errors import SettingsError, StoreError
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.pointer import pointers
from celery_kafka_backend.query import Query
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import keeps_history, open_sink, open_view
from celery_kafka_backend.topics import view_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from celery_kafka_backend.cli.broker import Broker, Member
    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.past import At, Span
    from celery_kafka_backend.pointer import Pointer
    from celery_kafka_backend.sinks.contract import View


class Lag(msgspec.Struct):
    """One partition as one reader sees it.

    Attributes:
        topic: The topic.
        partition: The partition.
        end: Next offset that Kafka will give.
        position: Next offset that the reader has not folded; None if it has none yet.
        events: Records in between.
        seconds: Age of the first of them; 0 if there is none, None if it could not be read.
        missed: Records that Kafka deleted before they were folded.
    """

    topic: str
    partition: int
    end: int
    position: int | None
    events: int
    seconds: float | None = 0.0
    missed: int = 0


class Folder(msgspec.Struct):
    """A consumer that reads; a materializer has one per topic.

    Attributes:
        client: Client id.
        host: Where it connects from.
        member: Member id.
        partitions: What it has, ``topic/n``; none while Kafka hands them out anew, or if there are too few.
    """

    client: str
    host: str
    member: str
    partitions: list[str]


class Reading(msgspec.Struct):
    """A view, or the chord processor.

    Attributes:
        name: Name of the view; ``chords``.
        url: The view's URL, masked; "" for chords.
        group: Consumer group.
        folders: Who folds; None if the broker cannot tell.
        lags: Per partition.
        warnings: What endangers it.
        error: Why the view could not be read.
        results_kept_s: How long it keeps a result, where the task does not say otherwise; None: for ever.
        keeps_history: Whether it keeps history.
        history_kept_s: … and how long an event stays in it; None: for ever. So far back an audit of this view reaches.
        history_from: When the oldest event that it has of it happened, ms since 1970; None: it has none, or cannot
            tell without reading all.
    """

    name: str
    url: str
    group: str
    folders: list[Folder] | None
    lags: list[Lag]
    warnings: list[str] = []
    error: str = ""
    results_kept_s: float | None = None
    keeps_history: bool = False
    history_kept_s: float | None = None
    history_from: int | None = None


class State(msgspec.Struct):
    """All of it.

    Attributes:
        servers: Kafka.
        embedded: Whether that is librdkafka's in-process broker.
        prefix: Topic prefix.
        at: When this was gathered, ms since 1970.
        log_kept_ms: How long Kafka keeps an event; None: for ever, or it does not tell.
        oldest: When the oldest event that the log still has was written: so far back audit and replay reach; None if it
            is empty.
        latest: … the latest.
        events: Records in the log.
        dead_letters: Records among the dead letters.
        views: Each view.
        chords: The chord processor; None if not asked for.
        readers: Which view readers of ours are to read, by what these views say.
    """

    servers: str
    embedded: bool
    prefix: str
    at: int
    log_kept_ms: int | None
    oldest: int | None
    latest: int | None
    events: int
    dead_letters: int
    views: list[Reading]
    chords: Reading | None
    readers: Standing

    @property
    def readings(self) -> list[Reading]:
        """Views and chords."""
        return [*self.views, *([self.chords] if self.chords else [])]

    @property
    def code(self) -> Exit:
        """How ``status`` exits."""
        if any(reading.folders == [] for reading in self.readings):
            return Exit.NOBODY_FOLDS
        return Exit.VIEW_UNUSABLE if any(view.error for view in self.views) else Exit.OK


def gather(pipeline: Pipeline, broker: Broker, urls: Sequence[str], *, chords: bool) -> State:
    """Ask Kafka and the views.

    Raises:
        Stop: Kafka does not answer, or a topic is missing.
    """
    prefix = pipeline.settings.topic_prefix
    log, chord_topic, dead = topics.task_events(prefix), topics.chords(prefix), topics.dead_letters(prefix)
    marks: dict[At, Span] = {}
    for topic in (log, chord_topic, dead):
        if not broker.partitions(topic):
            raise no_topic(topic, pipeline.command)
        marks |= {(topic, n): ends for n, ends in broker.ends(topic).items()}
    in_log = {at: ends for at, ends in marks.items() if at[0] == log}
    oldest = firsts(broker, in_log)
    latest = firsts(broker, {at: (max(low, high - 1), high) for at, (low, high) in in_log.items()})
    chord_marks = {at: ends for at, ends in marks.items() if at[0] == chord_topic}
    views = [_view(pipeline, broker, url, in_log | chord_marks) for url in urls]
    return State(
        servers=mask(pipeline.settings.bootstrap_servers),
        embedded=broker.embedded,
        prefix=prefix,
        at=system_wall_ms(),
        log_kept_ms=_kept_ms(broker, log),
        oldest=min((one.timestamp()[1] for one in oldest.values()), default=None),
        latest=max((one.timestamp()[1] for one in latest.values()), default=None),
        events=sum(high - low for low, high in in_log.values()),
        dead_letters=sum(high - low for at, (low, high) in marks.items() if at[0] == dead),
        views=[reading for reading, _ in views],
        chords=_reading(broker, "chords", "", chord_marks, None) if chords else None,
        readers=standing(pipeline.settings, {reading.name: held for reading, held in views}),
    )


def _kept_ms(broker: Broker, topic: str) -> int | None:
    try:
        told = int(broker.configs([topic]).get(topic, {}).get("retention.ms", -1))
    except Stop:  # to read a topic's settings is a right of its own
        return None
    return told if told >= 0 else None


def _view(
    pipeline: Pipeline, broker: Broker, url: str, marks: Mapping[At, Span]
) -> tuple[Reading, list[Pointer] | None]:
    """Ask a view; return also the cut-over pointers that it holds, None if it cannot be read."""
    error, positions, held, keeps, since = "", None, None, False, None
    options = pipeline.options(url)
    view = open_view(url, options)
    try:
        keeps = keeps_history(url, options)
        # The view's own word for how far it is: the commit comes a moment later.
        there = view.positions()
        positions = {(at.topic, at.partition): offset for at, offset in there.items()}
        held = pointers(pipeline.settings.topic_prefix, there)
        since = _oldest(view) if keeps else None
    except (StoreError, SettingsError) as exc:
        error = str(exc)
    finally:
        view.close()
    found = _reading(broker, view_name(url), url, marks, positions)
    found.error, found.keeps_history, found.history_from = error, keeps, since
    found.results_kept_s = pipeline.app.backend.expires or None
    own_ms = pipeline.settings.history_retention_ms
    found.history_kept_s = found.results_kept_s if own_ms is None else own_ms / 1000 or None
    if positions:  # only of a view that is there: opening a sink makes what is missing
        sink = open_sink(url, options)
        try:
            sink.open()
            found.warnings = sink.warnings()
        except Exception as exc:  # noqa: BLE001 - rights to write are not ours to need
            found.warnings = [f"cannot ask the store for its warnings: {exc}"]
        finally:
            sink.close()
    return found, held


def _oldest(view: View) -> int | None:
    """Return when the oldest event of a history happened; None where that is no quick question."""
    return next((event.at for event, _ in view.search(Query(limit=1))), None) if view.by_time else None


def _reading(
    broker: Broker, name: str, url: str, marks: Mapping[At, Span], positions: Mapping[At, int] | None
) -> Reading:
    group = topics.group_id(broker.settings.topic_prefix, name)
    if positions is None:
        positions = broker.committed(group, sorted({topic for topic, _ in marks}))
    members = broker.members(group)
    starts = {at: max(positions.get(at, low), low) for at, (low, _) in marks.items()}
    behind = {at: (start, marks[at][1]) for at, start in starts.items() if start < marks[at][1]}
    first = firsts(broker, behind)
    now = system_wall_ms()
    lags = []
    for at, (low, high) in sorted(marks.items()):
        position = positions.get(at)
        message = first.get(at)
        seconds = 0.0 if at not in behind else None if message is None else max(now - message.timestamp()[1], 0) / 1000
        missed = max(low - position, 0) if position is not None else 0
        lags.append(Lag(*at, high, position, max(high - starts[at], 0), seconds, missed))
    folders = None if members is None else [_folder(member) for member in members]
    return Reading(name, mask(url) if url else "", group, folders, lags)


def _folder(member: Member) -> Folder:
    held = [f"{topic}/{n}" for topic, n in member.partitions]
    return Folder(member.client, member.host, member.id, held)
