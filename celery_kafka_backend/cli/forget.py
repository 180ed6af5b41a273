"""``pipeline forget``: a task's result out of every view, and an honest word on what remains."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import click
import msgspec
from celery.exceptions import BackendStoreError

from celery_kafka_backend import codec, topics
from celery_kafka_backend.changes import history_expiry
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import Pipeline, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.output import console, duration, table, when
from celery_kafka_backend.errors import CodecError, SettingsError, StoreError
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import open_view

if TYPE_CHECKING:
    from celery_kafka_backend.sinks.contract import View

POLL_S: Final = 0.1


class Left(msgspec.Struct):
    """What one view has of a task after it was forgotten.

    Attributes:
        view: The view, password masked.
        document: ``gone``; ``shown``, if it was still there when time was up; ``unknown``, if the view cannot be read.
        history: Events that it keeps of the task.
        history_until: When the last of them expires, ms since 1970; None: never, or there is none.
        claims: Objects of large results that these refer to.
        error: Why it cannot be read.
    """

    view: str
    document: str
    history: int = 0
    history_until: int | None = None
    claims: int = 0
    error: str = ""


class Report(msgspec.Struct):
    """What is left of a task after it was forgotten.

    Attributes:
        task: Its id.
        views: In each view.
        log: The topic that has its events …
        partition: … the partition …
        log_until: … and when Kafka may delete the last of them, ms since 1970; None: Kafka keeps them for ever.
    """

    task: str
    views: list[Left]
    log: str
    partition: int
    log_until: int | None


@click.command("forget", cls=Command, short_help="Take a task's result out of every view.")
@click.argument("task_id")
@click.option("--report", is_flag=True, help="Wait for every view, and say what remains where, and for how long.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=30.0, help="Seconds that Kafka, and then each view, may take."
)
@click.pass_context
def command(ctx: click.Context, task_id: str, report: bool, as_json: bool, timeout: float) -> Exit:
    r"""Forget a task's result, as `AsyncResult.forget()` does: no view of this log shows it any more.

    It is an event like any other, so every view that reads the log takes the result out, also one that is filled by a
    replay later. Not erased are the recorded events, with their results and arguments: in the log until Kafka
    deletes them, and in views that keep history until they expire. --report says where, and until when. Exits with 13
    if a view still showed the result when time was up, with 7 if one could not be read.

    \b
    Examples:
      celery -A proj pipeline forget 5f0e…
      celery -A proj pipeline forget 5f0e… --report
      celery -A proj pipeline forget 5f0e… --json
    """
    pipeline = pipeline_of(ctx)
    try:
        pipeline.app.AsyncResult(task_id).forget()
    except BackendStoreError as exc:
        raise Stop(Exit.KAFKA_UNREACHABLE, f"not forgotten: {exc}", "try again when Kafka answers") from exc
    if not report and not as_json:
        click.echo(f"forgotten: {task_id}. Its events remain in the log and in history (--report)")
        return Exit.OK
    found = _report(pipeline, task_id, timeout)
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        show(found)
    if any(left.document == "shown" for left in found.views):
        return Exit.NOT_DONE
    return Exit.VIEW_UNUSABLE if any(left.error for left in found.views) else Exit.OK


def _report(pipeline: Pipeline, task_id: str, timeout_s: float) -> Report:
    deadline = time.monotonic() + timeout_s
    views = [_left(pipeline, url, task_id, deadline) for url in pipeline.settings.views]
    topic = topics.task_events(pipeline.settings.topic_prefix)
    broker = Broker(pipeline.settings, timeout_s)
    try:
        home = topics.partition_of(task_id, broker.partitions(topic))
        kept_ms = int(broker.configs([topic]).get(topic, {}).get("retention.ms", pipeline.settings.retention_ms))
    finally:
        broker.close()
    until = None if kept_ms < 0 else system_wall_ms() + kept_ms
    return Report(task_id, views, topic, home, until)


def _left(pipeline: Pipeline, url: str, task_id: str, deadline: float) -> Left:
    view = open_view(url, pipeline.options(url))
    try:
        while view.documents([task_id]) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        left = Left(mask(url), "shown" if view.documents([task_id]) else "gone")
        _count_history(view, task_id, left, pipeline.settings.history_retention_ms)
    except (StoreError, SettingsError) as exc:
        return Left(mask(url), "unknown", error=str(exc))
    finally:
        view.close()
    return left


def _count_history(view: View, task_id: str, left: Left, retention_ms: int | None) -> None:
    ends: list[int] = []
    claims = set()
    for value in view.history(task_id):
        try:
            event = codec.decode(value)
        except CodecError:
            ends.append(0)
            continue
        ends.append(history_expiry(event, retention_ms))
        if event.claim is not None:
            claims.add(event.claim.path)
    left.history, left.claims = len(ends), len(claims)
    left.history_until = max(ends, default=0) if all(ends) else None


def show(found: Report) -> None:
    """Draw the report."""
    screen = console()
    drawn = table("", "view", "result", "history", "until")
    for left in found.views:
        ends = when(left.history_until) if left.history_until else "for ever" if left.history else ""
        drawn.add_row(
            left.view, left.error or left.document, f"{left.history} events" if left.history else "none", ends
        )
    screen.print(f"forgotten: {found.task}", style="bold")
    screen.print(drawn)
    if claims := max((left.claims for left in found.views), default=0):
        screen.print(f"not erased: {claims} objects of large results, until their day (`pipeline claims expire`)")
    until = (
        f"until {when(found.log_until)} at the latest, and as long as its segment" if found.log_until else "for ever"
    )
    screen.print(f"not erased: its events in {found.log}/{found.partition}, with results and arguments, {until}")
    if found.log_until:
        left_s = found.log_until / 1000 - time.time()
        screen.print(f"a replay within {duration(left_s)} gives its history again, and not its result", style="dim")
