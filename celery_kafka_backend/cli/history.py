"""``pipeline history``: everything that happened to one task, to its workflow or to a group, now or as of any moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from celery_kafka_backend import codec, places, timeline, topics
from celery_kafka_backend.changes import Partition
from celery_kafka_backend.cli import history_shown as shown
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import Pipeline, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.moment import Moment, Span
from celery_kafka_backend.cli.output import duration, when
from celery_kafka_backend.cli.records import elsewhere, following, messages, spans
from celery_kafka_backend.cli.sources import AHEAD_MS, audited, keeps_less, log_name, log_of
from celery_kafka_backend.errors import CodecError, SettingsError, StoreError
from celery_kafka_backend.query import Query
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import keeps_history, open_view

if TYPE_CHECKING:
    from collections.abc import Mapping

    from celery_kafka_backend.events import Event
    from celery_kafka_backend.past import At
    from celery_kafka_backend.sinks.contract import View

AROUND_S: Final = 600.0
WINDOW_S: Final = 3600.0


class Asked(msgspec.Struct, frozen=True):
    """What the command line says."""

    id: str
    as_json: bool
    only_log: bool
    no_log: bool
    as_of: int | None
    around: int | None
    window_s: float | None
    timeout_s: float

    @property
    def within(self) -> tuple[int | None, int | None]:
        """The part of the log that ``--around`` allows to be read: since and until, ms since 1970."""
        if self.around is None:
            return None, None
        window = int((AROUND_S if self.window_s is None else self.window_s) * 1000)
        return self.around - window, self.around + window


@click.command("history", cls=Command, short_help="Everything that happened to a task, now or as of any moment.")
@click.argument("task_id", required=False)
@click.option("--tree", "what", flag_value="tree", help="The whole workflow below the task.")
@click.option("--group", "what", flag_value="group", help="TASK_ID is the id of a group or chord: its members.")
@click.option("--follow", is_flag=True, help="Go on live, until the task has ended.")
@click.option("--as-of", type=Moment(), help="The state as it was then. Without TASK_ID: counts of all tasks.")
@click.option("--around", type=Moment(), help="Read the log only around this time: seconds instead of minutes.")
@click.option(
    "--window", type=Span(),
    help="How far around --around (default 10m); of the counts as of a time, how far back (default 1h).",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The events as they were recorded: a JSON array.")
@click.option("--log", "only_log", is_flag=True, help="Read the log, also where a view keeps the history.")
@click.option("--no-log", is_flag=True, help="Only ask the views: reading a large log takes a while.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=10.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context,
    task_id: str | None,
    what: str | None,
    follow: bool,
    as_of: int | None,
    around: int | None,
    window: float | None,
    as_json: bool,
    only_log: bool,
    no_log: bool,
    timeout: float,
) -> Exit:
    r"""Show every recorded state of a task (or, by its group id, of a saved group): run by run, causes before effects.

    The first view that keeps history answers; if none does, the task's partition of the log is read, as far back as
    Kafka keeps it; --around has it read only the part that was written around some time. "wait" is the time in the
    queue, without any countdown; "run" that of the attempt.

    Times: 2026-01-31T03:15 (local; a Z or an offset says otherwise), 03:15 (the latest), 90m, 12h, 3d (ago).

    \b
    Examples:
      celery -A proj pipeline history 5f0e…                     a table
      celery -A proj pipeline history 5f0e… --json              the events
      celery -A proj pipeline history 5f0e… --tree              it, and all that it sent
      celery -A proj pipeline history 5f0e… --follow            until it has ended
      celery -A proj pipeline history 5f0e… --as-of 03:15       what was known then
      celery -A proj pipeline history 5f0e… --log --around 3h   straight from Kafka, ten minutes either side
      celery -A proj pipeline history 9c1a… --group --as-of 03:15    members of a group or chord, as they were then
      celery -A proj pipeline history --as-of 03:15 --window 1h      how many tasks were in which state
    """
    asked = Asked(task_id or "", as_json, only_log, no_log, as_of, around, window, timeout)
    _check(asked, what, follow=follow)
    pipeline = pipeline_of(ctx)
    if not asked.id:
        return _counts(pipeline, asked)
    if what == "tree":
        return _tree(pipeline, asked)
    if what == "group":
        return _group(pipeline, asked)
    if follow:
        return _follow(pipeline, asked)
    return _one(pipeline, asked)


def _check(asked: Asked, what: str | None, *, follow: bool) -> None:
    wrong = [
        (asked.only_log and asked.no_log, "--log and --no-log contradict each other", "give one of them"),
        (asked.around is not None and asked.no_log, "--around and --no-log contradict each other", "give one of them"),
        (follow and (what or asked.as_of is not None), "--follow is for one task, as of now", "leave out the others"),
        (follow and asked.no_log, "--follow reads the log", "leave out --no-log"),
        (not asked.id and asked.as_of is None, "no TASK_ID", "give the id of a task; only --as-of works without one"),
        (not asked.id and bool(what or follow), "no TASK_ID", "give the id of a task or group"),
        (
            asked.window_s is not None and asked.around is None and (asked.as_of is None or bool(asked.id)),
            "--window needs --around, or --as-of without an id",
            "say around what",
        ),
    ]
    for is_so, problem, remedy in wrong:
        if is_so:
            raise Stop(Exit.CONFIGURATION, problem, remedy)


# -- one task ------------------------------------------------------------------------------------


def _one(pipeline: Pipeline, asked: Asked) -> Exit:
    found, source = _life(pipeline, asked)
    if not found:
        raise _not_found(pipeline, asked)
    events = timeline.causal(event for event, _ in found)
    if asked.as_of is not None:
        events = timeline.causal(timeline.as_of(events, asked.as_of))
    if asked.as_json:
        values = {event.id: value for event, value in found}
        told = b"[" + b",\n".join(values[event.id] for event in events) + b"]"
        click.echo(told if asked.as_of is None else shown.as_of_json(asked.id, asked.as_of, events, told))
    else:
        shown.life(asked.id, events, source, asked.as_of)
    return Exit.OK


def _not_found(pipeline: Pipeline, asked: Asked) -> Stop:
    only_log = asked.only_log or asked.around is not None
    where = "the views" if asked.no_log else "the log" if only_log else "the views nor in the log"
    since, until = asked.within
    if since is not None:
        where += f" between {when(since)} and {when(until)}"
    return Stop(
        Exit.NOT_FOUND,
        f"no event of {asked.id!r} in {where}",
        "check the id; the log forgets after kafka_backend_settings['retention_ms'] "
        f"({duration(pipeline.settings.retention_ms / 1000)})"
        + ("; leave out --around to read all of it" if since is not None else ""),
    )


def _life(pipeline: Pipeline, asked: Asked) -> tuple[list[tuple[Event, bytes]], str]:
    """Return a task's events, and where they are from."""
    values, source = ([], "") if asked.only_log or asked.around is not None else from_views(pipeline, asked.id)
    if values or asked.no_log:
        return [(codec.decode(value), value) for value in values], source
    broker = Broker(pipeline.settings, asked.timeout_s)
    try:
        return from_log(broker, asked.id, *asked.within), log_name(pipeline)
    finally:
        broker.close()


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
            return found, f"{mask(url)}{_lacks(pipeline, view, len(found))}"
    return [], ""


def _lacks(pipeline: Pipeline, view: View, events: int) -> str:
    """Return why a view's history of a task may lack what the log has, in words; "" if it lacks nothing."""
    limit = pipeline.settings.history_limit
    if 0 < limit <= events and not view.keeps_history:  # one that is not made for it
        return f", which keeps the latest {limit} events of a task (history_limit); --log may have more"
    less = keeps_less(pipeline)
    return f", which {less}; --log may have more" if less else ""


def from_log(
    broker: Broker, task_id: str, since: int | None = None, until: int | None = None
) -> list[tuple[Event, bytes]]:
    """Return a task's events by reading its partition, from end to end or what was written in between.

    Where partitions were added, also what was written before in those where its id belonged then.
    """
    topic = log_of(broker)
    parts = spans(broker, topic, since, until)
    home = (topic, topics.partition_of(task_id, len(parts)))  # the same hash that every producer of ours uses
    marks = {number: span for (_, number), span in parts.items()} if since is until is None else broker.ends(topic)
    aside = places.oldest(topic, task_id, {} if broker.embedded else marks)
    found = _of_key(broker, {home: parts[home], **aside.spans}, task_id, aside)
    if earlier := elsewhere(broker, topic, task_id, marks, aside.moved(broker.reader)):
        others = ", ".join(str(n) for n in sorted({number for (_, number), _ in earlier}))
        note = f"note: partitions were added to {topic}: what was written before is looked for in {others}, too"
        click.secho(f"{note} ({sum(end - start for _, (start, end) in earlier)} records)", fg="yellow", err=True)
    for at, (start, end) in earlier:
        found += _of_key(broker, {at: (max(start, parts[at][0]), min(end, parts[at][1]))}, task_id)
    # Some other hand may have put it anywhere.
    return found or _of_key(broker, {at: span for at, span in parts.items() if at != home}, task_id)


def _of_key(
    broker: Broker, parts: Mapping[At, tuple[int, int]], task_id: str, aside: places.Oldest | None = None
) -> list[tuple[Event, bytes]]:
    """Return a task's events in some spans, all of them or, with ``aside``, those of the first.

    Args:
        broker: Kafka.
        parts: The spans.
        task_id: The task.
        aside: Looks at the records of the others.
    """
    key, found = task_id.encode(), []
    topic, home = next(iter(parts), ("the log", 0))
    for message in messages(broker, parts, topic):
        if aside is not None and message.partition() != home:
            aside.see(message)
            continue
        if message.key() != key:  # nothing else is asked of a message that is not ours: this is the whole cost
            continue
        try:
            found.append((codec.decode(message.value()), message.value() or b""))
        except CodecError as exc:
            where = f"{message.topic()}/{message.partition()}@{message.offset()}"
            click.secho(f"note: {where}: {exc}", fg="yellow", err=True)
    return found


def _follow(pipeline: Pipeline, asked: Asked) -> Exit:
    """Show what there is, then what comes, from where the source of the first ends."""
    broker = Broker(pipeline.settings, asked.timeout_s)
    try:
        topic = log_of(broker)
        views = [] if asked.only_log else _positions(pipeline)
        starts = {
            n: min([end, *(at.get(Partition(topic, n), 0) for at in views)])
            for n, (_, end) in broker.ends(topic).items()
        }
        found, _ = _life(pipeline, asked)
        events = timeline.causal(event for event, _ in found)
        values = {event.id: value for event, value in found}
        for event in events:
            shown.line(event, values[event.id], as_json=asked.as_json)
        if not events:
            click.echo(f"no event of {asked.id!r} yet; waiting for one", err=True)
        if timeline.ended(events):
            return Exit.OK
        for message in following(broker, topic, asked.id, starts):
            value = message.value()
            if value is None:
                continue
            event = codec.decode(value)
            if event.id not in values:
                values[event.id] = value
                events.append(event)
                shown.line(event, value, as_json=asked.as_json)
                if timeline.ended(timeline.causal(events)):
                    return Exit.OK
        return Exit.OK
    finally:
        broker.close()


def _positions(pipeline: Pipeline) -> list[Mapping[Partition, int]]:
    """Return how far the views are that may have answered: what they lack is still to come."""
    found: list[Mapping[Partition, int]] = []
    for url in pipeline.settings.views:
        view = open_view(url, pipeline.options(url))
        try:
            if keeps_history(url, pipeline.options(url)):
                found.append(view.positions())
        except (StoreError, SettingsError):
            continue
        finally:
            view.close()
    return found


# -- more than one -------------------------------------------------------------------------------


def _tree(pipeline: Pipeline, asked: Asked) -> Exit:
    found, _ = _life(pipeline, asked)
    if not found:
        raise _not_found(pipeline, asked)
    root = next((event.root for event, _ in found if event.root), asked.id)
    # Nothing of a workflow is older than what it began with; of a part of one, than that part. But clocks differ.
    query = Query(root=root, since=min(event.at for event, _ in found) - AHEAD_MS)
    events, source = _gathered(pipeline, asked, query)
    nodes = timeline.tree([*events, *(event for event, _ in found)], asked.id)
    if asked.as_of is not None:
        nodes = [node._replace(events=timeline.as_of(node.events, asked.as_of)) for node in nodes]
        # Who asks for a task is told of it in any case, though nobody may have heard of it by then.
        nodes = [node for node in nodes if node.events or node.task == asked.id]
    if asked.as_json:
        click.echo(msgspec.json.encode([shown.node_json(node) for node in nodes]))
    else:
        shown.workflow(asked.id, root, nodes, source, asked.as_of)
    return Exit.OK


def _group(pipeline: Pipeline, asked: Asked) -> Exit:
    since, until = asked.within
    events, source = _gathered(pipeline, asked, Query(group=asked.id, since=since, until=until))
    members: dict[str, list[Event]] = {}
    for event in events:
        members.setdefault(event.task, []).append(event)
    # What was said of the group itself, and its chord's body, which carries the group's id too.
    for other in (asked.id, *{event.chord for event in events if event.chord}):
        members.pop(other, None)
    if not any(event.group == asked.id for event in events):
        if events:
            raise Stop(Exit.NOT_FOUND, f"{asked.id!r} is a task, and no group", "leave out --group")
        raise _not_found(pipeline, asked)
    if asked.as_of is not None:
        then = {task: timeline.as_of(life, asked.as_of) for task, life in members.items()}
        members = {task: life for task, life in then.items() if life}
    lives = {task: timeline.causal(life) for task, life in members.items()}
    chord = shown.chord_line(pipeline, asked.id, asked.as_of, asked.timeout_s)
    if asked.as_json:
        click.echo(msgspec.json.encode(shown.group_json(asked.id, asked.as_of, lives, chord)))
    else:
        shown.group(asked.id, asked.as_of, lives, chord, source)
    return Exit.OK


def _gathered(pipeline: Pipeline, asked: Asked, query: Query) -> tuple[list[Event], str]:
    """Return what a query finds, and where."""
    only_log = asked.only_log or asked.around is not None
    with audited(pipeline, None, asked.timeout_s, only_log=only_log, no_log=asked.no_log) as source:
        return [event for event, _ in source.search(query)], source.name


def _counts(pipeline: Pipeline, asked: Asked) -> Exit:
    assert asked.as_of is not None
    window_s = WINDOW_S if asked.window_s is None else asked.window_s
    query = Query(since=asked.as_of - int(window_s * 1000), until=asked.as_of + 1)
    tally = timeline.Tally()
    with audited(pipeline, None, asked.timeout_s, only_log=asked.only_log, no_log=asked.no_log) as source:
        for event, _ in source.search(query):
            if event.hlc <= asked.as_of:  # the clock of `timeline.as_of`; a process whose own is behind says it earlier
                tally.take(event)
        name = source.name
    counts = tally.counts()
    if asked.as_json:
        rows = [{"name": task, "state": state, "tasks": n} for (task, state), n in sorted(counts.items())]
        told: dict[str, Any] = {"as_of": asked.as_of, "window_s": window_s, "counts": rows}
        click.echo(msgspec.json.encode(told))
    else:
        shown.counts(asked.as_of, window_s, counts, name)
    return Exit.OK
