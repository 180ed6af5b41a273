"""``pipeline replay``: the log once more, into another store. Runs no task again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import chosen_views, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.moment import Moment
from celery_kafka_backend.cli.output import progress
from celery_kafka_backend.cli.run import check_topics
from celery_kafka_backend.processors.replay import EARLIEST, replay
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import open_sink, open_view

if TYPE_CHECKING:
    from celery_kafka_backend.changes import Partition
    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.processors.replay import Replayed


@click.command("replay", cls=Command, short_help="Feed the log into another store.")
@click.option("--to", required=True, metavar="VIEW", help="Where to: a URL, or scheme or name of a configured view.")
@click.option("--from", "from_", type=Moment(), help="Only events since then. Default: all that the log has.")
@click.option("--until", type=Moment(), help="Only events before then. Default: the end as it is now.")
@click.option("--continue", "go_on", is_flag=True, help="Go on where that store's own positions say it stopped.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=10.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context, to: str, from_: int | None, until: int | None, go_on: bool, quiet: bool, timeout: float
) -> Exit:
    r"""Feed the log into a store: a new one, a lost one, or one to compare with. No task runs again.

    It folds as `run` does, beside whatever runs, and ends when it has reached the end as it was at the start. Repeating
    it changes nothing. What has expired is left out.

    \b
    Examples:
      celery -A proj pipeline replay --to sqlite:////data/audit.db
      celery -A proj pipeline replay --to redis --from 12h        the last half day, into the configured Redis
      celery -A proj pipeline replay --to sqlite:////data/audit.db --continue
    """
    pipeline = pipeline_of(ctx)
    urls = chosen_views(pipeline.settings, (to,), "--to")
    if len(urls) > 1:
        raise Stop(Exit.CONFIGURATION, f"--to {to}: that is {len(urls)} views", "give the URL or the name of one")
    if go_on and from_ is not None:
        raise Stop(Exit.CONFIGURATION, "--continue and --from contradict each other", "give one of them")
    url = urls[0]
    broker = Broker(pipeline.settings, timeout)
    try:
        check_topics(broker, pipeline)
    finally:
        broker.close()
    start = _positions(pipeline, url) if go_on else EARLIEST if from_ is None else from_
    done = _with_progress(pipeline, url, start, until, quiet=quiet)
    click.echo(
        f"{mask(url)}: {done.events} events and {done.facts} chord facts of {done.records} records, "
        f"{done.changes} tasks and groups written; left out: {done.expired} expired, {done.poison} unreadable, "
        f"{done.rejected} refused by the store"
    )
    if done.deleted:
        click.echo(f"{done.deleted} older records are no longer in the log.")
    return Exit.OK


def _positions(pipeline: Pipeline, url: str) -> dict[Partition, int]:
    view = open_view(url, pipeline.options(url))
    try:
        return view.positions()
    finally:
        view.close()


def _with_progress(
    pipeline: Pipeline, url: str, start: str | int | dict[Partition, int], until: int | None, *, quiet: bool
) -> Replayed:
    sink = open_sink(url, pipeline.options(url))
    if quiet:
        return replay(pipeline.settings, sink, from_=start, until=until)
    with progress() as bar:
        task = bar.add_task("replaying", total=None)
        return replay(
            pipeline.settings,
            sink,
            from_=start,
            until=until,
            on_progress=lambda done: bar.update(task, completed=done.read, total=done.total),
        )
