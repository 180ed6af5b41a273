"""How `pipeline history` looks: of a task, a workflow, a group, and counts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from celery_kafka_backend import codec, events, timeline, topics
from celery_kafka_backend.cli import chord_state
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.output import console, duration, short, table, when
from celery_kafka_backend.cli.records import messages, spans
from celery_kafka_backend.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from confluent_kafka import Message

    from celery_kafka_backend.cli.chord_state import ChordState
    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.events import Event
    from celery_kafka_backend.timeline import Node

SHOWN: Final = 200
"""Rows of a workflow or group in the table; --json has all."""
NO_INDEX: Final = 1 << 31
"""Above every index: of a member without one."""


# -- one task ------------------------------------------------------------------------------------


def life(task_id: str, found: Sequence[Event], source: str, as_of: int | None) -> None:
    """Draw a task's events, by `timeline.causal`, a table for each run."""
    screen = console()
    name = next((event.name for event in found if event.name), "")
    screen.print(f"{name or _kind(found)}  {task_id}", style="bold")
    if as_of is not None:
        screen.print(f"as of {when(as_of)}: {timeline.state(found)}", style="bold")
    runs = timeline.runs(found)
    for number, run in enumerate(runs, 1):
        if len(runs) > 1:
            screen.print(f"run {number} of {len(runs)}", style="dim")
        drawn = table(
            "", "time", "what", "try", "who", "queue", "wait", "run", "result", "cause", numbers=("try", "wait", "run")
        )
        for event in run.events:
            drawn.add_row(*cells(event))
        screen.print(drawn)
    # A retry is sent by the attempt before it, which is then its parent.
    origin = next((event for event in found if {event.parent, event.root} - {None, task_id}), None)
    if origin is not None:
        screen.print(
            f"parent {origin.parent or '?'}, root {origin.root or '?'} (history {origin.root or task_id} --tree)",
            style="dim",
        )
    screen.print(f"{len(found)} events, from {source}", style="dim")


def _kind(found: Sequence[Event]) -> str:
    """Return what an id without a name is, as far as its events say."""
    return "group" if any(event.kind in events.GROUP_KINDS for event in found) else "task"


def cells(event: Event) -> tuple[str, ...]:
    """Return an event as a row."""
    return (
        when(event.hlc), what(event), str(event.attempt), who(event), event.queue or "",
        duration(timeline.wait_s(event)), duration(event.runtime_s), outcome(event), cause(event),
    )  # fmt: skip


def line(event: Event, value: bytes, *, as_json: bool) -> None:
    """Print one event at once: as it was recorded, or as a line."""
    if as_json:
        click.echo(codec.one_line(value))
    else:
        click.echo("  ".join(cell for cell in cells(event) if cell))


def as_of_json(task_id: str, at_ms: int, found: Sequence[Event], told: bytes) -> bytes:
    """Return the state as of a moment, and the events by then."""
    said = {"task": task_id, "as_of": at_ms, "state": timeline.state(found), "events": msgspec.Raw(told)}
    return msgspec.json.encode(said)


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
    if event.imported is not None:
        return event.worker or ""
    place = event.worker or event.host
    if event.host and event.host not in place:
        place += f" on {event.host}"
    return f"{event.role} {place} [{event.pid}]"


def cause(event: Event) -> str:
    """Return what brought it about, or where it comes from."""
    found = event.imported
    if found is None:
        return timeline.cause(event)
    return f"imported from {found.source} at {when(found.at)}, by {found.by}"


def outcome(event: Event) -> str:
    """Return result, exception or reason, short."""
    if event.exception:
        text = short(f"{event.exception.removeprefix('builtins.')}: {event.message or ''}")
        return f"{text}; again at {when(event.due)}" if event.due else text
    if event.kind == events.REVOKED and event.message:
        return short(event.message)
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


# -- a workflow ----------------------------------------------------------------------------------


def workflow(task_id: str, root: str, nodes: Sequence[Node], source: str, as_of: int | None) -> None:
    """Draw a tree of tasks."""
    screen = console()
    if as_of is not None:
        screen.print(f"as of {when(as_of)}", style="bold")
    drawn = table(
        "", "task", "id", "state", "since", "tries", "wait", "run", "worker", "result", numbers=("tries", "wait", "run")
    )
    for node in nodes[:SHOWN]:
        told = node_json(node)
        said = timeline.deciding(node.events)
        drawn.add_row(
            f"{'  ' * node.depth}{told['name'] or '?'}", node.task, told["state"], when(told["at"]), str(told["attempts"]),
            duration(told["wait_s"]), duration(told["runtime_s"]), told["worker"] or "", outcome(said) if said else "",
        )  # fmt: skip
    screen.print(drawn)
    if len(nodes) > SHOWN:
        screen.print(f"… {len(nodes) - SHOWN} more (--json)", style="dim")
    if root != task_id:
        screen.print(f"part of the workflow of {root}", style="dim")
    screen.print(f"{len(nodes)} tasks, {sum(len(node.events) for node in nodes)} events, from {source}", style="dim")


def node_json(node: Node) -> dict[str, Any]:
    """Return a task of a workflow as plain data."""
    return {"depth": node.depth, **summary(node.task, node.events)}


def summary(task: str, found: Sequence[Event]) -> dict[str, Any]:
    """Return a task in one row: its name, parent, state, since when, tries, worker, first wait, last run time."""
    said = timeline.deciding(found)
    return {
        "task": task,
        "parent": next((event.parent for event in found if event.parent not in (None, task)), None),
        "name": next((event.name for event in found if event.name), None),
        "state": timeline.state(found),
        "at": said.hlc if said else None,
        "attempts": max((event.attempt for event in found), default=-1) + 1,
        "worker": next((event.worker for event in reversed(found) if event.worker), None),
        "wait_s": next((wait for event in found if (wait := timeline.wait_s(event)) is not None), None),
        "runtime_s": next((event.runtime_s for event in reversed(found) if event.runtime_s is not None), None),
        "exception": said.exception if said else None,
    }


# -- a group or chord ----------------------------------------------------------------------------


def group(group_id: str, as_of: int | None, lives: Mapping[str, Sequence[Event]], chord: str, source: str) -> None:
    """Draw a group's members."""
    screen = console()
    screen.print(f"group {group_id}" + (f"  as of {when(as_of)}" if as_of is not None else ""), style="bold")
    counts = Counter(timeline.state(life) for life in lives.values())
    screen.print("  " + (", ".join(f"{n} {state}" for state, n in counts.most_common()) or "no member was heard of"))
    if chord:
        screen.print(f"  {chord}")
    drawn = table("", "index", "member", "name", "state", "since", "run", "worker", numbers=("index", "run"))
    ordered = sorted(lives.items(), key=lambda one: _place(one[1]))
    for task, found in ordered[:SHOWN]:
        told = summary(task, found)
        index, _ = _place(found)
        drawn.add_row(
            "" if index == NO_INDEX else str(index), task, told["name"] or "", told["state"], when(told["at"]),
            duration(told["runtime_s"]), told["worker"] or "",
        )  # fmt: skip
    screen.print(drawn)
    if len(ordered) > SHOWN:
        screen.print(f"… {len(ordered) - SHOWN} more (--json)", style="dim")
    screen.print(f"{len(lives)} members, from {source}", style="dim")


def _place(found: Sequence[Event]) -> tuple[int, int]:
    index = next((event.index for event in found if event.index is not None), NO_INDEX)
    return index, min((event.hlc for event in found), default=0)


def group_json(group_id: str, as_of: int | None, lives: Mapping[str, Sequence[Event]], chord: str) -> dict[str, Any]:
    """Return a group and its members as plain data."""
    members = [summary(task, found) for task, found in sorted(lives.items(), key=lambda one: _place(one[1]))]
    counts = Counter(member["state"] for member in members)
    return {"group": group_id, "as_of": as_of, "chord": chord or None, "counts": counts, "members": members}


def chord_line(pipeline: Pipeline, group_id: str, as_of: int | None, timeout_s: float) -> str:
    """Return how far the group's chord is, or was then; "" if it is none."""
    broker = Broker(pipeline.settings, timeout_s)
    topic = topics.chords(pipeline.settings.topic_prefix)
    try:
        if not (parts := spans(broker, topic, None, None)):
            return ""
        at = (topic, topics.chord_partition(group_id, len(parts)))
        return chord_then(group_id, as_of, messages(broker, {at: parts[at]}, topic))
    finally:
        broker.close()


def chord_then(group_id: str, as_of: int | None, found: Iterable[Message]) -> str:
    """Return how far a chord is, or was then, by the messages of its partition."""
    now, then = chord_state.Records(group_id), chord_state.Records(group_id, as_of)
    for message in found:
        if now.take(message):
            then.take(message)
    said = [state for state in then.states() if as_of is None or state.declared_at]
    if not said:
        return ""
    return _chord_then(
        said[-1], next((state for state in now.states() if state.generation == said[-1].generation), None)
    )


def _chord_then(state: ChordState, latest: ChordState | None) -> str:
    """Return how far a chord was, in words; ``latest`` is how far it is, None if nothing of it is left."""
    if state.fired_at is not None:
        what = "failed" if state.state == chord_state.FAILED else "fired"
        return f"chord: {what} {when(state.fired_at)}, body {state.body}"
    if state.decided_at is not None:
        return f"chord: decided {when(state.decided_at)} ({state.outcome}), not fired"
    # Once a chord has fired, Kafka need not keep for long what its size was before.
    of = "an unknown number"
    if state.expected is not None:
        of = str(state.expected)
    elif latest is not None and latest.expected is not None:
        of = f"{latest.expected} in the end"
    return f"chord: waiting for its members ({of}), declared {when(state.declared_at)}"


# -- counts --------------------------------------------------------------------------------------


def counts(as_of: int, window_s: float, found: Mapping[tuple[str, str], int], source: str) -> None:
    """Draw how many tasks were in which state."""
    screen = console()
    since = when(as_of - int(window_s * 1000))
    screen.print(f"as of {when(as_of)}, of the tasks of which something was heard since {since}", style="bold")
    drawn = table("", "task", "state", "tasks", numbers=("tasks",))
    for (name, state), n in sorted(found.items()):
        drawn.add_row(name or "?", state, str(n))
    screen.print(drawn)
    screen.print(f"{sum(found.values())} tasks, from {source}", style="dim")
