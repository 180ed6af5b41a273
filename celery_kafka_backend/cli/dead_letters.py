"""``pipeline dead-letters``: what could not be folded or written, and what to do about it."""

from __future__ import annotations

import base64
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from celery_kafka_backend.cli.actor import checked, recorded, sure, who
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command, Family
from celery_kafka_backend.cli.context import pipeline_of
from celery_kafka_backend.cli.dealing import Dealing, Reading, letters_of, log_of, original
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.moment import Moment
from celery_kafka_backend.cli.output import console, print_json, short, table, watched, when
from celery_kafka_backend.letters import DROP, OPEN, REQUEUE, STATES, Selection, refusal, theirs
from celery_kafka_backend.order import system_wall_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from celery_kafka_backend.letters import Case, Raw

    _Function = TypeVar("_Function", bound="Callable[..., Any]")

FAMILY = "dead_letters"
SHOWN = 20
"""Rows of what is about to be done; --json has all."""

_FILTERS = (
    click.argument("places", nargs=-1, metavar="[RECORD]..."),
    click.option("--because", default="", metavar="PATTERN", help="Reason for which it was given up: '*too large*'."),
    click.option("--topic", default="", metavar="PATTERN", help="Topic that it stood in."),
    click.option("--by", default="", metavar="PATTERN", help="Consumer group that gave it up."),
    click.option("--name", default="", metavar="PATTERN", help="Name of the task: shop.pay, 'shop.*'."),
    click.option("--task", default="", metavar="ID", help="Id of the task, or of the group."),
    click.option("--since", type=Moment(), help="Given up not before: 2026-01-31T03:00, 03:00, 2h."),
    click.option("--until", type=Moment(), help="Given up before."),
)
_REACH = click.option("--timeout", type=click.FloatRange(min=0.1), default=10.0, help="Seconds that Kafka may take.")
_JSON = click.option("--json", "as_json", is_flag=True, help="JSON, everything.")


def _chosen(function: _Function) -> _Function:
    for option in reversed(_FILTERS):
        function = option(function)
    return function


@click.group("dead-letters", cls=Family, short_help="What could not be folded or written: list, show, requeue, drop.")
def command() -> None:
    r"""Look at the records that no view could take, and do something about them.

    A record is named by the place where it stood, TOPIC/PARTITION@OFFSET. It is listed once, however many views gave it
    up and however often. Nothing is ever removed from Kafka before its retention ends.

    \b
    Examples:
      celery -A proj pipeline dead-letters list
      celery -A proj pipeline dead-letters show celery.task-events/3@1742
      celery -A proj pipeline dead-letters requeue --because 'UnknownVersion*' --reason "processors upgraded"
      celery -A proj pipeline dead-letters drop celery.task-events/3@1742 --reason "a test's rubbish"
    """


# -- looking -------------------------------------------------------------------------------------


@command.command("list", cls=Command, family=FAMILY, short_help="Which there are, and what was done about them.")
@_chosen
@click.option("--state", type=click.Choice(sorted(STATES.values())), help="Only those. Default: all.")
@click.option("--limit", type=click.IntRange(1), default=50, help="At most so many rows, the newest; --json has all.")
@_JSON
@_REACH
@click.pass_context
def list_(ctx: click.Context, /, state: str | None, limit: int, as_json: bool, timeout: float, **given: Any) -> Exit:
    r"""List records that were given up, the newest last. In a PATTERN, * stands for any text and ? for one character.

    \b
    Examples:
      celery -A proj pipeline dead-letters list --state open --since 1d
      celery -A proj pipeline dead-letters list --name 'shop.*' --json | jq '.[].record'
    """
    with closing(Broker(pipeline_of(ctx).settings, timeout)) as broker:
        reading = Reading(broker)
        reading.go_on()
    found = _sorted(reading, Selection(state=state or "", **given))
    if as_json:
        print_json([_plain(case) for case in found])
    else:
        _draw(found[-limit:])
        counts = {each: sum(case.state == each for case in found) for each in STATES.values()}
        said = ", ".join(f"{count} {each}" for each, count in counts.items() if count)
        click.echo(f"{len(found)} records in {reading.topic}" + (f": {said}" if said else ""))
        if len(found) > limit:
            click.echo(f"the newest {limit} are shown: --limit, --json")
    if reading.cases.strange:
        click.echo(f"note: {reading.cases.strange} more records are not ours to read", err=True)
    return Exit.OK


@command.command("show", cls=Command, family=FAMILY, short_help="All that is known of one.")
@click.argument("place", metavar="RECORD")
@_JSON
@_REACH
@click.pass_context
def show(ctx: click.Context, place: str, as_json: bool, timeout: float) -> Exit:
    r"""Show a record that was given up: why, when and by whom, what was done about it, and what it says.

    \b
    Examples:
      celery -A proj pipeline dead-letters show celery.task-events/3@1742
      celery -A proj pipeline dead-letters show celery.chords/0@17 --json | jq -r .value_base64 | base64 -d
    """
    settings = pipeline_of(ctx).settings
    with closing(Broker(settings, timeout)) as broker:
        reading = Reading(broker)
        reading.go_on()
        (case,) = _all_of(reading, Selection(places=(place,)))
        ((_, letter),) = letters_of(broker, [case])
        whole = original(broker, case, letter)
    value = whole.value if whole else letter.value
    refused = refusal(log_of(settings), case, system_wall_ms())
    if as_json:
        print_json({**_plain(case), **_bytes(letter, value), "whole": whole is not None, "refused": refused})
        return Exit.OK
    screen = console()
    screen.print(f"{case.record}  {case.state}", style="bold")
    for line in _story(case):
        screen.print("  " + line)
    said = case.content
    screen.print(f"  {said.what or 'unreadable'} {said.name} of {said.subject or '?'} {when(said.happened)}".rstrip())
    if said.problem:
        screen.print(f"  {said.problem}")
    if case.deed is None:
        screen.print(f"  requeue: {'no: ' + refused if refused else 'can be done'}")
    screen.print(f"  key {letter.key!r}, {said.size} bytes{'' if whole else ', of which the beginning is left'}")
    for name, text in _headers(letter).items():
        screen.print(f"  header {name}: {short(text)}")
    screen.print(_readable(value))
    return Exit.OK


def _story(case: Case) -> list[str]:
    lines = [f"given up {when(one.at)} by {one.by or '?'}: {one.reason}" for one in case.letters]
    if case.again is not None:
        lines.insert(0, f"was {case.again} before, which was requeued")
    if case.deed is not None:
        to = f", now {case.deed.to}" if case.deed.to else ""
        lines.append(f"{case.state} {when(case.deed.at)} by {case.deed.by}: {case.deed.reason}{to}")
    return lines


# -- doing ---------------------------------------------------------------------------------------

_everything = click.option("--all", "everything", is_flag=True, help="All that are open, without any filter.")


@command.command("requeue", cls=Command, family=FAMILY, short_help="Append records to their topics again.")
@_chosen
@_everything
@recorded
@_JSON
@_REACH
@click.pass_context
def requeue(ctx: click.Context, /, **given: Any) -> Exit:
    r"""Append records again, byte for byte, to the topic that they stood in, once what was wrong with them is put right.

    A record is requeued once, whoever asks however often, and whatever dies meanwhile: it is appended, and that is
    recorded, in one transaction of Kafka's. If it is given up again that is another record, of which `list` says so.

    Refused are records that this version still cannot read, or that are not signed with our chord_key: they would be
    given up again. And those that are older than the log's retention: what has superseded them may be gone.

    Exits with 13 if anything was refused, 11 if nothing was to be done.

    \b
    Examples:
      celery -A proj pipeline dead-letters requeue --because '*mapper_parsing*' --reason "mapping put right" --dry-run
      celery -A proj pipeline dead-letters requeue --all --since 2h --reason "disk was full" --yes
    """
    return _deal(ctx, REQUEUE, **given)


@command.command("drop", cls=Command, family=FAMILY, short_help="Record that nothing will be done about some.")
@_chosen
@_everything
@recorded
@_JSON
@_REACH
@click.pass_context
def drop(ctx: click.Context, /, **given: Any) -> Exit:
    r"""Record that nothing will be done about records, and why. They cannot be requeued any more.

    They stay in Kafka until retention takes them, and in `list`, with your reason.

    \b
    Examples:
      celery -A proj pipeline dead-letters drop celery.task-events/3@1742 --reason "a test's rubbish"
      celery -A proj pipeline dead-letters drop --name 'load.*' --until 2026-01-31 --reason "load test" --yes
    """
    return _deal(ctx, DROP, **given)


def _deal(
    ctx: click.Context,
    action: str,
    *,
    everything: bool,
    reason: str,
    actor: str,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    timeout: float,
    **given: Any,
) -> Exit:
    if not everything and not any(given.values()):
        raise Stop(Exit.CONFIGURATION, f"{action} what?", "name records, give a filter, or --all")
    why = "" if dry_run else checked(reason, action)
    # Whoever names a record is told if it is dealt with; a filter means what is left to do.
    selection = Selection(state="" if given["places"] else OPEN, **given)
    with closing(Broker(pipeline_of(ctx).settings, timeout)) as broker:
        reading = Reading(broker)
        reading.go_on()
        chosen = _all_of(reading, selection)
        dealing = Dealing(broker, actor or who(), why)
        able = dealing.sort(chosen, action)
        if able and not dry_run:
            if not yes:
                _draw(able[:SHOWN])
                sure(f"{action} {_many(len(able))}?")
            dealing = Dealing(broker, actor or who(), why)
            dealing.begin()
            reading.go_on()  # nobody else deals with any from now on; whoever did has finished
            wanted = {case.record for case in chosen}
            able = dealing.sort((case for case in reading.cases if case.record in wanted), action)
            _work(dealing, able, action, quiet=as_json)
            dealing.settle()
    _tell(dealing, able, action, dry_run=dry_run, as_json=as_json)
    return Exit.NOT_DONE if dealing.refused else Exit.OK


def _work(dealing: Dealing, able: Sequence[Case], action: str, *, quiet: bool) -> None:
    steps = dealing.requeue(able) if action == REQUEUE else dealing.drop(able)
    watched(steps, action, len(able), quiet=quiet or len(able) < SHOWN)


def _tell(dealing: Dealing, able: Sequence[Case], action: str, *, dry_run: bool, as_json: bool) -> None:
    past = "requeued" if action == REQUEUE else "dropped"
    if as_json:
        refused = [{"record": str(one.case.record), "why": one.why} for one in dealing.refused]
        would = [{"record": str(case.record)} for case in able] if dry_run else []
        done = [{"record": str(one.record), "to": one.to and str(one.to)} for one in dealing.done]
        print_json({"action": action, "dry_run": dry_run, "done": done, "would": would, "refused": refused})
        return
    if dry_run:
        _draw(able[:SHOWN])
        click.echo(f"would be {past}: {_many(len(able))}")
    else:
        click.echo(f"{past}: {_many(len(dealing.done))}")
    for one in dealing.refused[:SHOWN]:
        click.echo(f"refused: {one.case.record}: {one.why}", err=True)
    if len(dealing.refused) > SHOWN:
        click.echo(f"… and {len(dealing.refused) - SHOWN} more refused (--json)", err=True)


# -- both ----------------------------------------------------------------------------------------


def _all_of(reading: Reading, selection: Selection) -> list[Case]:
    """Return what was chosen.

    Raises:
        Stop: There is none, or one that was named is not there.
    """
    found = _sorted(reading, selection)
    missing = set(selection.places) - {str(case.record) for case in found}
    if missing:
        place = min(missing)
        raise Stop(
            Exit.NOT_FOUND,
            f"{place} is not in {reading.topic}",
            "`list` names those that are, as TOPIC/PARTITION@OFFSET",
        )
    if not found:
        raise Stop(
            Exit.NOT_FOUND, f"nothing of that kind in {reading.topic}", "`dead-letters list` shows what there is"
        )
    return found


def _sorted(reading: Reading, selection: Selection) -> list[Case]:
    return sorted(filter(selection.matches, reading.cases), key=lambda case: (case.letters[-1].at, case.record))


def _many(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"


def _draw(cases: Sequence[Case]) -> None:
    if not cases:
        return
    drawn = table("", "record", "state", "given up", "times", "by", "what", "task", "id", "why", numbers=("times",))
    for case in cases:
        last, said = case.letters[-1], case.content
        why = short(last.reason) if case.deed is None else f"{case.deed.by}: {short(case.deed.reason)}"
        drawn.add_row(
            str(case.record), case.state, when(last.at), str(len(case.letters)), last.by, said.what or "unreadable", said.name,
            said.subject, why + (f" (before: {case.again})" if case.again else ""),
        )  # fmt: skip
    console().print(drawn)


def _plain(case: Case) -> dict[str, Any]:
    """Return a case as JSON has it."""
    deed = case.deed
    return {
        "record": str(case.record),
        "state": case.state,
        "given_up": [
            {"at": one.at, "by": one.by, "reason": one.reason, "letter": str(one.place)} for one in case.letters
        ],
        "again": case.again and str(case.again),
        "done": deed and {**msgspec.structs.asdict(deed), "to": deed.to and str(deed.to)},
        **msgspec.structs.asdict(case.content),
    }


def _bytes(letter: Raw, value: bytes | None) -> dict[str, Any]:
    return {
        "key": None if letter.key is None else letter.key.decode(errors="replace"),
        "headers": _headers(letter),
        "value_base64": None if value is None else base64.b64encode(value).decode(),
    }


def _headers(letter: Raw) -> dict[str, str]:
    return {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value or ""
        for name, value in theirs(letter.headers)
    }


def _readable(value: bytes | None) -> str:
    """Return what a value says, as far as it can be shown: JSON, text, or the bytes as Python writes them."""
    if value is None:
        return "no value"
    try:
        return msgspec.json.format(value, indent=2).decode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return repr(value[:4_000])
