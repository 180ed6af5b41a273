"""``pipeline export``: events into a file, as JSON Lines, CloudEvents or Parquet. Streams, whatever there is."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.export_formats import WRITERS
from celery_kafka_backend.cli.filters import filtered, placed, query_of
from celery_kafka_backend.cli.records import SAY_EVERY_S, SAY_FIRST_S
from celery_kafka_backend.cli.sources import audited

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from celery_kafka_backend.changes import Logged


@click.command("export", cls=Command, short_help="Write events to a file: JSON Lines, CloudEvents, Parquet.")
@filtered
@click.option("--format", "form", type=click.Choice(sorted(WRITERS)), default="jsonl", help="How.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to; a file that is there is replaced. Default: stdout."
)  # fmt: skip
@click.option("--limit", type=click.IntRange(0), default=0, help="At most so many events, the oldest; 0: all.")
@click.option("--quiet", is_flag=True, help="No progress.")
@placed
@click.pass_context
def command(
    ctx: click.Context,
    /,
    form: str,
    output: Path | None,
    limit: int,
    quiet: bool,
    view: str | None,
    only_log: bool,
    timeout: float,
    **given: Any,
) -> Exit:
    r"""Write events of the history to a file, the same that `search` finds. Memory stays flat, however many they are.

    jsonl: each event as it was recorded, one JSON object per line. cloudevents: each in a CloudEvents 1.0 envelope, one
    per line. parquet: a column per field, result and arguments as JSON; needs the extra "parquet". SQLite,
    Elasticsearch and MongoDB give them in the order of time, the others and the log in any.

    A file is complete or not there: it is written beside its place and moved when it is done.

    \b
    Examples:
      celery -A proj pipeline export --since 1d -o day.jsonl
      celery -A proj pipeline export --name 'shop.*' --state FAILURE --format parquet -o failed.parquet
      celery -A proj pipeline export --format cloudevents --since 1h | curl -T - https://…
      celery -A proj pipeline export --log -o everything.jsonl
    """
    pipeline = pipeline_of(ctx)
    query = query_of(given, limit=limit)
    if form == "parquet" and output is None:
        raise Stop(Exit.CONFIGURATION, "parquet is no text", "say where to: -o FILE")
    with audited(pipeline, view, timeout, only_log=only_log) as source, _place(output) as stream:
        counted = _Counted(source.search(query), quiet=quiet)
        WRITERS[form](counted, stream, pipeline.settings.topic_prefix)
        name = source.name
    if not quiet:
        click.echo(f"{counted.count} events from {name}" + (f" to {output}" if output else ""), err=True)
    return Exit.OK


@contextmanager
def _place(output: Path | None) -> Iterator[BinaryIO]:
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = output.with_name(f".{output.name}.part")
    try:
        with part.open("wb") as stream:
            yield stream
        part.replace(output)
    except OSError as exc:
        raise Stop(
            Exit.CONFIGURATION,
            f"-o {output}: {exc.strerror or exc}",
            "name a place where there is room and right to write",
        ) from exc
    finally:
        part.unlink(missing_ok=True)


class _Counted:
    """Events, counted on their way; says now and then how many."""

    def __init__(self, found: Iterable[Logged], *, quiet: bool) -> None:
        self._found = found
        self._quiet = quiet
        self.count = 0

    def __iter__(self) -> Iterator[Logged]:
        began = time.monotonic()
        say_at = began + SAY_FIRST_S
        for self.count, logged in enumerate(self._found, 1):  # noqa: B020 - the count is what is wanted
            if self.count % 1_000 == 0 and not self._quiet and (now := time.monotonic()) >= say_at:
                say_at = now + SAY_EVERY_S
                click.echo(f"{self.count} events, {self.count / (now - began):.0f}/s", err=True)
            yield logged
