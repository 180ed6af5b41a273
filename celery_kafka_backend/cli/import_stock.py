"""``pipeline import``: what Celery's own backend has stored becomes part of the log."""

from __future__ import annotations

import time
from collections import deque
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from celery_kafka_backend.changes import history_expiry
from celery_kafka_backend.claims import stub
from celery_kafka_backend.cli.actor import who
from celery_kafka_backend.cli.arrivals import Arriving, event_of
from celery_kafka_backend.cli.bookmark import Bookmark, Shelf
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import chosen_view, pipeline_of
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.output import print_json, watched, when
from celery_kafka_backend.cli.run import check_topics
from celery_kafka_backend.errors import PublishError, TooLarge, Unreadable
from celery_kafka_backend.events import Imported, kept_ms
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.pace import Pace
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.registry import open_view
from celery_kafka_backend.topics import view_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery_kafka_backend.cli.context import Pipeline
    from celery_kafka_backend.events import Event
    from celery_kafka_backend.producer.publisher import Delivery
    from celery_kafka_backend.sinks.contract import Page, Stock

AHEAD: Final = 5
"""Pages that may wait for Kafka's answer while the next ones are read."""
MARK_S: Final = 1.0
"""How often it is noted how far the import is."""
NAMED: Final = 20
"""Broken documents that are named on the terminal; --json has 1,000."""
KEPT: Final = 1_000


class Tally(msgspec.Struct):
    """What became of the documents of a store.

    Attributes:
        tasks: Results and states appended.
        groups: Saved groups appended.
        ours: Left out: this backend wrote them.
        expired: Left out: their time is over, in results and in history.
        broken: Left out: nobody can read them, or Kafka would not take them.
        problems: Which those are, and why; the first 1,000.
    """

    tasks: int = 0
    groups: int = 0
    ours: int = 0
    expired: int = 0
    broken: int = 0
    problems: list[str] = []

    def refuse(self, found: Stock, why: str) -> None:
        """Count a broken document."""
        self.broken += 1
        if len(self.problems) < KEPT:
            self.problems.append(f"{found.subject} {found.id}: {why}")

    @property
    def read(self) -> int:
        """How many documents were looked at."""
        return self.tasks + self.groups + self.ours + self.expired + self.broken


@click.command("import", cls=Command, short_help="Take over what Celery's own backend has stored.")
@click.option(
    "--from", "source", required=True, metavar="STORE",
    help="Celery's own result backend: redis://…, mongodb://…; or scheme or name of a configured view.",
)  # fmt: skip
@click.option("--actor", default="", help="Who asks. Default: user@host.")
@click.option("--again", is_flag=True, help="From the start, also where an import was interrupted.")
@click.option("--rate", type=click.FloatRange(min=0.1), metavar="N", help="At most so many documents per second.")
@click.option("--dry-run", is_flag=True, help="Read everything, append nothing; say what would be done.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=30.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(
    ctx: click.Context,
    source: str,
    actor: str,
    again: bool,
    rate: float | None,
    dry_run: bool,
    as_json: bool,
    timeout: float,
) -> Exit:
    r"""Append the results and groups that Celery's own backend has stored to the log, marked as imported.

    Every view then shows them, with the expiry that they had, and `history`, `search` and `verify` know them. Nothing that
    happened on this log ever gives way to an imported result, and to import the same again changes nothing. The store is
    only read; what this backend wrote there is left out. Killed, it goes on where it was.

    Settings of that backend (global_keyprefix, mongodb_backend_settings, …) are taken from the app. Exits with 13 if
    documents were left out because they are broken or too large.

    \b
    Examples:
      celery -A proj pipeline import --from redis://host/1 --dry-run
      celery -A proj pipeline import --from redis://host/1 --rate 5000
      celery -A proj pipeline import --from mongodb://host/celery --json
    """
    pipeline = pipeline_of(ctx)
    url = chosen_view(pipeline.settings, source, "--from")
    with closing(Broker(pipeline.settings, timeout)) as broker:
        check_topics(broker, pipeline)
        shelf = Shelf(broker, view_name(url))
        mark = shelf.take()
        if mark is None:
            mark = Bookmark(system_wall_ms(), actor or who())
        elif mark.after and not again:
            click.echo(
                f"going on with the import that {mark.by} began at {when(mark.at)} (--again: from the start)", err=True
            )
        if again or dry_run:
            mark = msgspec.structs.replace(mark, after="")
        with closing(open_view(url, pipeline.options(url))) as view:
            importing = Importing(pipeline, mask(url), mark, None if dry_run else shelf, timeout)
            pages = importing.run(view.stock(mark.after), Pace(rate))
            try:
                watched(pages, "importing", quiet=as_json)
            except PublishError as exc:
                problem = f"after {importing.tally.read} documents: {exc}"
                raise Stop(Exit.KAFKA_UNREACHABLE, problem, "the same command goes on where this one stopped") from exc
    return _tell(importing.tally, mask(url), dry_run=dry_run, as_json=as_json)


class Importing:
    """An import at work.

    Args:
        pipeline: Where to.
        source: Where from, password masked.
        mark: How far it is.
        shelf: Where that is noted; None: nothing is appended.
        timeout_s: Bound on each wait for Kafka.
    """

    def __init__(self, pipeline: Pipeline, source: str, mark: Bookmark, shelf: Shelf | None, timeout_s: float) -> None:
        self.tally = Tally()
        self._backend: Any = pipeline.app.backend
        self._recorder = self._backend.recorder
        self._settings = pipeline.settings
        self._mark = mark
        self._shelf = shelf
        self._timeout_s = timeout_s
        redact = self._recorder.redacted if pipeline.settings.redact else None
        self._how = Arriving(Imported(source, mark.at, mark.by), kept_ms(self._backend.expires), redact)
        self._sent: deque[tuple[list[Delivery], str]] = deque()

    def run(self, pages: Iterator[Page], pace: Pace) -> Iterator[int]:
        """Append all; yield how many documents were looked at, as it goes."""
        noted_at = time.monotonic()
        if self._shelf is not None:
            self._shelf.put(self._mark)  # its time is in the events: it has to be the same after a kill
        for page in pages:
            pace.take(len(page.found))
            self._sent.append(([sent for found in page.found for sent in self._take(found)], page.after))
            if len(self._sent) > AHEAD:
                self._settle()
                if time.monotonic() > noted_at + MARK_S:
                    self._note()
                    noted_at = time.monotonic()
            yield len(page.found)
        while self._sent:
            self._settle()
        self._note()

    def _take(self, found: Stock) -> Iterator[Delivery]:
        """Append a document, if it is to be; yield its delivery."""
        try:
            event = event_of(found, self._how)
            if event is None:
                self.tally.ours += 1
                return
            if self._over(event):
                self.tally.expired += 1
                return
            record = self._recorder.record(event if self._shelf is None else self._claimed(event))
        except (Unreadable, TooLarge) as exc:
            self.tally.refuse(found, str(exc))
            return
        if event.group == event.task:
            self.tally.groups += 1
        else:
            self.tally.tasks += 1
        if self._shelf is not None:
            yield self._recorder.publisher.publish(record, wait_s=self._timeout_s)

    def _over(self, event: Event) -> bool:
        """Whether no view would show anything of an event, nor keep it in its history."""
        now_ms, kept_ms = system_wall_ms(), self._settings.history_retention_ms
        return all(0 < ends <= now_ms for ends in (event.expires_at or 0, history_expiry(event, kept_ms)))

    def _claimed(self, event: Event) -> Event:
        """Return the event with its document in the object store, if that is large and there is one."""
        document = event.document or b""
        if not self._settings.claim_check or len(document) <= self._settings.claim_check_bytes:
            return event
        now = system_wall_ms()
        until = event.expires_at and max(event.expires_at, now + self._settings.retention_ms)
        claim = self._backend.claims.put(event.id, document, until, self._timeout_s)
        return msgspec.structs.replace(event, doc=msgspec.Raw(stub(event, claim, [])), opaque=None, claim=claim)

    def _settle(self) -> None:
        """Wait until the oldest page is in Kafka."""
        deliveries, after = self._sent.popleft()
        for delivery in deliveries:
            delivery.wait(self._timeout_s)
        self._mark = msgspec.structs.replace(self._mark, after=after)

    def _note(self) -> None:
        if self._shelf is not None:
            self._shelf.put(self._mark)


def _tell(tally: Tally, source: str, *, dry_run: bool, as_json: bool) -> Exit:
    if as_json:
        print_json({"from": source, "dry_run": dry_run, **msgspec.structs.asdict(tally)})
    else:
        done = "would be imported" if dry_run else "imported"
        click.echo(
            f"{source}: {tally.tasks} results and {tally.groups} groups {done}; left out: {tally.ours} ours, "
            f"{tally.expired} expired, {tally.broken} broken"
        )
        for problem in tally.problems[:NAMED]:
            click.echo(f"broken: {problem}", err=True)
        if tally.broken > NAMED:
            click.echo(f"… and {tally.broken - NAMED} more broken (--json)", err=True)
    return Exit.NOT_DONE if tally.broken else Exit.OK
