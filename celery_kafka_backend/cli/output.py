"""How things look on a terminal: tables and progress by rich, times and sizes for people."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from celery_kafka_backend.cli.exits import Exit, Stop

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console
    from rich.progress import Progress, Task
    from rich.table import Table

_EXTRA: Final = "celery-kafka-backend[processor]"


@contextmanager
def _rich() -> Iterator[None]:
    """Turn its absence into a `Stop` with the remedy."""
    try:
        yield
    except ModuleNotFoundError as exc:
        raise Stop(
            Exit.CONFIGURATION,
            f"tables and progress need the package {exc.name!r}, which is not installed",
            f"pip install '{_EXTRA}'; or use --json where the command has it",
        ) from exc


@_rich()
def console(*, stderr: bool = False) -> Console:
    """Return a terminal to draw on.

    Raises:
        Stop: rich is not installed.
    """
    from rich.console import Console  # noqa: PLC0415 - an extra

    # Where it is not a terminal (a log, a pipe), a table must not be cut to 80 columns.
    made = Console(stderr=stderr, highlight=False, markup=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, markup=False, width=200)


@_rich()
def table(title: str, *columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """Return an empty table; the columns named in ``numbers`` are right-aligned.

    Raises:
        Stop: rich is not installed.
    """
    from rich.table import Table  # noqa: PLC0415 - an extra
    from rich.text import Text  # noqa: PLC0415

    made = Table(
        title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


@_rich()
def progress() -> Progress:
    """Return a progress display on stderr: how far, how fast, how long yet.

    Raises:
        Stop: rich is not installed.
    """
    from rich.progress import (  # noqa: PLC0415 - an extra
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text  # noqa: PLC0415

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:,.0f}/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    return Progress(*columns, console=console(stderr=True))


def watched(steps: Iterable[int], what: str, total: int | None = None, *, quiet: bool) -> None:
    """Have some work done that says how much each step was, and draw how far it is."""
    with nullcontext() if quiet else progress() as bar:
        row = bar.add_task(what, total=total) if bar is not None else None
        for count in steps:
            if bar is not None and row is not None:
                bar.advance(row, count)


def print_json(value: Any) -> None:
    """Print a value as JSON that people can read, too."""
    click.echo(msgspec.json.format(msgspec.json.encode(value)))


def when(ms: int | None) -> str:
    """Return a moment in local time, with its milliseconds; "" if unknown."""
    if not ms:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ms / 1000)) + f".{ms % 1000:03d}"


def duration(seconds: float | None) -> str:
    """Return a time span as people say it; "" if unknown."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86_400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} d"


def size(count: float) -> str:
    """Return a number of bytes in a unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def short(text: str, limit: int = 80) -> str:
    """Return a text on one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
