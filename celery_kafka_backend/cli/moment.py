"""Times and time spans as people type them."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta
from typing import Final

import click

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
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
            return int((time.time() - float(ago[1]) * _UNITS[ago[2]]) * 1000)
        try:
            if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):
                return int(_latest(text.zfill(5) if text.count(":") == 1 else text.zfill(8)).timestamp() * 1000)
            return int(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000)
        except ValueError:
            self.fail(f"{text!r} is no time: 2026-01-31T12:00, 03:15, 90m, 12h or 3d", param, ctx)


def _latest(clock: str) -> datetime:
    now = datetime.now().astimezone()
    found = datetime.fromisoformat(f"{now.date()}T{clock}").astimezone()
    return found if found <= now else found - timedelta(days=1)


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
        return float(found[1]) * _UNITS[found[2]]
