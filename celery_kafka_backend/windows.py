"""Windows: from rows of figures by minute to what people ask for. Pure; quantiles by ddsketch.

A window of W minutes at a time T takes in the W whole minutes before the one of T, and of that one what there is up to
now: at a minute's first moment exactly W minutes. Its rates divide by its length up to T. What an event says belongs
to the minute of its own clock, so a window still changes when a late partial of one of its minutes comes, and never
otherwise: the same rows give the same figures, whoever looks, and whenever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec
from ddsketch import DDSketch
from ddsketch.mapping import LogarithmicMapping

from celery_kafka_backend import events
from celery_kafka_backend.partials import ACCURACY, MINUTE_MS, Cell, add_counts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WINDOWS: Final = {"1m": 1, "5m": 5, "1h": 60}
"""Name of a window, and its minutes."""
HOUR: Final = 60
QUANTILES: Final = (0.5, 0.95, 0.99)

Dimension = Literal["task", "queue", "worker"]
Labels = tuple[str, str, str]
"""Task name, queue and worker of a cell."""


class Quantiles(msgspec.Struct, frozen=True):
    """Of a duration, milliseconds, each within 1 %; None if nothing was measured."""

    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a window says about one task name, queue or worker.

    Attributes:
        name: Which one; "" if events did not say.
        kinds: Events by kind.
        rates: … per second.
        failure_ratio: Failures and lost workers among the attempts that ended for good; None if none did.
        retry_ratio: Retries among all attempts that ended; None if none did.
        errors: Failures, retries and lost workers by class of exception.
        bytes: Size of the events.
        wait: From when a task could have started to when it did.
        run: Run times of attempts that ended.
        in_flight: Attempts that began within the last hour and are not over.
        oldest_ms: Start of the minute in which the oldest of them began, ms since 1970; None if there is none.
    """

    name: str
    kinds: dict[str, int]
    rates: dict[str, float]
    failure_ratio: float | None
    retry_ratio: float | None
    errors: dict[str, int]
    bytes: int
    wait: Quantiles
    run: Quantiles
    in_flight: int
    oldest_ms: int | None


class Span(NamedTuple):
    """Which minutes a window takes in.

    Attributes:
        first: The first one.
        last: The last one.
        seconds: Its length.
    """

    first: int
    last: int
    seconds: float


def span(window_minutes: int, at_ms: int) -> Span:
    """Return the minutes of a window at a time, ms since 1970."""
    now, into = divmod(at_ms, MINUTE_MS)
    return Span(now - window_minutes, now if into else now - 1, window_minutes * 60 + into / 1000)


def needed(window_minutes: int, at_ms: int) -> range:
    """Return the minutes whose rows `figures` needs."""
    found = span(window_minutes, at_ms)
    return range(min(found.first, found.last - HOUR), found.last + 1)


def figures(
    rows: Iterable[tuple[int, str, Iterable[Cell]]],
    window_minutes: int,
    at_ms: int,
    by: Dimension = "task",
    only: Mapping[Dimension, str] | None = None,
) -> list[Figures]:
    """Return the figures of a window, one for each name of a dimension, by name.

    Args:
        rows: Minute, task name and cells; of the minutes that are `needed`, others are left out.
        window_minutes: Length of the window.
        at_ms: When, ms since 1970.
        by: For what each.
        only: Only of this task name, queue or worker.
    """
    window = span(window_minutes, at_ms)
    sums: dict[str, Cell] = {}
    balances: dict[str, dict[int, int]] = {}
    for minute, task, cells in rows:
        for cell in cells:
            labels: dict[Dimension, str] = {"task": task, "queue": cell.queue, "worker": cell.worker}
            if any(labels[dimension] != wanted for dimension, wanted in (only or {}).items()):
                continue
            name = labels[by]
            if window.first <= minute <= window.last:
                sums.setdefault(name, Cell()).add(cell)
            if window.last - HOUR <= minute <= window.last and (left := cell.begun - cell.over):
                add_counts(balances.setdefault(name, {}), {minute: left})
    return [
        _figures(name, sums.get(name, Cell()), balances.get(name, {}), window.seconds)
        for name in sorted({*sums, *balances})
    ]


def _figures(name: str, total: Cell, balance: dict[int, int], seconds: float) -> Figures:
    kinds = total.kinds
    failed = kinds.get(events.FAILURE, 0) + kinds.get(events.WORKER_LOST, 0)
    ended = failed + kinds.get(events.SUCCESS, 0)
    retried = kinds.get(events.RETRY, 0)
    in_flight, oldest = _unfinished(balance)
    return Figures(
        name=name,
        kinds=dict(sorted(kinds.items())),
        rates={kind: count / seconds for kind, count in sorted(kinds.items())},
        failure_ratio=failed / ended if ended else None,
        retry_ratio=retried / (ended + retried) if ended + retried else None,
        errors=dict(sorted(total.errors.items(), key=lambda item: (-item[1], item[0]))),
        bytes=total.bytes,
        wait=quantiles(total.wait),
        run=quantiles(total.run),
        in_flight=in_flight,
        oldest_ms=oldest,
    )


def _unfinished(balance: Mapping[int, int]) -> tuple[int, int | None]:
    """Return how many attempts are not over, and since when the oldest is not.

    An end whose beginning is not known (of a lost worker, say) is set against the oldest beginning.
    """
    surplus = -sum(left for left in balance.values() if left < 0)
    in_flight, oldest = 0, None
    for minute in sorted(balance):
        left = max(balance[minute], 0)
        taken = min(left, surplus)
        surplus -= taken
        in_flight += left - taken
        if left > taken and oldest is None:
            oldest = minute * MINUTE_MS
    return in_flight, oldest


def quantiles(bins: Mapping[int, int]) -> Quantiles:
    """Return the quantiles of a duration's bins, milliseconds."""
    sketch = DDSketch(ACCURACY)
    for number, count in bins.items():
        if count:
            sketch.add(_mapping.value(number), count)
    return Quantiles(*(sketch.get_quantile_value(each) for each in QUANTILES))


_mapping: Final = LogarithmicMapping(ACCURACY)
