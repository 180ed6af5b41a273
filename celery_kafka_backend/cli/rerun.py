"""``pipeline rerun``: the messages of tasks once more, as new runs. A replay runs nothing; this does."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import click

from celery_kafka_backend.cli.actor import checked, recorded, sure, who
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.filters import filtered, meant, query_of
from celery_kafka_backend.cli.history_shown import outcome, what
from celery_kafka_backend.cli.output import console, print_json, table, watched, when
from celery_kafka_backend.cli.resending import BATCH, Lives, Resending
from celery_kafka_backend.cli.run import check_topics
from celery_kafka_backend.cli.sources import in_log
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from celery_kafka_backend.query import Query
    from celery_kafka_backend.rerunning import Candidate

SHOWN: Final = 20
"""Rows of what is about to be done; --json has all."""
AT_ONCE_S: Final = 1.0
"""With a rate, so much of it is announced at once."""


@click.command("rerun", cls=Command, short_help="Run tasks again: their original messages, as new runs.")
@click.argument("tasks", nargs=-1, metavar="[TASK_ID]...")
@filtered
@click.option("--rate", type=click.FloatRange(min=0.01), metavar="N", help="At most so many messages per second.")
@recorded
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=30.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    tasks: tuple[str, ...],
    rate: float | None,
    reason: str,
    actor: str,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    timeout: float,
    **given: Any,
) -> Exit:
    r"""Send the original messages of tasks again, under the same ids, as new runs. It runs them: `replay` does not.

    The filters are those of `search`, and hold of how a task is now: a task that has failed and was run again since is not
    meant. Without --state only tasks that have ended are. Needed is what the setting record_messages records when a task
    is sent; tasks without are refused, with the reason.

    Who asked, why and when is in each task's history. Interrupted, the same command with the same --until sends the rest.

    Exits with 13 if tasks were refused, 11 if there are none.

    \b
    Examples:
      celery -A proj pipeline rerun --state FAILURE --name shop.pay --since 1h --dry-run
      celery -A proj pipeline rerun --state FAILURE --name 'shop.*' --since 1h --rate 50 --reason "bank was down"
      celery -A proj pipeline rerun 5f0e… --reason "asked by the customer" --yes
    """
    if not tasks and not any(given.values()):
        raise Stop(Exit.CONFIGURATION, "rerun what?", "name tasks, or give a filter")
    why = "" if dry_run else checked(reason, "rerun")
    begun = system_wall_ms()
    query = query_of({**given, "until": given["until"] or begun + 1})
    pipeline = pipeline_of(ctx)
    with closing(Broker(pipeline.settings, timeout)) as broker:
        check_topics(broker, pipeline)
        lives = Lives(broker, tasks or {event.task for event, _ in in_log(broker, query)})
        lives.go_on()
        found = lives.candidates(query)
        if not found:
            remedy = f"{meant(given['states'])}`{pipeline.command} search` shows what there is"
            raise Stop(Exit.NOT_FOUND, "no task is as asked for", remedy)
        if missing := set(tasks) - {one.task for one in found}:
            raise Stop(
                Exit.NOT_FOUND,
                f"{min(missing)} is not as asked for: the log has nothing of it, or it has not ended, or is forgotten",
                f"`{pipeline.command} history {min(missing)} --log` shows what there is; --state takes what has not ended",
            )
        able = [one for one in found if one.sent is not None]
        refused = [one for one in found if one.sent is None]
        done: list[str] = []
        if able and not dry_run:
            if not yes:
                _draw(able)
                sure(f"run {_many(len(able))} again?")
            if not as_json:
                click.echo(f"if this is interrupted, go on with --until {_moment(query.until)}", err=True)
            resending = Resending(pipeline, broker, actor or who(), why)
            done = resending.sent
            _work(resending, lives, query, rate, quiet=as_json)
    _tell(able, refused, done, dry_run=dry_run, as_json=as_json)
    return Exit.NOT_DONE if refused else Exit.OK


def _work(resending: Resending, lives: Lives, query: Query, rate: float | None, *, quiet: bool) -> None:
    resending.begin()
    # Nobody else announces anything from now on.
    able = [one for one in resending.settled(lives, query) if one.sent is not None]
    at_once = BATCH if rate is None else max(1, min(BATCH, int(rate * AT_ONCE_S)))
    steps = resending.run(lives, able, Pace(rate), at_once)
    watched(steps, "sending", len(able), quiet=quiet or len(able) < SHOWN)


def _moment(ms: int | None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(-(-(ms or 0) // 1000)))


def _many(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"


def _draw(found: Sequence[Candidate]) -> None:
    drawn = table("", "task", "id", "now", "since", "queue", "result", "note")
    for one in found[:SHOWN]:
        note = one.why_not or ("announced, and perhaps not sent" if one.run else "")
        queue = (one.sent or one.said).queue or ""
        drawn.add_row(one.said.name or "?", one.task, what(one.said), when(one.said.at), queue, outcome(one.said), note)
    console().print(drawn)
    if len(found) > SHOWN:
        click.echo(f"… and {len(found) - SHOWN} more (--json)")


def _tell(
    able: Sequence[Candidate], refused: Sequence[Candidate], done: Sequence[str], *, dry_run: bool, as_json: bool
) -> None:
    if as_json:
        would = [one.task for one in able] if dry_run else []
        why = [{"task": one.task, "why": one.why_not} for one in refused]
        print_json({"dry_run": dry_run, "would": would, "sent": list(done), "refused": why})
        return
    if dry_run:
        _draw(able)
        click.echo(f"would run again: {_many(len(able))}")
    else:
        click.echo(f"sent again: {_many(len(done))}")
    for one in refused[:SHOWN]:
        click.echo(f"refused: {one.task}: {one.why_not}", err=True)
    if len(refused) > SHOWN:
        click.echo(f"… and {len(refused) - SHOWN} more refused (--json)", err=True)
