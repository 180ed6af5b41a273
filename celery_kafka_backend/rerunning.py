"""Which tasks are to be run again, and by which message. Pure.

Never to be confused with a replay, which runs nothing. A rerun is an event, `events.RERUN`, with who asked and why, and
names the run; then the message is sent, and that is said as ever, by ``sent``. So a rerun without ``sent`` is one whose
operator was stopped: nobody knows whether the message left. It is sent again, as the same run: at least once.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from celery_kafka_backend import events, order, timeline
from celery_kafka_backend.errors import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from celery_kafka_backend.events import Event, Parcel
    from celery_kafka_backend.query import Query

SETTING: Final = "kafka_backend_settings['record_messages']"


class Candidate(NamedTuple):
    """A task that is to be run again.

    Attributes:
        task: Its id.
        said: What is known of it: the event that was asked for.
        sent: The event with the message that is sent again; None: see ``why_not``.
        run: The run that a rerun has announced already and nobody is known to have sent; None: a new one.
        announced_at: When that was, ms since 1970.
        why_not: Why it cannot be.
    """

    task: str
    said: Event
    sent: Event | None = None
    run: int | None = None
    announced_at: int = 0
    why_not: str = ""


def candidate(found: Iterable[Event], query: Query) -> Candidate | None:
    """Return a task as a candidate; None if it is not as asked for, or not any more.

    What counts is how the task is now: the event that ended its latest run, or its last one. Without a state to ask
    for only tasks that have ended are meant.

    Args:
        found: All its events.
        query: What is asked for.
    """
    life = [event for event in timeline.causal(found) if event.imported is None]
    announced = _unsent(life)
    before = life if announced is None else [event for event in life if event.run != announced.run]
    said = timeline.deciding(before)
    if said is None or said.kind in events.TOMBSTONES | events.GROUP_KINDS or not query.matches(said):
        return None
    if not query.states and not timeline.ended(before):
        return None
    run, at = (None, 0) if announced is None else (announced.run, announced.at)
    sent, why = _message(before)
    return Candidate(said.task, said, sent, run, at, why)


def _unsent(life: Sequence[Event]) -> Event | None:
    """Return the rerun that nothing is known to have come of."""
    latest = max((event.run for event in life if event.run is not None), default=None)
    of_it = [event for event in life if event.run == latest]
    return of_it[-1] if latest and all(event.kind == events.RERUN for event in of_it) else None


def _message(life: Sequence[Event]) -> tuple[Event | None, str]:
    """Return the event with the original message of the latest run, or why there is none."""
    sent = [event for event in life if event.kind == events.SENT]
    latest = max((event.run for event in sent if event.run is not None), default=None)
    first = min((event for event in sent if event.run == latest), key=lambda event: event.attempt, default=None)
    if first is None:
        return None, "its `sent` event is not in the log (any more)"
    if first.parcel is None:
        return None, f"its message was not recorded: {SETTING} did not name {first.name} when it was sent"
    if first.parcel.why_not:
        return None, f"its message was not recorded: {first.parcel.why_not}"
    return first, ""


class Message(NamedTuple):
    """What is sent.

    Attributes:
        parcel: Body and properties.
        headers: The new headers.
        exchange: "" for the default one.
        routing_key: There, the queue.
    """

    parcel: Parcel
    headers: dict[str, Any]
    exchange: str
    routing_key: str


def message_of(sent: Event, run: int, hlc: int, now_ms: int, ours: tuple[str, str, str, str]) -> Message:
    """Return a recorded message as it is to be sent now: a first attempt of another run.

    An ``eta`` that has passed is left out. A task that was to expire so long after it was sent is again to.

    Args:
        sent: The event that has it.
        run: The run.
        hlc: The clock that orders events, ms since 1970.
        now_ms: The wall clock, ms since 1970.
        ours: Names of the headers for run, clock, time and task.

    Raises:
        Unreadable: It has none.
    """
    parcel = sent.parcel
    if parcel is None or parcel.why_not:
        raise Unreadable(f"no message of {sent.task}")
    headers = {**parcel.headers, "retries": 0, **dict(zip(ours, (run, hlc, now_ms, sent.task), strict=True))}
    if sent.eta is not None and sent.eta <= now_ms:
        headers["eta"] = None
    if sent.message_expires is not None and sent.sent_at is not None:
        until = now_ms + max(sent.message_expires - sent.sent_at, 0)
        headers["expires"] = datetime.fromtimestamp(until / 1000, timezone.utc).isoformat()
    return Message(parcel, headers, sent.exchange or "", sent.routing_key or sent.queue or "")


def next_run(said: Iterable[Event], now_ms: int) -> int:
    """Return a run above all that a task has had: its unready states are not to be hidden by an old end."""
    return max([order.run_at(now_ms), *(event.run + 1 for event in said if event.run is not None)])
