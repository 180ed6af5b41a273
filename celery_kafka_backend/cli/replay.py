"""``pipeline replay``: the log once more, into another store. Runs no task again."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import click
import msgspec

from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import chosen_view, pipeline_of
from celery_kafka_backend.cli.edge import Edge
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.filters import meant
from celery_kafka_backend.cli.output import duration, progress, when
from celery_kafka_backend.cli.records import firsts
from celery_kafka_backend.cli.run import check_picklable, check_topics
from celery_kafka_backend.errors import PipelineError
from celery_kafka_backend.processors.crew import feed_all
from celery_kafka_backend.processors.hosting import calm
from celery_kafka_backend.processors.plan import Target, begin, prepare, survey
from celery_kafka_backend.processors.replay import feed
from celery_kafka_backend.processors.selection import Wanted
from celery_kafka_backend.settings import mask

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from celery_kafka_backend.changes import Partition
    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.processors.extent import Edge as Found
    from celery_kafka_backend.processors.extent import Extent
    from celery_kafka_backend.processors.plan import Prepared
    from celery_kafka_backend.processors.replay import Replayed

LINE_EVERY_S: Final = 10.0
"""Where it is no terminal."""


class Asked(msgspec.Struct, frozen=True):
    """What the options say.

    Attributes:
        url: The store.
        from_: Where to begin; None: not said.
        until: Where to end; None: not said.
        wanted: Which tasks.
        go_on: Take up an earlier one.
        dry: Write nothing.
        per_s: At most so many records per second; None: as fast as it goes.
        processes: How many.
        quiet: No progress.
        timeout_s: Seconds that Kafka may take to answer.
    """

    url: str
    from_: Found
    until: Found
    wanted: Wanted
    go_on: bool
    dry: bool
    per_s: float | None
    processes: int
    quiet: bool
    timeout_s: float


@click.command("replay", cls=Command, short_help="Feed the log into another store.")
@click.option("--to", required=True, metavar="VIEW", help="Where to: a URL, or scheme or name of a configured view.")
@click.option(
    "--from", "from_", type=Edge("earliest"),
    help="Only what the log got since then: 12h, 2026-01-31T03:00; or from offsets on: TOPIC:PARTITION:OFFSET,… or "
    "@FILE. Default: earliest.",
)  # fmt: skip
@click.option("--until", type=Edge("latest"), help="… and before then. Default: latest, the end as it is now.")
@click.option("--task-name", default="", metavar="PATTERN", help="Only tasks of this name: shop.pay, 'shop.*'.")
@click.option(
    "--state", "states", multiple=True, metavar="STATE",
    help="Only tasks that are in this state at the end: FAILURE, SUCCESS, PENDING … May be repeated.",
)  # fmt: skip
@click.option("--continue", "go_on", is_flag=True, help="Take up the last replay into that store where it stopped.")
@click.option("--dry-run", "dry", is_flag=True, help="Read and fold, write nothing, and say what would be written.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="At most so many records per second.")
@click.option("--processes", type=click.IntRange(1, 1000), default=1, help="Processes to share the partitions.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=10.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context, to: str, from_: Found, until: Found, task_name: str, states: tuple[str, ...], go_on: bool,
    dry: bool, rate: float | None, processes: int, quiet: bool, timeout: float,
) -> Exit:  # fmt: skip
    r"""Feed the log into a store: a new one, a lost one, or one to compare with. No task runs again, no chord fires.

    It folds as `run` does, beside whatever runs, and ends when it has reached the end as it was at the start. Repeating
    it changes nothing, and nothing older replaces anything newer. What has expired is left out.

    It may be killed at any moment: --continue goes on where it was, with the same range and tasks.

    \b
    Examples:
      celery -A proj pipeline replay --to sqlite:////data/audit.db
      celery -A proj pipeline replay --to sqlite:////data/audit.db --continue
      celery -A proj pipeline replay --to redis --from 12h        the last half day, into the configured Redis
      celery -A proj pipeline replay --to mongodb --processes 4 --rate 20000
      celery -A proj pipeline replay --to sqlite:///failed.db --state FAILURE --task-name 'shop.*'
      celery -A proj pipeline replay --to redis --from celery.task-events:0:120000,celery.task-events:1:98000 --dry-run
    """
    pipeline = pipeline_of(ctx)
    url = chosen_view(pipeline.settings, to, "--to")
    if go_on and (from_ is not None or until is not None):
        raise Stop(
            Exit.CONFIGURATION, "--continue goes on in the range of the replay that was not finished",
            "leave out --from and --until, or --continue",
        )  # fmt: skip
    wanted = Wanted(task_name, tuple(state.upper() for state in states))
    asked = Asked(url, from_, until, wanted, go_on, dry, rate, processes, quiet, timeout)
    return run(pipeline, asked)


def run(pipeline: Pipeline, asked: Asked) -> Exit:
    """Do it, and say what was done."""
    broker = Broker(pipeline.settings, asked.timeout_s)
    try:
        check_topics(broker, pipeline)
        prepared = prepare(
            pipeline.settings, Target(asked.url, pipeline.options(asked.url)),
            from_=asked.from_, until=asked.until, wanted=asked.wanted, go_on=asked.go_on, dry=asked.dry,
        )  # fmt: skip
        _check_range(broker, asked, prepared.extent)
    finally:
        broker.close()
    _say_before(asked, prepared)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="celery-kafka-replay-") as folder:
        chosen = _choose(pipeline, asked, prepared, Path(folder, "chosen.db")) if asked.wanted else None
        try:
            done = _work(pipeline, asked, prepared, chosen)
        except (PipelineError, KeyboardInterrupt):
            if not asked.dry:
                click.echo(
                    f"What was written stays; go on with `{pipeline.command} replay --to … --continue`.", err=True
                )
            raise
    _say_after(asked, prepared, done, time.monotonic() - began)
    return Exit.OK


def _check_range(broker: Broker, asked: Asked, found: Extent) -> None:
    """Say what of the range is not in the log."""
    for option, edge in (("--from", asked.from_), ("--until", asked.until)):
        if not isinstance(edge, int) and edge:
            _check_offsets(option, edge, found)
    if not found.spans and (asked.from_ or asked.until):
        oldest = firsts(broker, dict(found.kept.items()))
        begins = min((message.timestamp()[1] for message in oldest.values()), default=0)
        reach = f"its oldest record is of {when(begins)}" if begins else "it is empty"
        raise Stop(Exit.NOT_FOUND, "the log has nothing in that range", f"{reach}; correct --from or --until")


def _check_offsets(option: str, offsets: Mapping[Partition, int], found: Extent) -> None:
    for at, offset in offsets.items():
        if at not in found.kept:
            known = ", ".join(sorted({topic for topic, _ in found.kept}))
            raise Stop(Exit.CONFIGURATION, f"{option}: there is no {at.topic}/{at.partition}", f"topics: {known}")
        low, high = found.kept[at]
        if not low <= offset <= high:
            raise Stop(
                Exit.NOT_FOUND,
                f"{option}: {at.topic}/{at.partition} has no offset {offset}: Kafka keeps {low} to {high - 1}",
                "give one of these, or a time",
            )


def _say_before(asked: Asked, prepared: Prepared) -> None:
    if prepared.extent.deleted and not asked.go_on:
        click.echo(f"{prepared.extent.deleted} older records are no longer in the log.", err=True)
    if asked.go_on or asked.dry:
        return
    started = [at for at, offset in prepared.before.next.items() if offset > 0]
    if started:
        click.echo("An earlier replay into this store is begun anew; --continue would take it up.", err=True)


def _choose(pipeline: Pipeline, asked: Asked, prepared: Prepared, path: Path) -> Path:
    """Write down which tasks are wanted; return where."""
    with _telling(quiet=asked.quiet) as tell:
        found = survey(
            pipeline.settings, prepared.whole, asked.wanted, path, lambda n, of: tell("finding tasks", n, of)
        )
    click.echo(f"{found} tasks are wanted.")
    if not found:
        remedy = f"{meant(asked.wanted.states)}`{pipeline.command} search` shows what there is"
        raise Stop(Exit.NOT_FOUND, "no task of the log is as asked for", remedy)
    return path


def _work(pipeline: Pipeline, asked: Asked, prepared: Prepared, chosen: Path | None) -> Replayed:
    target = Target(asked.url, pipeline.options(asked.url))
    job = msgspec.structs.replace(prepared.job, chosen=str(chosen or ""), per_s=asked.per_s)
    with _telling(quiet=asked.quiet) as tell:
        if not asked.dry:
            begin(target, prepared)
        what = "reading" if asked.dry else "replaying"

        def on_progress(done: Replayed) -> None:
            tell(what, done.read, done.total)

        if asked.processes > 1:
            check_picklable((pipeline.settings, target))
            return feed_all(pipeline.settings, target, job.divided(asked.processes), on_progress)
        calm()
        return feed(pipeline.settings, target, job, on_progress)


def _say_after(asked: Asked, prepared: Prepared, done: Replayed, spent_s: float) -> None:
    kept = f" ({done.remembered} of them are in the history)" if done.remembered else ""
    unwanted = f", {done.unwanted} records of other tasks" if asked.wanted else ""
    click.echo(
        f"{mask(asked.url)}: {done.events} events and {done.facts} chord facts of {done.records} records, "
        f"{done.changes} tasks and groups {'would be written' if asked.dry else 'written (once per batch)'}; left out: {done.expired} expired{kept}, {done.poison} unreadable, "
        f"{done.rejected} refused by the store{unwanted}. {duration(spent_s)}."
    )
    if asked.dry:
        click.echo(
            f"Of {done.shown} documents the store has {done.kept} already, or newer ones, which would stay. "
            "Nothing was written."
        )
    elif not prepared.job.promised.issuperset(prepared.job.spans):
        click.echo("It is a part of the log: readers are not told that this view is up to date.")


# -- progress ----------------------------------------------------------------------------------


class _Tell(Protocol):
    def __call__(self, what: str, done: int, total: int) -> None: ...


@contextmanager
def _telling(*, quiet: bool) -> Iterator[_Tell]:
    """Give a way to say how far it is: a bar on a terminal, else a line now and then; with rate and time left."""
    if quiet:
        yield lambda what, done, total: None  # noqa: ARG005
    elif sys.stderr.isatty():
        with progress() as bar:
            tasks = {}

            def draw(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done, total=total)

            yield draw
    else:
        yield _Lines()


class _Lines:
    """A line on stderr now and then."""

    def __init__(self) -> None:
        self._what = ""
        self._began = self._said = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._said = what, now, now
        if now - self._said < LINE_EVERY_S:
            return
        self._said = now
        per_s = done / (now - self._began)
        left = duration((total - done) / per_s) if per_s else "unknown"
        click.echo(f"{what}: {done} of {total}, {per_s:,.0f}/s, {left} left", err=True)
