"""``pipeline chord``: what a chord waits for, and what an operator can do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from uuid import uuid4

import click
import msgspec

from celery_kafka_backend import chord_records, topics
from celery_kafka_backend.chord_records import Cancelled, Resent
from celery_kafka_backend.cli import chord_state
from celery_kafka_backend.cli.actor import REASON_LIMIT, who
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.chord_state import ChordState, Records, Trace
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import Pipeline, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop, no_topic
from celery_kafka_backend.cli.output import console, duration, print_json, short, table, when
from celery_kafka_backend.cli.records import messages, spans, tail
from celery_kafka_backend.cli.sources import CLOCKS_MS
from celery_kafka_backend.errors import SettingsError, StoreError
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.producer.publisher import Record, publisher_for
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import open_view

if TYPE_CHECKING:
    from collections.abc import Iterator


SHOWN: Final = 50
"""Rows of each kind in the table; --json has all."""


@click.command("chord", cls=Command, short_help="What a chord waits for; fire it, fail it, send its body again.")
@click.argument("group_id")
@click.option("--json", "as_json", is_flag=True, help="A JSON array: one object per generation.")
@click.option("--log", "only_log", is_flag=True, help="Read the chords' topic, also where a view shows the chord.")
@click.option("--fire", is_flag=True, help="Send the body with the results that are there.")
@click.option("--fail", is_flag=True, help="Let the chord fail: its body, errbacks and all.")
@click.option("--resend", is_flag=True, help="Send the body of a chord that has fired once more.")
@click.option("--reason", default="", help="Why, for those who read the history. Required with the three above.")
@click.option("--actor", default="", help="Who asks. Default: user@host.")
@click.option("--generation", type=int, help="Which one, of a chord that was applied more than once.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=30.0,
    help="Seconds that Kafka, and after it the chord processor, may take.",
)
@click.pass_context
def command(
    ctx: click.Context,
    group_id: str,
    as_json: bool,
    only_log: bool,
    fire: bool,
    fail: bool,
    resend: bool,
    reason: str,
    actor: str,
    generation: int | None,
    timeout: float,
) -> Exit:
    r"""Show a chord by the id of its header's group: which members are in, where the others were last seen, its decision.

    The first view that shows it answers, else the chords' topic itself. Members that are missing are looked for in the
    log, from the chord's declaration on, which takes a while on a large one.

    --fire, --fail and --resend are appended to the chords' topic, with actor and reason, and carried out by the chord
    processor; the command waits for that. A chord that is decided stays as it is: --fire and --fail are for one that
    waits, --resend for one whose body was sent. docs/chords.md says what each does.

    \b
    Examples:
      celery -A proj pipeline chord 5f0e…
      celery -A proj pipeline chord 5f0e… --json
      celery -A proj pipeline chord 5f0e… --fail --reason "worker 7 is gone for good"
      celery -A proj pipeline chord 5f0e… --resend --reason "the broker lost its queues"
    """
    asked = [name for name, given in (("fire", fire), ("fail", fail), ("resend", resend)) if given]
    if len(asked) > 1:
        raise Stop(Exit.CONFIGURATION, f"--{asked[0]} and --{asked[1]} contradict each other", "give one of them")
    pipeline = pipeline_of(ctx)
    broker = Broker(pipeline.settings, timeout)
    try:
        if asked:
            (ask,) = asked
            if not reason.strip():
                raise Stop(Exit.CONFIGURATION, f"--{ask} needs --reason", "say why: it is kept with the chord")
            state = _repair(pipeline, broker, group_id, ask, (reason, actor or who()), generation, timeout)
            states, source = [state], _log_of(pipeline)
            code = Exit.OK if _did(state, ask) else Exit.NOT_DONE
        else:
            states, source = _look(pipeline, broker, group_id, only_log)
            states = _named(states, generation)
            code = Exit.OK
        for one in states:
            if one.lacks:
                _trace(broker, one)
    finally:
        broker.close()
    if as_json:
        print_json(states)
    else:
        for one in states:
            _show(one, source)
    return code


def _log_of(pipeline: Pipeline) -> str:
    return f"the chords' topic at {mask(pipeline.settings.bootstrap_servers)}"


# -- looking -------------------------------------------------------------------------------------


def _look(pipeline: Pipeline, broker: Broker, group_id: str, only_log: bool) -> tuple[list[ChordState], str]:
    for url in () if only_log else pipeline.settings.views:
        view = open_view(url, pipeline.options(url))
        try:
            facts = view.chord(group_id)
        except (StoreError, SettingsError) as exc:
            click.secho(f"note: {mask(url)} cannot be read: {exc}", fg="yellow", err=True)
            continue
        finally:
            view.close()
        found = chord_state.from_facts(group_id, facts)
        if any(one.declared_at for one in found):
            return found, mask(url)
    return _from_log(pipeline, broker, group_id), _log_of(pipeline)


def _from_log(pipeline: Pipeline, broker: Broker, group_id: str) -> list[ChordState]:
    topic, partition = _home(pipeline, broker, group_id)
    at = (topic, partition)
    records = Records(group_id)
    for message in messages(broker, {at: spans(broker, topic, None, None)[at]}, topic):
        records.take(message)
    found = records.states()
    if not found:
        kept = duration(pipeline.settings.retention_ms / 1000)
        stock = (
            "; what is begun with chords = 'view' is counted by Celery" if pipeline.settings.chords == "view" else ""
        )
        raise Stop(
            Exit.NOT_FOUND,
            f"no chord of group {group_id!r}: neither a view nor {topic} knows it",
            "check the id: it is the header's (`result.parent.id` of what `chord(…)(…)` returned); chords are forgotten "
            f"after kafka_backend_settings['retention_ms'] ({kept}){stock}",
        )
    return found


def _home(pipeline: Pipeline, broker: Broker, group_id: str) -> tuple[str, int]:
    topic = topics.chords(pipeline.settings.topic_prefix)
    count = broker.partitions(topic)
    if not count:
        raise no_topic(topic, pipeline.command)
    return topic, topics.chord_partition(group_id, count)


def _trace(broker: Broker, state: ChordState) -> None:
    """Look for the members that are missing."""
    topic = topics.task_events(broker.settings.topic_prefix)
    trace = Trace(state.group)
    for message in messages(broker, spans(broker, topic, state.declared_at - CLOCKS_MS, None), topic):
        trace.take(message)
    state.missing = trace.missing(member.task for member in state.members)
    if state.expected is not None:
        state.untraced = max(state.expected - len(state.members) - len(state.missing), 0)


# -- repairing -----------------------------------------------------------------------------------


def _repair(
    pipeline: Pipeline,
    broker: Broker,
    group_id: str,
    ask: str,
    why: tuple[str, str],
    generation: int | None,
    timeout_s: float,
) -> ChordState:
    """Append a request, and return the chord as it is once that is carried out."""
    state = _chosen(_from_log(pipeline, broker, group_id), ask, generation)
    reason, actor = why
    request = _request(state, ask, reason.strip()[:REASON_LIMIT], actor, pipeline.settings.chord_key)
    publisher = publisher_for(msgspec.structs.replace(pipeline.settings, delivery_timeout_s=timeout_s))
    topic, partition = _home(pipeline, broker, group_id)
    try:
        key, value = chord_records.encode(request)
        delivery = publisher.publish(Record(topic, key, value, group=group_id), wait_s=timeout_s)
        delivery.wait(timeout_s + 1)
    finally:
        publisher.close()
    click.echo(f"asked as {actor}: {ask} {group_id}", err=True)
    records = Records(group_id)
    for message in tail(broker, topic, partition, timeout_s):
        if message is not None and records.take(message):
            continue
        now = next((one for one in records.states() if one.generation == state.generation), None)
        if now is not None and _is_over(now, request):
            return now
    raise Stop(
        Exit.NOBODY_FOLDS,
        f"recorded, but not carried out within {timeout_s:g} s",
        "the chord processor will do it when it runs (`pipeline status`); if it does run, see whether it took the "
        "request for a dead letter: then chord_key differs between here and there",
    )


def _named(states: list[ChordState], generation: int | None) -> list[ChordState]:
    """Return the generation that is meant, all if none is said."""
    named = [one for one in states if generation in (None, one.generation)]
    if not named:
        known = ", ".join(str(one.generation) for one in states)
        raise Stop(Exit.NOT_FOUND, f"no generation {generation} of this chord", f"there are {known}")
    return named


def _chosen(states: list[ChordState], ask: str, generation: int | None) -> ChordState:
    """Return the generation that is meant, if what is asked makes sense for it."""
    fits = (chord_state.SENT, chord_state.FAILED) if ask == "resend" else (chord_state.WAITING,)
    named = _named(states, generation)
    able = [one for one in named if one.state in fits and (one.declared_at or ask == "resend")]
    if ask == "resend" and generation is None:
        able = able[-1:]
    if len(able) > 1:
        known = ", ".join(f"{one.generation} (of {when(one.declared_at)})" for one in able)
        raise Stop(Exit.CONFIGURATION, "the chord was applied more than once", f"say which with --generation: {known}")
    if not able:
        raise Stop(Exit.NOT_DONE, f"nothing to {ask}: {_why_not(named[-1], ask)}", "")
    return able[0]


def _why_not(state: ChordState, ask: str) -> str:
    if not state.declared_at and ask != "resend":
        return "the chord's declaration is not in Kafka"
    if state.state == chord_state.WAITING:
        return "the chord waits for its members: its body has not been sent yet"
    if state.state == chord_state.DECIDED_NOT_FIRED:
        return f"it was decided ({state.outcome}) at {when(state.decided_at)}, and the chord processor is at work on its body"
    done = "fired" if state.outcome == chord_records.SUCCESS else "failed"
    return f"the chord has {done} at {when(state.fired_at)}{': ' + state.why if state.why else ''}"


def _request(state: ChordState, ask: str, reason: str, actor: str, secret: str) -> Cancelled | Resent:
    here = {"group": state.group, "generation": state.generation, "id": uuid4().hex, "by": actor, "reason": reason}
    at = system_wall_ms()
    if ask == "resend":
        return chord_records.sign(Resent(**here, at=at), secret)  # type: ignore[arg-type]
    return chord_records.sign(Cancelled(**here, at=at, fire=ask == "fire"), secret)  # type: ignore[arg-type]


def _is_over(state: ChordState, request: Cancelled | Resent) -> bool:
    if isinstance(request, Cancelled):
        return state.fired_at is not None
    return any(one.done for one in state.requests if (one.what, one.at, one.by) == ("resend", request.at, request.by))


def _did(state: ChordState, ask: str) -> bool:
    """Return whether it ended as was asked."""
    if ask == "resend":
        return bool(state.requests) and state.requests[-1].outcome == chord_records.SUCCESS
    return bool(state.why) and state.state == (chord_state.SENT if ask == "fire" else chord_state.FAILED)


# -- showing -------------------------------------------------------------------------------------


def _show(state: ChordState, source: str) -> None:
    screen = console()
    screen.print(f"chord {state.group}  {state.body_name}  body {state.body or '?'}", style="bold")
    for line in _summary(state):
        screen.print("  " + line)
    if state.members:
        drawn = table("in", "index", "member", "state", "since", "worker", "", numbers=("index",))
        for member in state.members[:SHOWN]:
            note = f"added by {member.added_by}" if member.added_by else short(member.exception)
            drawn.add_row(_number(member.index), member.task, member.state, when(member.at), member.worker, note)
        screen.print(drawn)
        _more(len(state.members))
    if state.missing:
        drawn = table("missing", "index", "member", "name", "last seen", "at", "where", "queue", numbers=("index",))
        for one in state.missing[:SHOWN]:
            seen = one.seen + (f", try {one.attempt}" if one.attempt else "")
            drawn.add_row(_number(one.index), one.task, one.name, seen, when(one.at), one.who, one.queue)
        screen.print(drawn)
        _more(len(state.missing))
    if state.untraced:
        screen.print(
            f"{state.untraced} more of which the log has no event: behind another task in a chain, not sent yet, "
            "or not recorded"
        )
    screen.print(f"generation {state.generation}, from {source}", style="dim")


def _number(index: int | None) -> str:
    return "" if index is None else str(index)


def _more(count: int) -> None:
    if count > SHOWN:
        console().print(f"… {count - SHOWN} more (--json)", style="dim")


def _summary(state: ChordState) -> Iterator[str]:
    """Yield what happened to it, in order."""
    if state.declared_at:
        deadline = f", deadline {when(state.deadline)}" if state.deadline else ""
        yield f"declared {when(state.declared_at)} by {state.declared_by}{deadline}"
    of = "an unknown number of" if state.expected is None else str(state.expected)
    failed = sum(bool(member.state) and member.state != "SUCCESS" for member in state.members)
    yield f"{len(state.members)} of {of} members in" + (f", {failed} of them failed" if failed else "")
    for request in state.requests:
        done = f"; done {when(request.done)}: {request.outcome} {request.why}".rstrip() if request.done else ""
        yield f"{request.what} asked {when(request.at)} by {request.by}: {request.reason}{done}"
    if state.decided_at is not None:
        why = f": {state.why}" if state.why else f": member {state.failed} failed" if state.failed else ""
        yield f"decided  {when(state.decided_at)} by {state.decided_by}: {state.outcome}{why}"
    if state.fired_at is not None:
        what = "body failed, errbacks called" if state.state == chord_state.FAILED else "body sent"
        yield f"fired    {when(state.fired_at)} by {state.fired_by}: {what}{' (found in the log)' if state.found else ''}"
    else:
        yield "not fired"
