"""``pipeline cutover``: have readers read another view, or the one before again, without a restart."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
import msgspec

from celery_kafka_backend import topics
from celery_kafka_backend.changes import Batch, Partition
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import chosen_view, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop, no_topic
from celery_kafka_backend.cli.output import duration, when
from celery_kafka_backend.errors import SettingsError, StoreError
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.pointer import Pointer, pointers, position
from celery_kafka_backend.primary import LOOK_S
from celery_kafka_backend.settings import SETTING, mask
from celery_kafka_backend.sinks.registry import open_sink, open_view

if TYPE_CHECKING:
    from collections.abc import Mapping

    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import View

ASK_S = 0.01


class Standing(msgspec.Struct):
    """Which view readers of ours are to read.

    Attributes:
        view: Its name.
        since: Since when, ms since 1970; None: it is the first one configured, and there was no cut-over.
        forced: Whether readers went there although it showed less.
        before: The view that they came from; None if that is not known.
        copies: What each view says, by name: the view that its pointer names, "" if it has none, None if it cannot be read.
    """

    view: str
    since: int | None = None
    forced: bool = False
    before: str | None = None
    copies: dict[str, str | None] = {}

    @property
    def outdated(self) -> list[str]:
        """The views whose copy of the pointer is missing or old: who asks only these reads another view."""
        return [name for name, said in self.copies.items() if self.since and said is not None and said != self.view]


def standing(settings: Settings, held: Mapping[str, list[Pointer] | None]) -> Standing:
    """Return where readers are to be, by the pointers that each view holds, latest first; None: it cannot be read."""
    first = topics.view_name(settings.views[0])
    copies = {name: None if found is None else found[0].view if found else "" for name, found in held.items()}
    every = sorted((one for found in held.values() for one in found or ()), key=lambda one: one.at, reverse=True)
    if not every:
        return Standing(first, copies=copies)
    latest = every[0]
    before = next((one.view for one in every if one.view != latest.view), first if first != latest.view else None)
    return Standing(latest.view, latest.at, latest.forced, before, copies)


def said(found: Standing) -> str:
    """Return it in words."""
    if found.since is None:
        return f"{found.view}, the first one configured"
    forced = ", by force" if found.forced else ""
    before = f"; before: {found.before}" if found.before else ""
    return f"{found.view} since {when(found.since)}{forced}{before}"


@click.command("cutover", cls=Command, short_help="Have readers read another view, without a restart.")
@click.option(
    "--to", "to", metavar="VIEW", help="The view to read from now on: URL, scheme or name of a configured one."
)
@click.option("--back", is_flag=True, help="The view that was read before.")
@click.option(
    "--lag", type=click.FloatRange(min=0.01), default=5.0,
    help="Seconds in which the view must show all that the log holds when this begins.",
)  # fmt: skip
@click.option(
    "--force", is_flag=True, help="Even if it does not, or a view is away: what was shown may be missing for a while."
)
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would be done.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=5.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context, to: str | None, back: bool, lag: float, force: bool, dry_run: bool, timeout: float
) -> Exit:
    r"""Move the pointer that names the view which clients and workers on kafka:// read.

    They follow without a restart, within about 2 seconds, each when the new view shows all that it has seen in the old
    one. Both must be among their configured views, and both must be fed (`run`). Clients on Celery's own backends
    cannot follow. Without --to and --back: shows where readers are. docs/cut-over.md is the runbook.

    \b
    Examples:
      celery -A proj pipeline cutover
      celery -A proj pipeline cutover --to redis-1a2b3c4d
      celery -A proj pipeline cutover --back
      celery -A proj pipeline cutover --to mongodb --force    the old view is lost
    """
    pipeline = pipeline_of(ctx)
    if to and back:
        raise Stop(Exit.CONFIGURATION, "--to and --back contradict each other", "give one of them")
    urls = {topics.view_name(url): url for url in pipeline.settings.views}
    now = standing(pipeline.settings, {name: held(pipeline, url) for name, url in urls.items()})
    click.echo(f"Readers read {said(now)}")
    for name in now.outdated:
        click.secho(f"warning: {name} does not say so: `{pipeline.command} cutover --to {now.view}`", fg="yellow")
    if not to and not back:
        return Exit.OK
    target = _previous(now) if back else _target(pipeline, to or "")
    if target == now.view and not now.outdated:
        return Exit.OK
    _check(pipeline, now, target, force=force)
    shown = target == now.view or _is_up_to_date(pipeline, urls[target], lag, timeout, force=force)
    if dry_run:
        click.echo(f"Would move readers to {target}.")
        return Exit.OK
    at = now.since if target == now.view and now.since else max(system_wall_ms(), (now.since or 0) + 1)
    code = _write(pipeline, urls, Pointer(target, at, forced=not shown))
    click.echo(
        f"Readers read {target} ({mask(urls[target])}) within about {LOOK_S:g} s. Back: `{pipeline.command} cutover --back`"
    )
    return code


def held(pipeline: Pipeline, url: str) -> list[Pointer] | None:
    """Return the pointers that a view holds, the latest first; None if it cannot be read."""
    view = open_view(url, pipeline.options(url))
    try:
        return pointers(pipeline.settings.topic_prefix, view.positions())
    except (StoreError, SettingsError) as exc:
        click.secho(f"warning: {topics.view_name(url)} cannot be read: {exc}", fg="yellow", err=True)
        return None
    finally:
        view.close()


def _target(pipeline: Pipeline, to: str) -> str:
    name = topics.view_name(chosen_view(pipeline.settings, to, "--to"))
    if name not in map(topics.view_name, pipeline.settings.views):
        raise Stop(
            Exit.CONFIGURATION,
            f"--to {mask(to)}: not one of {SETTING}['views'], among which readers look for it",
            "add it there, or as another view= in result_backend, and restart with it all that reads results",
        )
    return name


def _previous(now: Standing) -> str:
    if now.before is None or now.before not in now.copies:
        which = f"{now.before} is not configured here" if now.before else "no view was read before"
        raise Stop(Exit.NOT_FOUND, f"--back: {which}", "name one: --to")
    return now.before


def _check(pipeline: Pipeline, now: Standing, target: str, *, force: bool) -> None:
    """Refuse what only force does.

    Raises:
        Stop: A view is away, or chords are counted in the one that is read.
    """
    if now.copies[target] is None:
        raise Stop(Exit.VIEW_UNUSABLE, f"{target} cannot be read", "start its store first")
    away = [name for name, copy in now.copies.items() if copy is None]
    if away and not force:
        raise Stop(
            Exit.VIEW_UNUSABLE,
            f"{', '.join(away)} cannot be told: readers that have it as their first view would not follow once it is back",
            "wait for it, or --force, and repeat this when it is back",
        )
    if pipeline.settings.chords == "view" and not force:
        raise Stop(
            Exit.NOT_DONE,
            f"{SETTING}['chords'] = 'view': the store of {now.view} counts chords, and shows their members' results",
            "finish docs/switching.md first",
        )


def _is_up_to_date(pipeline: Pipeline, url: str, lag_s: float, timeout_s: float, *, force: bool) -> bool:
    """See whether a view shows all that the log holds now, in time.

    Raises:
        Stop: It does not, and it is not forced.
    """
    name = topics.view_name(url)
    broker = Broker(pipeline.settings, timeout_s)
    view = open_view(url, pipeline.options(url))
    try:
        behind, took_s = catch_up(broker, view, lag_s)
    finally:
        view.close()
        broker.close()
    if not behind:
        click.echo(f"{name} showed within {duration(took_s)} all that the log held.")
        return True
    problem = f"{name} lags: after {duration(lag_s)} it is {behind} events behind what the log held"
    if not force:
        remedy = f"see `{pipeline.command} status`; wait, give it more processes (`run --processes`), raise --lag; or --force"
        raise Stop(Exit.NOT_DONE, problem, remedy)
    click.secho(f"warning: {problem}", fg="yellow")
    return False


def catch_up(broker: Broker, view: View, lag_s: float) -> tuple[int, float]:
    """Wait until a view shows all that the log holds now.

    Returns:
        How many events it is behind when the time is over, and how many seconds that took.

    Raises:
        Stop: Kafka does not answer; there is no log.
    """
    log = topics.task_events(broker.settings.topic_prefix)
    ends = {Partition(log, n): span for n, span in broker.ends(log).items()}
    if not ends:
        raise no_topic(log)
    began = time.monotonic()
    while True:
        there = view.positions()
        behind = sum(max(high - max(there.get(at, 0), low), 0) for at, (low, high) in ends.items())
        took_s = time.monotonic() - began
        if not behind or took_s > lag_s:
            return behind, took_s
        time.sleep(ASK_S)


def _write(pipeline: Pipeline, urls: Mapping[str, str], pointer: Pointer) -> Exit:
    """Write the pointer into every view, the one that it names first."""
    at = position(pipeline.settings.topic_prefix, pointer)
    code = Exit.OK
    for name in sorted(urls, key=lambda name: name != pointer.view):
        sink = open_sink(urls[name], pipeline.options(urls[name]))
        try:
            sink.open()
            sink.write(Batch([], positions=at))
        except (StoreError, SettingsError) as exc:
            if name == pointer.view:
                raise
            code = Exit.NOT_DONE
            remedy = f"`{pipeline.command} cutover --to {pointer.view}` when it is back"
            click.secho(f"warning: {name} could not be told: {exc}; repeat {remedy}", fg="yellow", err=True)
        finally:
            sink.close()
    return code
