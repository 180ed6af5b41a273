"""``pipeline run``: look before, say what runs, supervise."""

from __future__ import annotations

import pickle
from importlib import metadata
from typing import TYPE_CHECKING, Final

import click
import msgspec

from celery_kafka_backend import rights, topics
from celery_kafka_backend.cli import ownership
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import Pipeline, chosen_views, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.errors import SettingsError, Unavailable
from celery_kafka_backend.processors import hosting, supervisor
from celery_kafka_backend.processors.supervisor import ProcessSpec, Supervisor
from celery_kafka_backend.settings import SETTING, mask
from celery_kafka_backend.sinks.insight import insight_url
from celery_kafka_backend.sinks.registry import open_sink
from celery_kafka_backend.topics import view_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from celery_kafka_backend.settings import Settings

CHORDS: Final = "chords"
INSIGHT: Final = "insight"
_ENDS: Final = {
    supervisor.STOPPED: Exit.OK,
    supervisor.KILLED: Exit.KILLED,
    supervisor.GAVE_UP: Exit.PROCESSORS_CRASHED,
    supervisor.MISCONFIGURED: Exit.CONFIGURATION,
}
_LEVELS: Final = ("debug", "info", "warning", "error")


@click.command("run", cls=Command, short_help="Run the processors.")
@click.option(
    "--view", "views", multiple=True, metavar="VIEW",
    help="Feed this view: its URL, or scheme or name of a configured one. May be repeated. Default: all configured.",
)  # fmt: skip
@click.option("--processes", type=click.IntRange(1, 1000), default=1, help="Processes per view, on this machine.")
@click.option("--no-chords", is_flag=True, help="Only views: chords are decided elsewhere.")
@click.option("--chords-only", is_flag=True, help="No views: only decide chords.")
@click.option("--insight", is_flag=True, help="Also keep the insight view, for `pipeline top` (extra: insight).")
@click.option("--loglevel", "-l", type=click.Choice(_LEVELS, case_sensitive=False), default="info", help="Log level.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="Serve metrics and health here; 0: any free port.")
@click.option("--metrics-address", default="127.0.0.1", help="… on this address.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=10.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context,
    views: tuple[str, ...],
    processes: int,
    no_chords: bool,
    chords_only: bool,
    insight: bool,
    loglevel: str,
    metrics_port: int | None,
    metrics_address: str,
    timeout: float,
) -> Exit:
    r"""Run the processors: one or more per view, and one that decides chords.

    Each is a process of its own, restarted when it dies; all end when one dies too often. SIGTERM and Ctrl-C stop them
    cleanly: the batch in hand is written and committed. Start it on as many machines as you like: Kafka shares the
    partitions out.

    \b
    Examples:
      celery -A proj pipeline run                              everything, one process each
      celery -A proj pipeline run --processes 4                four per view, for a large log
      celery -A proj pipeline run --view redis --no-chords     one view only
      celery -A proj pipeline run --chords-only                chords only, beside it
      celery -A proj pipeline run --insight                    everything, and figures for `pipeline top`
      celery -A proj pipeline run --view sqlite:////data/audit.db --no-chords
                                                               a view that the app does not know (yet)
    """
    if no_chords and chords_only:
        raise Stop(Exit.CONFIGURATION, "--no-chords and --chords-only leave nothing to run", "give one of them")
    if chords_only and views:
        raise Stop(Exit.CONFIGURATION, "--view and --chords-only contradict each other", "give one of them")
    pipeline = pipeline_of(ctx)
    urls = [] if chords_only else chosen_views(pipeline.settings, views)
    held = insight_view(pipeline.settings) if insight else ""
    preflight(pipeline, urls, timeout, chords=not no_chords, insight=insight)
    specs = processes_for(pipeline, urls, processes, loglevel, chords=not no_chords, insight=held)
    hosting.log_to_stderr(loglevel)
    click.echo(banner(pipeline, urls, processes, chords=not no_chords, insight=held))
    if metrics_port is not None:
        specs = monitored(pipeline, urls, specs, metrics_address, metrics_port, insight=held)
    return _ENDS.get(Supervisor(specs).run(), Exit.UNEXPECTED)


def processes_for(
    pipeline: Pipeline, urls: Sequence[str], processes: int, loglevel: str, *, chords: bool, insight: str = ""
) -> list[ProcessSpec]:
    """Return what is to run; ``insight`` is the view that holds it, if it is wanted."""
    specs = [
        ProcessSpec(
            f"{view_name(url)}/{n}", hosting.fold_view, (loglevel, pipeline.settings, url, pipeline.options(url))
        )
        for url in urls
        for n in range(1, processes + 1)
    ]
    if chords:
        specs.append(ProcessSpec(CHORDS, hosting.decide_chords, (loglevel, pipeline.reference)))
    if insight:
        given = (loglevel, pipeline.settings, insight, pipeline.options(insight))
        specs.append(ProcessSpec(INSIGHT, hosting.keep_insight, given, vital=False))
    check_picklable(specs)
    return specs


def check_picklable(arguments: object) -> None:
    """Say which setting keeps processes from being started.

    Raises:
        SettingsError: One does.
    """
    try:
        pickle.dumps(arguments)
    except (pickle.PicklingError, TypeError, AttributeError) as exc:
        raise SettingsError(
            SETTING, f"something in it cannot be handed to another process: {exc}", "give callables as dotted paths"
        ) from exc


def monitored(
    pipeline: Pipeline,
    urls: Sequence[str],
    specs: Sequence[ProcessSpec],
    address: str,
    port: int,
    *,
    insight: str = "",
) -> list[ProcessSpec]:
    """Serve metrics and health; return the processes, each with its place on the board.

    Raises:
        SettingsError: The address or port cannot be had, or the extra is not installed.
    """
    # Only where metrics are wanted:
    from celery_kafka_backend.monitor import Endpoint  # noqa: PLC0415
    from celery_kafka_backend.processors.monitoring import ProcessorsSource, Role, ViewProbe  # noqa: PLC0415

    views = [view_name(url) for url in urls]
    # Faust's process has no seat on the board: what it does shows in the figures that it writes.
    apart = [spec for spec in specs if spec.name == INSIGHT]
    specs = [spec for spec in specs if spec.name != INSIGHT]
    roles = [Role(spec.name, next((v for v in views if spec.name.startswith(f"{v}/")), "")) for spec in specs]
    probes = [ViewProbe(url, pipeline.options(url)) for url in urls]
    figures = None
    if insight:
        from celery_kafka_backend.processors.insight_metrics import InsightProbe  # noqa: PLC0415 - likewise

        figures = InsightProbe(insight, pipeline.options(insight))
    source = ProcessorsSource(roles, probes, pipeline.settings.health_timeout_s, figures)
    endpoint = Endpoint(source, address, port, ("--metrics-address", "--metrics-port"))
    endpoint.start()
    click.echo(f"Metrics and health: {endpoint.url}/metrics, /healthz, /readyz")
    return [spec._replace(args=(*spec.args, source.place(number))) for number, spec in enumerate(specs)] + apart


def insight_view(settings: Settings) -> str:
    """Return the URL of the view that is to hold insight.

    Raises:
        SettingsError: No view can, nobody tells statistics, or the extra is not installed.
    """
    if not settings.insight:
        raise SettingsError(f"{SETTING}['insight']", "False, so that nothing is told", "leave it out")
    try:
        for package in ("faust-streaming", "ddsketch"):
            metadata.version(package)
    except metadata.PackageNotFoundError as exc:
        remedy = "pip install 'celery-kafka-backend[insight]'"
        raise SettingsError("--insight", f"{exc.name} is not installed", remedy) from exc
    return insight_url(settings.views)


def banner(pipeline: Pipeline, urls: Sequence[str], processes: int, *, chords: bool, insight: str = "") -> str:
    """Return what runs where, without secrets."""
    settings = pipeline.settings
    each = f"{processes} process{'es' * (processes != 1)}"
    lines = [
        f"celery-kafka-backend: processors of the app {pipeline.app.main or '(without a name)'}",
        f"  log     kafka://{mask(settings.bootstrap_servers)}  {topics.task_events(settings.topic_prefix)}",
        *(f"  view    {mask(url)}  {view_name(url)}, {each}" for url in urls),
        f"  chords  {'1 process' if chords else 'not here'}",
        *([f"  insight {mask(insight)}, 1 process"] if insight else []),
        "Ctrl-C or SIGTERM stops them cleanly.",
    ]
    return "\n".join(lines)


# -- looking before --------------------------------------------------------------------------


def preflight(
    pipeline: Pipeline, urls: Sequence[str], timeout_s: float, *, chords: bool, insight: bool = False
) -> None:
    """Find out what would keep the processors from working.

    Raises:
        Stop: Kafka, a right, a topic or a view is missing.
        ForeignLog: The topics are another app's.
    """
    broker = Broker(pipeline.settings, timeout_s)
    try:
        check_topics(broker, pipeline, insight=insight)
        check_rights(broker, rights.PROCESSOR, chords=chords, insight=insight)
        check_views(pipeline, urls)
        ownership.claim(broker, str(pipeline.app.main or ""))
    finally:
        broker.close()


def check_topics(broker: Broker, pipeline: Pipeline, *, insight: bool = False) -> None:
    """Say which topics are missing."""
    # Results need none of insight's topics.
    wanted = topics.wanted(msgspec.structs.replace(pipeline.settings, insight=insight))
    missing = [topic.name for topic in wanted if not broker.partitions(topic.name)]
    if missing:
        raise Stop(
            Exit.TOPICS_WRONG,
            f"Kafka at {pipeline.settings.bootstrap_servers} has no {', no '.join(missing)} "
            f"(kafka_backend_settings['topic_prefix'] = {pipeline.settings.topic_prefix!r}), or does not show it to us",
            f"create them: `{pipeline.command} init` (rights: `{pipeline.command} init --print`)",
        )


def check_rights(broker: Broker, role: str, *, chords: bool = True, insight: bool = False) -> None:
    """Say which rights a role lacks with these credentials, as far as Kafka tells."""
    prefix = broker.settings.topic_prefix
    needed = rights.of_role(prefix, role)
    if not insight:  # results need none of its topics
        needed = [
            one for one in needed if one.name not in (topics.task_stats(prefix), topics.insight_changelog(prefix))
        ]
    on_topics = [one for one in needed if one.resource == "topic" and (chords or one.operation != "Write")]
    have = broker.operations(sorted({right.name for right in on_topics}))
    if have is None:
        return
    missing = [right for right in on_topics if right.name in have and right.operation not in have[right.name]]
    missing += [right for right in needed if right.resource == "group" and not broker.may(right.operation, right.name)]
    if missing:
        problem, remedy = rights.lacking(broker.settings, missing)
        raise Stop(Exit.RIGHTS_MISSING, f"Kafka at {broker.settings.bootstrap_servers}: {problem}", remedy)


def check_views(pipeline: Pipeline, urls: Sequence[str]) -> None:
    """Open all views; one that is away keeps no other waiting, for its processors wait for it.

    Raises:
        Stop: A view is wrong, or there is none that could be reached.
    """
    away: list[Stop] = []
    for url in urls:
        try:
            check_view(pipeline, url)
        except Stop as stop:
            if not isinstance(stop.__cause__, Unavailable):
                raise
            away.append(stop)
    if away and len(away) == len(urls):
        raise away[0]
    for each in away:
        click.echo(f"warning: {each.problem}; its processors wait for it", err=True)


def check_view(pipeline: Pipeline, url: str) -> list[str]:
    """Open a view as its processor will; return its store's warnings."""
    sink = open_sink(url, pipeline.options(url))
    try:
        sink.open()
        return sink.warnings()
    except SettingsError as exc:
        raise Stop(Exit.VIEW_UNUSABLE, str(exc)) from exc
    except Unavailable as exc:
        raise Stop(
            Exit.VIEW_UNUSABLE,
            f"the view {mask(url)} cannot be reached: {exc}",
            "start its store, or correct view= in result_backend (or 'views' in kafka_backend_settings)",
        ) from exc
    finally:
        sink.close()
