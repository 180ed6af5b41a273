"""``pipeline findings``: what the log shows to be wrong, without anybody having asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click
import msgspec

from celery_kafka_backend import chord_records, codec, findings, places, topics
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import Pipeline, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.moment import Moment, Span
from celery_kafka_backend.cli.output import console, short, table, when
from celery_kafka_backend.cli.records import messages, spans
from celery_kafka_backend.cli.sources import CLOCKS_MS, log_of
from celery_kafka_backend.errors import CodecError
from celery_kafka_backend.order import system_wall_ms

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from celery_kafka_backend.findings import Finding
    from celery_kafka_backend.past import At

DAY_MS: Final = 86_400_000


class Bounds(msgspec.Struct, frozen=True):
    """What to read, and what counts as too long.

    Attributes:
        since: Read what was written since, ms since 1970.
        now: … and before this, as of which the findings are.
        bound_s: Silence of a task or chord.
        gone_s: Silence of a worker.
    """

    since: int
    now: int
    bound_s: float
    gone_s: float


@click.command(
    "findings", cls=Command, short_help="Lost and orphaned tasks, contradictions, stuck chords, wrong clocks."
)
@click.option("--since", type=Moment(), help="Read what was written since then. Default: a day ago.")
@click.option("--until", type=Moment(), help="… and before then; findings are as of then. Default: now.")
@click.option("--bound", type=Span(), default="1h", help="A task or chord may be silent for so long.")
@click.option(
    "--gone-after", type=Span(), default="10m", help="A worker may be silent for so long while others are not."
)
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(sorted(findings.KINDS)), help="Only these. May be repeated."
)
@click.option("--limit", type=click.IntRange(0), default=20, help="Rows of each kind in the table; all are counted.")
@click.option("--json", "as_json", is_flag=True, help="All of them, one JSON object per line.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=10.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context,
    since: int | None,
    until: int | None,
    bound: float,
    gone_after: float,
    kinds: tuple[str, ...],
    limit: int,
    as_json: bool,
    timeout: float,
) -> Exit:
    r"""Read the log and the chords' topic, and say what is wrong. Exits with 10 if there is anything, with 0 if not.

    \b
      unfinished    sent, and within --bound neither ended nor heard of
      worker-gone   started on a worker that restarted or fell silent, and never ended
      purged        sent and never received, though its queue went on: purged, or lost by the broker
      two-results   two successes of one run with different results
      late-state    a state after the end of its run
      stuck-chord   a chord that was not fired, and silent for --bound
      clock-skew    a host whose clock is two seconds wrong, or more

    A task that began before --since is judged by what came after. Memory: some 1,300 bytes per task of the largest
    partition.

    \b
    Examples:
      celery -A proj pipeline findings
      celery -A proj pipeline findings --since 3h --bound 30m --kind unfinished --kind purged
      celery -A proj pipeline findings --json > findings.jsonl || page-somebody
    """
    pipeline = pipeline_of(ctx)
    now = system_wall_ms() if until is None else until
    bounds = Bounds(now - DAY_MS if since is None else since, now, bound, gone_after)
    if bounds.since >= now:
        raise Stop(Exit.CONFIGURATION, "--since is not before --until", "exchange them")
    broker = Broker(pipeline.settings, timeout)
    counts: dict[str, int] = {}
    shown: list[Finding] = []
    try:
        for one in _all(pipeline, broker, bounds):
            if kinds and one.kind not in kinds:
                continue
            counts[one.kind] = counts.get(one.kind, 0) + 1
            if as_json:
                click.echo(msgspec.json.encode(one))
            elif counts[one.kind] <= limit:
                shown.append(one)
    finally:
        broker.close()
    if not as_json:
        show(shown, counts)
    verdict = f"{sum(counts.values())} findings" if counts else "nothing found"
    span = f"{when(bounds.since)} to {when(bounds.now)}"
    click.secho(f"{verdict}, in what was written from {span}", fg="red" if counts else "green", err=as_json)
    return Exit.DIFFERENT if counts else Exit.OK


def _all(pipeline: Pipeline, broker: Broker, bounds: Bounds) -> Iterator[Finding]:
    bound_ms, gone_ms = int(bounds.bound_s * 1000), int(bounds.gone_s * 1000)
    tasks = findings.Tasks(ignored_are_recorded=pipeline.settings.record_ignored)
    clocks = findings.Clocks()
    topic = log_of(broker)
    parts = spans(broker, topic, bounds.since - CLOCKS_MS, bounds.now + CLOCKS_MS)
    joined = _joined(broker, topic, parts)
    for at, span in sorted(parts.items()):
        for message in messages(broker, {at: span}, f"{topic}/{at[1]}"):
            try:
                event = codec.decode(message.value())
            except CodecError:
                continue  # the materializer's dead letters tell
            if message.timestamp()[1] >= bounds.now < event.hlc:
                continue  # neither happened by then nor was heard of
            tasks.take(event)
            if not broker.embedded:  # it keeps no time of its own
                clocks.take(event, message.timestamp()[1])
        if not joined:
            yield from tasks.settle()
    yield from tasks.findings(bounds.now, bound_ms, gone_ms)
    yield from clocks.findings()
    yield from _chords(broker, bounds, bound_ms)


def _joined(broker: Broker, topic: str, parts: Mapping[At, tuple[int, int]]) -> bool:
    """Return whether a task's events may be in several partitions, for some were added; say so on stderr."""
    if broker.embedded:  # it adds none
        return False
    marks = {number: span for (_, number), span in parts.items()}
    if not places.Oldest(topic, marks, len(marks)).moved(broker.reader):
        return False
    note = f"note: partitions were added to {topic} in that time: the tasks of all of them are in memory at once"
    click.secho(note, fg="yellow", err=True)
    return True


def _chords(broker: Broker, bounds: Bounds, bound_ms: int) -> Iterator[Finding]:
    topic = topics.chords(broker.settings.topic_prefix)
    chords = findings.Chords()
    # From its start: a chord that is stuck may have been declared long ago, and the topic is compacted.
    for at, span in sorted(spans(broker, topic, None, None).items()):
        for message in messages(broker, {at: span}, f"{topic}/{at[1]}"):
            try:
                record = chord_records.decode(message.key(), message.value())
            except CodecError:
                continue
            if message.timestamp()[1] < bounds.now:
                chords.take(record, message.timestamp()[1])
    yield from chords.findings(bounds.now, bound_ms)


def show(found: list[Finding], counts: dict[str, int]) -> None:
    """Draw what was found, kind by kind."""
    screen = console()
    for kind, meaning in findings.KINDS.items():
        if not counts.get(kind):
            continue
        rows = [one for one in found if one.kind == kind]
        screen.print(f"{kind}: {counts[kind]}  ({meaning})", style="bold")
        if rows:
            drawn = table("", "at", "task", "id", "where", "what")
            for one in rows:
                where = one.worker or one.host or one.queue or (f"chord {one.group}" if one.group else "")
                drawn.add_row(when(one.at), one.name, one.task, where, short(one.detail, 120))
            screen.print(drawn)
        if counts[kind] > len(rows):
            screen.print(f"… {counts[kind] - len(rows)} more (--json)", style="dim")
