"""``pipeline shadow``: does our view show what the app's own result backend has stored."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import msgspec
from celery import states
from celery.backends.base import KeyValueStoreBackend
from kombu.utils.encoding import bytes_to_str, ensure_bytes

from celery_kafka_backend import topics
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import chosen_view, pipeline_of
from celery_kafka_backend.cli.cutover import catch_up
from celery_kafka_backend.cli.exits import Exit, Stop, no_topic
from celery_kafka_backend.cli.output import console, print_json, short
from celery_kafka_backend.cli.records import firsts, spans
from celery_kafka_backend.configure import SHADOW
from celery_kafka_backend.documents import moment
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import open_view

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.sinks.contract import View

CHUNK: Final = 1_000
ROUNDS: Final = 3
"""How often tasks that differ are looked at again: what still moves then is in flight, not different."""
PAUSE_S: Final = 1.0
DONE_AT: Final = "date_done"

Meta = dict[str, Any]
"""A document's fields, as Celery names them."""


class Difference(msgspec.Struct):
    """A task that the two show differently.

    Attributes:
        task: Its id.
        fields: Which of the document's fields differ; empty if one of the two has no such task.
        theirs: These fields in the app's own backend; None if it has no such task.
        ours: … in our view.
    """

    task: str
    fields: list[str]
    theirs: Meta | None
    ours: Meta | None

    @property
    def unready(self) -> bool:
        """Whether the task has not ended, as far as either knows."""
        metas = [meta for meta in (self.theirs, self.ours) if meta is not None]
        return self.theirs is not None and all(meta[DONE_AT] is None for meta in metas)


class Found(msgspec.Struct):
    """The result.

    Attributes:
        same: Tasks that both show alike.
        different: … differently, or only one of them does.
        earlier: Tasks that only their backend has, because they ended before the shadow's first event.
        in_flight: Tasks that have not ended, or changed while they were compared.
        listed: Whether their backend could be asked which tasks it has; else only those of our view were compared.
        differences: The first of those that differ.
    """

    same: int = 0
    different: int = 0
    earlier: int = 0
    in_flight: int = 0
    listed: bool = True
    differences: list[Difference] = []


def differing(theirs: Meta | None, ours: Meta | None, tolerance_s: float) -> list[str] | None:
    """Return the fields in which two documents differ, [] if one is missing, None if they say the same.

    Each of the two takes the time by itself: `date_done` may differ by ``tolerance_s``.
    """
    if theirs is None or ours is None:
        return None if theirs is ours else []
    fields = [
        name
        for name in sorted({*theirs, *ours} - {DONE_AT})
        if (theirs.get(name) or None) != (ours.get(name) or None) and theirs.get(name) != ours.get(name)
    ]
    at, other = moment(theirs.get(DONE_AT)), moment(ours.get(DONE_AT))
    if (at is None) != (other is None) or (at and other and abs(at - other) > tolerance_s * 1000):
        fields.append(DONE_AT)
    return fields or None


class Comparing(NamedTuple):
    """The two sides.

    Attributes:
        theirs: Reads documents from the app's own backend.
        ours: … from our view.
        tolerance_s: How far apart their times may be.
        began: When the shadow began, ms since 1970: what ended before is only theirs.
    """

    theirs: Callable[[list[str]], dict[str, Meta]]
    ours: Callable[[list[str]], dict[str, Meta]]
    tolerance_s: float
    began: int

    def look(self, ids: Iterable[str], found: Found) -> dict[str, Difference]:
        """Compare tasks, and return those that differ."""
        differ: dict[str, Difference] = {}
        for chunk in _chunks(ids):
            # Ours last: it is the one that lags.
            theirs = self.theirs(chunk)
            ours = self.ours(chunk)
            for task_id in chunk:
                a, b = theirs.get(task_id), ours.get(task_id)
                fields = differing(a, b, self.tolerance_s)
                if fields is None:
                    found.same += a is not None
                elif b is None and a is not None and (ended := moment(a.get(DONE_AT))) and ended < self.began:
                    found.earlier += 1
                else:
                    differ[task_id] = Difference(task_id, fields, _only(a, fields), _only(b, fields))
        return differ


def _only(meta: Meta | None, fields: list[str]) -> Meta | None:
    return None if meta is None else {name: meta.get(name) for name in dict.fromkeys((*fields, "status", DONE_AT))}


def _chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    every = list(ids)
    for start in range(0, len(every), CHUNK):
        yield every[start : start + CHUNK]


def compare(
    sides: Comparing, ids: Iterable[str], limit: int, *, listed: bool, settled: Callable[[], None] = lambda: None
) -> Found:
    """Compare tasks; those that differ again, when the view has caught up, for it is always a moment behind.

    Args:
        sides: The two.
        ids: The tasks that either has.
        limit: How many differences to describe; all are counted.
        listed: As `Found` has it.
        settled: Waits until our view shows all that the log holds by then.
    """
    found = Found(listed=listed)
    before, lasting = sides.look(ids, found), {}
    for _ in range(ROUNDS):
        if not before:
            break
        time.sleep(PAUSE_S)  # what workers have just stored is on its way to Kafka
        settled()
        now = sides.look(before, found)
        lasting = {one: said for one, said in now.items() if said == before[one]}
        if len(lasting) == len(now):
            break
        before = now
    else:
        found.in_flight += len(now) - len(lasting)
    unready = [one for one, said in lasting.items() if said.unready]
    found.in_flight += len(unready)
    differ = [lasting[one] for one in sorted(lasting.keys() - unready)]
    found.different = len(differ)
    found.differences = differ[:limit]
    return found


# -- the app's own backend ---------------------------------------------------------------------


def their_ids(backend: Any) -> list[str] | None:
    """Return the tasks that a backend has, None if it cannot be asked."""
    prefix = getattr(backend, "task_keyprefix", None)
    if prefix and hasattr(getattr(backend, "client", None), "scan_iter"):  # Redis
        start = ensure_bytes(prefix)
        return [
            bytes_to_str(key)[len(bytes_to_str(start)) :]
            for key in backend.client.scan_iter(match=start + b"*", count=CHUNK)
        ]
    if hasattr(backend, "collection"):  # MongoDB
        return [str(one["_id"]) for one in backend.collection.find({}, {"_id": 1})]
    if hasattr(backend, "ResultSession"):  # SQL
        with backend.ResultSession() as session:
            return [str(one) for (one,) in session.query(backend.task_cls.task_id)]
    return None


def read_theirs(backend: Any) -> Callable[[list[str]], dict[str, Meta]]:
    """Return what reads documents from a backend."""

    def by_keys(ids: list[str]) -> dict[str, Meta]:
        values = backend.mget([backend.get_key_for_task(one) for one in ids])
        return {one: backend.decode_result(value) for one, value in zip(ids, values, strict=True) if value}

    def one_by_one(ids: list[str]) -> dict[str, Meta]:
        metas = {one: backend._get_task_meta_for(one) for one in ids}  # noqa: SLF001 - past the cache
        return {one: _plain(meta) for one, meta in metas.items() if meta["status"] != states.PENDING}

    return by_keys if _by_keys(backend) else one_by_one


def _by_keys(backend: Any) -> bool:
    """Whether a backend stores whole documents under keys, as Redis' does: all their fields can be compared."""
    return isinstance(backend, KeyValueStoreBackend)


def _plain(meta: Meta) -> Meta:
    """Return what every backend tells of a task, comparable."""
    found = {name: meta.get(name) for name in ("status", "result", "traceback", DONE_AT)}
    if isinstance(found["result"], BaseException):
        found["result"] = repr(found["result"])
    return found


@click.command("shadow", cls=Command, short_help="Compare a shadow with the result backend beside it.")
@click.option("--view", "chosen", metavar="VIEW", help="Our view: URL, scheme or name. Default: the first one.")
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=2.0, help="Seconds by which the two may say that a task ended."
)
@click.option(
    "--lag",
    type=click.FloatRange(min=0.01),
    default=10.0,
    help="Seconds that the view may take to show what the log holds.",
)
@click.option("--limit", type=click.IntRange(0), default=20, help="Differences to describe; all are counted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=5.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context, chosen: str | None, tolerance: float, lag: float, limit: int, as_json: bool, timeout: float
) -> Exit:
    r"""Compare, task by task, what the app's result backend has stored with what our view shows.

    For an app in shadow mode (kafka_shadow): every field of every document but the time when it ended, which may differ
    by --tolerance. What differs is looked at again once the view has caught up: tasks in flight are not differences.
    Exits with 10 if there are any, with 13 if the view lags more than --lag. Reads only.

    \b
    Examples:
      celery -A proj pipeline shadow
      celery -A proj pipeline shadow --json | jq .different
    """
    pipeline = pipeline_of(ctx)
    if not pipeline.shadows:
        remedy = f"set {SHADOW} = 'kafka://…?view=…' beside it (docs/shadow.md)"
        raise Stop(Exit.CONFIGURATION, "this app has no shadow: its result_backend is all it writes", remedy)
    url = chosen_view(pipeline.settings, chosen) if chosen else pipeline.settings.views[0]
    backend = pipeline.app.backend
    broker, view = Broker(pipeline.settings, timeout), open_view(url, pipeline.options(url))
    try:
        began, settled = _began(broker), partial(_settle, pipeline, broker, view, lag)
        settled()
        listed = their_ids(backend)
        ids = dict.fromkeys([*(listed or ()), *(row.key for row in view.rows() if row.table == "document")])
        sides = Comparing(read_theirs(backend), partial(_ours, backend, view), tolerance, began)
        found = compare(sides, ids, limit, listed=listed is not None, settled=settled)
    finally:
        view.close()
        broker.close()
    if as_json:
        print_json(msgspec.to_builtins(found, enc_hook=str))
    else:
        show(found, backend.as_uri(), mask(url))
    return Exit.DIFFERENT if found.different else Exit.OK


def _ours(backend: Any, view: View, ids: list[str]) -> dict[str, Meta]:
    decode = (
        backend.decode_result
        if _by_keys(backend)
        else lambda one: _plain(backend.meta_from_decoded(backend.decode(one)))
    )
    return {one: decode(document) for one, document in view.documents(ids).items()}


def _began(broker: Broker) -> int:
    """Return when the oldest event was written that the log still has, ms since 1970."""
    log = topics.task_events(broker.settings.topic_prefix)
    parts = spans(broker, log, None, None)
    if not parts:
        raise no_topic(log)
    first = firsts(broker, parts)
    return min((one.timestamp()[1] for one in first.values()), default=system_wall_ms())


def _settle(pipeline: Pipeline, broker: Broker, view: View, lag_s: float) -> None:
    """Wait until the view shows all that the log holds now.

    Raises:
        Stop: It did not in time.
    """
    behind, _ = catch_up(broker, view, lag_s)
    if behind:
        problem = f"{view.url} lags: after {lag_s:g} s it is {behind} events behind what the log held"
        raise Stop(Exit.NOT_DONE, problem, f"`{pipeline.command} run`, or a longer --lag")


def show(found: Found, theirs: str, ours: str) -> None:
    """Draw it."""
    screen = console()
    screen.print(f"theirs: {theirs}\nours:   {ours}")
    screen.print(f"{found.same} tasks are the same.")
    if found.in_flight:
        screen.print(f"{found.in_flight} have not ended, or changed meanwhile.")
    if found.earlier:
        screen.print(f"{found.earlier} ended before the shadow began.")
    if not found.listed:
        screen.print(
            "Their backend cannot be asked which tasks it has: what only it has was not looked for.", style="yellow"
        )
    for one in found.differences:
        screen.print(one.task, style="bold")
        if one.theirs is None or one.ours is None:
            screen.print(f"  only {'ours' if one.theirs is None else 'theirs'}: {one.ours or one.theirs}")
            continue
        for name in one.fields:
            screen.print(
                f"  {name}: {short(repr(one.theirs.get(name)), 120)}  |  {short(repr(one.ours.get(name)), 120)}"
            )
    screen.print(
        f"{found.different} differ." if found.different else "No difference.",
        style="red" if found.different else "green",
    )
