"""``pipeline claims``: what becomes of the objects that large results lie in."""

from __future__ import annotations

import click

from celery_kafka_backend.claims import Claims
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.settings import SETTING


@click.command("claims", cls=Command, short_help="Expire the objects of large results.")
@click.argument("action", type=click.Choice(["expire"]))
@click.option("--dry-run", is_flag=True, help="Remove nothing; say what would be.")
@click.pass_context
def command(ctx: click.Context, action: str, dry_run: bool) -> Exit:
    r"""Remove the objects of every day that has passed: no view and no replay asks for them any more.

    An object's day is the result's expiry or the end of the log's retention, whichever is later, and one more. Run it
    daily, or let the store do it: the objects of a day are one folder below `claim_check`.

    \b
    Examples:
      celery -A proj pipeline claims expire --dry-run
      celery -A proj pipeline claims expire
    """
    del action  # one, so far
    settings = pipeline_of(ctx).settings
    if not settings.claim_check:
        raise Stop(Exit.CONFIGURATION, f"{SETTING}['claim_check'] is not set", "there is nothing to expire")
    claims = Claims(settings)
    days = list(claims.expired(system_wall_ms()))
    for day, count in days:
        if not dry_run:
            claims.remove(day)
        objects = "1 object" if count == 1 else f"{count} objects"
        click.echo(f"{day}: {objects} {'to be removed' if dry_run else 'removed'}")
    if not days:
        click.echo(f"{claims.url}: no day has passed")
    return Exit.OK
