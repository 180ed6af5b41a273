"""``pipeline search``: which events match, as a table."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.filters import filtered, meant, placed, query_of
from celery_kafka_backend.cli.history_shown import outcome, what, who
from celery_kafka_backend.cli.output import console, duration, table, when
from celery_kafka_backend.cli.sources import audited

if TYPE_CHECKING:
    from collections.abc import Sequence

    from celery_kafka_backend.changes import Logged


@click.command("search", cls=Command, short_help="Find events by task name, state, worker, time, duration, exception …")
@filtered
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=50, help="At most so many events; `export` has no limit."
)
@click.option("--oldest", is_flag=True, help="The oldest first; else the newest.")
@click.option("--json", "as_json", is_flag=True, help="The events as they were recorded: a JSON array.")
@placed
@click.pass_context
def command(
    ctx: click.Context,
    /,
    limit: int,
    oldest: bool,
    as_json: bool,
    view: str | None,
    only_log: bool,
    timeout: float,
    **given: Any,
) -> Exit:
    r"""Find events in the history: of the first view that keeps one, else in the log. Everything asked for must hold.

    In a PATTERN, * stands for any text and ? for one character. Times are those of the process that says so.

    SQLite and Elasticsearch filter by all but --text themselves, MongoDB by time, state, name, worker and exception.
    Cassandra and Redis cannot: all that they have is read. The log is read from --since to an hour after --until.
    Exits with 11 if there is nothing.

    \b
    Examples:
      celery -A proj pipeline search --name 'shop.*' --state FAILURE --since 3h
      celery -A proj pipeline search --exception '*Timeout' --worker '*@h7' --since 02:00 --until 04:00
      celery -A proj pipeline search --text order-1717
      celery -A proj pipeline search --min-duration 5m --since 1d --json | jq '.[].task'
      celery -A proj pipeline search --retries 3 --log --since 1h
    """
    pipeline = pipeline_of(ctx)
    query = query_of(given, limit=limit, newest_first=not oldest)
    with (
        audited(pipeline, view, timeout, only_log=only_log) as source,
        nullcontext() if as_json else console(stderr=True).status(f"searching {source.name}"),
    ):
        found, name = list(source.search(query)), source.name
    if as_json:
        click.echo(b"[" + b",\n".join(logged.value for logged in found) + b"]")
    elif found:
        show(found, name, limit)
    if not found:
        remedy = f"{meant(given['states'])}ask for less, or elsewhere with --view or --log"
        raise Stop(Exit.NOT_FOUND, f"nothing of that kind in {name}", remedy)
    return Exit.OK


def show(found: Sequence[Logged], source: str, limit: int) -> None:
    """Draw what was found."""
    screen = console()
    drawn = table("", "time", "what", "task", "id", "try", "who", "queue", "run", "result", numbers=("try", "run"))
    for event, _ in found:
        drawn.add_row(
            when(event.at), what(event), event.name or "", event.task, str(event.attempt), who(event), event.queue or "",
            duration(event.runtime_s), outcome(event),
        )  # fmt: skip
    screen.print(drawn)
    more = "; perhaps there are more: --limit, or `export`" if len(found) == limit else ""
    screen.print(f"{len(found)} events, from {source}{more}", style="dim")
