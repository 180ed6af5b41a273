"""``pipeline status``: who folds, how far behind, and what endangers a view."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import chosen_views, pipeline_of
from celery_kafka_backend.cli.cutover import said
from celery_kafka_backend.cli.exits import Exit
from celery_kafka_backend.cli.output import console, duration, print_json, table, when
from celery_kafka_backend.cli.state import gather

if TYPE_CHECKING:
    from celery_kafka_backend.cli.state import Reading, State

EVERY_S: Final = 2.0


@click.command("status", cls=Command, short_help="Who folds, and how far behind.")
@click.option(
    "--view", "views", multiple=True, metavar="VIEW",
    help="Only this view: its URL, or scheme or name of a configured one. May be repeated.",
)  # fmt: skip
@click.option("--no-chords", is_flag=True, help="Leave the chord processor out.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--watch", is_flag=True, help="Again every 2 seconds, until Ctrl-C.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=5.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context, views: tuple[str, ...], no_chords: bool, as_json: bool, watch: bool, timeout: float
) -> Exit:
    r"""Show how far each view is behind the log, and who folds.

    Lag is given in events and in seconds: the age of the first event that the view does not have. Exits with 2 when
    a view or the chords have no processor, with 7 when a view cannot be read.

    \b
    Examples:
      celery -A proj pipeline status
      celery -A proj pipeline status --watch
      celery -A proj pipeline status --json | jq '.views[].lags[].events'
      celery -A proj pipeline status --view redis --no-chords || page-somebody
    """
    pipeline = pipeline_of(ctx)
    urls = chosen_views(pipeline.settings, views)
    broker = Broker(pipeline.settings, timeout)
    try:
        if not watch:
            state = gather(pipeline, broker, urls, chords=not no_chords)
            if as_json:
                print_json(_plain(state))
            else:
                show(state, pipeline.command)
            return state.code
        while True:
            broker.forget_metadata()
            state = gather(pipeline, broker, urls, chords=not no_chords)
            click.clear()
            show(state, pipeline.command)
            time.sleep(EVERY_S)
    finally:
        broker.close()


def _plain(state: State) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(state)
    for reading, shown in zip(state.readings, [*found["views"], *filter(None, [found["chords"]])], strict=True):
        shown["lag_events"], shown["lag_seconds"] = total(reading)
    return {**found, "exit_code": int(state.code), "verdict": state.code.name.lower()}


def total(reading: Reading) -> tuple[int, float | None]:
    """Return the lag of all partitions: events, and seconds of the one furthest behind (None if unknown)."""
    events = sum(lag.events for lag in reading.lags)
    ages = [lag.seconds for lag in reading.lags]
    return events, None if None in ages else max((age for age in ages if age is not None), default=0.0)


def show(state: State, command: str) -> None:
    """Draw it; ``command`` is how the user calls us."""
    screen = console()
    note = "  (embedded broker: in memory only; it cannot tell who folds)" if state.embedded else ""
    screen.print(f"log {state.prefix}.task-events at {state.servers}{note}")
    if state.oldest is None:
        screen.print("  empty")
    else:
        back = duration((state.at - state.oldest) / 1000)
        screen.print(f"  {state.events} events, from {when(state.oldest)} ({back} back) to {when(state.latest)}")
        kept = f"; Kafka keeps them for {duration(state.log_kept_ms / 1000)}" if state.log_kept_ms is not None else ""
        screen.print(f"  audit and replay reach back to {when(state.oldest)}{kept}")
    screen.print(f"  readers read {said(state.readers)}")
    for name in state.readers.outdated:
        again = f"`{command} cutover --to {state.readers.view}`"
        screen.print(f"  warning: {name} does not say so; repeat {again}", style="yellow")
    letters = f"{state.dead_letters} records in {state.prefix}.dead-letters"
    if state.dead_letters:  # what was done about them, too
        screen.print(f"  {letters}; `{command} dead-letters list --state open` says what is to be done", style="yellow")
    else:
        screen.print(f"  {letters}")
    for reading in state.readings:
        screen.print()
        _show(reading, state.at)
    if state.code is Exit.NOBODY_FOLDS:
        lonely = ", ".join(reading.name for reading in state.readings if reading.folders == [])
        screen.print(f"\nnobody folds: {lonely}. Start `{command} run`.", style="red")


def _kept(reading: Reading, now_ms: int) -> str:
    results = f"results are kept {_span(reading.results_kept_s)} (result_expires)"
    if not reading.keeps_history:
        return f"{results}; no history: an audit reads the log"
    if reading.history_kept_s == reading.results_kept_s:
        kept = f"{results}, and their history as long"
    else:
        kept = f"{results}, history {_span(reading.history_kept_s)} (history_retention_ms)"
    if reading.history_from is None:
        return kept
    back = duration((now_ms - reading.history_from) / 1000)
    return f"{kept}: from {when(reading.history_from)} ({back} back)"


def _span(seconds: float | None) -> str:
    return f"for {duration(seconds)}" if seconds else "for ever"


def _show(reading: Reading, now_ms: int) -> None:
    screen = console()
    events, seconds = total(reading)
    if events:
        late = f"{events} events behind, {duration(seconds) or 'age unknown'}"
    else:
        late = "" if reading.error else "up to date"  # what its processors have committed says nothing of what it shows
    screen.print(f"{reading.name}  {reading.url}  {late}".rstrip(), style="bold")
    if reading.error:
        screen.print(f"  cannot be read: {reading.error}", style="red")
    if reading.url and not reading.error:
        screen.print(f"  {_kept(reading, now_ms)}")
    for warning in reading.warnings:
        screen.print(f"  warning: {warning}", style="yellow")
    if reading.folders is None:
        screen.print(f"  group {reading.group}: this broker cannot tell who folds")
    elif not reading.folders:
        screen.print(f"  group {reading.group}: nobody", style="red")
    else:
        for one in reading.folders:
            held = ", ".join(one.partitions) or "no partition now"
            screen.print(f"  group {reading.group}: {one.host}  {one.client}  {held}")
    drawn = table(
        "", "topic", "partition", "end", "position", "behind", "age", numbers=("partition", "end", "position", "behind")
    )
    for lag in reading.lags:
        position = str(lag.position) if lag.position is not None else "none yet" if lag.events else ""
        age = duration(lag.seconds) if lag.events else ""
        gone = f"  {lag.missed} were deleted before they were folded" if lag.missed else ""
        drawn.add_row(
            f"  {lag.topic}", str(lag.partition), str(lag.end), position, str(lag.events), f"{age}{gone}".strip()
        )
    screen.print(drawn)
