"""``pipeline size``: what a number of tasks per day needs. Arithmetic on `figures`; asks nobody."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from celery_kafka_backend.cli import figures
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import pipeline_of
from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.cli.output import duration, print_json
from celery_kafka_backend.cli.output import size as bytes_of

if TYPE_CHECKING:
    from celery_kafka_backend.cli.context import Pipeline

DAY_S: Final = 86_400
A_YEAR_S: Final = 365.0 * DAY_S
"""Of what is kept for ever, what that brings."""
BUSY: Final = 0.5
"""How busy a process may be at the peak: the rest is for catching up, and for rebalances."""
OUTAGE_S: Final = 600
PARTITIONS_PER_PROCESS: Final = 4
"""Room to add processes without adding partitions."""
FEWEST_PARTITIONS: Final = 6

_UNITS: Final = {"m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}


class Span(click.ParamType):
    """A time span: ``90m``, ``12h``, ``7d``, ``2w``; given as seconds."""

    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, (int, float)):
            return float(value)
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", str(value))
        if not found:
            self.fail(f"{value!r} is no time span: 90m, 12h, 7d or 2w", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


class Load(NamedTuple):
    """What is to be carried.

    Attributes:
        tasks_per_day: Tasks.
        events_per_task: Events of each.
        result_bytes: Encoded result of each.
        peak: The busiest minutes, as a multiple of the day's mean.
        retention_s: How long the log keeps events.
        expires_s: How long results stay.
        replication: Copies in Kafka.
        history: Whether Redis keeps every event too.
        history_s: … and for how long.
    """

    tasks_per_day: float
    events_per_task: float
    result_bytes: float
    peak: float
    retention_s: float
    expires_s: float
    replication: int
    history: bool
    history_s: float


class Needs(NamedTuple):
    """What it takes.

    Attributes:
        mean_events_per_s: Mean rate.
        peak_events_per_s: Peak rate.
        processes: Materializers per view.
        partitions: Of the log.
        log_bytes: Kafka's disk, all copies.
        log_bytes_per_day: … per day, one copy.
        redis_bytes: Redis' memory.
        process_bytes: Memory of all materializers of one view.
        catch_up_s: How long it takes to catch up after ten minutes' outage at the peak.
    """

    mean_events_per_s: float
    peak_events_per_s: float
    processes: int
    partitions: int
    log_bytes: float
    log_bytes_per_day: float
    redis_bytes: float
    process_bytes: float
    catch_up_s: float


def needs(load: Load) -> Needs:
    """Return what a load takes."""
    mean = load.tasks_per_day * load.events_per_task / DAY_S
    peak = mean * load.peak
    processes = max(1, math.ceil(peak / (figures.FOLD_EVENTS_PER_S * BUSY)))
    in_log = load.events_per_task * figures.LOG_BYTES_PER_EVENT + load.result_bytes * figures.LOG_BYTES_PER_RESULT_BYTE
    result = load.result_bytes * figures.REDIS_BYTES_PER_RESULT_BYTE
    in_redis = (figures.REDIS_BYTES_PER_TASK + result) * load.expires_s
    if load.history:
        in_redis += (load.events_per_task * figures.REDIS_HISTORY_BYTES_PER_EVENT + result) * load.history_s
    per_day = load.tasks_per_day * in_log
    return Needs(
        mean_events_per_s=mean,
        peak_events_per_s=peak,
        processes=processes,
        partitions=max(FEWEST_PARTITIONS, PARTITIONS_PER_PROCESS * processes),
        log_bytes=per_day * load.retention_s / DAY_S * load.replication,
        log_bytes_per_day=per_day,
        redis_bytes=load.tasks_per_day / DAY_S * in_redis,
        process_bytes=processes * figures.MATERIALIZER_BYTES,
        catch_up_s=OUTAGE_S * peak / (processes * figures.FOLD_EVENTS_PER_S - peak),
    )


@click.command("size", cls=Command, short_help="What so many tasks per day need.")
@click.option("--tasks-per-day", type=click.FloatRange(min=1), required=True, help="How many tasks; 2e6 is fine.")
@click.option("--result-bytes", type=click.FloatRange(min=0), default=400, help="Encoded result of one task.")
@click.option("--events-per-task", type=click.FloatRange(min=1), default=4, help="sent, received, started, success: 4.")
@click.option("--retention", type=Span(), help="How long the log keeps events. Default: as configured.")
@click.option("--expires", type=Span(), help="How long results stay. Default: result_expires.")
@click.option("--peak", type=click.FloatRange(min=1), default=5, help="Busiest minutes as a multiple of the mean.")
@click.option("--history/--no-history", default=None, help="Redis keeps every event. Default: as configured.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    tasks_per_day: float,
    result_bytes: float,
    events_per_task: float,
    retention: float | None,
    expires: float | None,
    peak: float,
    history: bool | None,
    as_json: bool,
) -> Exit:
    r"""Say what a number of tasks per day needs: partitions, disk, memory, processes.

    From measured figures, named with their source; your results and machines differ, so take it as a start and look at
    `status` later.

    \b
    Examples:
      celery -A proj pipeline size --tasks-per-day 2e6
      celery -A proj pipeline size --tasks-per-day 5e7 --result-bytes 2000 --retention 3d --peak 3
    """
    pipeline = pipeline_of(ctx)
    expires_s = _expires_s(pipeline) if expires is None else expires
    own_ms = pipeline.settings.history_retention_ms
    load = Load(
        tasks_per_day,
        events_per_task,
        result_bytes,
        peak,
        pipeline.settings.retention_ms / 1000 if retention is None else retention,
        expires_s,
        pipeline.settings.replication_factor,
        bool(pipeline.settings.history.get("redis")) if history is None else history,
        expires_s if own_ms is None else own_ms / 1000 or A_YEAR_S,
    )
    found = needs(load)
    if as_json:
        shown = {"load": load._asdict(), "needs": found._asdict(), "source": figures.SOURCE}
        print_json(shown)
    else:
        show(load, found, pipeline.settings.partitions)
    return Exit.OK


def _expires_s(pipeline: Pipeline) -> float:
    expires = pipeline.app.conf.result_expires
    if not expires:
        return A_YEAR_S
    return float(getattr(expires, "total_seconds", lambda: expires)())


def show(load: Load, found: Needs, configured: int) -> None:
    """Print it."""
    many = "es" * (found.processes != 1)
    copies = "1 copy" if load.replication == 1 else f"{load.replication} copies"
    rates = f"{found.mean_events_per_s:,.0f}/s on average, {found.peak_events_per_s:,.0f}/s at {load.peak:g} times that"
    each = f"one folds {figures.FOLD_EVENTS_PER_S:,} events/s into Redis"
    processes = f"{found.processes} process{many} per view, {bytes_of(found.process_bytes)} of memory; {each}"
    partitions = f"{found.partitions} for the log (kafka_backend_settings['partitions'] is {configured})"
    disk = f"{bytes_of(found.log_bytes)}: {bytes_of(found.log_bytes_per_day)} a day, kept {duration(load.retention_s)}"
    history = f"with history kept {duration(load.history_s)}" if load.history else "without history"
    kept = f"results kept {duration(load.expires_s)}, {history}"
    lines = (
        ("events", rates),
        ("processes", processes),
        ("partitions", partitions),
        ("Kafka disk", f"{disk}, {copies}"),
        ("Redis memory", f"{bytes_of(found.redis_bytes)}: {kept}"),
        ("catching up", f"{duration(found.catch_up_s)} after ten minutes without processors at the peak"),
    )
    for name, text in lines:
        click.echo(f"{name:<13} {text}")
    click.echo(f"\nFigures: {figures.SOURCE}.")
