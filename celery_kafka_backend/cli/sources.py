"""Where an audit reads: a view that keeps history, else the log itself. Both answer the same `Query`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from celery_kafka_backend import topics
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.context import chosen_views
from celery_kafka_backend.cli.exits import Exit, Stop, no_topic
from celery_kafka_backend.cli.once import once
from celery_kafka_backend.cli.output import duration
from celery_kafka_backend.cli.records import messages, spans
from celery_kafka_backend.errors import SettingsError, StoreError
from celery_kafka_backend.events import kept_ms
from celery_kafka_backend.order import SKEW_LIMIT_MS, system_wall_ms
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.contract import matching
from celery_kafka_backend.sinks.registry import keeps_history, open_view

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from celery_kafka_backend.changes import Logged
    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.query import Query
    from celery_kafka_backend.sinks.contract import View

CLOCKS_MS: Final = 60_000
"""Hosts' and brokers' clocks may differ by so much."""
AHEAD_MS: Final = SKEW_LIMIT_MS
"""An event may say a time so much later than Kafka's: a clock that is further ahead is believed by nobody."""
LATE_MS: Final = 3_600_000
"""An event may reach Kafka so much later than it happened: the producer's own patience, and an hour's outage with a spool."""
FEW: Final = 1_000_000
"""So many more records are read rather than left out: that takes some seconds."""


class Source(NamedTuple):
    """A place that has events.

    Attributes:
        name: What to call it, password masked.
        search: Yields the events that match, as `View.search` does.
    """

    name: str
    search: Callable[[Query], Iterator[Logged]]


@contextmanager
def audited(
    pipeline: Pipeline, chosen: str | None, timeout_s: float, *, only_log: bool, no_log: bool = False
) -> Iterator[Source]:
    """Open the view that was chosen, else the first that keeps history and can be read, else the log, unless ``no_log``.

    Raises:
        Stop: What was chosen is no view that keeps history, or both were chosen; Kafka does not answer.
    """
    if chosen and only_log:
        raise Stop(Exit.CONFIGURATION, "--view and --log contradict each other", "give one of them")
    urls = [] if only_log else chosen_views(pipeline.settings, (chosen,) if chosen else ())
    for url in urls:
        view = open_view(url, pipeline.options(url))
        try:
            if _usable(pipeline, url, view, must=bool(chosen)):
                yield Source(mask(url), _searching(pipeline, mask(url), view))
                return
        finally:
            view.close()
    if no_log:
        raise Stop(Exit.NOT_FOUND, "no view that can be read keeps history", "leave out --no-log")
    broker = Broker(pipeline.settings, timeout_s)
    try:
        yield Source(log_name(pipeline), lambda query: in_log(broker, query))
    finally:
        broker.close()


def _searching(pipeline: Pipeline, name: str, view: View) -> Callable[[Query], Iterator[Logged]]:
    """Return a view's search; where the log reaches further back than its history, and the question too, say so."""
    less = keeps_less(pipeline)

    def search(query: Query) -> Iterator[Logged]:
        if less and (query.since or 0) < system_wall_ms() - _history_ms(pipeline)[0]:
            click.secho(f"note: {name} {less}; --log reaches further", fg="yellow", err=True)
        return view.search(query)

    return search


def keeps_less(pipeline: Pipeline) -> str:
    """Return how long views keep history, in words, where that is shorter than the log; else ""."""
    views_ms, setting = _history_ms(pipeline)
    log_ms = pipeline.settings.retention_ms
    if not 0 < views_ms < log_ms:
        return ""
    return f"keeps history for {duration(views_ms / 1000)} ({setting}), the log for {duration(log_ms / 1000)}"


def _history_ms(pipeline: Pipeline) -> tuple[int, str]:
    """Return how long views keep history, in ms, 0: for ever; and which setting says so."""
    if (own_ms := pipeline.settings.history_retention_ms) is not None:
        return own_ms, "history_retention_ms"
    return kept_ms(pipeline.app.backend.expires), "result_expires"


def _usable(pipeline: Pipeline, url: str, view: View, *, must: bool) -> bool:
    if not keeps_history(url, pipeline.options(url)):
        if must:
            scheme = url.partition("://")[0]
            raise Stop(
                Exit.CONFIGURATION,
                f"{mask(url)} keeps no history",
                f"set kafka_backend_settings['history'] = {{'{scheme}': True}} and replay, name another view, or use --log",
            )
        return False
    try:
        if not must and not any(
            at.topic == topics.task_events(pipeline.settings.topic_prefix) for at in view.positions()
        ):
            click.secho(f"note: {mask(url)} has folded nothing yet", fg="yellow", err=True)
            return False
    except (StoreError, SettingsError) as exc:
        if must:
            raise
        click.secho(f"note: {mask(url)} cannot be read: {exc}", fg="yellow", err=True)
        return False
    return True


def in_log(broker: Broker, query: Query) -> Iterator[Logged]:
    """Yield the events of the log that match, each once: by Kafka's time index, then by reading all that was written then.

    Where much was written more than `LATE_MS` after ``query.until``, that is left out, and said.
    """
    topic = log_of(broker)
    since = None if query.since is None else query.since - AHEAD_MS
    parts = spans(broker, topic, since, None)
    if query.until is not None:
        then = spans(broker, topic, since, query.until + LATE_MS)
        left = sum(parts[at][1] - end for at, (_, end) in then.items())
        if left > FEW:
            parts = then
            note = f"note: {left} events that reached Kafka over {duration(LATE_MS / 1000)} after --until are not looked at"
            click.secho(f"{note}; a spool may have kept some for so long: leave --until out", fg="yellow", err=True)
    values = (value for message in messages(broker, parts, topic) if (value := message.value()) is not None)
    found = matching(values, query, by_time=False)
    return found if query.limit else once(found)


def log_name(pipeline: Pipeline) -> str:
    """Return what to call the log, password masked."""
    return f"the log at {mask(pipeline.settings.bootstrap_servers)}"


def log_of(broker: Broker) -> str:
    """Return the topic of the events.

    Raises:
        Stop: There is none.
    """
    topic = topics.task_events(broker.settings.topic_prefix)
    if not broker.partitions(topic):
        raise no_topic(topic)
    return topic
