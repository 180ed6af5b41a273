"""The Celery result backend: thin. It makes documents and delegates everything else at once.

Writing: document → event → `producer.recorder` → Kafka. Reading: `reader` → the primary view.
Chords: declaration, size and parts → Kafka; the chord processor decides and sends the body.
"""

from __future__ import annotations

import contextlib
import threading
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from celery import current_app, states
from celery import signals as celery_signals
from celery.app import trace
from celery.backends.asynchronous import AsyncBackendMixin, BaseResultConsumer
from celery.exceptions import BackendStoreError, ImproperlyConfigured, Reject
from celery.result import GroupResult
from celery.utils.functional import _regen
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError, OperationalError
from kombu.serialization import dumps
from kombu.utils.encoding import bytes_to_str, ensure_bytes

from celery_kafka_backend import chord_records, codec, configure, events, order
from celery_kafka_backend.barrier import barrier_for
from celery_kafka_backend.claims import ClaimedMeta, Claims, reference, stub
from celery_kafka_backend.errors import NotAcknowledged, PublishError, SettingsError, TooLarge, Unavailable
from celery_kafka_backend.events import Opaque
from celery_kafka_backend.order import Rank
from celery_kafka_backend.producer import headers as names
from celery_kafka_backend.producer import signals
from celery_kafka_backend.producer.courier import ONCE, Retries
from celery_kafka_backend.producer.members import members
from celery_kafka_backend.producer.recorder import (
    MESSAGE_LIMIT,
    current_request,
    field,
    held_ids,
    plain,
    recorder_for,
)
from celery_kafka_backend.producer.stubs import without_bodies
from celery_kafka_backend.reader import Ear
from celery_kafka_backend.reads import Reads
from celery_kafka_backend.settings import mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery import Celery

    from celery_kafka_backend.changes import Partition
    from celery_kafka_backend.events import Event
    from celery_kafka_backend.producer.publisher import Record, Stored
    from celery_kafka_backend.producer.recorder import Identity, Recorder
    from celery_kafka_backend.settings import Settings

logger = get_logger(__name__)

HEAR_SLICE_S: Final = 0.1
"""One thread hears for all that wait in its process; the others look at their own result this often."""

SHORTEST_PATIENCE_S: Final = 0.2
"""A waiter in its last moments gives a healthy store so long to answer, rather than hang up on it."""

_KINDS: Final = {
    states.STARTED: events.STARTED,
    states.RETRY: events.RETRY,
    states.SUCCESS: events.SUCCESS,
    states.FAILURE: events.FAILURE,
    states.REVOKED: events.REVOKED,
}
_RANKS: Final = {
    states.SUCCESS: Rank.SUCCEEDED,
    states.FAILURE: Rank.FAILED,
    states.REVOKED: Rank.FAILED,
}
_LOST: Final = frozenset({"WorkerLostError"})


class _Ending(NamedTuple):
    """The end of a task, fixed before the part and the state are sent."""

    task_id: str
    who: Identity
    kind: str
    more: dict[str, Any]


class ResultConsumer(BaseResultConsumer):  # type: ignore[misc]
    """Celery's waiting machinery on one `Ear`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ear: Ear | None = None
        self._turn = threading.Condition()
        self._hearing = False
        self._here = threading.local()

    @property
    def ear(self) -> Ear:
        """The process's ear."""
        if self._ear is None:
            self._ear = Ear(self.backend.reader, self.backend.settings.poll_interval_s)
        return self._ear

    def start(self, initial_task_id: str, **_: Any) -> None:
        """Start listening with a first task."""
        self.ear.add(initial_task_id)

    def consume_from(self, task_id: str) -> None:
        """Listen for a task."""
        self.ear.add(task_id)

    def cancel_for(self, task_id: str) -> None:
        """Stop listening for a task."""
        if self._ear is not None:
            self._ear.drop(task_id)

    def stop(self) -> None:
        """Stop listening."""
        if self._ear is not None:
            self._ear.close()

    def on_after_fork(self) -> None:
        """Start anew in a fork."""
        self._ear = None
        self._turn = threading.Condition()
        self._hearing = False

    def drain_events(self, timeout: float | None = None) -> None:
        """Hear for a moment: one thread listens, the others wait for what it hears."""
        slice_s = HEAR_SLICE_S if timeout is None else min(timeout, HEAR_SLICE_S)
        with self._turn:
            if self._hearing:
                self._turn.wait(slice_s)
                return
            self._hearing = True
        try:
            for task_id, document in self.ear.hear(slice_s, self._patience_s()).items():
                self._changed(task_id, document)
        finally:
            with self._turn:
                self._hearing = False
                self._turn.notify_all()

    def _changed(self, task_id: str, document: bytes) -> None:
        meta = self.backend.decode_result(document)
        meta.setdefault("task_id", task_id)
        self.on_state_change(meta, None)
        if meta["status"] in states.READY_STATES:
            self.cancel_for(task_id)

    def _wait_for_pending(self, result: Any, timeout: float | None = None, **kwargs: Any) -> Iterator[None]:
        """Look once at what is there already, in the waiter's own thread, then wait for the rest of the timeout."""
        outer = getattr(self._here, "until", None)
        # Celery takes 0, as None, for no timeout at all.
        self._here.until = until = time.monotonic() + timeout if timeout else None
        try:
            for task_id, document in self.ear.meet(list(_unknown(result)), self._patience_s()).items():
                self._changed(task_id, document)
            left = None if until is None else max(until - time.monotonic(), 0.01)
            yield from super()._wait_for_pending(result, timeout=left, **kwargs)
        finally:
            self._here.until = outer

    def _patience_s(self) -> float | None:
        """How long this thread's ``get`` may still wait for the store."""
        until: float | None = getattr(self._here, "until", None)
        return None if until is None else max(until - time.monotonic(), SHORTEST_PATIENCE_S)


def _unknown(result: Any) -> Iterator[str]:
    """Yield the ids of a result, or of the members of a group of groups, whose end is not known yet."""
    if (members := getattr(result, "results", None)) is not None:
        for each in members:
            yield from _unknown(each)
    elif result._cache is None:  # noqa: SLF001 - as Celery's own `ResultSet` asks
        yield result.id


class KafkaBackend(AsyncBackendMixin, Reads):  # type: ignore[misc]
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
        super().__init__(app=app, url=url, expires_type=float, **kwargs)
        self.settings = _settings(self.app, url)
        self.url = url or self.app.conf.result_backend
        self.recorder: Recorder = recorder_for(self.app, self.settings)
        if self.settings.metrics_port is not None and _in_worker():
            _measure(self.recorder)
        failure = self.app.conf.get("result_failure_expires")
        self.failure_expires = self.expires if failure is None else self.prepare_expires(failure, type=float)
        self.result_consumer = self.ResultConsumer(
            self, self.app, self.accept, self._pending_results, self._pending_messages
        )
        self.barrier = barrier_for(self.settings)
        self._here = threading.local()
        self._extended = bool(self.app.conf.find_value_for_key("extended", "result"))
        self.recorder.positions = self._positions
        self.recorder.result_retries = self._retries
        if _in_worker():
            _open(self.recorder)
        signals.connect()
        signals.catch_up()
        celery_signals.worker_ready.connect(_worker_ready, weak=False, dispatch_uid="celery-kafka-backend.check-tasks")

    def _positions(self) -> dict[Partition, int]:
        return self.reader.positions()

    def as_uri(self, include_password: bool = False) -> str:
        """Return the URL, passwords masked unless asked for."""
        return self.url if include_password else mask(self.url)

    def __reduce__(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _unpickled, (type(self), {**(kwargs or {}), "url": self.url})

    # -- reading -----------------------------------------------------------------------------

    @cached_property
    def claims(self) -> Claims:
        """Where large results lie.

        Raises:
            ImproperlyConfigured: fsspec or the store's driver is not installed, or refuses an option.
        """
        try:
            return Claims(self.settings)
        except SettingsError as exc:
            raise configure.improperly_configured(exc) from exc

    def decode_result(self, payload: Any) -> dict[str, Any]:
        """Return a document's fields; of one that lies elsewhere, read when the result is asked for.

        Raises (when it is asked for):
            ClaimLost: The object is gone or damaged.
            Unavailable: Its store does not answer.
        """
        claim = reference(payload)
        if claim is None:
            return super().decode_result(payload)  # type: ignore[no-any-return]
        read = super().decode_result
        return ClaimedMeta(payload, lambda: read(self.claims.get(claim)))

    def meta_from_decoded(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Return fields with an exception as such; those that lie elsewhere become it when they are read."""
        return meta if isinstance(meta, ClaimedMeta) else super().meta_from_decoded(meta)

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing: a waiter registers when it waits, so that ``delay()`` costs no round trip."""

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Whether ``result_backend_always_retry`` may try again."""
        return isinstance(exc, (NotAcknowledged, Unavailable))

    # -- storing -----------------------------------------------------------------------------

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> Any:
        """Append a state; a ready one is acknowledged by Kafka when this returns.

        Raises:
            EncodeError: It is larger than ``max_message_bytes``: final.
            BackendStoreError: Kafka did not acknowledge it within ``delivery_timeout_s``.
        """
        encoded = self.encode_result(result, state)
        event = self._state_event(task_id, result, encoded, state, traceback, request)
        if state in states.READY_STATES and self.settings.claim_check:
            event = self._claimed(event, request)
        try:
            record = self.recorder.record(event)
        except TooLarge as exc:
            raise _final(exc) from exc
        if state in states.READY_STATES:
            self._store(record, f"{state} of {task_id}", task_id, state, request)
        else:
            self.recorder.publisher.cast(record)
            if request is None:  # an abort, or a state set from outside: what comes next may depend on it
                self.recorder.publisher.send_casts()
        return encoded

    def _claimed(self, event: Event, request: Any) -> Event:
        """Return the event with its document in the object store, if that is large.

        Raises:
            BackendStoreError: The store did not take it within ``delivery_timeout_s``, as with Kafka away.
        """
        document = event.document or b""
        # The worker's parent runs an event loop; its documents are small.
        if len(document) <= self.settings.claim_check_bytes or self.recorder.role == events.PARENT:
            return event
        until = event.expires_at and max(event.expires_at, event.at + self.settings.retention_ms)
        try:
            claim = self._ensure_retryable(
                self.claims.put, event.id, document, until, self.settings.delivery_timeout_s
            )  # fmt: skip
        except PublishError as exc:
            self._here.unstored = event.task
            raise BackendStoreError(
                f"{event.state} of {event.task} not stored: {exc}", task_id=event.task, state=event.state
            ) from exc
        children = self.current_task_children(request)
        return msgspec.structs.replace(
            event, doc=msgspec.Raw(stub(event, claim, children)), opaque=None, claim=claim
        )  # fmt: skip

    def _store(self, record: Record, what: str, task_id: str, state: str, request: Any) -> None:
        """See what must not be lost into Kafka, as far as ``delivery`` says."""
        wait_s = self._wait_s(task_id, request)
        courier = self.recorder.courier
        try:
            if wait_s:
                courier.store(record, what, wait_s, self._retries)
            else:
                pipelined = self.settings.delivery == "pipelined" and self.recorder.role == events.CHILD
                courier.queue(record, what, remember=pipelined)
        except TooLarge as exc:
            raise _final(exc) from exc
        except PublishError as exc:
            self._here.unstored = task_id
            if isinstance(exc, NotAcknowledged) and self._comes_back(request):
                logger.error(  # noqa: TRY400 - no traceback to a user
                    "%s not stored in Kafka at %s: %s; its message goes back to the broker (reject_on_worker_lost)",
                    what, self.settings.bootstrap_servers, exc,
                )  # fmt: skip
                raise Reject(exc, requeue=True) from exc
            raise BackendStoreError(
                f"{what} not stored in Kafka at {self.settings.bootstrap_servers}: {exc}",
                task_id=task_id, state=state,
            ) from exc  # fmt: skip

    @cached_property
    def _retries(self) -> Retries:
        if not self.always_retry:
            return ONCE
        return Retries(self.max_retries, self.base_sleep_between_retries_ms, self.max_sleep_between_retries_ms)

    def _wait_s(self, task_id: str, request: Any) -> float:
        delivery = self.settings.delivery
        if delivery == "buffered" or self.recorder.role == events.PARENT:
            return 0.0  # the parent runs an event loop: it queues and goes on
        # Where the message is acknowledged when the task ends, its result has to be in Kafka by then.
        if delivery == "pipelined" and not self._acks_late(request):
            return 0.0
        if getattr(self._here, "unstored", None) == task_id:
            # Celery makes a FAILURE of a result that was not stored: Kafka had its time already.
            return 0.0
        self._here.unstored = None
        return self.settings.delivery_timeout_s

    def _comes_back(self, request: Any) -> bool:
        """Whether a task whose result cannot be stored is to run again, as if its child had died.

        Only a prefork child can say so: Celery's other pools lose a `Reject` from here.
        """
        task = self.app.tasks.get(field(request, "task") or "")
        in_child = bool(self.recorder.worker_pid) and self.recorder.worker_pid != self.recorder.pid
        return bool(in_child and task is not None and task.acks_late and task.reject_on_worker_lost)

    def _acks_late(self, request: Any) -> bool:
        task = self.app.tasks.get(field(request, "task") or "")
        return bool(task.acks_late if task is not None else self.app.conf.task_acks_late)

    def _state_event(self, task_id: str, result: Any, encoded: Any, state: str, traceback: Any, request: Any) -> Event:
        own = request if field(request, "id") == task_id else None
        planned = self._planned(task_id)
        who = planned.who if planned else self._identity(task_id, state, request)
        meta = self._meta(task_id, encoded, state, traceback, own)
        name = field(own, "task")
        if "args" in meta:
            meta["args"], meta["kwargs"] = self.recorder.redacted(name or "", meta["args"], meta["kwargs"])
        more = self._outcome(result, state)
        if state == states.RETRY:
            more["due"] = self.recorder.taken_due(task_id)
        more |= planned.more if planned else {}
        return self.recorder.event(
            (planned and planned.kind) or self._kind(result, state),
            task_id,
            who,
            own,
            state=state,
            date_done=meta["date_done"],
            expires_at=self._expires_at(who.wall, state, name),
            **self._documents(meta),
            **more,
        )

    def _meta(self, task_id: str, encoded: Any, state: str, traceback: Any, request: Any) -> dict[str, Any]:
        """Return the native document, as Celery's own method makes it.

        For the plainest and most frequent case without that method, a third of what storing a result costs: it looks
        up a setting (7 us) and converts time zones (8 us). A test compares the two.
        """
        if state == states.SUCCESS and request is not None and not (
            self._extended or request.group or request.parent_id
        ):  # fmt: skip
            meta = {
                "status": state,
                "result": encoded,
                "traceback": traceback,
                "children": self.current_task_children(request),
                "date_done": datetime.now(self.app.timezone).isoformat(),
            }
        else:
            meta = self._get_result_meta(result=encoded, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        return meta

    def _identity(self, task_id: str, state: str, request: Any) -> Identity:
        rank = _RANKS.get(state, Rank.UNREADY)
        own = field(request, "id") == task_id
        if state == states.REVOKED and not own:
            rank = Rank.GUESSED_REVOKED
        known = None if own else self._known(task_id)
        return self.recorder.identity(task_id, rank, request, known)

    def _known(self, task_id: str) -> tuple[int | None, int] | None:
        """Return the run and HLC that the view shows, for a write without a request (abort, revoke)."""
        try:
            shown = self.reader.shown(task_id)
        except Unavailable:
            return None
        if shown is None:
            return None
        wall = self.recorder.clock.wall_ms()
        # A publisher at 2099 may have left its run in the side record: the greatest that can be believed.
        runs = (order.trusted_run(shown.side.run if shown.side else None, wall), order.run_of_key(shown.key))
        return max((run for run in runs if run), default=None), shown.side.seen if shown.side else 0

    @staticmethod
    def _kind(result: Any, state: str) -> str:
        if state == states.FAILURE and type(result).__name__ in _LOST:
            return events.WORKER_LOST
        return _KINDS.get(state, events.STATE)

    @staticmethod
    def _outcome(result: Any, state: str) -> dict[str, Any]:
        if state in states.EXCEPTION_STATES and isinstance(result, BaseException):
            kind = type(result)
            return {"exception": f"{kind.__module__}.{kind.__qualname__}", "message": str(result)[:MESSAGE_LIMIT]}
        return {}

    def _expires_at(self, wall_ms: int, state: str, name: str | None) -> int | None:
        expires = self.failure_expires if state == states.FAILURE else self.expires
        task = self.app.tasks.get(name) if name else None
        own = getattr(task, "result_expires", None)
        if own is not None:
            expires = self.prepare_expires(own, type=float)
        return wall_ms + int(expires * 1000) if expires else None

    def _documents(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Return the native document as an event carries it: embedded JSON, or opaque with its parts."""
        if not self.compression and self.content_type == "application/json":
            try:
                document = ensure_bytes(self.encoder(meta))
            except Exception:  # noqa: BLE001 - whatever a serializer raises: kombu's way to it translates that
                document = ensure_bytes(self.encode(meta))
            if codec.is_json_document(document):
                return {"doc": msgspec.Raw(document)}
        else:
            document = ensure_bytes(self.encode(meta))
        return {"opaque": self._opaque(document, meta)}

    def _opaque(self, document: bytes, meta: dict[str, Any]) -> Opaque:
        def part(name: str) -> bytes | None:
            return self._part(meta[name]) if meta.get(name) is not None else None

        stamped = meta.get("stamped_headers")
        stamps = {one: meta[one] for one in stamped if one in meta} if stamped else None
        return Opaque(
            meta=document,
            content_type=self.content_type,
            result=self._part(meta["result"]),
            traceback=meta.get("traceback"),
            children=part("children"),
            args=part("args"),
            kwargs=part("kwargs"),
            stamps=self._part({"stamped_headers": stamped, "stamps": stamps}) if stamps is not None else None,
            plain=_plain(meta),
        )

    def _part(self, value: Any) -> bytes:
        return bytes(ensure_bytes(self._encode(value)[2]))

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
        with self._ending(task_id, exc, state, request, store_result):
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
        with self._ending(task_id, None, state, request, store_result, kind, more):
            super().mark_as_revoked(task_id, reason, request=request, store_result=store_result, state=state)

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
    ) -> Iterator[None]:
        """Fix the end's identity, send the part with it; keep Celery from sending it a second time."""
        if not stored and field(request, "is_eager"):
            yield  # ran in the caller: nobody else knows of it, and nothing is kept
            return
        here = self._here
        ending = _Ending(
            task_id, self._identity(task_id, state, request), kind or self._kind(result, state), more or {}
        )
        outer = getattr(here, "planned", None), getattr(here, "parted", None)
        try:
            if field(request, "chord") and field(request, "id") == task_id:
                self._send_part(request, state, result, ending.who, stored)
                here.parted = task_id
            if stored:
                here.planned = ending
            else:
                self._log_ignored(ending, result, state, request)
            yield
        finally:
            here.planned, here.parted = outer

    def _planned(self, task_id: str) -> _Ending | None:
        planned: _Ending | None = getattr(self._here, "planned", None)
        if planned is None or planned.task_id != task_id:
            return None
        self._here.planned = None  # once: _fail_chain and errbacks store other things inside
        return planned

    def _log_ignored(self, ending: _Ending, result: Any, state: str, request: Any) -> None:
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

    # -- forgetting and groups ---------------------------------------------------------------

    def _forget(self, task_id: str) -> None:
        """Append a forget, and return when the primary view shows nothing of the task.

        Raises:
            BackendStoreError: Kafka did not acknowledge it.
        """
        run: int | None = None
        for _ in range(2):
            known = self._known(task_id)
            run = (known[0] if known else None) or run
            who = self.recorder.identity(task_id, None)
            who.run, who.key = run, order.forget_key(run)
            event = self.recorder.event(
                events.FORGOTTEN, task_id, who, expires_at=who.wall + self.settings.retention_ms
            )
            if run is not None:
                self.recorder.forgotten.keep(task_id, run)
            if not self._append_shown(event, events.FORGOTTEN):
                self._forget_unseen(task_id, run)
                return
            # The view has folded all before the forget; only now is the run of what it showed certain.
            known = self._known(task_id)
            if known is None or not known[0] or known[0] == run:
                return

    def _forget_unseen(self, task_id: str, run: int | None) -> None:
        """Forget what a view that lags does not show yet, too: every run up to now."""
        latest = order.run_at(self.recorder.clock.wall_ms())
        if run is not None and run >= latest:
            return
        who = self.recorder.identity(task_id, None)
        who.run, who.key = latest, order.forget_key(latest)
        expires = who.wall + self.settings.retention_ms
        event = self.recorder.event(events.FORGOTTEN, task_id, who, expires_at=expires)
        self.recorder.forgotten.keep(task_id, latest)
        self.barrier.keep_unshown(event, *self._append(event, events.FORGOTTEN))

    def _append_shown(self, event: Event, what: str) -> bool:
        """Append an event and wait, bounded, until the primary view has folded it."""
        timeout_s = self.settings.barrier_timeout_s
        partition, offset = self._append(event, what)
        if self.reader.passed(partition, offset, timeout_s):
            return True
        self.barrier.keep_unshown(event, partition, offset)
        logger.warning(
            "%s of %s is safe in Kafka, but %s has not shown it within %g s: does a processor run?",
            what, event.task, mask(self.settings.views[0]), timeout_s,
        )  # fmt: skip
        return False

    def _append(self, event: Event, what: str) -> Stored:
        """Append an event; return where it is.

        Raises:
            BackendStoreError: Kafka did not acknowledge it within ``delivery_timeout_s``.
        """
        try:
            return self.recorder.courier.carry(
                self.recorder.record(event),
                f"{what} of {event.task}",
                self.settings.delivery_timeout_s,
                self._retries,
            ).stored
        except TooLarge as exc:
            raise _final(exc) from exc
        except PublishError as exc:
            raise BackendStoreError(
                f"{what} of {event.task} not stored in Kafka at {self.settings.bootstrap_servers}: {exc}",
                task_id=event.task, state=what,
            ) from exc  # fmt: skip

    def _group_run(self, group_id: str) -> int:
        run = order.run_at(self.recorder.clock.wall_ms())
        forgotten = self.recorder.forgotten.get(f"group {group_id}")
        return forgotten + 1 if forgotten is not None and forgotten >= run else run

    def _save_group(self, group_id: str, result: GroupResult) -> GroupResult:
        who = self.recorder.identity(group_id, None)
        who.run = self._group_run(group_id)
        who.key = order.order_key(Rank.UNREADY, who.hlc, who.run)
        expires = self._expires_at(who.wall, states.SUCCESS, None)
        event = self.recorder.event(
            events.GROUP_SAVED, group_id, who, group=group_id, expires_at=expires,
            **self._documents({"result": self.prepare_value(result)}),
        )  # fmt: skip
        self._append_shown(event, events.GROUP_SAVED)
        return result

    def _delete_group(self, group_id: str) -> None:
        who = self.recorder.identity(group_id, None)
        who.run = self._group_run(group_id)
        who.key = order.forget_key(who.run)
        self.recorder.forgotten.keep(f"group {group_id}", who.run)
        event = self.recorder.event(
            events.GROUP_DELETED, group_id, who, group=group_id, expires_at=who.wall + self.settings.retention_ms
        )
        self._append_shown(event, events.GROUP_DELETED)

    # -- chords ------------------------------------------------------------------------------

    def apply_chord(self, header_result_args: tuple[Any, ...], body: Any, **_: Any) -> None:
        """Declare a chord; acknowledged before any header task is sent.

        Raises:
            OperationalError: Kafka did not acknowledge it within ``publish_timeout_s``.
        """
        self.ensure_chords_allowed()
        group_id = header_result_args[0]
        request = current_request()
        clock = self.recorder.clock
        # A chord frozen inside this message is declared again, as the same one, by a redelivery.
        held = request is not None and (body.options.get("task_id") in held_ids(request))
        generation = (field(request, names.HLC) if held else None) or clock.tick()
        body.options[names.GENERATION] = generation
        self.recorder.generations.keep(group_id, generation)
        content_type, content_encoding, encoded = dumps(
            without_bodies(dict(body)), serializer=self.app.conf.task_serializer
        )
        delivery_info = field(request, "delivery_info") or {}
        record = chord_records.Declared(
            group=group_id,
            generation=generation,
            body=ensure_bytes(encoded),
            content_type=content_type,
            content_encoding=content_encoding,
            body_task_id=body.options.get("task_id") or body.id,
            body_name=body.task or "",
            immutable=bool(body.immutable),
            root=field(request, "root_id"),
            parent=field(request, "id"),
            priority=delivery_info.get("priority"),
            stamps=_stamps(request),
            group_result=self._shape(header_result_args[1]),
            at=clock.wall_ms(),
            host=self.recorder.host,
            pid=self.recorder.pid,
        )
        if self.settings.chord_key:
            record = chord_records.sign(record, self.settings.chord_key)
        self._declare(record, "declaring")

    def _shape(self, results: Any) -> bytes | None:
        """Return how the header is nested, encoded as the body is; None if it is flat.

        A generator is not unrolled to find out: Celery does not either, and its results come out flat.
        """
        if isinstance(results, _regen) or not any(isinstance(one, GroupResult) for one in results):
            return None
        shape = _nesting(self.app.GroupResult(None, results))
        return bytes(ensure_bytes(dumps(shape, serializer=self.app.conf.task_serializer)[2]))

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Say how many parts a chord has; acknowledged before its last header task is sent.

        Raises:
            OperationalError: As `apply_chord`.
        """
        generation = self.recorder.generations.get(group_id)
        if generation is None:
            request = current_request()
            generation = _generation(field(request, "chord")) if field(request, "group") == group_id else None
        if generation is None:
            return  # a group inside a chord declared elsewhere: its size is part of that one's
        at = self.recorder.clock.wall_ms()
        self._declare(chord_records.Sized(group=group_id, generation=generation, size=chord_size, at=at), "sizing")

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Let a chord wait for one more task; acknowledged before that is sent.

        Raises:
            OperationalError: As `apply_chord`.
        """
        request = current_request()
        generation = _generation(field(request, "chord")) or self.recorder.generations.get(chord_id)
        if generation is None:
            return
        record = chord_records.Extended(
            group=chord_id,
            generation=generation,
            task=result.id,
            by=field(request, "id"),
            at=self.recorder.clock.wall_ms(),
        )
        self._declare(record, "extending")

    def _declare(self, record: chord_records.Record, doing: str) -> None:
        try:
            encoded = self.recorder.chord_record(record.group, *chord_records.encode(record))
            self.recorder.courier.carry(encoded, f"{doing} chord {record.group}", self.settings.publish_timeout_s)
        except TooLarge as exc:
            raise _final(exc) from exc
        except PublishError as exc:
            raise OperationalError(
                f"{doing} chord {record.group} in Kafka at {self.settings.bootstrap_servers}: {exc}"
            ) from exc

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_: Any) -> None:
        """Send a member's outcome, unless `_ending` has already done so."""
        task_id = field(request, "id")
        if getattr(self._here, "parted", None) == task_id:
            return
        # Of a failed chain, or a chord's body failed by the chord processor: any canvas, none of which ever ran.
        for member in members(request):
            self._send_part(member, state, result, self._identity(member.id, state, member), stored=True)

    def _send_part(self, request: Any, state: str, result: Any, who: Identity, stored: bool) -> None:
        group_id, task_id, chord = field(request, "group"), field(request, "id"), field(request, "chord")
        generation = _generation(chord)
        if not group_id or not task_id:
            return
        if generation is None:
            logger.error(
                "task %s belongs to a chord that was begun on another result backend: %s will not hear of it",
                task_id,
                group_id,
            )
            return
        succeeded = state == states.SUCCESS
        ignored = succeeded and not stored
        content_type = content_encoding = ""
        payload = b""
        if not (ignored or (succeeded and chord.get("immutable"))):
            if state == states.REVOKED and result is None:
                result = _revoked()
            content_type, content_encoding, encoded = self._encode(self.encode_result(result, state))
            payload = bytes(ensure_bytes(encoded))
        record = chord_records.Part(
            group=group_id,
            generation=generation,
            task=task_id,
            index=field(request, "group_index"),
            id=who.id,
            key=who.key,
            state=state,
            result=payload,
            content_type=content_type,
            content_encoding=content_encoding or "",
            ignored=ignored,
            exception="" if succeeded else repr(result)[: chord_records.EXCEPTION_LIMIT],
            root=field(request, "root_id"),
            parent=field(request, "parent_id"),
            priority=(field(request, "delivery_info") or {}).get("priority"),
            stamps=_stamps(request),
            at=who.wall,
            worker=field(request, "hostname") or "",
            told=tuple(field(request, "told") or ()),
        )
        try:
            encoded_part = self.recorder.chord_record(group_id, *chord_records.encode(record))
        except TooLarge as exc:
            raise _final(exc) from exc
        self._store(encoded_part, f"part of chord {group_id} by {task_id}", task_id, state, request)


def _final(exc: TooLarge) -> EncodeError:
    """Celery makes a FAILURE of an `EncodeError`, and tries nothing again."""
    return EncodeError(str(exc))


def _settings(app: Celery, url: str | None) -> Settings:
    try:
        return configure.settings_of(app, url)
    except ImproperlyConfigured as exc:
        if not _in_worker():
            raise
        raise _end_of_worker(exc) from None


def _open(recorder: Recorder) -> None:
    """Make the worker's connection: it is to end at once if a setting is wrong, not to fail every task."""
    with suppress(NotAcknowledged):  # no token yet: said in the log, and asked for again
        try:
            recorder.publisher.open()
            if recorder.settings.claim_check:
                Claims(recorder.settings)
        except SettingsError as exc:
            raise _end_of_worker(configure.improperly_configured(exc)) from None


def _end_of_worker(exc: ImproperlyConfigured) -> SystemExit:
    # A worker that starts logs any exception with its traceback; SystemExit ends it with this line alone.
    logger.critical("%s", exc)
    return SystemExit(exc.exit_code)


def _worker_ready(sender: Any = None, **_: Any) -> None:
    backend = sender.app.backend if sender is not None else None
    if isinstance(backend, KafkaBackend):
        try:
            configure.check_tasks(backend.app, backend.settings)
            configure.check_spool(backend.settings)
        except ImproperlyConfigured as exc:
            raise _end_of_worker(exc) from None


def _measure(recorder: Recorder) -> None:
    from celery_kafka_backend.producer import metering  # noqa: PLC0415 - only where metrics are wanted

    try:
        metering.measure(recorder)
    except SettingsError as exc:
        raise _end_of_worker(configure.improperly_configured(exc)) from None


def _in_worker() -> bool:
    return bool(getattr(trace, "_localized", None))


def _generation(chord: Any) -> int | None:
    found = (chord.get("options") or {}).get(names.GENERATION) if isinstance(chord, dict) else None
    return found if isinstance(found, int) else None


def _nesting(result: Any) -> list[Any]:
    """Return a result as ``as_tuple()`` does, without its parents: a chain would repeat them in every member."""
    children = [_nesting(child) for child in result.results] if isinstance(result, GroupResult) else None
    return [[result.id, None], children]


def _stamps(request: Any) -> dict[str, Any] | None:
    stamped = field(request, "stamped_headers")
    if not stamped:
        return None
    stamps = field(request, "stamps") or {}
    return {"stamped_headers": list(stamped), **{one: plain(stamps.get(one)) for one in stamped}}


def _revoked() -> BaseException:
    from celery.exceptions import TaskRevokedError  # noqa: PLC0415 - what Celery itself stores

    return TaskRevokedError("revoked")  # type: ignore[no-any-return]


def _unpickled(cls: type[KafkaBackend], kwargs: dict[str, Any]) -> KafkaBackend:
    """Return the backend of a result that comes out of a pickle, a saved group's for one.

    The app's own where it is the same: that one hears for whoever waits, another would wait in vain.
    """
    app = current_app._get_current_object()  # noqa: SLF001 - how Celery's own unpickle_backend finds it
    own = app.backend
    return own if type(own) is cls and own.url == kwargs["url"] else cls(app, **kwargs)


def _plain(meta: dict[str, Any]) -> dict[str, Any] | None:
    """Return what of a document's parts JSON can say, for `Opaque.plain`."""
    parts = {name: meta[name] for name in ("children", "args", "kwargs") if meta.get(name)}
    if "status" not in meta:  # a saved group: (id and parent, members)
        parts = {"children": meta["result"][1]}
    found = {}
    for name, value in parts.items():
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            found[name] = msgspec.json.decode(msgspec.json.encode(value))
    return found or None
