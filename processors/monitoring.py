"""What `pipeline run` shows of its processors: it reads their board, and asks each view itself.

Alive: the processor's loop turned within ``health_timeout_s``; while it waits for its store, which is the
store's fault, that its process runs is enough, up to `PATIENCE` times as long. A process that died counts from
its last turn, for the supervisor starts it again.

Ready: besides, every processor runs, is in its consumer group (without partitions, if there are not enough),
is not paused, and its view answers *us*: an idle processor would not notice.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from celery_kafka_backend import metrics
from celery_kafka_backend.board import Board
from celery_kafka_backend.errors import PipelineError
from celery_kafka_backend.monitor import Series
from celery_kafka_backend.processors import metering
from celery_kafka_backend.processors.metering import Place, Report
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import open_view

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from celery_kafka_backend.board import Reading
    from celery_kafka_backend.metrics import Layout, Metric
    from celery_kafka_backend.processors.insight_metrics import InsightProbe
    from celery_kafka_backend.sinks.contract import StoreOptions

PATIENCE: Final = 10
SLOW_S: Final = 5.0
"""Neither a view's answer nor a turn of the loop takes so long when all is well."""
PROBE_EVERY_S: Final = 2.0


class Role(NamedTuple):
    """A processor that the supervisor runs.

    Attributes:
        name: As the supervisor calls it.
        view: Name of the view that it feeds; "" for the chord processor.
    """

    name: str
    view: str

    @property
    def layout(self) -> Layout:
        """Where its numbers are."""
        return metering.VIEW if self.view else metering.CHORDS


class ViewProbe:
    """Asks a view, now and then, whether it answers. Its driver may take its time, so in a thread of its own."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._url = mask(url)
        self._view = open_view(url, options)
        self._answered = time.monotonic()
        self._wrong = ""
        threading.Thread(target=self._look, name="view-probe", daemon=True).start()

    def _look(self) -> None:
        while True:
            try:
                self._view.positions()
            except PipelineError as exc:
                self._wrong = f"the view {self._url} does not answer: {exc}"
            else:
                self._wrong = ""
            self._answered = time.monotonic()
            time.sleep(PROBE_EVERY_S)

    def wrong(self) -> str:
        """Return what is wrong; "" if nothing is."""
        silent_s = time.monotonic() - self._answered
        if silent_s > PROBE_EVERY_S + SLOW_S:
            return f"the view {self._url} has not answered for {silent_s:.0f} s"
        return self._wrong


class ProcessorsSource:
    """What the endpoint of `pipeline run` shows.

    Args:
        roles: The processors, in the order of their places.
        probes: One per view.
        health_timeout_s: As set.
        insight: Reads the insight view, where it is kept.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        probes: Sequence[ViewProbe],
        health_timeout_s: float,
        insight: InsightProbe | None = None,
    ) -> None:
        self.metrics: Sequence[Metric] = (*metrics.PROCESSORS, *(metrics.INSIGHT if insight else ()))
        self._insight = insight
        self._roles = list(roles)
        self._probes = list(probes)
        self._timeout_s = health_timeout_s
        self._began = time.monotonic()
        self._board = Board(len(roles), max(role.layout.size for role in roles), metering.TEXT_BYTES)

    def place(self, number: int) -> Place:
        """Return where a processor writes."""
        return Place(self._board, number)

    # -- /metrics --------------------------------------------------------------------------------------

    def series(self) -> Iterator[Series]:
        """Yield every series."""
        now = time.monotonic()
        readings = {one.number: one for one in self._board.read()}
        for view in dict.fromkeys(role.view for role in self._roles):
            numbers = [n for n, role in enumerate(self._roles) if role.view == view]
            yield from _summed(view, self._roles[numbers[0]].layout, [readings[n] for n in numbers if n in readings])
        for number, role in enumerate(self._roles):
            reading = readings.get(number)
            yield Series(metrics.UP, (role.name,), (float(reading is not None and reading.alive),))
            if reading is not None:
                yield from _of_process(role, reading, now)
        if self._insight is not None:
            yield from self._insight.series()

    # -- /healthz and /readyz ----------------------------------------------------------------------------

    def unhealthy(self) -> list[str]:
        """Return whose loop stands still."""
        now = time.monotonic()
        readings = {one.number: one for one in self._board.read()}
        silences = ((role, self._silence(role, readings.get(n), now)) for n, role in enumerate(self._roles))
        return [
            f"{role.name}: its loop has not turned for {silent_s:.0f} s"
            for role, silent_s in silences
            if silent_s > self._timeout_s
        ]

    def unready(self) -> list[str]:
        """Return which processors cannot work now, and which views do not answer."""
        now = time.monotonic()
        readings = {one.number: one for one in self._board.read()}
        wrong = [
            f"{role.name}: {what}"
            for number, role in enumerate(self._roles)
            for what in self._unready(role, readings.get(number), now)
        ]
        return wrong + [what for probe in self._probes if (what := probe.wrong())]

    def _silence(self, role: Role, reading: Reading | None, now: float) -> float:
        """Return for how long a loop has stood still through its own fault, seconds."""
        if reading is None:
            return now - self._began
        turn, beat, store = (
            reading.cells[role.layout.at(name)] for name in (metering.TURN, metering.BEAT, metering.STORE)
        )
        if store and reading.alive and now - store < PATIENCE * self._timeout_s:
            return now - beat
        return now - turn

    def _unready(self, role: Role, reading: Reading | None, now: float) -> list[str]:
        if reading is None or not reading.alive:
            return ["its process does not run (yet)"]
        report = _report(reading)
        if report is None:
            return ["it has just been started"]
        silent_s = self._silence(role, reading, now)
        if silent_s > min(SLOW_S, self._timeout_s):
            return [f"its loop has not turned for {silent_s:.0f} s"]
        store = reading.cells[role.layout.at(metering.STORE)]
        if store and now - store > SLOW_S:
            return [f"it has waited {now - store:.0f} s for its view to take a batch"]
        return report.wrong


def _summed(view: str, layout: Layout, readings: list[Reading]) -> Iterator[Series]:
    """Yield what a view's processes counted, together; gauges are those of the living."""
    labels = (view,) if view else ()
    for metric, own, where in layout.series():
        counted = [one for one in readings if one.alive or metric.kind != "gauge"]
        columns = zip(*(one.cells[where] for one in counted), strict=True)
        numbers = [sum(column) for column in columns] or [0.0] * metric.cells
        yield Series(metric, (*labels, own) if own else labels, numbers)


def _of_process(role: Role, reading: Reading, now: float) -> Iterator[Series]:
    layout, name = role.layout, (role.name,)
    yield Series(metrics.STARTS, name, (reading.cells[layout.at(metering.START)],))
    yield Series(metrics.TURN, name, (now - reading.cells[layout.at(metering.TURN)],))
    report = _report(reading) if reading.alive else None
    if report is None:
        return
    yield Series(metrics.PARTITIONS, name, (float(report.partitions),))
    for topic, rows in report.lag.items():
        for partition, records, seconds in rows:
            labels = (role.view, topic, str(partition))
            yield Series(metrics.VIEW_LAG, labels, (float(records),))
            # What is lacking has grown older since.
            yield Series(metrics.VIEW_LAG_SECONDS, labels, (seconds + now - report.at if records else 0.0,))


def _report(reading: Reading) -> Report | None:
    return msgspec.json.decode(reading.text, type=Report) if reading.text else None
