"""What a processor writes on the board of `pipeline run`: its counters, when its loop turned, and in words how it is.

Used only with ``--metrics-port``. Counters are written with every turn of the loop, so that they agree with
what happened however the process ends; how far behind it is, once a second, for that asks the client library.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from celery_kafka_backend import metrics
from celery_kafka_backend.metrics import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from celery_kafka_backend.board import Board
    from celery_kafka_backend.processors.chords import ChordProcessor
    from celery_kafka_backend.processors.materializer import Materializer

REPORT_S: Final = 1.0
LISTED: Final = 2_000
"""Partitions that one process reports on, the furthest behind first."""
TEXT_BYTES: Final = 262_144

TURN, BEAT, STORE, START = "turn", "beat", "store", "starts"
"""Moments by the machine's monotonic clock: the loop turned; the process ran; it began to wait for its store,
0 if it does not. And how many times it was started."""
VIEW: Final = Layout(metrics.VIEW_CELLS, [TURN, BEAT, STORE, START])
CHORDS: Final = Layout(metrics.CHORDS_CELLS, [TURN, BEAT, STORE, START])

_VIEW_COUNTERS: Final = {
    "events": VIEW.at(metrics.VIEW_EVENTS),
    "facts": VIEW.at(metrics.VIEW_FACTS),
    "changes": VIEW.at(metrics.VIEW_CHANGES),
    "dead_letters": VIEW.at(metrics.VIEW_LETTERS),
    "retries": VIEW.at(metrics.VIEW_RETRIES),
    "missed": VIEW.at(metrics.VIEW_MISSED),
    "rewound": VIEW.at(metrics.VIEW_REWOUND),
    **{event: VIEW.at(metrics.VIEW_REBALANCES, event) for event in metrics.VIEW_REBALANCES.own},
}
_CHORD_COUNTERS: Final = {
    "decided": CHORDS.at(metrics.CHORDS_DECIDED),
    "lost": CHORDS.at(metrics.CHORDS_LOST),
    **{outcome: CHORDS.at(metrics.CHORDS_FIRED, outcome) for outcome in metrics.CHORDS_FIRED.own},
    "retries": CHORDS.at(metrics.CHORDS_RETRIES),
    "dead_letters": CHORDS.at(metrics.CHORDS_LETTERS),
    "rebuilt": CHORDS.at(metrics.CHORDS_REBUILT),
}
_BATCH: Final = VIEW.at(metrics.VIEW_BATCH)
_WRITE: Final = VIEW.at(metrics.VIEW_WRITE)
_PAUSED: Final = VIEW.at(metrics.VIEW_PAUSED)
_OPEN: Final = CHORDS.at(metrics.CHORDS_OPEN)
_DELAY: Final = CHORDS.at(metrics.CHORDS_DELAY)


class Place(NamedTuple):
    """Where a processor writes. It can be pickled only while its process is spawned."""

    board: Board
    number: int


class Report(msgspec.Struct, omit_defaults=True):
    """How a processor is.

    Attributes:
        at: When it said so, by the machine's monotonic clock.
        wrong: Why it cannot do its work now; empty if it can.
        partitions: How many it has.
        lag: Of each topic (partition, records behind, seconds behind).
    """

    at: float = 0.0
    wrong: list[str] = []
    partitions: int = 0
    lag: dict[str, list[tuple[int, int, float]]] = {}


class _Meter:
    """What both kinds have in common."""

    def __init__(self, place: Place, layout: Layout, counters: Mapping[str, int]) -> None:
        seat = place.board.take(place.number, clear=(*layout.gauges, layout.at(STORE)))
        assert seat is not None, "its last process has ended, or this one would not have been started"
        self._seat = seat
        self._layout = layout
        self._counters = counters
        self._before = dict.fromkeys(counters, 0)
        self._report_at = 0.0
        seat.add(layout.at(START))
        self._turn()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        while True:
            self._seat.put(self._layout.at(BEAT), time.monotonic())
            time.sleep(REPORT_S)

    def _turn(self) -> float:
        now = time.monotonic()
        self._seat.put(self._layout.at(TURN), now)
        return now

    def _count(self, statistics: Any) -> None:
        for name, cell in self._counters.items():
            value = getattr(statistics, name)
            if value != self._before[name]:
                self._seat.add(cell, value - self._before[name])
                self._before[name] = value

    def _is_due(self, now: float) -> bool:
        if now < self._report_at:
            return False
        self._report_at = now + REPORT_S
        return True

    def _say(self, report: Report) -> None:
        self._seat.say(msgspec.json.encode(report))


class ViewMeter(_Meter):
    """A materializer's."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, VIEW, _VIEW_COUNTERS)
        # When each partition was last seen without a record that the view lacks.
        self._level: dict[tuple[str, int], float] = {}

    def turned(self, work: Materializer) -> None:
        """Take note that the loop turned."""
        now = self._turn()
        self._count(work.statistics)
        self._seat.put(_PAUSED, float(bool(work.paused)))
        if self._is_due(now):
            self._say(Report(now, work.wrong(), work.partitions(), self._lag(work, now)))

    @contextmanager
    def writing(self, records: int) -> Iterator[None]:
        """Measure one write of a batch of so many records."""
        began = time.monotonic()
        self._seat.put(VIEW.at(STORE), began)
        try:
            yield
            if records:
                self._seat.observe(_BATCH, metrics.VIEW_BATCH.buckets, records)
        finally:
            self._seat.put(VIEW.at(STORE), 0.0)
            self._seat.observe(_WRITE, metrics.VIEW_WRITE.buckets, time.monotonic() - began)

    def _lag(self, work: Materializer, now: float) -> dict[str, list[tuple[int, int, float]]]:
        behind = work.behind()
        self._level = {at: self._level.get(at, now) if records else now for at, records in behind.items()}
        found: dict[str, list[tuple[int, int, float]]] = {}
        for at in sorted(behind, key=behind.__getitem__, reverse=True)[:LISTED]:
            seconds = round(now - self._level[at], 3)
            found.setdefault(at.topic, []).append((at.partition, behind[at], seconds))
        return found


class ChordMeter(_Meter):
    """The chord processor's."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, CHORDS, _CHORD_COUNTERS)

    def turned(self, work: ChordProcessor) -> None:
        """Take note that the loop turned."""
        now = self._turn()
        self._count(work.statistics)
        self._seat.put(_OPEN, work.statistics.open)
        if self._is_due(now):
            self._say(Report(now, work.wrong(), work.partitions()))

    def sent(self, delay_s: float) -> None:
        """Take note of a body sent so long after its chord's last part."""
        self._seat.observe(_DELAY, metrics.CHORDS_DELAY.buckets, max(delay_s, 0.0))
