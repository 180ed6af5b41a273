"""The insight processor: a Faust app that merges partial statistics and keeps the insight view.

The topology::

    <prefix>.task-stats ──▶ agent `count` (concurrency 1) ──▶ table `minutes` ──▶ every half second ──▶ insight view
      keyed by task name       each bucket once                │    ▲
                                                               ▼    │ recovery
                                              <prefix>.insight-minutes-changelog

One table, keyed by (minute, partition of the log, task name), whose values are `minutes.Minute`; a name's rows live
where its partials arrive, so one process owns a name and writes its rows. The figures per queue and worker are cells
inside these rows, and readers add up the ones that they are asked for: no second topic, no repartitioning.

In memory, for it is small: a name needs some KB in a minute that changes, one later, for `minutes.KEPT_MINUTES`. Faust's own windows
are not used: a table of theirs forgets by the greatest time seen, so one wrong clock would empty it.

**A table that was lost is counted again.** Each partition has a mark in the table. Where an event comes and there is
none, the changelog is new, or was deleted: then the partition of ``task-stats`` is read again, as far back as windows
show, before the event is counted. To count something again changes nothing, so this needs no care: wherever the
changelog may lack something, or has something that nobody can read, the mark is taken away.

Start it by ``celery -A proj pipeline run --insight``, or as any Faust worker, where the app is what `proj` has made::

    app = insight_app(settings, view_url, options)         # faust -A proj worker --without-web
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import faust
import msgspec
from aiokafka.errors import KafkaError
from confluent_kafka import KafkaException, TopicPartition

from celery_kafka_backend import partials, threads, topics
from celery_kafka_backend.errors import CodecError, Crashed, PublishError, SettingsError, Unavailable
from celery_kafka_backend.kafka import OncePerInterval, translate
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.partials import MINUTE_MS
from celery_kafka_backend.past import batches, offsets_at, reader
from celery_kafka_backend.processors import minutes
from celery_kafka_backend.processors.faust_client import client_options
from celery_kafka_backend.sinks.insight import MinuteRow, open_insight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from celery_kafka_backend.processors.minutes import Minute
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import StoreOptions
    from celery_kafka_backend.sinks.insight import InsightStore

logger = logging.getLogger(__name__)

WRITE_S: Final = 0.5
CLEAN_S: Final = 60.0
COMPLAIN_S: Final = 60.0
MARK_S: Final = 3_600
STOP_S: Final = 20.0
"""How long a crashed app may take to end."""
STUCK_S: Final = 60.0
"""A table that comes no nearer to being back for so long is not waited for any more."""
ANSWER_S: Final = 10.0
RETRY_S: Final = 2.0
PUT_ROWS: Final = 1_000
"""Rows that go to the view in one go: the others may be millions."""
RECORD_ROOM: Final = 512
"""Bytes that a record is larger than its key and value, and more."""


class _Logged(NamedTuple):
    """The latest value of a row that the changelog has, and where it is from."""

    version: int
    value: bytes
    partition: int


class Insight:
    """What the app's agent and timers do, and what they hold.

    Rows are counted in memory. Twice a second those that changed go to the changelog, and when they are there the events
    that changed them are acknowledged, and the view is written: a row that a thousand partials changed goes once.

    Args:
        table: Faust's.
        store: The insight view.
        max_bytes: Largest record of the changelog.
    """

    def __init__(self, table: Any, store: InsightStore, max_bytes: int) -> None:
        self._table = table
        self._store = store
        self._max_bytes = max_bytes
        self._opened = False
        self._name = uuid.uuid4().hex
        self._written_at = {0}
        """When we wrote last, ms since 1970, as the view may have it: of a write that failed nobody knows."""
        self._reassigned = 0
        self._minutes: dict[bytes, Minute] = {}
        self._counted: list[Any] = []
        self._changed: dict[bytes, int] = {}
        self._marks: dict[bytes, tuple[int, bytes]] = {}
        self._latest: dict[bytes, _Logged] = {}
        self._spoilt: dict[bytes | None, int] = {}
        self._logged: dict[int, int] = {}
        # Until this minute, by Kafka's clock, the changelog lacks something that a window may show.
        self._lacking_until = 0
        self._unwritten: set[tuple[int, str]] = set()
        self._partitions: set[int] = set()
        self._minute_now = 0
        self._keeping = asyncio.Lock()
        self._complained: dict[str, float] = {}

    # -- counting ------------------------------------------------------------------------------

    def take(self, event: Any) -> None:
        """Take an event of the partials' topic; it is acknowledged by `keep`."""
        message = event.message
        self._minute_now = int(message.timestamp) // 60
        self.count(event.value, message.timestamp, message.partition)
        self._counted.append(event)
        # Once an hour, for Kafka deletes from the changelog what is old.
        mark = _mark(message.partition)
        if mark not in self._marks and message.timestamp - int(self._table.get(mark) or 0) > MARK_S:
            self._marks[mark] = message.partition, b"%d" % message.timestamp

    def is_new(self, partition: int) -> bool:
        """Return whether the table knows nothing of a partition of the partials' topic."""
        mark = _mark(partition)
        return mark not in self._marks and self._table.get(mark) is None

    def count(self, value: bytes | None, written_s: float, partition: int) -> None:
        """Count one record of the partials' topic, written at that time by Kafka's clock."""
        try:
            partial = partials.decode(value)
        except CodecError as exc:
            self.complain(f"a record is left out: {exc}")
            return
        if problem := minutes.unbelievable(partial, int(written_s) // 60):
            what, why = problem
            self.complain(f"{partial.task}: figures of a minute {what} are left out: {why}", once=why)
            return
        key = minutes.key(partial)
        minute = self._minute(key)
        if minute.take(partial):
            self._minutes[key] = minute
            self._changed[key] = partition
            self._to_write(key)

    def _minute(self, key: bytes) -> Minute:
        return self._minutes.get(key) or minutes.decode(self._table.get(key))

    def _to_write(self, key: bytes) -> None:
        minute, partition, task = minutes.parse_key(key)
        self._partitions.add(partition)
        self._unwritten.add((minute, task))

    def reassigned(self) -> None:
        """Forget what is not in the changelog: partitions have come or gone, and what was not acknowledged is read again.

        Before the table is read from its changelog: afterwards events are counted already.
        """
        self._reassigned += 1
        self._minutes.clear()
        self._changed.clear()
        self._marks.clear()
        self._latest.clear()
        self._counted.clear()
        self._logged.clear()

    def heard(self, key: bytes | None, value: bytes | None, partition: int) -> None:
        """Take a record of the changelog, which is being read, before it is put into the table."""
        if value is None:
            return
        try:
            version = _version_of(key or b"", value)
        except (ValueError, msgspec.MsgspecError):  # of a newer version, or nobody's
            self._spoilt[key] = partition
            return
        self._spoilt.pop(key, None)
        if key is None or key.startswith(b"!"):
            return
        held = self._latest.get(key)
        if held is None and (here := self._table.data.data.get(key)) is not None:
            held = self._latest[key] = _Logged(minutes.decode(here).version, here, partition)
        if held is None or version >= held.version:
            self._latest[key] = _Logged(version, value, partition)

    def recovered(self) -> None:
        """The table has been read from its changelog: all of it may be news to the view.

        What was logged last is not always the latest: who was frozen, lost its partitions and went on may have logged
        once more. Of what was counted in the order of one partition, the one with more in it holds all of the other.
        """
        for key, (_, value, partition) in self._latest.items():
            if self._table.data.data.get(key) != value:
                self._table.data.data[key] = value
                self._minutes[key] = minutes.decode(value)
                self._changed[key] = partition
        self._latest.clear()
        spoilt, self._spoilt = self._spoilt, {}
        for unread, partition in spoilt.items():
            shown = (unread or b"")[:100]
            self.complain(f"the changelog has what cannot be read: {shown!r}; its partition is counted again")
            self._table.data.data.pop(unread, None)
            self._table.data.data.pop(_mark(partition), None)
        self._all_to_write()

    def _all_to_write(self) -> None:
        for key in self._rows():
            self._to_write(key)

    async def clean(self) -> None:
        """Forget what no window shows, by Kafka's clock; the changelog forgets by itself.

        And do not hold what was not changed for a while twice: a row takes ten times the room of its bytes.
        """
        async with self._keeping:
            for key in self._rows():
                if minutes.parse_key(key)[0] < self._minute_now - minutes.KEPT_MINUTES:
                    self._table.data.data.pop(key, None)
                    self._changed.pop(key, None)
            self._minutes = {key: self._minutes[key] for key in self._changed}

    def _rows(self) -> list[bytes]:
        return [key for key in self._table.data if not key.startswith(b"!")]

    # -- keeping -------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Bring changelog and view up to date, and acknowledge what is in the changelog.

        The view may be ahead of it: what is not acknowledged is counted again, and comes to the same.
        """
        async with self._keeping:
            counted, self._counted = self._counted, []
            reassigned = self._reassigned
            if await self._log_changes():
                for event in counted:
                    event.ack()
            elif self._reassigned == reassigned:
                self._counted = counted + self._counted
        await self._write()  # a view that does not answer holds up no rebalance

    async def hand_over(self) -> None:
        """Write the changelog for whoever has our partitions next; what is not acknowledged is only counted once more."""
        async with self._keeping:
            await self._log_changes()

    async def _log_changes(self) -> bool:
        changed, self._changed = self._changed, {}
        marks, self._marks = self._marks, {}
        reassigned = self._reassigned
        rows = {key: (partition, minutes.encode(self._minutes[key])) for key, partition in changed.items()}
        large = {key for key, (_, value) in rows.items() if self._is_too_large(key, value)}
        whole = not large
        try:
            whole &= await self._log({key: row for key, row in rows.items() if key not in large})
            self._hold(rows)
            if not whole:
                self._lacking_until = self._minute_now + minutes.KEPT_MINUTES
                marks = self._all_marks() | marks
            # Not before: whoever finds the mark of a partition takes what the table has of it for complete.
            lacking = self._minute_now <= self._lacking_until
            await self._log({key: (at, None if lacking else value) for key, (at, value) in marks.items()})
            self._hold(marks)
        except (KafkaError, asyncio.TimeoutError) as exc:
            if self._reassigned == reassigned:  # else what it was of is forgotten, and read again
                self._changed = changed | self._changed
                self._marks = marks | self._marks
            self.complain(
                f"the changelog cannot be written: {exc!r}; `pipeline init` makes it if it is gone, `pipeline init --print`"
                " says which rights it takes",
                once="changelog",
            )
            return False
        return True

    def _hold(self, values: Mapping[bytes, tuple[int, bytes]]) -> None:
        self._table.data.data.update((key, value) for key, (_, value) in values.items())

    async def _log(self, values: Mapping[bytes, tuple[int, bytes | None]]) -> bool:
        """Append to the changelog; return whether it still has what was appended before."""
        sent = [self._table.send_changelog(partition, key, value) for key, (partition, value) in values.items()]
        whole = True
        for there in await asyncio.wait_for(asyncio.gather(*sent), ANSWER_S):
            if there.offset < self._logged.get(there.partition, 0):
                self.complain("the changelog was made anew: the next start or rebalance reads all partials again")
                whole = False
            self._logged[there.partition] = there.offset
        return whole

    def _all_marks(self) -> dict[bytes, tuple[int, bytes]]:
        return {key: (int(key[1:]), value) for key, value in self._table.data.items() if key.startswith(b"!")}

    def _is_too_large(self, key: bytes, value: bytes) -> bool:
        """Return whether the changelog does not take a row: Faust would end at it, and all that follow it."""
        if len(key) + len(value) + RECORD_ROOM <= self._max_bytes:
            return False
        _, _, task = minutes.parse_key(key)
        remedy = "raise kafka_backend_settings['max_message_bytes'], and `pipeline init`"
        self.complain(
            f"{task[:100]}: what one minute says is too large for the changelog; figures are right, but each start and"
            f" rebalance reads all partials again: {remedy}",
            once=remedy,
        )
        return True

    async def _write(self) -> None:
        unwritten, self._unwritten = self._unwritten, set()
        where = sorted(unwritten)
        try:
            for start in range(0, max(len(where), 1), PUT_ROWS):
                rows = [self._row(minute, task) for minute, task in where[start : start + PUT_ROWS]]
                if not await _in_thread(self._put, rows):
                    logger.warning("insight: the view has lost what it had: it is written again")
                    self._all_to_write()
        except (Unavailable, SettingsError) as exc:
            self._unwritten |= unwritten
            self._opened = False
            self.complain(f"the insight view cannot be written: {exc}")

    def _row(self, minute: int, task: str) -> MinuteRow:
        keys = [minutes.key_of(minute, number, task) for number in self._partitions]
        cells = partials.merged(cell for key in keys for cell in self._minute(key).cells)
        return MinuteRow(minute, task, minutes.version(cells), msgspec.json.encode(cells))

    def _put(self, rows: list[MinuteRow]) -> bool:
        """Put rows into the view; return whether it has what was put before."""
        if not self._opened:
            self._store.open()
            self._opened = True
        before, now_ms = set(self._written_at), system_wall_ms()
        self._written_at.add(now_ms)
        there = self._store.write(rows, now_ms, self._name)
        self._written_at = {now_ms}
        return there in before

    def complain(self, text: str, once: str = "") -> None:
        """Log an error, each text once a minute, or each ``once`` of many texts."""
        now, about = time.monotonic(), once or text
        if now - self._complained.get(about, -COMPLAIN_S) >= COMPLAIN_S:
            if len(self._complained) > 100:
                self._complained.clear()
            self._complained[about] = now
            logger.error("insight: %s", text)


def _mark(partition: int) -> bytes:
    """Return the table's key that says that it knows a partition."""
    return b"!%d" % partition


def _version_of(key: bytes, value: bytes) -> int:
    """Return the version of a row as the changelog has it; of a mark, when it was made.

    Raises:
        ValueError: It is neither.
        MsgspecError: Likewise.
    """
    if key.startswith(b"!"):
        return int(value)
    minutes.parse_key(key)
    return minutes.decode(value).version


async def _in_thread(function: Any, *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


def earlier(settings: Settings, partition: int, before: int, written_s: float) -> list[tuple[bytes | None, float]]:
    """Return what a partition of the partials' topic holds before an offset: values, and when Kafka wrote them, seconds.

    Of the time before that one, written at ``written_s``, only as much as a window may still show.

    Raises:
        PublishError: Kafka does not answer, or refuses.
    """
    at = (topics.task_stats(settings.topic_prefix), partition)
    consumer = reader(settings)
    try:
        since_ms = int(written_s * 1_000) - (minutes.KEPT_MINUTES + 1) * MINUTE_MS
        low, _ = consumer.get_watermark_offsets(TopicPartition(*at), timeout=ANSWER_S)
        low = max(low, offsets_at(consumer, [at], since_ms, ANSWER_S).get(at, low))
        return [
            (message.value(), message.timestamp()[1] / 1000)
            for batch, _ in batches(consumer, {at: (low, before)})
            for message in batch
        ]
    except KafkaException as exc:
        raise translate(exc, f"reading {at[0]} again") from exc
    finally:
        consumer.close()


def insight_app(settings: Settings, view: str, options: StoreOptions) -> Any:
    """Return the Faust app.

    Args:
        settings: The user's.
        view: URL of the view that is to hold insight (`sinks.insight.insight_url`).
        options: What its store needs beside it.

    Raises:
        SettingsError: A setting of librdkafka's has no equivalent in Faust.
    """
    prefix = settings.topic_prefix
    # It says of a topic that is gone that it is, with each of some thousand questions a second.
    logging.getLogger("aiokafka.cluster").addFilter(OncePerInterval(COMPLAIN_S))
    app = faust.App(
        topics.insight(prefix),
        store="memory://",
        # It makes one, though a table in memory needs none; by default where one stands.
        datadir=Path(tempfile.gettempdir(), f"celery-kafka-insight-{os.getuid()}"),
        # Topics are made by `init`, with their settings, by somebody who may.
        topic_allow_declare=False,
        topic_disable_leader=True,
        # A copy in memory is read from the changelog's start when it is needed, so that having one in time saves nothing.
        table_standby_replicas=0,
        producer_max_request_size=settings.max_message_bytes,
        web_enabled=False,
        stream_wait_empty=False,
        consumer_auto_offset_reset="earliest",
        # A dead worker's partitions move within 10 s, as a materializer's do.
        broker_session_timeout=8.0,
        broker_heartbeat_interval=2.0,
        broker_commit_interval=1.0,
        **client_options(settings),
    )
    stats = app.topic(topics.task_stats(prefix), key_serializer="raw", value_serializer="raw")

    async def heard(event: Any) -> None:
        work.heard(event.key, event.value, event.message.partition)

    table = app.Table(
        "minutes", key_type=bytes, value_type=bytes, partitions=settings.insight_partitions, on_changelog_event=heard
    )
    work = Insight(table, open_insight(view, options), settings.max_message_bytes)

    @app.agent(stats, name=f"{topics.insight(prefix)}.count", concurrency=1)
    async def count(stream: Any) -> None:
        async for event in stream.noack().events():
            if await known(event.message):
                work.take(event)

    async def known(message: Any) -> bool:
        """Have the partition of a message counted up to it; return whether it is still ours."""
        generation = app.consumer_generation_id
        while work.is_new(message.partition):
            try:
                before = await _in_thread(earlier, settings, message.partition, message.offset, message.timestamp)
            except PublishError as exc:
                work.complain(str(exc))
                await asyncio.sleep(RETRY_S)
                before = None
            if app.consumer_generation_id != generation:  # whoever has the partition now is sent this event again
                return False
            if before is not None:
                for value, written_s in before:
                    work.count(value, written_s, message.partition)
                break
        return True

    async def revoked(*_: Any, **__: Any) -> None:
        await work.hand_over()

    async def assigned(*_: Any, **__: Any) -> None:
        work.reassigned()
        app.add_future(end_if_stuck(app))

    threads.start(end_if_crashed, "insight-crash", app)
    app.timer(WRITE_S)(work.keep)
    app.timer(CLEAN_S)(work.clean)
    app.on_partitions_revoked.connect(revoked, weak=False)
    app.on_partitions_assigned.connect(assigned, weak=False)

    @table.on_recover
    async def recovered() -> None:
        work.recovered()

    return app


async def end_if_stuck(app: Any, stuck_s: float = STUCK_S) -> None:
    """Crash a worker whose table does not come back after a rebalance; its partitions go to another one.

    Faust's recovery waits without a bound for a signal that is sent once, and ends for good where Kafka does not answer
    for its request timeout. Then the worker keeps its partitions and counts nothing.
    """
    generation, left = app.consumer_generation_id, None
    while app.consumer_generation_id == generation and not app.tables.actives_ready:
        before, left = left, app.tables.recovery.active_remaining_total()
        if left == before:
            logger.error(
                "insight: the table has not come back within %g s, %d records are missing: ending", stuck_s, left
            )
            await app.crash(Crashed("the table does not come back"))
            return
        await asyncio.sleep(stuck_s)


def end_if_crashed(app: Any, patience_s: float = STOP_S) -> None:
    """End a process whose app has crashed and does not come to its end: whoever supervises it starts another.

    Faust's producer waits without a bound for a topic that is gone, also on its way out.
    """
    while not app.crashed:
        time.sleep(1)
    time.sleep(patience_s)
    logger.error("insight: it has crashed, and does not end by itself within %g s: ending", patience_s)
    os._exit(1)


def run(settings: Settings, view: str, options: StoreOptions) -> None:
    """Keep the insight view until SIGTERM or SIGINT: the body of a process."""
    # Faust's own lines tell of each of its services; a hundred for one start.
    for name in ("faust", "mode", "aiokafka"):
        logging.getLogger(name).setLevel(logging.WARNING)
    app = insight_app(settings, view, options)
    worker = faust.Worker(app, override_logging=False, redirect_stdouts=False, quiet=True, loglevel="WARN")
    worker.spinner = None  # it writes control characters, also into a file
    worker.execute_from_commandline()
