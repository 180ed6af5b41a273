"""Times and time spans as people type them."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta
from typing import Final

import click

_UNITS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
"""Milliseconds: what a quotient of them gives is the same float that a measured 17.423 is, a product with 0.001 is not."""
_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")


class Moment(click.ParamType):
    """A point in time: ISO 8601 (local unless it says otherwise), a time of the last 24 hours, or so long ago: ``90m``."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return ms since 1970."""
        if isinstance(value, int):
            return value
        text = str(value)
        if ago := _SPAN.fullmatch(text):
            return int(time.time() * 1000 - float(ago[1]) * _UNITS[ago[2]])
        try:
            if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):
                clock = text.zfill(5) if text.count(":") == 1 else text.zfill(8)
                return int(latest(clock, datetime.now().astimezone()).timestamp() * 1000)
            return int(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000)
        except ValueError:
            self.fail(f"{text!r} is no time: 2026-01-31T12:00, 03:15, 90m, 12h or 3d", param, ctx)


def latest(clock: str, now: datetime) -> datetime:
    """Return when a clock on the wall last showed ``HH:MM`` or ``HH:MM:SS``: of an hour that came twice, the second one."""
    shown = (
        datetime.fromisoformat(f"{day}T{clock}").replace(fold=fold).astimezone()
        for day in (now.date(), now.date() - timedelta(days=1))
        for fold in (0, 1)
    )
    return max(then for then in shown if then <= now)


class Span(click.ParamType):
    """A length of time: ``250ms``, ``90s``, ``10m``, ``2h``, ``3d``."""

    name = "span"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        found = _SPAN.fullmatch(str(value))
        if not found:
            self.fail(f"{value!r} is no length of time: 250ms, 90s, 10m, 2h or 3d", param, ctx)
        return float(found[1]) * _UNITS[found[2]] / 1000
