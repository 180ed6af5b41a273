"""What the log knows of a task beyond its state: `KafkaResult`, beside Celery's `AsyncResult`.

Celery's PENDING means "waits in a queue" and "never heard of". The view has more: a side record of every task (when it was
first sent, received and started) and, where it keeps one, the history of its events. And a result that can be awaited.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from celery import states

from celery_kafka_backend import codec, events, order, places, timeline
from celery_kafka_backend.awaiting import awaited
from celery_kafka_backend.changes import Side
from celery_kafka_backend.reads import Reads

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from celery.result import AsyncResult

    from celery_kafka_backend.events import Event

UNKNOWN: Final = timeline.UNKNOWN

_AROUND_MS: Final = 600_000
_ENDS: Final = frozenset({events.SUCCESS, events.FAILURE, events.WORKER_LOST, events.RETRY})
"""Kinds that say how long an attempt ran."""


class KafkaResult:
    """A task's result, with what the log knows of it. Every question reads the primary view once or twice.

    Facts are about the latest run of the id, where the view keeps history, else about all of its runs.

    Args:
        result: Celery's own, of an app whose ``result_backend`` is ``kafka://…``.
    """

    def __init__(self, result: AsyncResult) -> None:
        self.result = result
        self._backend: Reads = result.backend

    @classmethod
    def of(cls, result: AsyncResult) -> KafkaResult:
        """Return it for one of Celery's results.

        Raises:
            TypeError: That one's backend is another.
        """
        if not isinstance(result.backend, Reads):
            raise TypeError(f"{result!r} is of {type(result.backend).__name__}, not of a kafka:// result backend")
        return cls(result)

    def __repr__(self) -> str:
        return f"<KafkaResult: {self.result.id}>"

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait without blocking the event loop; return or raise what ``result.get()`` would.

        For a bound: ``asyncio.wait_for(KafkaResult.of(result), 5)``.
        """
        return awaited(self.result).__await__()

    def history(self, *, log: bool = False, around: datetime | None = None) -> list[Event]:
        """Return every event of the task, run by run, in causal order; [] if the view keeps none (Redis does if told so).

        `timeline.as_of` tells what had happened by some moment, and `timeline.state` how far the task was then.

        Args:
            log: Read where the log may have the task where the view has nothing: seconds, or minutes on a large log.
            around: Read only what the log got within ten minutes of this time; the view is not asked.

        Raises:
            Unavailable: The view does not answer.
            PublishError: Kafka does not, or refuses.
            CodecError: An event was written by newer software.
        """
        found = [] if around is not None else self._backend.reader.history(self.result.id)
        if around is not None:
            at = int(around.timestamp() * 1000)
            found = places.of_task(self._backend.settings, self.result.id, at - _AROUND_MS, at + _AROUND_MS)
        elif log and not found:
            found = places.of_task(self._backend.settings, self.result.id)
        return timeline.causal(codec.decode(value) for value in found)

    def describe(self) -> str:
        """Return how far the task is.

        Returns:
            ``unknown``, ``sent``, ``received``, ``started``, ``retry``, ``success``, ``failure``, ``revoked``, ``rejected``,
            ``forgotten``, or a state of the task's own. Without a history: of a task that ignores its result or
            refuses its message, at most ``started``; and of one that is tried again, ``retry`` until it ends.

        Raises:
            Unavailable: The view does not answer.
        """
        if found := self.history():
            return timeline.state(found)
        shown = self._backend.reader.shown(self.result.id)
        if shown is None:
            return UNKNOWN
        if shown.document is not None:
            state = str(self._backend.decode_result(shown.document)["status"])
            if state != states.PENDING:
                kind = events.kind_of(state)
                return state if kind == events.STATE else kind
        if shown.key and shown.key == order.forget_key(order.run_of_key(shown.key)):
            return events.FORGOTTEN
        return _furthest(shown.side or Side())

    @property
    def started_at(self) -> datetime | None:
        """When it first started; None if that is not known (yet)."""
        run = timeline.latest_run(self.history())
        first = _first_start(run)
        at = first.started_at if first is not None else None if run else self._side.started
        return _moment(at)

    @property
    def queue_wait_s(self) -> float | None:
        """Seconds from when it was sent, or was due, until it first started; None if it has not.

        Without a history a countdown counts as waiting.
        """
        run = timeline.latest_run(self.history())
        if run:
            first = _first_start(run)
            if first is None or first.sent_at is None or first.started_at is None:
                return None
            return max(first.started_at - max(first.sent_at, first.eta or 0), 0) / 1000
        side = self._side
        return max(side.started - side.sent, 0) / 1000 if side.started and side.sent else None

    @property
    def runtime_s(self) -> float | None:
        """Seconds that its last attempt ran, as its worker measured; None before it ended.

        Without a history: from start to end, and None if it was tried more than once.
        """
        run = timeline.latest_run(self.history())
        if run:
            return next((event.runtime_s for event in reversed(run) if event.kind in _ENDS), None)
        side, done = self._side, self.result.date_done
        if not side.started or side.attempts or not isinstance(done, datetime):
            return None
        return max(done.timestamp() - side.started / 1000, 0.0)

    @property
    def worker(self) -> str | None:
        """Node name of the worker that had it last; without a history None if there were several."""
        run = timeline.latest_run(self.history())
        if run:
            return next((event.worker for event in reversed(run) if event.worker and event.role != events.CLIENT), None)
        workers = self._side.workers
        return workers[0] if len(workers) == 1 else None

    @property
    def _side(self) -> Side:
        shown = self._backend.reader.shown(self.result.id)
        return (shown.side if shown is not None else None) or Side()


def _first_start(run: Sequence[Event]) -> Event | None:
    return min((event for event in run if event.started_at), key=lambda event: event.started_at or 0, default=None)


def _furthest(side: Side) -> str:
    for at, word in ((side.started, events.STARTED), (side.received, events.RECEIVED), (side.sent, events.SENT)):
        if at:
            return word
    return UNKNOWN


def _moment(ms: int | None) -> datetime | None:
    return datetime.fromtimestamp(ms / 1000, timezone.utc) if ms else None
