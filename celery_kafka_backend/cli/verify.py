"""``pipeline verify``: are two views the same, row by row, as of one instant; or a view and the log."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import chosen_view, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.output import console, print_json, short, table, when
from celery_kafka_backend.processors.instant import LogSide, ViewSide, verify
from celery_kafka_backend.processors.plan import Target
from celery_kafka_backend.processors.verify import HISTORY, TABLES, Table
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import keeps_history, open_view

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.processors.instant import Side, Verdict

LOG: Final = "log"


@click.command("verify", cls=Command, short_help="Compare two views, or a view and the log, row by row.")
@click.option("--view", "first", required=True, metavar="VIEW", help="One view: a URL, or scheme or name.")
@click.option(
    "--against", "second", required=True, metavar="VIEW|log",
    help="The other; 'log': fold the log into a temporary file and compare with that.",
)  # fmt: skip
@click.option(
    "--within", type=click.FloatRange(min=0), default=10.0, help="Seconds that a view may lag behind the other."
)
@click.option("--limit", type=click.IntRange(0), default=20, help="Differences to describe; all are counted.")
@click.option("--json", "as_json", is_flag=True, help="For programs; digests by partition.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.pass_context
def command(ctx: click.Context, first: str, second: str, within: float, limit: int, as_json: bool, quiet: bool) -> Exit:
    r"""Compare every document, side record, group, history entry and chord fact, every column, expiry within a second.

    Exits with 10 if they differ. Both may be written meanwhile: they are compared as of one instant, which is printed,
    and what was written since is compared again.

    \b
    Examples:
      celery -A proj pipeline verify --view redis --against sqlite:////data/audit.db
      celery -A proj pipeline verify --view redis --against log
    """
    pipeline = pipeline_of(ctx)
    one = chosen_view(pipeline.settings, first)
    other = LOG if second == LOG else chosen_view(pipeline.settings, second, "--against")
    if one == other:
        raise Stop(Exit.CONFIGURATION, f"{mask(one)} is both views", "give two different ones")
    with ExitStack() as stack:
        shown = None if quiet or as_json else stack.enter_context(console(stderr=True).status("comparing"))

        def say(text: str) -> None:
            if shown is not None:
                shown.update(text)

        sides: list[Side] = []
        for url in (one, other):
            if url == LOG:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="celery-kafka-verify-"))
                options = msgspec.structs.replace(
                    pipeline.options(one), history=keeps_history(one, pipeline.options(one)), options={}
                )
                target = Target(f"sqlite:///{folder}/log.db", options)
                fold = LogSide(pipeline.settings, target, say)
                sides.append(stack.enter_context(closing(fold)))
            else:
                view = stack.enter_context(closing(open_view(url, pipeline.options(url))))
                sides.append(ViewSide(view, say))
        verdict = verify(pipeline.settings, *sides, tables=_tables(pipeline, one, other), limit=limit, within_s=within)
    if as_json:
        print_json(_told(verdict, mask(one), mask(other)))
    else:
        show(verdict, [mask(one), mask(other)])
    return Exit.OK if verdict.found.equal else Exit.DIFFERENT


def _tables(pipeline: Pipeline, one: str, other: str) -> Collection[str]:
    """Return what both have."""
    both_keep = all(keeps_history(url, pipeline.options(url)) for url in (one, other) if url != LOG)
    return TABLES if both_keep else TABLES - {HISTORY}


def show(verdict: Verdict, names: list[str]) -> None:
    """Draw what came out."""
    screen, found = console(), verdict.found
    screen.print(f"here:  {names[0]}\nthere: {names[1]}\nas of {_instant(verdict)}")
    drawn = table("", "table", "rows here", "rows there", "digest here", "digest there", "the same", numbers=("rows here", "rows there"))  # fmt: skip
    for name in sorted({*found.a, *found.b}):
        a, b = found.a.get(name, Table()), found.b.get(name, Table())
        same = (a.rows, a.digest) == (b.rows, b.digest)
        drawn.add_row(name, str(a.rows), str(b.rows), _digest(a), _digest(b), "yes" if same else "no")
    screen.print(drawn)
    parts = sorted({*found.parts_a, *found.parts_b})
    uneven = [f"{name}/{n}" for name, n in parts if found.parts_a.get((name, n)) != found.parts_b.get((name, n))]
    if uneven and not found.equal:
        screen.print(f"digests differ in {len(uneven)} of {len(parts)} partitions: {short(', '.join(uneven), 300)}")
    for one in found.differences:
        screen.print(f"{one.table} {one.key}", style="bold")
        for column in one.columns:
            screen.print(f"  {column}: {_value(one.a, column)}  |  {_value(one.b, column)}")
    for text in _notes(verdict, names):
        screen.print(text)
    same_things = "The views are the same." if names[1] != LOG else "The view is what the log says."
    verdict_text = same_things if found.equal else f"{found.different} rows differ."
    screen.print(verdict_text, style="green" if found.equal else "red")


def _value(columns: Mapping[str, Any] | None, name: str) -> str:
    if columns is None:
        return "no such row"
    return short(repr(columns[name]), 120) if name in columns else "-"


def _notes(verdict: Verdict, names: list[str]) -> Iterator[str]:
    for name, lacks in zip(names, verdict.lacks, strict=True):
        if lacks:
            yield f"{name} is {lacks} records behind, and did not get there in time (--within)."
    if verdict.again:
        later = when(verdict.instants[-1].at)
        yield f"{verdict.again} rows were written meanwhile, and compared again, last as of {later}."
    if verdict.changing:
        yield f"{verdict.changing} rows that differ were written since; the others were not."
    if verdict.beyond:
        yield f"{verdict.beyond} rows began before the log does, or were compacted in it; they are not counted."
    if verdict.found.expired:
        yield f"{verdict.found.expired} rows expired in one of them a moment before the other; not counted."


def _instant(verdict: Verdict) -> str:
    """Return the instant, its offsets as `replay --until` takes them."""
    instant = verdict.instants[0]
    return f"{when(instant.at)}, {_offsets(verdict) or 'positions unknown'}"


def _offsets(verdict: Verdict) -> str:
    positions = sorted(verdict.instants[0].positions.items())
    return ",".join(f"{topic}:{number}:{offset}" for (topic, number), offset in positions)


def _digest(one: Table) -> str:
    return f"{one.digest:032x}"


def _told(verdict: Verdict, here: str, there: str) -> dict[str, Any]:
    found = verdict.found
    parts = [
        {"table": name, "partition": number}
        | {
            side: {"rows": part.rows, "digest": _digest(part)}
            for side, part in (
                ("here", found.parts_a.get((name, number), Table())),
                ("there", found.parts_b.get((name, number), Table())),
            )
        }
        for name, number in sorted({*found.parts_a, *found.parts_b})
    ]
    return {
        "here": here,
        "there": there,
        "as_of": verdict.instants[0].at,
        "positions": _offsets(verdict),
        "equal": found.equal,
        "different": found.different,
        "differences": [
            {
                "table": one.table,
                "key": one.key,
                "columns": one.columns,
                "here": _readable(one.a),
                "there": _readable(one.b),
            }
            for one in found.differences
        ],
        "lacks": {"here": verdict.lacks[0], "there": verdict.lacks[1]},
        "compared_again": verdict.again,
        "changing": verdict.changing,
        "beyond_the_log": verdict.beyond,
        "expired": found.expired,
        "partitions": parts,
    }


def _readable(columns: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return columns as JSON can say them."""
    return None if columns is None else {name: _plain(value) for name, value in columns.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):  # which may be no Unicode
        return value.decode(errors="backslashreplace")
    return value if value is None or isinstance(value, (str, int, float)) else repr(value)  # a driver's own
