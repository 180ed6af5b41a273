"""A worker's metrics: what each of its processes writes on the board, and what its main process makes of it.

Imported only where ``metrics_port`` is set. The main process makes the board and the endpoint
before the pool forks; every process that makes a producer handle takes a seat, and counts by being
that handle: the hot path pays two readings of a clock and a lock per record.
"""

from __future__ import annotations

import threading
import time
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from billiard.process import current_process
from celery.utils.log import get_logger
from confluent_kafka import Producer

from celery_kafka_backend import kafka, metrics, topics
from celery_kafka_backend.board import Board
from celery_kafka_backend.errors import PublishError, Refused, SpoolError, TooLarge
from celery_kafka_backend.metrics import Layout
from celery_kafka_backend.monitor import Endpoint, Series
from celery_kafka_backend.settings import SETTING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from confluent_kafka import KafkaError, Message

    from celery_kafka_backend.board import Reading, Seat
    from celery_kafka_backend.producer.publisher import Publisher
    from celery_kafka_backend.producer.recorder import Recorder

logger = get_logger(__name__)

SEATS: Final = 1024
"""Processes of one worker at once; of more, the others are not counted."""
SAMPLE_S: Final = 0.05
UNANSWERED_S: Final = 10.0
"""A record that Kafka has not answered for so long says that a process cannot reach it."""
PROBE_S: Final = 2.0
"""Longest wait of a probe for Kafka, and how long its answer holds."""

_SINCE: Final = "unanswered_since"
"""When the oldest record without an answer was sent, by the machine's monotonic clock; 0: none is."""
_LAYOUT: Final = Layout(metrics.WORKER_CELLS, [_SINCE])
_LATENCY: Final = _LAYOUT.at(metrics.PUBLISH_SECONDS)
_DROPPED: Final = _LAYOUT.at(metrics.DROPPED)
_SENT_AGAIN: Final = _LAYOUT.at(metrics.SENT_AGAIN)
_LOST: Final = _LAYOUT.at(metrics.LOST)
_QUEUED: Final = _LAYOUT.at(metrics.QUEUED)
_SINCE_AT: Final = _LAYOUT.at(_SINCE)
_REASONS: Final = ((TooLarge, "too_large"), (Refused, "refused"), (PublishError, "not_acknowledged"))


class MeteredProducer(Producer):
    """A producer handle that writes what it does on a seat."""

    def __init__(self, config: dict[str, Any], seat: Seat, recorder: Recorder) -> None:
        super().__init__(config)
        self._seat = seat
        self._recorder = recorder
        self._counted = _counts(recorder)
        self._numbers = count()
        self._lock = threading.Lock()
        self._pending: dict[int, float] = {}
        self._sampled = 0.0

    def produce(  # type: ignore[override]
        self,
        topic: str,
        value: bytes | None,
        key: bytes,
        partition: int = -1,
        on_delivery: Callable[[KafkaError | None, Message], None] = lambda *_: None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """As the client's own, as far as it is used."""
        number = next(self._numbers)
        began = time.monotonic()

        def answered(error: KafkaError | None, message: Message) -> None:
            with self._lock:
                del self._pending[number]
            if error is None:
                self._seat.observe(_LATENCY, metrics.PUBLISH_SECONDS.buckets, time.monotonic() - began)
            else:
                self._seat.add(_LAYOUT.at(metrics.PUBLISH_ERRORS, _reason(error)))
            on_delivery(error, message)

        with self._lock:
            self._pending[number] = began
        try:
            super().produce(topic, value, key, partition, answered, headers=list(headers))
        except BaseException:
            with self._lock:
                del self._pending[number]
            raise

    def poll(self, timeout: float = -1) -> int:
        """As the client's own. Called all the time, so this is where samples are taken."""
        served = super().poll(timeout)
        self._sample_now_and_then()
        return served

    def flush(self, timeout: float = -1) -> int:
        """As the client's own; whoever waits for a record does so by short flushes, a process that ends by its last one."""
        left = super().flush(timeout)
        if timeout > SAMPLE_S:
            self._sample()
        else:
            self._sample_now_and_then()
        return left

    def _sample_now_and_then(self) -> None:
        if time.monotonic() - self._sampled >= SAMPLE_S:
            self._sample()

    def _sample(self) -> None:
        self._sampled = time.monotonic()
        counts = _counts(self._recorder)
        for cell, value in counts.items():
            if value != self._counted[cell]:
                self._seat.add(cell, value - self._counted[cell])
        self._counted = counts
        with self._lock:
            # Not len(self): librdkafka counts what it has to say about its brokers, too.
            pending, oldest = len(self._pending), next(iter(self._pending.values()), 0.0)
        self._seat.put(_QUEUED, self._recorder.publisher.waiting() + pending)
        self._seat.put(_SINCE_AT, oldest)


def _counts(recorder: Recorder) -> dict[int, int]:
    """Return what the publisher and the courier have counted themselves, in this process, by cell."""
    return {
        _DROPPED: recorder.publisher.dropped,
        _SENT_AGAIN: recorder.courier.sent_again,
        _LOST: recorder.courier.lost,
    }


def _reason(error: KafkaError) -> str:
    translated = kafka.translate(error)
    return next(reason for kind, reason in _REASONS if isinstance(translated, kind))


class WorkerSource:
    """What a worker's endpoint shows."""

    metrics = metrics.WORKER

    def __init__(self, board: Board, recorder: Recorder) -> None:
        self._board = board
        self._recorder = recorder
        self._publisher = recorder.publisher
        self._probing = threading.Lock()
        self._probed = (-PROBE_S, "")

    def series(self) -> Iterator[Series]:
        """Yield every series: sums over all processes that there ever were, gauges over the living."""
        readings = list(self._board.read())
        living = [one for one in readings if one.alive]
        for metric, own, where in _LAYOUT.series():
            counted = living if metric.kind == "gauge" else readings
            columns = zip(*(one.cells[where] for one in counted), strict=True)
            numbers = [sum(column) for column in columns] or [0.0] * metric.cells
            yield Series(metric, (own,) if own else (), numbers)
        yield Series(metrics.UNANSWERED, (), (_oldest_s(living),))
        yield Series(metrics.PROCESSES, (), (float(len(living)),))
        yield from self._spool()

    def _spool(self) -> Iterator[Series]:
        detour = self._recorder.courier.detour
        if detour is None:
            return
        try:
            state = detour.spool.state()
        except SpoolError as exc:
            logger.warning("no metrics of the spool: %s", exc)
            return
        oldest_s = 0.0 if state.oldest_ms is None else max(time.time() - state.oldest_ms / 1000, 0.0)
        numbers = (state.records, sum(state.aside.values()), state.size, state.limit, oldest_s)
        for metric, number in zip(metrics.SPOOL, numbers, strict=True):
            yield Series(metric, (), (float(number),))

    def unhealthy(self) -> list[str]:
        """Return []: who answers, lives."""
        return []

    def unready(self) -> list[str]:
        """Return why results could not be stored now."""
        wrong = [self._probe()]
        oldest_s = _oldest_s([one for one in self._board.read() if one.alive])
        if oldest_s > UNANSWERED_S:
            wrong.append(f"a record has been waiting for Kafka's answer for {oldest_s:.0f} s")
        return [one for one in wrong if one]

    def _probe(self) -> str:
        """Ask Kafka for the log's partitions, once for all who ask within `PROBE_S`; return what is wrong, or ""."""
        with self._probing:
            at, wrong = self._probed
            if time.monotonic() - at >= PROBE_S:
                settings = self._publisher.settings
                try:
                    self._publisher.partitions(topics.task_events(settings.topic_prefix), PROBE_S)
                    wrong = ""
                except PublishError as exc:
                    wrong = str(exc)
                self._probed = (time.monotonic(), wrong)
            return wrong


def _oldest_s(living: list[Reading]) -> float:
    since = [one.cells[_SINCE_AT] for one in living if one.cells[_SINCE_AT]]
    return time.monotonic() - min(since) if since else 0.0


# -- the worker's main process, before its pool forks; what it makes is inherited ----------------------

_boards: Final[list[Board]] = []
_measured: Final[list[Publisher]] = []


def measure(recorder: Recorder) -> None:
    """Count what a recorder's publisher does, here and in the forks of this process; serve it if this is a worker's main process.

    Called for every backend that is made; does it once.

    Raises:
        SettingsError: The endpoint cannot be had.
    """
    publisher = recorder.publisher
    if publisher in _measured:
        return
    settings = publisher.settings
    if not _boards:
        if current_process().name != "MainProcess":
            logger.warning("this process started before its worker's board of metrics was there: it is not counted")
            return
        assert settings.metrics_port is not None
        board = Board(SEATS, _LAYOUT.size, 0)
        names = (f"{SETTING}['metrics_address']", f"{SETTING}['metrics_port']")
        endpoint = Endpoint(WorkerSource(board, recorder), settings.metrics_address, settings.metrics_port, names)
        _boards.append(board)
        endpoint.start()
        logger.info("metrics: %s/metrics, /healthz and /readyz", endpoint.url)
    _measured.append(publisher)
    publisher.make = lambda config: _metered(_boards[0], recorder, config)


def _metered(board: Board, recorder: Recorder, config: dict[str, Any]) -> Producer:
    seat = board.take(clear=(*_LAYOUT.gauges, _SINCE_AT))
    if seat is None:
        logger.warning("metrics: over %d processes; this one is not counted", SEATS)
        return Producer(config)
    return MeteredProducer(config, seat, recorder)
