"""``pipeline top``: what the fleet does now, live."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, cast

import click
import msgspec

from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.output import console, duration, print_json, table, when
from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.order import system_wall_ms

if TYPE_CHECKING:
    from rich.console import RenderableType

    from celery_kafka_backend.insight import Insight
    from celery_kafka_backend.windows import Dimension, Figures

WINDOWS: Final = ("1m", "5m", "1h")
DIMENSIONS: Final = ("task", "queue", "worker")
STALE_S: Final = 10.0
"""So long after the insight processor's last write, it is said that the figures are old."""
_NUMBERS: Final = (
    "sent/s", "started/s", "ok/s", "failed/s", "failed", "retried", "wait p50", "p95", "p99", "run p50", "p95 ", "p99 ",
    "in flight", "oldest",
)  # fmt: skip


@click.command("top", cls=Command, short_help="What the fleet does now, live.")
@click.option("--window", type=click.Choice(WINDOWS), default="1m", help="Over how long.")
@click.option("--by", type=click.Choice(DIMENSIONS), default="task", help="One row for each of these.")
@click.option("--task", metavar="NAME", help="Only this task name.")
@click.option("--queue", metavar="NAME", help="Only this queue.")
@click.option("--worker", metavar="NODE", help="Only this worker.")
@click.option("--once", is_flag=True, help="Show it once, and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: as JSON.")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, help="Seconds between two looks.")
@click.pass_context
def command(
    ctx: click.Context,
    window: str,
    by: str,
    task: str | None,
    queue: str | None,
    worker: str | None,
    once: bool,
    as_json: bool,
    interval: float,
) -> Exit:
    r"""Show rates, failures, waiting and run times and what is in flight, per task name, queue or worker.

    It reads the insight view, which `pipeline run --insight` keeps. docs/insight.md says what a window promises.

    \b
    Examples:
      celery -A proj pipeline top
      celery -A proj pipeline top --window 1h --by queue
      celery -A proj pipeline top --by task --worker celery@host1
      celery -A proj pipeline top --once --json | jq '.figures[] | select(.failure_ratio > 0.1)'
    """
    if as_json and not once:
        raise Stop(Exit.CONFIGURATION, "--json shows one moment", "add --once")
    insight = _insight(ctx)
    query = {"by": cast("Dimension", by), "task": task, "queue": queue, "worker": worker}
    try:
        if as_json:
            print_json(_as_json(insight, window, query))
        elif once:
            console().print(_shown(insight, window, query))
        else:
            _live(insight, window, query, interval)
    except Unavailable as exc:
        raise Stop(
            Exit.VIEW_UNUSABLE, f"the insight view cannot be read: {exc}", "is `pipeline run --insight` running?"
        ) from exc
    finally:
        insight.close()
    return Exit.OK


def _insight(ctx: click.Context) -> Insight:
    try:
        from celery_kafka_backend.insight import insight_of  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as exc:
        raise Stop(
            Exit.CONFIGURATION, f"{exc.name!r} is not installed", "pip install 'celery-kafka-backend[insight]'"
        ) from exc
    return insight_of(pipeline_of(ctx).app)


def _as_json(insight: Insight, window: str, query: dict[str, Any]) -> dict[str, Any]:
    at = system_wall_ms()
    found = insight.window(window, at_ms=at, **query)
    return {
        "at": at,
        "written_at": insight.written_at(),
        "window": window,
        "by": query["by"],
        "figures": msgspec.to_builtins(found),
    }


def _live(insight: Insight, window: str, query: dict[str, Any], interval_s: float) -> None:
    from rich.live import Live  # noqa: PLC0415 - an extra; `console` says so

    screen = console()
    with Live(_shown(insight, window, query), console=screen, auto_refresh=False, screen=screen.is_terminal) as live:
        while True:
            time.sleep(interval_s)
            try:
                live.update(_shown(insight, window, query), refresh=True)
            except Unavailable as exc:
                live.update(f"the insight view cannot be read: {exc}", refresh=True)


def _shown(insight: Insight, window: str, query: dict[str, Any]) -> RenderableType:
    now = system_wall_ms()
    written = insight.written_at()
    late_s = (now - written) / 1000
    only = "".join(f", {name} {query[name]}" for name in DIMENSIONS if query[name] is not None)
    title = f"the last {window} by {query['by']}{only}, at {when(now)}"
    if not written:
        title += ": nothing was written yet: is `pipeline run --insight` running?"
    elif late_s > STALE_S:
        title += f": OLD, the insight processor last wrote {duration(late_s)} ago"
    made = table(title, query["by"], *_NUMBERS, "most frequent error", numbers=_NUMBERS)
    for one in insight.window(window, at_ms=now, **query):
        made.add_row(*_cells(one, now))
    return made


def _cells(one: Figures, now_ms: int) -> list[str]:
    rates = [f"{one.rates.get(kind, 0.0):.1f}" for kind in ("sent", "started", "success", "failure")]
    ratios = ["" if ratio is None else f"{ratio:.1%}" for ratio in (one.failure_ratio, one.retry_ratio)]
    times = [
        duration(None if each is None else each / 1000)
        for known in (one.wait, one.run)
        for each in (known.p50, known.p95, known.p99)
    ]
    oldest = "" if one.oldest_ms is None else duration((now_ms - one.oldest_ms) / 1000)
    error = next((f"{name} ({count})" for name, count in one.errors.items()), "")
    return [one.name or "(unknown)", *rates, *ratios, *times, str(one.in_flight), oldest, error]
