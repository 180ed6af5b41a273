"""The insight view's figures for Prometheus: what `top` shows, read in a thread of its own now and then."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from celery_kafka_backend import metrics
from celery_kafka_backend.errors import PipelineError
from celery_kafka_backend.insight import Insight
from celery_kafka_backend.monitor import Series
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.sinks.insight import open_insight
from celery_kafka_backend.windows import WINDOWS, figures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from celery_kafka_backend.sinks.contract import StoreOptions
    from celery_kafka_backend.windows import Dimension, Figures, Quantiles

LOOK_EVERY_S: Final = 5.0
REST: Final = 4
"""… and at least so many times as long as a look takes."""
MOST_NAMES: Final = 1_000
"""Of each dimension; a name has up to some fifty series."""
LONGEST: Final = "1h"
DIMENSIONS: Final[tuple[Dimension, ...]] = ("task", "queue", "worker")


class InsightProbe:
    """Reads the figures every few seconds.

    Args:
        url: The view that holds them.
        options: What its store needs beside it.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._insight = Insight(open_insight(url, options))
        self._found: list[Series] = []
        threading.Thread(target=self._look, name="insight-probe", daemon=True).start()

    def _look(self) -> None:
        while True:
            began = time.monotonic()
            try:
                self._found = list(self._series())
            except PipelineError:  # the view's own probe says so
                self._found = []
            # With many names and workers an hour of minutes takes a while: it is to be no more than a share of a core.
            time.sleep(max(LOOK_EVERY_S, REST * (time.monotonic() - began)))

    def series(self) -> list[Series]:
        """Return what was read last; nothing while the view is away."""
        return self._found

    def _series(self) -> Iterator[Series]:
        now_ms = system_wall_ms()
        written = self._insight.written_at()
        if written:
            yield Series(metrics.INSIGHT_AGE, (), ((now_ms - written) / 1000,))
        rows = self._insight.rows(LONGEST, now_ms)
        for by in DIMENSIONS:
            found = {window: figures(rows, minutes, now_ms, by) for window, minutes in WINDOWS.items()}
            shown = _busiest(found[LONGEST])
            for window in WINDOWS:
                for one in found[window]:
                    if one.name in shown:
                        yield from _of_window(one, by, window)
            for one in found[LONGEST]:
                if one.name in shown:
                    yield Series(metrics.INSIGHT_IN_FLIGHT, (by, one.name), (float(one.in_flight),))
                    oldest_s = 0.0 if one.oldest_ms is None else (now_ms - one.oldest_ms) / 1000
                    yield Series(metrics.INSIGHT_OLDEST, (by, one.name), (oldest_s,))


def _busiest(found: Sequence[Figures]) -> set[str]:
    """Return the names that are shown: those with the most events within the longest window."""
    if len(found) <= MOST_NAMES:
        return {one.name for one in found}
    return {one.name for one in sorted(found, key=lambda one: -sum(one.kinds.values()))[:MOST_NAMES]}


def _of_window(one: Figures, by: str, window: str) -> Iterator[Series]:
    labels = (by, one.name, window)
    for kind, rate in one.rates.items():
        yield Series(metrics.INSIGHT_RATE, (*labels, kind), (rate,))
    for metric, ratio in (
        (metrics.INSIGHT_FAILURES, one.failure_ratio),
        (metrics.INSIGHT_RETRIES, one.retry_ratio),
    ):
        if ratio is not None:
            yield Series(metric, labels, (ratio,))
    yield from _quantiles(metrics.INSIGHT_WAIT, labels, one.wait)
    yield from _quantiles(metrics.INSIGHT_RUN, labels, one.run)


def _quantiles(metric: metrics.Metric, labels: tuple[str, ...], found: Quantiles) -> Iterator[Series]:
    for quantile, value_ms in (("0.5", found.p50), ("0.95", found.p95), ("0.99", found.p99)):
        if value_ms is not None:
            yield Series(metric, (*labels, quantile), (value_ms / 1000,))
