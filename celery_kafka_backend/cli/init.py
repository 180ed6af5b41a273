"""``pipeline init``: the topics, as they should be. It adds; it never shrinks, and never deletes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import click
import msgspec
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # its __init__ only imports them
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
)

from celery_kafka_backend import rights, topics
from celery_kafka_backend.cli import ownership, plan
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from celery_kafka_backend.cli.plan import Difference
    from celery_kafka_backend.ownership import Mark
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.topics import Topic

CREATE_S: Final = 30.0
"""Bound on Kafka's own work for one request that changes something."""
SHOW_EVERY_S: Final = 0.1


@click.command("init", cls=Command, short_help="Create the topics.")
@click.option("--check", is_flag=True, help="Change nothing; name each difference, and exit with 6 if there is one.")
@click.option("--print", "print_", is_flag=True, help="Change nothing, ask nothing; print the commands for an admin.")
@click.option("--grow", is_flag=True, help="Add partitions to the log if it has fewer than wanted.")
@click.option("--alter", is_flag=True, help="Set settings of existing topics that differ.")
@click.option("--replication", type=click.IntRange(1), help="Copies of each partition, instead of replication_factor.")
@click.option("--take-over", is_flag=True, help="The topics are this app's from now on (it was renamed).")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=10.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context,
    check: bool,
    print_: bool,
    grow: bool,
    alter: bool,
    replication: int | None,
    take_over: bool,
    timeout: float,
) -> Exit:
    r"""Create the topics, with the settings that the promises rest on.

    What exists stays as it is: a difference is named, with the option that puts it right. The number of partitions of
    the chords' topic is never changed, and nothing is ever shrunk or deleted.

    \b
    Examples:
      celery -A proj pipeline init                       create what is missing
      celery -A proj pipeline init --replication 1       on a cluster of one broker
      celery -A proj pipeline init --check               in a deployment's checks
      celery -A proj pipeline init --print               for a cluster where only others may create topics
      celery -A proj pipeline init --grow                after raising kafka_backend_settings['partitions']
    """
    pipeline = pipeline_of(ctx)
    settings = _with_replication(pipeline.settings, replication)
    wanted = topics.wanted(settings)
    if print_:
        _print(settings, wanted)
        return Exit.OK
    broker = Broker(settings, timeout)
    try:
        if broker.embedded:
            return _embedded(broker, wanted)
        found = plan.differences(wanted, broker.found([topic.name for topic in wanted]))
        if check:
            return _check(wanted, found)
        app = str(pipeline.app.main or "")
        missing = {one.topic.name for one in found if one.kind == plan.MISSING}
        before = None
        if topics.chords(settings.topic_prefix) not in missing:  # else nobody can have claimed them
            before = _claim(broker, app, take_over=take_over)  # before anything of another app's is touched
        left = _put_right(broker, found, grow=grow, alter=alter)
        for topic in wanted:
            _say(topic, [one for one in left if one.topic is topic], created=topic.name in missing)
        if before is None:
            before = _claim(broker, app, take_over=take_over)
    finally:
        broker.close()
    taken = f"; they were {before.app!r}'s" if before is not None and before.app != app else ""
    click.echo(f"They serve the app {app!r}{taken}." if app else f"They serve an app without a name{taken}.")
    return Exit.TOPICS_WRONG if any(not one.harmless for one in left) else Exit.OK


def _with_replication(settings: Settings, replication: int | None) -> Settings:
    if replication is None:
        return settings
    in_sync = min(settings.min_insync_replicas, replication)
    return msgspec.structs.replace(settings, replication_factor=replication, min_insync_replicas=in_sync)


def _print(settings: Settings, wanted: list[Topic]) -> None:
    servers = settings.bootstrap_servers
    click.echo("# The topics. Run these once, as somebody who may create topics.")
    for topic in wanted:
        click.echo(plan.create_command(topic, servers))
    click.echo("\n# Rights, per role; put your principals in the place of User:celery-… .")
    click.echo("# A client sends tasks; a worker runs them; a processor is `pipeline run`; an operator types the rest.")
    click.echo(f"# Whoever may write {topics.chords(settings.topic_prefix)} can send tasks to the fleet.")
    for role, commands in rights.commands(settings.topic_prefix, servers).items():
        click.echo(f"\n# {role}")
        for line in commands:
            click.echo(line)


def _embedded(broker: Broker, wanted: list[Topic]) -> Exit:
    for topic in wanted:
        click.echo(f"{topic.name}: {broker.partitions(topic.name)} partitions, in memory")
    click.echo("This is librdkafka's embedded broker: topics appear by themselves, and nothing outlives its process.")
    return Exit.OK


def _check(wanted: list[Topic], found: list[Difference]) -> Exit:
    for one in found:
        click.echo(f"{one}  ({one.remedy})")
    if any(not one.harmless for one in found):
        return Exit.TOPICS_WRONG
    click.echo(f"{len(wanted)} topics are as they should be.")
    return Exit.OK


def _put_right(broker: Broker, found: Sequence[Difference], *, grow: bool, alter: bool) -> list[Difference]:
    """Do what may be done; return what is left."""
    left = []
    missing = [one.topic for one in found if one.kind == plan.MISSING]
    if missing:
        _create(broker, missing)
    configs: dict[str, list[Difference]] = {}
    for one in found:
        if one.kind == plan.FEWER and grow and not one.topic.fixed_partitions:
            _grow(broker, one.topic)
        elif one.kind == plan.CONFIG and alter:
            configs.setdefault(one.topic.name, []).append(one)
        elif one.kind != plan.MISSING:
            left.append(one)
    for name, several in configs.items():
        _alter(broker, name, several)
    return left


def _create(broker: Broker, missing: list[Topic]) -> None:
    brokers = len(broker.metadata.brokers)
    most = max(topic.replication for topic in missing)
    if most > brokers:
        copies = "copy" if brokers == 1 else "copies"
        raise Stop(
            Exit.TOPICS_WRONG,
            f"kafka_backend_settings['replication_factor'] = {most}, but Kafka at {broker.settings.bootstrap_servers} "
            f"has {brokers} broker{'s' * (brokers != 1)}, which can hold {brokers} {copies}",
            f"for a try-out: `pipeline init --replication {brokers}`, or set 'replication_factor': {brokers}, "
            f"'min_insync_replicas': {min(brokers, broker.settings.min_insync_replicas)}; in production have 3 brokers",
        )
    new = [
        NewTopic(topic.name, topic.partitions, replication_factor=topic.replication, config=topic.config)
        for topic in missing
    ]
    futures = broker.admin.create_topics(new, operation_timeout=CREATE_S, request_timeout=CREATE_S)
    for name, future in futures.items():
        try:
            future.result()
        except KafkaException as exc:
            # Two at once: what counts is that it is there.
            if exc.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise _named(broker, exc, f"creating {name}") from exc
    _wait_for(broker, [topic.name for topic in missing])


def _wait_for(broker: Broker, names: list[str]) -> None:
    """Return when every topic is to be seen: whoever runs next may ask another broker."""
    deadline = time.monotonic() + CREATE_S
    while time.monotonic() < deadline:
        broker.forget_metadata()
        if all(broker.partitions(name) for name in names):
            return
        time.sleep(SHOW_EVERY_S)


def _named(broker: Broker, exc: KafkaException, what: str) -> Stop:
    stop = broker.translated(exc.args[0], what)
    if stop.code is Exit.RIGHTS_MISSING:
        return Stop(stop.code, stop.problem, "let an admin run what `pipeline init --print` prints")
    return stop


def _grow(broker: Broker, topic: Topic) -> None:
    futures = broker.admin.create_partitions([NewPartitions(topic.name, topic.partitions)], request_timeout=CREATE_S)
    for future in futures.values():
        try:
            future.result()
        except KafkaException as exc:
            raise _named(broker, exc, f"adding partitions to {topic.name}") from exc


def _alter(broker: Broker, name: str, several: list[Difference]) -> None:
    entries = [ConfigEntry(one.setting, one.wanted, incremental_operation=AlterConfigOpType.SET) for one in several]
    resource = ConfigResource(ConfigResource.Type.TOPIC, name, incremental_configs=entries)
    for future in broker.admin.incremental_alter_configs([resource], request_timeout=CREATE_S).values():
        try:
            future.result()
        except KafkaException as exc:
            raise _named(broker, exc, f"setting {', '.join(one.setting for one in several)} of {name}") from exc


def _say(topic: Topic, left: list[Difference], *, created: bool) -> None:
    if created:
        copies = "1 copy" if topic.replication == 1 else f"{topic.replication} copies"
        click.echo(f"{topic.name}: created, {topic.partitions} partitions, {copies} of each")
        for name, value in topic.config.items():
            click.echo(f"    {name} = {value}")
    else:
        click.echo(f"{topic.name}: exists{'' if left else ', as it should be'}")
    for one in left:
        kind = "note" if one.harmless else "differs"
        click.secho(f"  {kind}: {one}  ({one.remedy})", fg="yellow", err=True)


def _claim(broker: Broker, app: str, *, take_over: bool) -> Mark | None:
    """Write down whose topics these are; return whose they were."""
    try:
        return ownership.claim(broker, app, take_over=take_over)
    except Stop as exc:
        if exc.code is not Exit.RIGHTS_MISSING:
            raise
        click.secho(f"note: whose topics these are was not written down: {exc.problem}", fg="yellow", err=True)
        return None
