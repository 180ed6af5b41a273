"""The materializer: keeps one view up to date with the log, for ever.

A batch loop on Kafka's own consumer groups, one group per view, any number of processes::

    consume ─▶ read ─▶ fold ─▶ sink.write ─▶ dead letters acknowledged ─▶ commit
       ▲                          │ Unavailable, or dead letters not acknowledged
       └── paused, still polled ◀─┘ back off, then the same batch again

**A store may forget** what it acknowledged: a Redis that is restarted empty, a failover to a replica that
was behind, a file put back from a backup. With each batch the view is told how far it is; when it says
that it is not so far any more, what it lost is read again from the log, as far back as Kafka keeps it.

**Guarantee.** At least once into the sink, whose writes are idempotent: effectively once. An offset
is committed only after everything below it is in the view, or acknowledged in the dead letters. A
crash at any point repeats at most the batches since the last commit; a stop by `Materializer.stop`
repeats nothing. A zombie may write late; the guards in the sink make that harmless.

The loop and retry live here; reading, positions and pauses are `consumers`, what a batch means is `fold`,
what is in a record is `intake`, how it gets into a store is a sink. docs/adr/0005 has the reasons and figures.
"""

from __future__ import annotations

import logging
import random
import signal
import time
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import Producer

from celery_kafka_backend import topics as names
from celery_kafka_backend.changes import Batch
from celery_kafka_backend.complaints import Complaints
from celery_kafka_backend.errors import PublishError, Rejected, Unavailable
from celery_kafka_backend.kafka import producer_config
from celery_kafka_backend.processors import intake
from celery_kafka_backend.processors.backoff import backoff_s
from celery_kafka_backend.processors.consumers import IDLE_S, Consumers, Counts, place
from celery_kafka_backend.processors.deadletters import DeadLetters
from celery_kafka_backend.processors.emitting import Emitter
from celery_kafka_backend.processors.fold import fold
from celery_kafka_backend.processors.hosting import calm
from celery_kafka_backend.sinks.registry import open_sink, open_view

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from confluent_kafka import Message

    from celery_kafka_backend.changes import Partition
    from celery_kafka_backend.processors.metering import Place, ViewMeter
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import Sink, StoreOptions, View

logger = logging.getLogger(__name__)

CHECK_S: Final = 5.0
"""How often the view is asked where it is; and after each trouble, and when partitions come."""
CONFIRM_S: Final = 1.0
"""… and asked once more before it is believed: a store may show its own last write late."""
REPORT_S: Final = 30.0
LOGGED_LETTERS: Final = 10
"""Dead letters per batch that get a line in the log; a batch can hold thousands."""


class Statistics(Counts):
    """What a materializer has done since it was made, and what happened to its partitions.

    Attributes:
        events: Events folded.
        facts: Facts about chords shown.
        changes: Tasks and groups written, once per batch.
        batches: Batches written.
        dead_letters: Records given up, and acknowledged as such.
        retries: Failed attempts to write, because the store or the dead letters were away.
        lag: Records in the assigned partitions behind what was written, as last asked.
    """

    events: int = 0
    facts: int = 0
    changes: int = 0
    batches: int = 0
    dead_letters: int = 0
    retries: int = 0
    lag: int = 0


class _Rewound(Exception):  # noqa: N818 - no error: says what was done
    """Partitions are read again from an earlier offset: what is in hand of them is old."""

    def __init__(self, partitions: Collection[Partition]) -> None:
        self.partitions = partitions


class Materializer:
    """Folds the log into one view.

    Args:
        settings: The user's.
        sink: The view's write side, not yet opened.
        view: Its read side, which is asked where it is.
        group: Consumer group; the same for every process that feeds this view.
        dead_letters: For what cannot be folded or written.
        topics: What to read, the one that must not wait first; the log and the chords by default.
        clock: Seconds, monotonic.
        jitter: A random number from 0 to 1.
    """

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        view: View,
        *,
        group: str,
        dead_letters: DeadLetters,
        topics: Sequence[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        prefix = settings.topic_prefix
        self.group = group
        self.statistics = Statistics()
        self._retention_ms = settings.retention_ms
        self._sink = sink
        self._view = view
        self._dead_letters = dead_letters
        self._chords_topic = names.chords(prefix)
        log = names.task_events(prefix)
        self._topics = list(topics or (log, self._chords_topic))
        self._consumers = Consumers(settings, group, self._topics, [log], self.statistics, clock)
        self._clock = clock
        self._jitter = jitter
        self._stopping = False
        self.meter: ViewMeter | None = None
        """Who is told what happens; set before `run`."""
        self.emitter: Emitter | None = None
        """Who is handed what is read, to tell statistics of it; set before `run`."""
        self.paused = ""
        """What we wait for, and why; "" if we do not."""
        # Whether the view may have lost something since it was last asked.
        self._unsure = True
        self._asked_at = clock()
        self._reported = (clock(), 0)

    def stop(self) -> None:
        """Ask `run` to finish the batch in hand, commit, leave the group and return.

        Safe from a signal handler: it takes no lock.
        """
        self._stopping = True

    def run(self) -> None:
        """Work until `stop`.

        A store that is away is waited for. Anything but `Unavailable` and `Rejected` from the
        sink, and a fatal error of librdkafka, ends it: nothing of that batch is committed.

        Raises:
            SettingsError: The store refuses us.
        """
        try:
            if not self._insist(self._sink.open, "opening the view"):
                return
            try:
                self._consumers.join()
                logger.info("%s: reading %s into %s", self.group, ", ".join(self._topics), self._sink.url)
                if self.emitter is not None:
                    self.emitter.start(self._consumers.done)
                    self._sink.meanwhile = self.emitter.count_some
                self._loop()
            finally:
                self._consumers.leave()
                if self.emitter is not None:
                    self.emitter.stop()
        finally:
            self._sink.close()
            self._view.close()
        logger.info("%s: stopped", self.group)

    def _loop(self) -> None:
        while not self._stopping:
            if not self._is_sure() or not self._process(self._consumers.gather()):
                break
            self._report()
            if self.meter is not None:
                self.meter.turned(self)
        self._consumers.finish()
        if self.meter is not None:
            self.meter.turned(self)

    # -- one batch ---------------------------------------------------------------------------

    def _process(self, messages: list[Message]) -> bool:
        """Write a batch and commit it; return False if stopped before it was written.

        A batch without messages is written too if positions have moved (past control records):
        readers wait on positions.
        """
        if (self._consumers.progress(messages) or messages) and not self._fold(messages):
            return False
        self._consumers.commit_now_and_then()
        return True

    def _fold(self, messages: list[Message]) -> bool:
        found = intake.read(messages, self._chords_topic, self._retention_ms)
        batch = Batch(fold(found.logged), found.facts, self._consumers.moved)
        if self.emitter is not None:  # it counts the log, each record once, whatever becomes of this write
            self.emitter.take(messages, found)
        try:
            if not self._insist(lambda: self._write(batch, messages), "writing to the view"):
                return False
        except _Rewound as rewound:
            return self._fold([message for message in messages if place(message) not in rewound.partitions])
        self._give_up(found.poison)
        if not self._insist(self._dead_letters.flush, "dead letters"):
            return False
        counts = self.statistics
        counts.events += len(found.logged)
        counts.facts += len(found.facts)
        counts.changes += len(batch.changes)
        counts.batches += 1
        self._consumers.written()
        return True

    def _write(self, batch: Batch, messages: list[Message]) -> None:
        if self._unsure or self._consumers.newly_assigned:
            self._ask_the_view()  # before the batch's positions hide what was lost before them
        try:
            with nullcontext() if self.meter is None else self.meter.writing(len(messages)):
                self._sink.write(batch)
        except Rejected as exc:
            reasons = dict(exc.reasons)
            refused = intake.about(messages, reasons, self._chords_topic)
            self._give_up([(message, f"Rejected: {reasons[subject]}") for message, subject in refused])

    def _give_up(self, poison: Sequence[intake.Poison]) -> None:
        for number, (message, reason) in enumerate(poison):
            topic, partition, offset = message.topic(), message.partition(), message.offset()
            assert topic is not None
            assert partition is not None
            assert offset is not None
            if number < LOGGED_LETTERS:
                logger.error("%s: dead letter: %s/%d@%d: %s", self.group, topic, partition, offset, reason)
            headers: Any = message.headers()  # of a consumed message a list, never the dict of the stubs
            self._dead_letters.put(topic, partition, offset, message.key(), message.value(), headers, reason)
            self.statistics.dead_letters += 1
        if len(poison) > LOGGED_LETTERS:
            logger.error("%s: and %d more dead letters in this batch", self.group, len(poison) - LOGGED_LETTERS)

    # -- what the view has lost --------------------------------------------------------------

    def _is_sure(self) -> bool:
        """Ask the view where it is, if that was a while ago; return False if stopped before it answered."""
        if self._clock() - self._asked_at < CHECK_S and not self._unsure and not self._consumers.newly_assigned:
            return True
        try:
            return self._insist(self._ask_the_view, "asking the view where it is")
        except _Rewound:
            return True

    def _ask_the_view(self) -> None:
        """Have what the view does not have any more read again.

        Raises:
            _Rewound: There was something.
            Unavailable: The store is away.
        """
        behind = self._behind_us()
        if behind:
            time.sleep(CONFIRM_S)
            behind = self._behind_us()
        for at, offset in behind.items():
            logger.warning(
                "%s: the view has lost %s/%d from %d to %d: reading it again",
                self.group, *at, offset, self._consumers.done[at] - 1,
            )  # fmt: skip
        self._consumers.rewind(behind)
        self._unsure = self._consumers.newly_assigned = False
        self._asked_at = self._clock()
        if behind:
            raise _Rewound(behind)

    def _behind_us(self) -> dict[Partition, int]:
        there = self._view.positions()
        return {at: there.get(at, 0) for at, done in self._consumers.done.items() if there.get(at, 0) < done}

    # -- trouble -----------------------------------------------------------------------------

    def _insist(self, action: Callable[[], None], what: str) -> bool:
        """Do it until it works; return False if stopped before it did."""
        failures = 0
        while True:
            try:
                action()
            except _Rewound:
                if failures:
                    self._resume()
                raise
            except (Unavailable, PublishError) as exc:
                self._unsure = True
                failures += 1
                self.statistics.retries += 1
                if not self.paused:
                    logger.warning("%s: paused, %s: %s", self.group, what, exc)
                else:
                    logger.info("%s: still paused, %s, attempt %d: %s", self.group, what, failures, exc)
                self.paused = f"{what}: {exc}"
                self._wait(backoff_s(failures, self._jitter))
                if self._stopping:
                    return False
            else:
                if failures:
                    self._resume()
                    logger.info("%s: resumed after %d failed attempts, %s", self.group, failures, what)
                return True

    def _wait(self, delay_s: float) -> None:
        """Keep the group membership while no message is wanted: poll, on paused partitions."""
        end = self._clock() + delay_s
        while not self._stopping and (left := end - self._clock()) > 0:
            slice_s = min(left, IDLE_S)
            if self.meter is not None:
                self._consumers.ask_an_end(slice_s)
                self.meter.turned(self)
            self._consumers.wait(slice_s)

    def _resume(self) -> None:
        self.paused = ""
        self._consumers.resume()

    def _report(self) -> None:
        then, before = self._reported
        now = self._clock()
        if now - then < REPORT_S:
            return
        self._reported = (now, self.statistics.events)
        if self.statistics.events > before:
            s = self.statistics
            s.lag = self.lag()
            logger.info(
                "%s: %d events/s; in all %d events, %d facts, %d changes, %d batches, %d dead letters, %d retries;"
                " %d behind",
                self.group, (s.events - before) / (now - then), s.events, s.facts, s.changes, s.batches,
                s.dead_letters, s.retries, s.lag,
            )  # fmt: skip

    def lag(self) -> int:
        """Return how many records of our partitions are not in the view, by what the last fetches said.

        To be called in the thread of `run`; elsewhere read ``statistics.lag``.
        """
        return sum(self.behind().values())

    def behind(self) -> dict[Partition, int]:
        """Return likewise how many of each partition, as far as known."""
        return self._consumers.behind()

    def partitions(self) -> int:
        """Return how many partitions we have."""
        return self._consumers.partitions()

    def wrong(self) -> list[str]:
        """Return why nothing can be written now; [] if it can, or if there is nothing for us to do."""
        found = [f"paused, {self.paused}"] if self.paused else []
        return found + [f"not in its consumer group for {topic} (yet)" for topic in self._consumers.outside()]


def materializer(settings: Settings, url: str, options: StoreOptions) -> Materializer:
    """Return the materializer of a configured view."""
    group = names.group_id(settings.topic_prefix, names.view_name(url))
    # A record as large as the log allows must fit with its reason and position beside it.
    roomy = {**producer_config(settings), "message.max.bytes": settings.max_message_bytes + names.DEAD_LETTER_ROOM}
    make = partial(Complaints(settings).handle, Producer)
    letters = DeadLetters(roomy, names.dead_letters(settings.topic_prefix), by=group, make=make)
    sink, view = open_sink(url, options), open_view(url, options)
    return Materializer(settings, sink, view, group=group, dead_letters=letters)


def materialize(settings: Settings, url: str, options: StoreOptions, place: Place | None = None) -> None:
    """Feed a view until SIGTERM or SIGINT: the body of a process.

    Args:
        settings: The user's.
        url: The view.
        options: What its store needs beside it.
        place: Where to write metrics, if anywhere.
    """
    work = materializer(settings, url, options)
    if settings.insight and url == settings.views[0]:
        work.emitter = Emitter(settings)
    if place is not None:
        from celery_kafka_backend.processors.metering import ViewMeter  # noqa: PLC0415 - only where metrics are wanted

        work.meter = ViewMeter(place)
    calm()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: work.stop())
    work.run()
