"""What `pipeline doctor` looks at: one generator per subject, each yielding findings. Shown by `doctor`."""

from __future__ import annotations

import json
import platform
import shutil
import time
from importlib import metadata
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import uuid4

import confluent_kafka

from celery_kafka_backend import codec, topics
from celery_kafka_backend.claims import Claims
from celery_kafka_backend.cli import cutover, ownership, plan
from celery_kafka_backend.cli.dealing import Reading
from celery_kafka_backend.cli.exits import Exit, Stop, code_of
from celery_kafka_backend.cli.output import duration, size
from celery_kafka_backend.cli.records import last_records
from celery_kafka_backend.cli.run import check_rights, check_topics, check_view
from celery_kafka_backend.errors import CodecError, PipelineError, SpoolError
from celery_kafka_backend.letters import OPEN
from celery_kafka_backend.ownership import foreign
from celery_kafka_backend.producer.spool import spool_for
from celery_kafka_backend.settings import SETTING, mask
from celery_kafka_backend.sinks.registry import open_view
from celery_kafka_backend.topics import view_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from confluent_kafka import Message

    from celery_kafka_backend.cli.broker import Broker
    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.settings import Settings

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"
SKIP: Final = "skip"

AHEAD_S: Final = 1.0
"""An event cannot be written to the log before it happened; beyond this its host's clock is ahead."""
BEHIND_S: Final = 30.0
"""An event that reached the log so late is rather from a clock that is behind, unless Kafka was away."""
CLAIM_S: Final = 10.0
UNDRAINED_S: Final = 60.0
"""A worker drains within a second or two of Kafka's return; a result that is older shows that something is amiss."""
SAMPLE_ROWS: Final = 2000

_PACKAGES: Final = ("celery", "kombu", "confluent-kafka", "msgspec", "redis", "rich")


class Finding(NamedTuple):
    """One line.

    Attributes:
        level: ``ok``, ``warn``, ``fail`` or ``skip``.
        subject: What was looked at.
        text: What was found.
        remedy: What to do.
        code: How doctor is to exit, for a failure.
    """

    level: str
    subject: str
    text: str
    remedy: str = ""
    code: Exit = Exit.OK


def failure(subject: str, error: PipelineError) -> Finding:
    """Return the finding for an error."""
    if isinstance(error, Stop):
        return Finding(FAIL, subject, error.problem, error.remedy, error.code)
    return Finding(FAIL, subject, str(error), "", code_of(error))


def examine(pipeline: Pipeline, broker: Broker, role: str) -> Iterator[Finding]:
    """Look at everything, with the eyes of a role; what Kafka is needed for is skipped if it does not answer."""
    yield from versions()
    yield from delivery(pipeline)
    reached = False
    for finding in _caught("kafka", lambda: kafka(broker)):
        reached = finding.level != FAIL
        yield finding
    with_kafka = (
        ("topics", lambda: topic_settings(pipeline, broker)),
        ("sizes", lambda: sizes(broker)),
        ("rights", lambda: rights(broker, role)),
        ("app", lambda: owner(pipeline, broker)),
        ("clocks", lambda: clocks(broker)),
        ("dead letters", lambda: dead_letters(broker)),
        ("processors", lambda: processors(pipeline, broker)),
    )
    for subject, check in with_kafka:
        if reached:
            yield from _caught(subject, check)
        else:
            yield Finding(SKIP, subject, "Kafka does not answer")
    if pipeline.settings.spool:
        yield from _caught("spool", lambda: spool(pipeline.settings))
    if pipeline.settings.claim_check:
        yield from _caught("claim check", lambda: claim_check(pipeline.settings))
    if len(pipeline.settings.views) > 1:
        yield from _caught("readers", lambda: readers(pipeline))
    for url in pipeline.settings.views:
        yield from _caught(f"view {view_name(url)}", lambda url=url: view(pipeline, url))


def _caught(subject: str, check: Any) -> Iterator[Finding]:
    try:
        yield from check()
    except PipelineError as exc:
        yield failure(subject, exc)


def versions() -> Iterator[Finding]:
    """Name what is installed."""
    found = [f"Python {platform.python_version()}", f"librdkafka {confluent_kafka.libversion()[0]}"]
    missing = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    text = ", ".join(found) + (f"; not installed: {', '.join(missing)}" if missing else "")
    yield Finding(OK, "versions", text)


def delivery(pipeline: Pipeline) -> Iterator[Finding]:
    """Look for settings that do not go well together."""
    settings, conf = pipeline.settings, pipeline.app.conf
    late = sorted(name for name, task in pipeline.app.tasks.items() if getattr(task, "acks_late", False))
    where = f"{SETTING}['delivery'] = {settings.delivery!r}"
    if settings.delivery != "acknowledged" and (conf.task_acks_late or late):
        which = "task_acks_late" if conf.task_acks_late else f"acks_late of {', '.join(late[:3])}"
        yield Finding(
            WARN,
            "delivery",
            f"{where} with {which}: the message is acknowledged to the broker before the result is in Kafka",
            "set it to 'acknowledged'",
        )
    elif settings.delivery == "buffered":
        yield Finding(WARN, "delivery", f"{where}: what a killed worker had queued is lost", "'acknowledged' is safe")
    else:
        yield Finding(OK, "delivery", where)
    expires = conf.result_expires
    seconds = getattr(expires, "total_seconds", lambda: expires or 0)()
    if not seconds or seconds * 1000 > settings.retention_ms:
        yield Finding(
            WARN,
            "retention",
            f"results stay {duration(seconds) if seconds else 'for ever'}, events {duration(settings.retention_ms / 1000)}:"
            " a view that is rebuilt lacks the older results",
            f"raise {SETTING}['retention_ms'], or lower result_expires",
        )
    else:
        kept = duration(settings.retention_ms / 1000)
        yield Finding(OK, "retention", f"results {duration(seconds)}, events {kept}")
    kept_ms = settings.history_retention_ms
    if kept_ms is not None and not 0 < kept_ms <= settings.retention_ms:
        yield Finding(
            WARN,
            "retention",
            f"history stays {duration(kept_ms / 1000) if kept_ms else 'for ever'}, events {duration(settings.retention_ms / 1000)}:"
            " a view that is rebuilt lacks the older history",
            f"raise {SETTING}['retention_ms'], or keep a copy of the view, or of `pipeline export`",
        )


def kafka(broker: Broker) -> Iterator[Finding]:
    """Look whether Kafka answers, and what it is."""
    begun = time.monotonic()
    found = broker.metadata
    took = duration(time.monotonic() - begun)
    brokers = len(found.brokers)
    where = (
        f"{mask(broker.settings.bootstrap_servers)}: cluster {found.cluster_id}, {brokers} brokers, answered in {took}"
    )
    if broker.embedded:
        yield Finding(WARN, "kafka", f"{where}; librdkafka's embedded broker keeps nothing", "for a try-out only")
    elif brokers < broker.settings.replication_factor:
        yield Finding(
            WARN,
            "kafka",
            f"{where}, fewer than {SETTING}['replication_factor'] = {broker.settings.replication_factor}",
            "have as many brokers; for a try-out set 'replication_factor': 1, 'min_insync_replicas': 1",
        )
    else:
        yield Finding(OK, "kafka", where)


def topic_settings(pipeline: Pipeline, broker: Broker) -> Iterator[Finding]:
    """Compare topics with what they should be."""
    check_topics(broker, pipeline)
    wanted = topics.wanted(pipeline.settings)
    if broker.embedded:
        yield Finding(SKIP, "topics", "they appear by themselves, and this broker does not tell their settings")
        return
    differences = plan.differences(wanted, broker.found([topic.name for topic in wanted]))
    for one in differences:
        if one.harmless:
            yield Finding(WARN, "topics", str(one), one.remedy)
        else:
            yield Finding(FAIL, "topics", str(one), one.remedy, Exit.TOPICS_WRONG)
    if not differences:
        yield Finding(OK, "topics", ", ".join(f"{topic.name} ({topic.partitions})" for topic in wanted))


def sizes(broker: Broker) -> Iterator[Finding]:
    """Compare the brokers' limits with the largest event; a dead letter, a little larger, replicas fetch all the same."""
    largest = broker.settings.max_message_bytes
    known = broker.limits()
    if known is None:
        yield Finding(SKIP, "sizes", "the brokers' limits cannot be read (DescribeConfigs on the cluster)")
        return
    odd = plan.too_small(known, largest)
    for number, name, value in odd:
        text = f"broker {number}: {name} = {value}, less than a record of {largest} bytes"
        remedy = f"raise it there, or lower {SETTING}['max_message_bytes'] = {broker.settings.max_message_bytes}"
        if name in plan.FATAL_LIMITS:
            yield Finding(FAIL, "sizes", text, remedy, Exit.TOPICS_WRONG)
        else:
            yield Finding(WARN, "sizes", f"{text}: replicas fetch one at a time", remedy)
    if not odd:
        yield Finding(OK, "sizes", f"records up to {largest} bytes fit the brokers' limits")


def rights(broker: Broker, role: str) -> Iterator[Finding]:
    """Ask Kafka what we may do."""
    if broker.operations([topics.task_events(broker.settings.topic_prefix)]) is None:
        yield Finding(SKIP, "rights", "this broker cannot tell")
        return
    check_rights(broker, role, insight=broker.settings.insight)
    article = "an" if role == "operator" else "a"
    yield Finding(OK, "rights", f"these credentials may do what {article} {role} does")


def owner(pipeline: Pipeline, broker: Broker) -> Iterator[Finding]:
    """Look whose topics these are."""
    app = str(pipeline.app.main or "")
    found = ownership.owner(broker)
    if found is not None and found.app != app:
        raise foreign(pipeline.settings, found, app)
    latest = ownership.latest_worker(broker)
    if latest is not None and latest.app != app:
        yield Finding(
            WARN, "app", f"the latest events are from workers of the app {latest.app!r}", "give it its own topic_prefix"
        )
    else:
        yield Finding(OK, "app", f"{app!r}" if found else f"{app!r}; nobody has claimed the topics yet")


def clocks(broker: Broker) -> Iterator[Finding]:
    """Compare hosts' clocks with the broker's, by when their last events reached the log."""
    latest: dict[str, float] = {}
    for message in last_records(broker, topics.task_events(broker.settings.topic_prefix), 20):
        kind, appended = message.timestamp()
        late = _late_s(message, appended)
        if kind == confluent_kafka.TIMESTAMP_LOG_APPEND_TIME and late is not None:
            host, seconds = late
            # The fastest tells most about the clock; the others waited.
            latest[host] = min(seconds, latest.get(host, seconds))
    if not latest:
        yield Finding(SKIP, "clocks", "unknown: no events yet, or the broker does not stamp them itself")
        return
    odd = {host: s for host, s in latest.items() if s < -AHEAD_S or s > BEHIND_S}
    for host, seconds in sorted(odd.items()):
        way = "ahead of" if seconds < 0 else "behind"
        yield Finding(
            WARN,
            "clocks",
            f"{host}: {duration(abs(seconds))} {way} the broker (or its events were late)",
            "run NTP there",
        )
    if not odd:
        yield Finding(OK, "clocks", f"{len(latest)} hosts agree with the broker: {', '.join(sorted(latest)[:5])}")


def _late_s(message: Message, appended: int) -> tuple[str, float] | None:
    try:
        event = codec.decode(message.value())
    except CodecError:
        return None
    return event.host, (appended - event.at) / 1000


def dead_letters(broker: Broker) -> Iterator[Finding]:
    """Count what could not be folded, and nobody has dealt with."""
    reading = Reading(broker)
    reading.go_on()
    left = [case.letters[-1] for case in reading.cases if case.state == OPEN]
    if not left:
        yield Finding(OK, "dead letters", "none is open")
        return
    last = max(left, key=lambda letter: letter.at)
    problem = f"{len(left)} open in {reading.topic}, the last: {last.reason[:200]}"
    yield Finding(WARN, "dead letters", problem, "`celery -A proj pipeline dead-letters list`")


def processors(pipeline: Pipeline, broker: Broker) -> Iterator[Finding]:
    """Look whether anybody folds."""
    chords = () if pipeline.shadows else ("chords",)  # a shadow's are the other backend's
    for name in (*map(view_name, pipeline.settings.views), *chords):
        members = broker.members(topics.group_id(broker.settings.topic_prefix, name))
        if members is None:
            yield Finding(SKIP, "processors", "this broker cannot tell who folds")
            return
        if members:
            yield Finding(OK, "processors", f"{name}: {len(members)} consumers")
        else:
            yield Finding(WARN, "processors", f"{name}: nobody", f"start `{pipeline.command} run`")


def spool(settings: Settings) -> Iterator[Finding]:
    """Look at this host's spool: can it be written, is there room, and what was not drained. Drains nothing."""
    place = spool_for(settings)
    by_hand = "`celery -A proj pipeline spool status` and `… spool drain`, on this host"
    try:
        place.check()
    except SpoolError as exc:
        remedy = f"{SETTING}['spool']: name a folder that workers may write"
        yield Finding(FAIL, "spool", str(exc), remedy, Exit.CONFIGURATION)
        return
    state = place.state()
    free = shutil.disk_usage(place.path.parent).free
    age_s = time.time() - state.oldest_ms / 1000 if state.oldest_ms else 0.0
    if age_s > UNDRAINED_S:
        text = f"{state.records} results and parts wait in {place.path}, the oldest for {duration(age_s)}"
        yield Finding(WARN, "spool", text, f"Kafka does not take them, or no worker runs here: {by_hand}")
    if state.aside or state.files:
        text = f"{sum(state.aside.values())} records set aside and {len(state.files)} damaged files beside {place.path}"
        yield Finding(WARN, "spool", text, by_hand)
    if state.size + free < state.limit:
        text = f"{size(free)} free on the disk, and {place.path} may grow to {size(state.limit)}"
        yield Finding(WARN, "spool", text, f"make room, or lower {SETTING}['spool_max_bytes']")
    text = f"{place.path} can be written: {state.records} records, {size(state.size)} of {size(state.limit)}"
    yield Finding(OK, "spool", text)


def claim_check(settings: Settings) -> Iterator[Finding]:
    """Store, read and remove an object."""
    claims = Claims(settings)
    claim = claims.put(uuid4().hex, b"pipeline doctor", 0, CLAIM_S)
    claims.get(claim, CLAIM_S)
    claims.remove(claim.path)
    yield Finding(OK, "claim check", f"{claims.url} can be written and read")


def readers(pipeline: Pipeline) -> Iterator[Finding]:
    """Look which view readers of ours are to read, and whether all views say the same."""
    names = {view_name(url): url for url in pipeline.settings.views}
    found = cutover.standing(pipeline.settings, {name: cutover.held(pipeline, url) for name, url in names.items()})
    text = f"read {cutover.said(found)}"
    if found.view not in names:
        remedy = f"add it to {SETTING}['views'], or `{pipeline.command} cutover --to` another one"
        yield Finding(WARN, "readers", f"{text}, which is not configured here", remedy)
    elif found.outdated:
        remedy = f"`{pipeline.command} cutover --to {found.view}`"
        yield Finding(WARN, "readers", f"{text}; {', '.join(found.outdated)} does not say so", remedy)
    else:
        yield Finding(OK, "readers", text)


def view(pipeline: Pipeline, url: str) -> Iterator[Finding]:
    """Open a view, ask its store what endangers it, and read one document as a stock client would."""
    subject = f"view {view_name(url)}"
    warnings = check_view(pipeline, url)
    for warning in warnings:
        yield Finding(WARN, subject, warning)
    text = f"{mask(url)} opens"
    if pipeline.app.conf.result_serializer == "json" and not pipeline.app.conf.get("result_compression"):
        reader = open_view(url, pipeline.options(url))
        try:
            documents = (row for row in islice(reader.rows(), SAMPLE_ROWS) if row.table == "document")
            sample = next(documents, None)
        finally:
            reader.close()
        if sample is not None:
            text += ", and a stock client can read it" if _is_stock(sample.columns["document"]) else ""
            if not _is_stock(sample.columns["document"]):
                yield Finding(
                    FAIL, subject, f"{mask(url)}: the document of {sample.key} is not one of Celery's", "replay into it",
                    Exit.VIEW_UNUSABLE,
                )  # fmt: skip
                return
    if not warnings:
        yield Finding(OK, subject, text)


def _is_stock(document: Any) -> bool:
    try:
        found = json.loads(document)
    except (TypeError, ValueError):
        return False
    return isinstance(found, dict) and {"status", "result", "task_id"} <= found.keys()
