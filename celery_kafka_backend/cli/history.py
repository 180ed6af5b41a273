"""``pipeline history``: everything that happened to one task, from a view or from the log itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from celery_kafka_backend import codec, events, topics
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import Pipeline, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.output import console, duration, short, table, when
from celery_kafka_backend.cli.records import saying, scan
from celery_kafka_backend.errors import CodecError, SettingsError, StoreError
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import open_view

if TYPE_CHECKING:
    from celery_kafka_backend.events import Event


@click.command("history", cls=Command, short_help="Everything that happened to a task.")
@click.argument("task_id")
@click.option("--json", "as_json", is_flag=True, help="The events as they were recorded: a JSON array.")
@click.option("--log", "only_log", is_flag=True, help="Read the log, also where a view keeps the history.")
@click.option("--no-log", is_flag=True, help="Only ask the views: reading a large log takes a while.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=10.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(ctx: click.Context, task_id: str, as_json: bool, only_log: bool, no_log: bool, timeout: float) -> Exit:
    r"""Show every recorded state of a task (or, by its group id, of a saved group), oldest first.

    The first view that keeps history answers; if none does, the task's partition of the log is read, as far back as
    Kafka keeps it. "wait" is the time in the queue, without any countdown; "run" that of the attempt.

    \b
    Examples:
      celery -A proj pipeline history 5f0e…            a table
      celery -A proj pipeline history 5f0e… --json     the events
      celery -A proj pipeline history 5f0e… --log      straight from Kafka, whatever the views say
    """
    if only_log and no_log:
        raise Stop(Exit.CONFIGURATION, "--log and --no-log contradict each other", "give one of them")
    pipeline = pipeline_of(ctx)
    values, source = ([], "") if only_log else from_views(pipeline, task_id)
    if not values and not no_log:
        values = from_log(pipeline, task_id, timeout)
        source = f"the log at {mask(pipeline.settings.bootstrap_servers)}"
    if not values:
        where = "the views" if no_log else "the views nor in the log"
        raise Stop(
            Exit.NOT_FOUND,
            f"no event of {task_id!r} in {where}",
            "check the id; the log forgets after kafka_backend_settings['retention_ms'] "
            f"({duration(pipeline.settings.retention_ms / 1000)})",
        )
    if as_json:
        click.echo(b"[" + b",\n".join(values) + b"]")
    else:
        show(task_id, [codec.decode(value) for value in values], source)
    return Exit.OK


def from_views(pipeline: Pipeline, task_id: str) -> tuple[list[bytes], str]:
    """Return a task's events and where they are from: the first view that has any."""
    for url in pipeline.settings.views:
        view = open_view(url, pipeline.options(url))
        try:
            found = view.history(task_id)
        except (StoreError, SettingsError) as exc:
            click.secho(f"note: {mask(url)} cannot be read: {exc}", fg="yellow", err=True)
            continue
        finally:
            view.close()
        if found:
            return found, mask(url)
    return [], ""


def from_log(pipeline: Pipeline, task_id: str, timeout_s: float) -> list[bytes]:
    """Return a task's events by reading its partition from end to end."""
    broker = Broker(pipeline.settings, timeout_s)
    topic = topics.task_events(pipeline.settings.topic_prefix)
    try:
        count = broker.partitions(topic)
        if not count:
            raise Stop(Exit.TOPICS_WRONG, f"no topic {topic}", f"create the topics: `{pipeline.command} init`")
        home = topics.chord_partition(task_id, count)  # the same hash that every producer of ours uses
        found = _scan(broker, topic, home, task_id)
        # Partitions may have been added since: then old events stand where the id belonged before.
        for n in range(count) if not found else ():
            if n != home:
                found += _scan(broker, topic, n, task_id)
    finally:
        broker.close()
    unique = {event.id: (event.hlc, event.id, value) for event, value in found}
    return [value for _, _, value in sorted(unique.values())]


def _scan(broker: Broker, topic: str, partition: int, task_id: str) -> list[tuple[Event, bytes]]:
    key, found = task_id.encode(), []
    for message in saying(scan(broker, topic, partition), f"{topic}/{partition}"):
        value = message.value()
        if message.key() != key or value is None:
            continue
        try:
            found.append((codec.decode(value), value))
        except CodecError as exc:
            click.secho(f"note: {topic}/{partition}@{message.offset()}: {exc}", fg="yellow", err=True)
    return found


# -- showing -----------------------------------------------------------------------------------


def show(task_id: str, found: list[Event], source: str) -> None:
    """Draw the table, by the clock that orders the events: wall time, never behind what caused it."""
    screen = console()
    name = next((event.name for event in found if event.name), "")
    screen.print(f"{name or 'group'}  {task_id}", style="bold")
    drawn = table("", "time", "what", "try", "who", "queue", "wait", "run", "result", numbers=("try", "wait", "run"))
    for event in found:
        drawn.add_row(
            when(event.hlc), what(event), str(event.attempt), who(event), event.queue or "",
            duration(wait_s(event)), duration(event.runtime_s), outcome(event),
        )  # fmt: skip
    screen.print(drawn)
    screen.print(f"{len(found)} events, from {source}", style="dim")


def what(event: Event) -> str:
    """Return what happened, in a few words."""
    text = event.state if event.kind == events.STATE and event.state else event.kind
    if event.redelivered:
        text += " (redelivered)"
    if event.terminated:
        text += " (terminated)"
    return text


def who(event: Event) -> str:
    """Return who says so."""
    return f"{event.role} {event.worker or event.host} [{event.pid}]"


def wait_s(event: Event) -> float | None:
    """Return how long a task that starts was in the queue: not before its eta, and not before it was sent."""
    started = event.started_at if event.kind == events.STARTED else None
    if started is None or event.sent_at is None:
        return None
    return max(started - max(event.sent_at, event.eta or 0), 0) / 1000


def outcome(event: Event) -> str:
    """Return result, exception or reason, short."""
    if event.exception:
        text = short(f"{event.exception.removeprefix('builtins.')}: {event.message or ''}")
        return f"{text}; again at {when(event.due)}" if event.due else text
    if event.kind == events.REVOKED and (event.by or event.message):
        return short(f"{event.message or ''} {('by ' + event.by) if event.by else ''}")
    if event.ignored:
        return "(ignored)"
    if event.doc:
        try:
            return short(bytes(codec.native_parts(bytes(event.doc)).result).decode(errors="replace"))
        except CodecError:
            return ""
    if event.opaque is not None:
        return f"({event.opaque.content_type or 'opaque'}, {len(event.opaque.meta)} bytes)"
    return short(event.message or "")
