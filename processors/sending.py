"""How a decision is carried out: read the declaration and the parts, send the body, say so in the log.

In threads: they wait for Kafka and for Celery's broker, deciding does not wait for them. What is done
with a body is `body`; whether it is still to be done, the ledger says, again and again.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
from confluent_kafka import KafkaException

from celery_kafka_backend import chord_records, codec, events, topics
from celery_kafka_backend.chord_records import FAILURE, SUCCESS, Chosen, Decided, Declared, Fired, Part, Resent
from celery_kafka_backend.errors import ClaimLost, CodecError, PipelineError, StoreError
from celery_kafka_backend.order import run_at
from celery_kafka_backend.processors import body, resending
from celery_kafka_backend.processors.chord_reader import ChordReader, KafkaAway, TooMuch
from celery_kafka_backend.processors.decision import Fire, Resend

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from celery import Celery

    from celery_kafka_backend.chord_records import Choice
    from celery_kafka_backend.processors.held import Held, Recent, Statistics
    from celery_kafka_backend.processors.metering import ChordMeter
    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

SENDERS: Final = 4
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
FRESH_MS: Final = 2_000
"""A decision of our own that is so young is certainly not yet another's to carry out (the session lasts 8 s); then what
is still in memory will do. Later the log is read: of a chord that another has finished the parts are gone."""
CLOCKS_MS: Final = 60_000
"""Brokers' and hosts' clocks may differ by so much."""

_OUR_FAULT_S: Final = 30.0


class PartsMissing(PipelineError):  # noqa: N818 - named as in `errors`
    """Raised when records that a decision names are not in the log up to ``end``."""

    def __init__(self, missing: int, end: int) -> None:
        self.end = end
        super().__init__(f"{missing} records are not in the log")


@dataclass
class Deed:
    """What is to be done for a chord, until it is done or is no longer ours to do."""

    held: Held
    group: str
    asked: Callable[[], bool]
    """Whether the ledger still asks for it."""
    once: Callable[[Callable[[], bool], PartsMissing | None], Fired | Resent | None]
    """Does it; is told who knows whether it is still wanted, and what it did not find the last time."""
    attempts: int = 0
    lost: PartsMissing | None = None
    read_to: int = 0
    """Not again before this much of the partition has been read."""


class Sender:
    """Carries out what a ledger asks for.

    Args:
        app: The user's app: routing, serializers and errbacks are its.
        settings: The user's.
        statistics: Counts here what was done.
        recent: What need not be read from Kafka again.
        clock: The wall clock, ms since 1970.
        append: Appends a record to a partition until it is acknowledged.
    """

    def __init__(
        self,
        app: Celery,
        settings: Settings,
        statistics: Statistics,
        recent: Recent,
        clock: Callable[[], int],
        append: Callable[[Held, Fired | Resent], None],
    ) -> None:
        self.app = app
        self.settings = settings
        self.statistics = statistics
        self.meter: ChordMeter | None = None
        """Who is told how long a body took."""
        self.waiting: dict[str, str] = {}
        """Group ids of bodies that could not be sent, and why."""
        self.stopping = False
        self._recent = recent
        self._clock = clock
        self._append = append
        self._topic = topics.chords(settings.topic_prefix)
        self._events_topic = topics.task_events(settings.topic_prefix)
        self._lock = threading.Lock()
        self._paused: list[tuple[float, Deed]] = []
        """What failed, and when to try it again, on the monotonic clock."""
        self._thread = threading.local()
        self._readers: list[ChordReader] = []
        self._pool = ThreadPoolExecutor(SENDERS, "chord-body", initializer=app.set_current)

    def submit(self, held: Held, action: Fire | Resend) -> None:
        """Carry an action out in a thread."""
        if isinstance(action, Fire):
            decided, ledger = action.decided, held.ledger
            self._try(Deed(held, decided.group, partial(ledger.is_open, decided), partial(self.once, held, action)))
        else:
            request, ledger = action.request, held.ledger
            self._try(Deed(held, request.group, partial(ledger.is_asked, request), partial(self.again, held, action)))

    def refuse(self, held: Held, declared: Declared, why: str) -> None:
        """Say of a body that it will not be sent, in a thread."""

        def once(_wanted: Callable[[], bool], _lost: PartsMissing | None) -> None:
            body.refuse(self.app, declared, why)

        self._try(Deed(held, declared.group, lambda: True, once))

    def go_on(self) -> None:
        """Try again what has waited long enough, and let go of what is not ours to do any more; to be called now and then."""
        now = time.monotonic()
        with self._lock:
            paused, self._paused = self._paused, []
        early = []
        for due, deed in paused:
            if not self._wanted(deed):
                self.waiting.pop(deed.group, None)
            elif due <= now and deed.held.position >= deed.read_to:
                self._try(deed)
            else:
                early.append((due, deed))
        with self._lock:
            self._paused += early

    def close(self) -> None:
        """Finish what is being done, leave what is not."""
        self.stopping = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        for reader in self._readers:
            reader.close()

    # -- until it is done --------------------------------------------------------------------

    def _wanted(self, deed: Deed) -> bool:
        held = deed.held
        return held.open and not self.stopping and not held.broken and deed.asked()

    def _try(self, deed: Deed) -> None:
        deed.held.jobs.add(self._pool.submit(self._attempt, deed))

    def _attempt(self, deed: Deed) -> None:
        """Do it once. Whoever fails gives the thread back: a body that always fails must not hold up the others."""
        wanted = partial(self._wanted, deed)
        if not wanted():
            self.waiting.pop(deed.group, None)
            return
        try:
            done = deed.once(wanted, deed.lost)
        except PartsMissing as exc:
            # Finished by another owner, most likely: read on to there, then look again.
            first = deed.lost is None
            deed.lost, deed.read_to = exc, exc.end
            if first:
                self._pause(deed, 0.0)
            else:  # the declaration: without it nobody knows what to send, nor what to fail
                self._pause(deed, BACKOFF_MAX_S, str(exc))
        except (*body.TRANSIENT, StoreError, KafkaAway, KafkaException) as exc:
            deed.attempts += 1
            self.statistics.retries += 1
            loud = deed.attempts in (1, 10) or deed.attempts % 100 == 0
            level = logging.WARNING if loud and len(self.waiting) < SENDERS else logging.DEBUG
            logger.log(level, "chord %s: its body waits, attempt %d: %r", deed.group, deed.attempts, exc)
            self._pause(deed, min(BACKOFF_FIRST_S * 2 ** min(deed.attempts - 1, 10), BACKOFF_MAX_S), str(exc))
        except Exception as exc:
            logger.exception("chord %s: cannot send its body; tried again in %g s", deed.group, _OUR_FAULT_S)
            self._pause(deed, _OUR_FAULT_S, repr(exc))
        else:
            self.waiting.pop(deed.group, None)
            if done is not None:
                self._append(deed.held, done)

    def _pause(self, deed: Deed, delay_s: float, why: str = "") -> None:
        if why:
            self.waiting[deed.group] = why
        with self._lock:
            self._paused.append((time.monotonic() + delay_s, deed))

    # -- a decision --------------------------------------------------------------------------

    def once(self, held: Held, fire: Fire, wanted: Callable[[], bool], lost: PartsMissing | None) -> Fired | None:
        """Carry a decision out, unless it was; return what to append, None if it is no longer ours to do."""
        decided = fire.decided
        declared = self._declared(held, fire)
        try:
            parts, why = self._parts(held, fire, declared, needed=lost is None), str(lost)
        except TooMuch as exc:
            parts, why = None, str(exc)
        found = fire.look_first and self._was_sent(declared, decided, fire.since_ms)
        if not wanted():
            return None
        if found:
            outcome = decided.outcome
            self.statistics.found += 1
        elif parts is None:
            logger.error("chord %s: %s", decided.group, why)
            outcome = self.give_up(declared, decided, why)
        else:
            outcome = self.send(declared, decided, parts)
            last = parts[decided.last] if parts else None
            if self.meter is not None and last is not None:
                self.meter.sent((self._clock() - last.at) / 1000)
        if not found:
            self.statistics.failed += outcome == FAILURE
            self.statistics.sent += outcome != FAILURE
        return Fired(
            group=decided.group,
            generation=decided.generation,
            owner=held.ledger.owner,
            outcome=outcome,
            body_task_id=decided.body_task_id,
            found=found,
            at=self._clock(),
        )

    def send(self, declared: Declared, decided: Decided, parts: Sequence[Part | None]) -> str:
        """Send a body, or fail it; return the outcome. What is appended is appended after this returns."""
        return body.carry_out(self.app, declared, decided, parts)

    def give_up(self, declared: Declared, decided: Decided, why: str) -> str:
        """Fail a body whose results are lost, or too much; return the outcome."""
        return body.give_up(self.app, declared, decided, why)

    def _declared(self, held: Held, fire: Fire) -> Declared:
        key = chord_records.make_key(fire.decided.group, fire.decided.generation, chord_records.DECLARED)
        found = self._records(held, fire, {key: fire.declared}).get(key)
        if not isinstance(found, Declared):
            raise PartsMissing(1, self._reader().end)
        return found

    def _parts(self, held: Held, fire: Fire, declared: Declared, *, needed: bool) -> list[Part | None] | None:
        """Return the parts in the decision's order; None if some are missing that are not `needed`.

        Raises:
            PartsMissing: Some are missing that are.
            TooMuch: Their results are more than ``chord_max_bytes``.
        """
        decided = fire.decided
        keys = [
            chord_records.part_key(decided.group, decided.generation, part.task, part.index, part.id)
            for part in fire.parts
        ]
        # A body that takes no results, or that fails, needs two parts at most.
        few = declared.immutable or decided.outcome == FAILURE
        wanted = {
            key: part.offset
            for n, (key, part) in enumerate(zip(keys, fire.parts, strict=True))
            if not few or n == decided.last or part.task == decided.failed
        }
        found = self._records(held, fire, wanted, None if few else self.settings.chord_max_bytes)
        missing = len(wanted) - len(found)
        if missing and needed:
            raise PartsMissing(missing, self._reader().end)
        parts = [part if isinstance(part := found.get(key), Part) else None for key in keys]
        return None if missing else parts

    def _records(
        self, held: Held, fire: Fire, wanted: Mapping[bytes, int], limit: int | None = None
    ) -> dict[bytes, Any]:
        fresh = not fire.look_first and 0 <= self._clock() - fire.decided.at < FRESH_MS
        found: dict[bytes, Any] = dict(self._recent.among(wanted)) if fresh else {}
        rest = {key: at for key, at in wanted.items() if key not in found}
        if rest:
            found |= self._reader().read(self._topic, held.partition, rest, limit)
        if limit is not None:
            TooMuch.check(sum(len(one.result) for one in found.values()), limit)
        return found

    # -- a request to send it again ------------------------------------------------------------

    def again(self, held: Held, resend: Resend, wanted: Callable[[], bool], lost: PartsMissing | None) -> Resent | None:
        """Send a body once more; return what to append, None if it is no longer ours to do."""
        request = resend.request
        found = self._reader().read(self._topic, held.partition, resend.wanted).values()
        declared = next((one for one in found if isinstance(one, Declared)), None)
        decided = next((one for one in found if isinstance(one, Decided)), None)
        slices = [one for one in found if isinstance(one, Chosen)]
        done = partial(msgspec.structs.replace, request, owner=held.ledger.owner)
        if declared is None or decided is None or len(slices) < decided.slices:
            if lost is None:
                raise PartsMissing(1, self._reader().end)
            return done(done=self._clock(), outcome=FAILURE, why="its declaration or its decision is gone")
        if decided.outcome == FAILURE:
            return done(done=self._clock(), outcome=FAILURE, why="the chord failed: its body was never to be sent")
        decided = msgspec.structs.replace(decided, body_run=max(run_at(resend.at_ms), decided.body_run + 1))
        sent_already = self._was_sent(declared, decided, resend.at_ms)
        parts, why = (
            ([], "") if sent_already else self._logged_parts(declared, decided, resending.ordered(decided, slices))
        )
        if not wanted():
            return None
        outcome = FAILURE
        if sent_already:
            outcome = SUCCESS
            self.statistics.found += 1
        elif not why:
            outcome = self.send(declared, decided, parts)
            self.statistics.failed += outcome == FAILURE
            self.statistics.sent += outcome != FAILURE
            why = "it could not be sent: see the body's error" if outcome == FAILURE else ""
        logger.info("chord %s: asked by %s to send its body again: %s", request.group, request.by, why or "done")
        return done(done=self._clock(), outcome=outcome, run=decided.body_run, found=sent_already, why=why)

    def _logged_parts(
        self, declared: Declared, decided: Decided, choices: list[Choice]
    ) -> tuple[list[Part | None], str]:
        """Return the parts in the decision's order, or why not."""
        needed = [choices[decided.last]] if declared.immutable and choices else choices
        found: dict[Choice, Part] = {}
        try:
            begun, ids = declared.at - CLOCKS_MS, [one.task for one in needed]
            # If the declaring host's clock was wrong: the whole log.
            for since_ms, partitions in (
                (begun, self._reader().homes(self._events_topic, ids, begun)),
                (0, list(range(self._reader().partitions(self._events_topic)))),
            ):
                if len(found) < len(needed):
                    logged = self._reader().since(self._events_topic, partitions, since_ms)
                    found = resending.parts_of(self.app.backend, decided, needed, logged)
            TooMuch.check(sum(len(part.result) for part in found.values()), self.settings.chord_max_bytes)
        except (ClaimLost, TooMuch) as exc:
            return [], str(exc)
        missing = len(needed) - len(found)
        if missing and not declared.immutable:
            return [], f"the results of {missing} of {len(choices)} members are not in the log (any more)"
        return [found.get(one) for one in choices], ""

    # -- looking ---------------------------------------------------------------------------------

    def _was_sent(self, declared: Declared, decided: Decided, since_ms: int) -> bool:
        """Look for events of the body's first messages in that run."""
        try:
            callback = body.signature(self.app, declared)
        except body.BadBody:
            return False  # to fail it twice does no harm
        if decided.outcome == FAILURE:
            failed = body.innermost(callback).id
            ids, kinds = [failed] if failed else [], frozenset({events.FAILURE})
        else:
            # Every kind counts: what is said of a task before it is sent is of another run.
            ids, kinds = body.first_ids(callback), events.KINDS
        left = {one.encode() for one in ids}
        begun = since_ms - CLOCKS_MS
        partitions = self._reader().homes(self._events_topic, ids, begun) if ids else []
        if not partitions:
            return False
        for key, value in self._reader().since(self._events_topic, partitions, begun):
            if key in left and value is not None:
                try:
                    event = codec.decode(value)
                except CodecError:
                    continue
                if event.run == decided.body_run and event.kind in kinds:
                    left.discard(key)
                    if not left:
                        return True
        return False

    def _reader(self) -> ChordReader:
        reader: ChordReader | None = getattr(self._thread, "reader", None)
        if reader is None:
            reader = self._thread.reader = ChordReader(self.settings)
            self._readers.append(reader)
        return reader
