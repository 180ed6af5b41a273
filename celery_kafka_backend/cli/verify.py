"""``pipeline verify``: are two views the same, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import chosen_views, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.output import console, short, table
from celery_kafka_backend.processors.verify import compare
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import open_view

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery_kafka_backend.processors.verify import Comparison
    from celery_kafka_backend.sinks.contract import Row, View


@click.command("verify", cls=Command, short_help="Compare two views, row by row.")
@click.option("--view", "first", required=True, metavar="VIEW", help="One view: a URL, or scheme or name.")
@click.option("--against", "second", required=True, metavar="VIEW", help="The other.")
@click.option("--limit", type=click.IntRange(0), default=20, help="Differences to describe; all are counted.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.pass_context
def command(ctx: click.Context, first: str, second: str, limit: int, quiet: bool) -> Exit:
    r"""Compare two views: every document, side record, group, history entry and chord fact.

    Exits with 10 if they differ. Both are read as they are: compare when nothing is being written, or expect the tasks
    that changed meanwhile.

    \b
    Examples:
      celery -A proj pipeline verify --view redis --against sqlite:////data/audit.db
    """
    pipeline = pipeline_of(ctx)
    urls = []
    for option, one in (("--view", first), ("--against", second)):
        found = chosen_views(pipeline.settings, (one,), option)
        if len(found) > 1:
            raise Stop(Exit.CONFIGURATION, f"{option} {one}: that is {len(found)} views", "give the URL or name of one")
        urls += found
    if urls[0] == urls[1]:
        raise Stop(Exit.CONFIGURATION, f"{mask(urls[0])} is both views", "give two different ones")
    views: list[Any] = [open_view(url, pipeline.options(url)) for url in urls]
    try:
        with console(stderr=True).status("comparing") as shown:
            counting: list[Any] = (
                views if quiet else [_Counting(view, url, shown.update) for view, url in zip(views, urls, strict=True)]
            )
            found_ = compare(counting[0], counting[1], limit=limit)
    finally:
        for view in views:
            view.close()
    show(found_, [mask(url) for url in urls])
    return Exit.OK if found_.equal else Exit.DIFFERENT


class _Counting:
    """A view that says how many rows it has given."""

    def __init__(self, view: View, url: str, say: Any) -> None:
        self._view = view
        self._url = mask(url)
        self._say = say

    def rows(self) -> Iterator[Row]:
        for n, row in enumerate(self._view.rows(), 1):
            if n % 1000 == 0:
                self._say(f"{self._url}: {n} rows")
            yield row


def show(found: Comparison, names: list[str]) -> None:
    """Draw the comparison."""
    screen = console()
    drawn = table("", "table", "rows here", "rows there", "the same", numbers=("rows here", "rows there"))
    for name in sorted({*found.a, *found.b}):
        a, b = found.a.get(name), found.b.get(name)
        same = a is not None and b is not None and (a.rows, a.digest) == (b.rows, b.digest)
        drawn.add_row(name, str(a.rows if a else 0), str(b.rows if b else 0), "yes" if same else "no")
    screen.print(f"here:  {names[0]}\nthere: {names[1]}")
    screen.print(drawn)
    for one in found.differences:
        screen.print(f"{one.table} {one.key}", style="bold")
        for column in one.columns:
            here = "no such row" if one.a is None else short(repr(one.a.get(column)), 120)
            there = "no such row" if one.b is None else short(repr(one.b.get(column)), 120)
            screen.print(f"  {column}: {here}  |  {there}")
    if found.expired:
        screen.print(f"{found.expired} rows expired in one of them a moment before the other; not counted.")
    verdict = "The views are the same." if found.equal else f"{found.different} rows differ."
    screen.print(verdict, style="green" if found.equal else "red")
