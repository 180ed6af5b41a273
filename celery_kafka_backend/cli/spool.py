"""``pipeline spool``: what this host keeps because Kafka did not take it, and its way there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop, code_of
from celery_kafka_backend.cli.output import duration, print_json, size, when
from celery_kafka_backend.producer.courier import VERDICT_S
from celery_kafka_backend.producer.drain import drain
from celery_kafka_backend.producer.publisher import publisher_for
from celery_kafka_backend.producer.salvage import adopt
from celery_kafka_backend.producer.spool import Spool, spool_for

if TYPE_CHECKING:
    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.producer.spool import State


@click.command("spool", cls=Command, short_help="What this host keeps for Kafka: look, or drain.")
@click.argument("action", type=click.Choice(["status", "drain"]))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=30.0, help="Seconds that Kafka may take to answer.")
@click.option(
    "--from", "files", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="drain: take over another spool's file first, of other servers, another prefix, a copy. May be repeated.",
)  # fmt: skip
@click.option("--again", is_flag=True, help="drain: also what was set aside because Kafka would not take it.")
@click.pass_context
def command(
    ctx: click.Context, action: str, as_json: bool, timeout: float, files: tuple[Path, ...], again: bool
) -> Exit:
    r"""Look at the spool of this host, or publish what it holds; the workers of this host do that by themselves.

    Where a worker runs, drain waits for it to do so. Exits with 4 if Kafka did not take everything, and with 10 if records are set aside that it will never take.

    \b
    Examples:
      celery -A proj pipeline spool status
      celery -A proj pipeline spool drain
      celery -A proj pipeline spool drain --from /mnt/dead-host/celery-4f1c09ab.spool
    """
    pipeline = pipeline_of(ctx)
    if not pipeline.settings.spool:
        raise Stop(
            Exit.CONFIGURATION,
            "this app has no spool",
            "kafka_backend_settings['spool'] = '/a/folder/of/each/worker/host'",
        )
    spool = spool_for(pipeline.settings)
    if action == "drain":
        return _drain(pipeline, spool, timeout, files, again)
    state = spool.state()
    if as_json:
        print_json(plain(spool, state))
    else:
        _show(spool, state)
    return _code(state)


def plain(spool: Spool, state: State) -> dict[str, object]:
    """Return a state as JSON can hold it."""
    shown = state._asdict()
    return {"path": str(spool.path), **shown, "files": [str(file) for file in state.files]}


def _code(state: State) -> Exit:
    return Exit.DIFFERENT if state.aside else Exit.OK


def _show(spool: Spool, state: State) -> None:
    click.echo(f"spool {spool.path}")
    if not state.records:
        click.echo("  empty")
    else:
        age = duration(max(time.time() - (state.oldest_ms or 0) / 1000, 0))
        click.echo(f"  {state.records} records, the oldest from {when(state.oldest_ms)} ({age})")
    click.echo(f"  {size(state.size)} of {size(state.limit)}")
    for pid, count in sorted(state.pids.items()):
        click.echo(f"  {count} spooled by pid {pid}")
    for why, count in state.aside.items():
        click.secho(f"  {count} set aside: {why}", fg="red")
    for file in state.files:
        click.secho(f"  moved aside, to be read by the next drain: {file}", fg="yellow")
    others = sorted(set(spool.path.parent.glob("*.spool")) - {spool.path})
    for file in others:
        click.secho(f"  of other servers or another prefix: {file} (drain --from)", fg="yellow")


def _drain(pipeline: Pipeline, spool: Spool, timeout: float, files: tuple[Path, ...], again: bool) -> Exit:
    for file in files:
        _take_over(spool, file.absolute())
    if again:
        spool.take_back()
    deadline = time.monotonic() + timeout
    while True:
        with spool.claim() as mine:
            if mine:
                _publish(pipeline, spool, timeout)
                break
        if spool.empty():
            click.echo(f"a worker of this host has drained {spool.path}")
            break
        if time.monotonic() > deadline:
            left = spool.state().records
            raise Stop(Exit.KAFKA_UNREACHABLE, f"{left} records left, which a worker of this host is trying to drain")
        time.sleep(0.1)
    state = spool.state()
    if state.aside:
        _show(spool, state)
    return _code(state)


def _publish(pipeline: Pipeline, spool: Spool, timeout: float) -> None:
    publisher = publisher_for(msgspec.structs.replace(pipeline.settings, delivery_timeout_s=timeout))
    try:
        found = drain(spool, publisher, timeout + VERDICT_S)
    finally:
        publisher.close()
    click.echo(f"{found.sent} records drained from {spool.path}")
    if found.why is not None:
        raise Stop(code_of(found.why), f"{spool.state().records} records left: {found.why}")


def _take_over(spool: Spool, file: Path) -> None:
    if file == spool.path:
        return
    other = Spool(file, spool.state().limit)
    other.retire()
    for retired in other.retired():
        count, whole = adopt(spool, retired)
        click.echo(f"{count} records taken over from {file}{'' if whole else '; the rest cannot be read'}")
