"""The Celery result backend: what it is, how it starts in a worker, and how a task ends.

Writing: `chords` on `writes`: document → event → `producer.recorder` → Kafka. Reading: `reads` → the primary view, past
the barrier where Celery's own code in a worker reads. Waiting: `waiting`.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from celery import current_app, states
from celery import signals as celery_signals
from celery.app import trace
from celery.exceptions import ImproperlyConfigured, TaskRevokedError
from celery.utils.log import get_logger

from celery_kafka_backend import configure, events, older, threads
from celery_kafka_backend.barrier import barrier_for
from celery_kafka_backend.chords import Chords
from celery_kafka_backend.claims import Claims
from celery_kafka_backend.errors import NotAcknowledged, SettingsError, StoreError, Unavailable, Unsure
from celery_kafka_backend.nested import NestedGroups
from celery_kafka_backend.parents import has_ended
from celery_kafka_backend.producer import signals
from celery_kafka_backend.producer.recorder import (
    field,
    recorder_for,
)
from celery_kafka_backend.producer.stubs import is_declared
from celery_kafka_backend.reports import keep_secrets
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.waiting import ResultConsumer
from celery_kafka_backend.writes import Ending

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery import Celery

    from celery_kafka_backend.producer.recorder import Recorder

logger = get_logger(__name__)

IDLE_AFTER_S: Final = 15.0
"""A view that has not moved past an acknowledged event for so long has no processor."""


class KafkaBackend(NestedGroups, Chords):
    """Result backend for ``kafka://host:port,host:port/?view=redis://…``.

    Raises:
        ImproperlyConfigured: A setting is unknown, contradictory or unusable.
    """

    ResultConsumer = ResultConsumer

    supports_native_join = True
    supports_autoexpire = True
    supports_result_compression = True
    supports_failure_expires = True
    persistent = True

    def __init__(self, app: Celery | None = None, url: str | None = None, **kwargs: Any) -> None:
        super().__init__(app, url, **kwargs)
        self.url = url or self.app.conf.result_backend
        with _checked():
            self.settings = configure.settings_of(self.app, url)
            self.recorder: Recorder = recorder_for(self.app, self.settings)
            if self.settings.metrics_port is not None and _in_worker():
                _measure(self.recorder)
        self.result_consumer = self.ResultConsumer(
            self, self.app, self.accept, self._pending_results, self._pending_messages
        )
        self.barrier = barrier_for(self.settings)
        self.recorder.result_retries = self._retries
        if _in_worker():
            _open(self.recorder)
        signals.connect()
        keep_secrets()
        signals.catch_up()
        celery_signals.worker_ready.connect(_worker_ready, weak=False, dispatch_uid="celery-kafka-backend.check-tasks")

    def as_uri(self, include_password: bool = False) -> str:
        """Return the URL, passwords masked unless asked for."""
        return self.url if include_password else mask(self.url)

    def __reduce__(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _unpickled, (type(self), {**(kwargs or {}), "url": self.url})

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing: a waiter registers when it waits, so that ``delay()`` costs no round trip."""

    def add_pending_result(self, result: Any, weak: bool = False, start_drainer: bool = True) -> Any:
        """Have a result told of its end, unless it knows: Celery would call again what it has called with it."""
        if has_ended(result):
            return result
        return super().add_pending_result(result, weak=weak, start_drainer=start_drainer)

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Whether ``result_backend_always_retry`` may try again."""
        return isinstance(exc, (NotAcknowledged, Unavailable))

    # -- a task's end: the chord's part goes first, acknowledged, then the state -----------------

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, state: str = states.SUCCESS
    ) -> None:
        """Store a success."""
        with self._ending(task_id, result, state, request, store_result and not field(request, "ignore_result")):
            super().mark_as_done(task_id, result, request=request, store_result=store_result, state=state)

    def mark_as_failure(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = states.FAILURE,
    ) -> None:
        """Store a failure, fail what was chained after it, call its errbacks."""
        if older.had_succeeded(self, task_id, exc, request):
            return
        with self._ending(task_id, exc, state, request, store_result, traceback=traceback):
            super().mark_as_failure(
                task_id, exc, traceback=traceback, request=request, store_result=store_result,
                call_errbacks=call_errbacks, state=state,
            )  # fmt: skip

    def mark_as_revoked(
        self,
        task_id: str,
        reason: str = "",
        request: Any = None,
        store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:
        """Store a revocation."""
        kind = events.EXPIRED if reason == "expired" else events.REVOKED
        more = {"message": reason, "by": self.recorder.node, "terminated": reason == "terminated"}
        with self._ending(task_id, TaskRevokedError(reason), state, request, store_result, kind, more):
            super().mark_as_revoked(task_id, reason, request=request, store_result=store_result, state=state)

    def _call_task_errbacks(self, request: Any, exc: BaseException, traceback: Any) -> None:
        """Call a failed task's errbacks, when the view shows how it failed: they ask for that by its id, without waiting."""
        # Not in a worker's main process, whose loop must not stand still, nor in a chord processor, which knows no view.
        if self.recorder.runs_task and not field(request, "is_eager"):
            task_id, bound_s = field(request, "id"), self.settings.barrier_timeout_s
            stored = self._here.stored
            with suppress(Unsure, Unavailable):
                if stored is not None and stored[0] == task_id:
                    self.barrier.passed(stored[1].stored, self.reader.positions, bound_s, patient=False)
                else:
                    self.barrier.caught_up([task_id], self.reader.positions, bound_s, patient=False)
        super()._call_task_errbacks(request, exc, traceback)

    @contextmanager
    def _ending(
        self,
        task_id: str,
        result: Any,
        state: str,
        request: Any,
        stored: bool,
        kind: str | None = None,
        more: dict[str, Any] | None = None,
        traceback: Any = None,
    ) -> Iterator[None]:
        """Fix the end's identity, send the part with it; keep Celery from sending it a second time."""
        if not stored and field(request, "is_eager"):
            yield  # ran in the caller: nobody else knows of it, and nothing is kept
            return
        here = self._here
        ending = Ending(task_id, self._identity(task_id, state, request), kind or self._kind(result, state), more or {})
        outer = here.planned, here.parted, here.stored
        try:
            if is_declared(field(request, "chord")) and field(request, "id") == task_id:
                if stored:
                    encoded = self.encode_result(result, state)
                    event = self._state_event(task_id, result, encoded, state, traceback, request, ending)
                    ending = ending._replace(record=self._state_record(event, encoded, traceback, request))
                self._send_part(request, state, result, ending.who, stored)
                here.parted = task_id
            if stored:
                here.planned = ending
            else:
                self._log_ignored(ending, result, state, request)
            yield
        finally:
            here.planned, here.parted, here.stored = outer

    def _log_ignored(self, ending: Ending, result: Any, state: str, request: Any) -> None:
        """Log the end of a task that stores nothing: history and findings need it."""
        if not self.settings.record_ignored:
            return
        who = ending.who
        who.key = 0
        event = self.recorder.event(
            ending.kind,
            ending.task_id,
            who,
            request,
            state=state,
            ignored=True,
            expires_at=self._expires_at(who.wall, state, field(request, "task")),
            **{**self._outcome(result, state), **ending.more},
        )
        self.recorder.cast(event)


@contextmanager
def _checked() -> Iterator[None]:
    """Let a wrong setting be Celery's exception; a worker is to end at once, with its text, not to fail every task."""
    try:
        try:
            yield
        except SettingsError as exc:
            raise configure.improperly_configured(exc) from exc
    except ImproperlyConfigured as exc:
        if not _in_worker():
            raise
        raise _end_of_worker(exc) from None


def _end_of_worker(exc: ImproperlyConfigured) -> SystemExit:
    # A worker that starts logs any exception with its traceback; SystemExit ends it with this line alone.
    logger.critical("%s", exc)
    return SystemExit(exc.exit_code)


def _open(recorder: Recorder) -> None:
    """Make the worker's connection."""
    with _checked(), suppress(NotAcknowledged):  # no token yet: said in the log, and asked for again
        registry.store(recorder.settings.views[0])  # its driver: a worker reads results, too
        recorder.publisher.open()
        if recorder.settings.claim_check:
            Claims(recorder.settings)


def _worker_ready(sender: Any = None, **_: Any) -> None:
    backend = sender.app.backend if sender is not None else None
    if isinstance(backend, KafkaBackend):
        try:
            configure.check_tasks(backend.app, backend.settings)
            configure.check_spool(backend.settings)
        except ImproperlyConfigured as exc:
            raise _end_of_worker(exc) from None
        threads.start(_watch, "celery-kafka-watch", backend)


def _watch(backend: KafkaBackend) -> None:
    """Say once if nobody folds what this worker appends."""
    recorder = backend.recorder
    while (sample := recorder.publisher.latest) is None:
        time.sleep(1)
    reader = backend.reader
    try:
        deadline = time.monotonic() + IDLE_AFTER_S
        while time.monotonic() < deadline:
            time.sleep(1)
            if reader.positions().get(sample.partition, -1) > sample.offset:
                return
    except StoreError as exc:
        logger.warning("cannot tell whether a processor folds results into %s: %s", mask(reader.view.url), exc)
        return
    logger.warning(
        "no processor folds results into %s: they are safe in Kafka at %s, but no client will see one until "
        "`celery -A %s pipeline run` runs",
        mask(reader.view.url), recorder.settings.bootstrap_servers, recorder.app_name or "proj",
    )  # fmt: skip


def _measure(recorder: Recorder) -> None:
    from celery_kafka_backend.producer import metering  # noqa: PLC0415 - only where metrics are wanted

    metering.measure(recorder)


def _in_worker() -> bool:
    return bool(getattr(trace, "_localized", None))


def _unpickled(cls: type[KafkaBackend], kwargs: dict[str, Any]) -> KafkaBackend:
    """Return the backend of a result that comes out of a pickle, a saved group's for one.

    The app's own where it is the same: that one hears for whoever waits, another would wait in vain.
    """
    app = current_app._get_current_object()  # noqa: SLF001 - how Celery's own unpickle_backend finds it
    own = app.backend
    return own if type(own) is cls and own.url == kwargs["url"] else cls(app, **kwargs)
