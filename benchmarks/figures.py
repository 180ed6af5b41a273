"""Measured figures: medians, ratios against a peer, bounds, and how they are shown. No I/O."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Bound(NamedTuple):
    """What a figure must not leave.

    Attributes:
        of: ``ratio`` (ours / peer) or ``value`` (ours).
        least: At least this, if not None.
        most: At most this, if not None.
    """

    of: str = "ratio"
    least: float | None = None
    most: float | None = None

    def holds(self, figure: float) -> bool:
        return (self.least is None or figure >= self.least) and (self.most is None or figure <= self.most)

    def __str__(self) -> str:
        if self.least is not None:
            return f"{self.of} ≥ {_short(self.least)}"
        return f"{self.of} ≤ {_short(self.most or 0.0)}"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table.

    Attributes:
        what: What was measured.
        unit: Its unit.
        ours: One figure for each run.
        peer: The peer's, measured right before or after ours of the same place; [] without a peer.
        against: Who the peer is.
        bound: What must hold, if anything.
        note: Anything a reader has to know.
    """

    what: str
    unit: str
    ours: list[float]
    peer: list[float] = []
    against: str = ""
    bound: Bound | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Median over the runs of ours / peer: neighbours in time share the machine's mood."""
        if not self.peer or not self.ours:
            return None
        if len(self.peer) == len(self.ours):
            return median(a / b for a, b in zip(self.ours, self.peer, strict=True))
        return median(self.ours) / median(self.peer)

    @property
    def holds(self) -> bool | None:
        if self.bound is None:
            return None
        figure = self.ratio if self.bound.of == "ratio" else median(self.ours)
        return figure is not None and self.bound.holds(figure)

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": self.unit,
            "ours": summary(self.ours),
            "peer": summary(self.peer) if self.peer else None,
            "against": self.against or None,
            "ratio": self.ratio,
            "bound": None if self.bound is None else str(self.bound),
            "holds": self.holds,
            "note": self.note or None,
        }


def summary(samples: Sequence[float]) -> dict[str, Any]:
    return {"median": median(samples), "min": min(samples), "max": max(samples), "runs": list(samples)}


def percentile(samples: Iterable[float], share: float) -> float:
    """Return the smallest sample that at least ``share`` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


HEADER = ("what", "unit", "ours: median (min to max)", "peer: median (min to max)", "peer", "ratio", "bound", "")


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table, padded so that it reads as plain text too."""
    lines = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    shown = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    shown.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [f"- {row.what}: {row.note}" for row in rows if row.note]
    return "\n".join([*shown, "", *notes]) if notes else "\n".join(shown)


def _cells(row: Row) -> tuple[str, ...]:
    ratio, holds = row.ratio, row.holds
    return (
        row.what,
        row.unit,
        _spread(row.ours),
        _spread(row.peer) if row.peer else "",
        row.against,
        "" if ratio is None else f"{ratio:.2f}",
        "" if row.bound is None else str(row.bound),
        "" if holds is None else "PASS" if holds else "FAIL",
    )


def _spread(samples: Sequence[float]) -> str:
    if len(samples) == 1:
        return _short(samples[0])
    return f"{_short(median(samples))} ({_short(min(samples))} to {_short(max(samples))})"


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
