"""The insight processor: a Faust app that merges partial statistics and keeps the insight view.

The topology::

    <prefix>.task-stats ──▶ agent `count` (concurrency 1) ──▶ table `minutes` ──▶ every half second ──▶ insight view
      keyed by task name       each bucket once                │    ▲
                                                               ▼    │ recovery
                                              <prefix>.insight-minutes-changelog

One table, keyed by (minute, partition of the log, task name), whose values are `minutes.Minute`; a name's rows live
where its partials arrive, so one process owns a name and writes its rows. The figures per queue and worker are cells
inside these rows, and readers add up the ones that they are asked for: no second topic, no repartitioning.

In memory, for it is small: a name needs some KB per minute, and `minutes.KEPT_MINUTES` are kept. Faust's own windows
are not used: a table of theirs forgets by the greatest time seen, so one wrong clock would empty it.

**A table that was lost is counted again.** Each partition has a mark in the table. Where an event comes and there is
none, the changelog is new, or was deleted: then the partition of ``task-stats`` is read again from its start, hours
at most, before the event is counted. To count something again changes nothing, so this needs no care.

Start it by ``celery -A proj pipeline run --insight``, or as any Faust worker, where the app is what `proj` has made::

    app = insight_app(settings, view_url, options)         # faust -A proj worker --without-web
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import faust
import msgspec
from aiokafka.errors import KafkaError
from confluent_kafka import KafkaException, TopicPartition

from celery_kafka_backend import partials, topics
from celery_kafka_backend.errors import CodecError, Crashed, PublishError, SettingsError, Unavailable
from celery_kafka_backend.kafka import translate
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.partials import MINUTE_MS
from celery_kafka_backend.past import batches, reader
from celery_kafka_backend.processors import minutes
from celery_kafka_backend.processors.faust_client import client_options
from celery_kafka_backend.sinks.insight import MinuteRow, open_insight

if TYPE_CHECKING:
    from celery_kafka_backend.processors.minutes import Minute
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import StoreOptions
    from celery_kafka_backend.sinks.insight import InsightStore

logger = logging.getLogger(__name__)

WRITE_S: Final = 0.5
CLEAN_S: Final = 60.0
COMPLAIN_S: Final = 60.0
MARK_S: Final = 3_600
STUCK_S: Final = 60.0
"""A table that comes no nearer to being back for so long is not waited for any more."""
ANSWER_S: Final = 10.0


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
    """

    def __init__(self, table: Any, store: InsightStore) -> None:
        self._table = table
        self._store = store
        self._opened = False
        self._minutes: dict[bytes, Minute] = {}
        self._counted: list[Any] = []
        self._changed: dict[bytes, int] = {}
        self._marks: dict[bytes, tuple[int, bytes]] = {}
        self._latest: dict[bytes, _Logged] = {}
        self._unwritten: set[tuple[int, str]] = set()
        self._partitions = 1
        self._keeping = asyncio.Lock()
        self._complained: dict[str, float] = {}

    # -- counting ------------------------------------------------------------------------------

    def take(self, event: Any) -> None:
        """Take an event of the partials' topic; it is acknowledged by `keep`."""
        message = event.message
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
            self.complain(f"{partial.task}: figures of a minute {problem} are left out: look at that host's clock")
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
        self._partitions = max(self._partitions, partition + 1)
        self._unwritten.add((minute, task))

    def reassigned(self) -> None:
        """Forget what is not in the changelog: partitions have come or gone, and what was not acknowledged is read again.

        Before the table is read from its changelog: afterwards events are counted already.
        """
        self._minutes.clear()
        self._changed.clear()
        self._marks.clear()
        self._latest.clear()
        self._counted.clear()

    def heard(self, key: bytes, value: bytes | None, partition: int) -> None:
        """Take a record of the changelog, which is being read, before it is put into the table."""
        if value is None or key.startswith(b"!"):
            return
        held = self._latest.get(key)
        if held is None and (here := self._table.data.data.get(key)) is not None:
            held = self._latest[key] = _Logged(minutes.decode(here).version, here, partition)
        version = minutes.decode(value).version
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
        for key in self._rows():
            self._to_write(key)

    def clean(self, now_minute: int) -> None:
        """Forget what no window shows; the changelog forgets by itself."""
        for key in self._rows():
            if minutes.parse_key(key)[0] < now_minute - minutes.KEPT_MINUTES:
                self._table.data.data.pop(key, None)
                self._minutes.pop(key, None)
                self._changed.pop(key, None)

    def _rows(self) -> list[bytes]:
        return [key for key in self._table.data if not key.startswith(b"!")]

    # -- keeping -------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Bring changelog and view up to date, and acknowledge what is in the changelog."""
        async with self._keeping:
            counted, self._counted = self._counted, []
            if not await self._log_changes():
                self._counted = counted + self._counted
                return
            for event in counted:
                event.ack()
        await self._write()  # a view that does not answer holds up no rebalance

    async def hand_over(self) -> None:
        """Write the changelog for whoever has our partitions next; what is not acknowledged is only counted once more."""
        async with self._keeping:
            await self._log_changes()

    async def _log_changes(self) -> bool:
        changed, self._changed = self._changed, {}
        marks, self._marks = self._marks, {}
        rows = {key: (partition, minutes.encode(self._minutes[key])) for key, partition in changed.items()}
        try:
            await self._log(rows)
            # Not before: whoever finds the mark of a partition takes what the table has of it for complete.
            await self._log(marks)
        except (KafkaError, asyncio.TimeoutError) as exc:
            self._changed = changed | self._changed
            self._marks = marks | self._marks
            self.complain(f"the changelog cannot be written: {exc!r}; `pipeline init` makes it if it is gone")
            return False
        return True

    async def _log(self, values: dict[bytes, tuple[int, bytes]]) -> None:
        sent = [self._table.send_changelog(partition, key, value) for key, (partition, value) in values.items()]
        await asyncio.wait_for(asyncio.gather(*sent), ANSWER_S)
        self._table.data.data.update((key, value) for key, (_, value) in values.items())

    async def _write(self) -> None:
        unwritten, self._unwritten = self._unwritten, set()
        rows = [self._row(minute, task) for minute, task in unwritten]
        try:
            await _in_thread(self._put, rows)
        except (Unavailable, SettingsError) as exc:
            self._unwritten |= unwritten
            self._opened = False
            self.complain(f"the insight view cannot be written: {exc}")

    def _row(self, minute: int, task: str) -> MinuteRow:
        keys = [minutes.key_of(minute, number, task) for number in range(self._partitions)]
        cells = partials.merged(cell for key in keys for cell in self._minute(key).cells)
        return MinuteRow(minute, task, minutes.version(cells), msgspec.json.encode(cells))

    def _put(self, rows: list[MinuteRow]) -> None:
        if not self._opened:
            self._store.open()
            self._opened = True
        self._store.write(rows, system_wall_ms())

    def complain(self, text: str) -> None:
        """Log an error, each text once a minute."""
        now = time.monotonic()
        if now - self._complained.get(text, -COMPLAIN_S) >= COMPLAIN_S:
            if len(self._complained) > 100:
                self._complained.clear()
            self._complained[text] = now
            logger.error("insight: %s", text)


def _mark(partition: int) -> bytes:
    """Return the table's key that says that it knows a partition."""
    return b"!%d" % partition


async def _in_thread(function: Any, *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


def earlier(settings: Settings, partition: int, before: int) -> list[tuple[bytes | None, float]]:
    """Return what a partition of the partials' topic holds before an offset: values, and when Kafka wrote them, seconds.

    Raises:
        PublishError: Kafka does not answer, or refuses.
    """
    at = (topics.task_stats(settings.topic_prefix), partition)
    consumer = reader(settings)
    try:
        low, _ = consumer.get_watermark_offsets(TopicPartition(*at), timeout=ANSWER_S)
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
    work = Insight(table, open_insight(view, options))

    @app.agent(stats, name=f"{topics.insight(prefix)}.count", concurrency=1)
    async def count(stream: Any) -> None:
        async for event in stream.noack().events():
            message = event.message
            if work.is_new(message.partition):
                generation = app.consumer_generation_id
                try:
                    before = await _in_thread(earlier, settings, message.partition, message.offset)
                except PublishError as exc:  # the next event will have it read, and this one with it
                    work.complain(str(exc))
                    continue
                if app.consumer_generation_id != generation:  # whoever has the partition now is sent this event again
                    continue
                for value, written_s in before:
                    work.count(value, written_s, message.partition)
            work.take(event)

    async def clean() -> None:
        work.clean(system_wall_ms() // MINUTE_MS)

    async def revoked(*_: Any, **__: Any) -> None:
        await work.hand_over()

    async def assigned(*_: Any, **__: Any) -> None:
        work.reassigned()
        app.add_future(end_if_stuck(app))

    app.timer(WRITE_S)(work.keep)
    app.timer(CLEAN_S)(clean)
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


def run(settings: Settings, view: str, options: StoreOptions) -> None:
    """Keep the insight view until SIGTERM or SIGINT: the body of a process."""
    # Faust's own lines tell of each of its services; a hundred for one start.
    for name in ("faust", "mode", "aiokafka"):
        logging.getLogger(name).setLevel(logging.WARNING)
    app = insight_app(settings, view, options)
    worker = faust.Worker(app, override_logging=False, redirect_stdouts=False, quiet=True, loglevel="WARN")
    worker.spinner = None  # it writes control characters, also into a file
    worker.execute_from_commandline()
