"""How the backend writes: a state or a group becomes a document, the document an event, the event a record in Kafka."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from billiard.exceptions import SoftTimeLimitExceeded
from celery import states
from celery.exceptions import BackendStoreError, Reject
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from kombu.utils import json as kombu_json
from kombu.utils.encoding import bytes_to_str, ensure_bytes

from celery_kafka_backend import codec, events, older, order, threads
from celery_kafka_backend.claims import stub
from celery_kafka_backend.errors import NotAcknowledged, PublishError, TooLarge, Unavailable, Unsure
from celery_kafka_backend.events import Opaque
from celery_kafka_backend.order import Rank
from celery_kafka_backend.producer.courier import ONCE, Retries
from celery_kafka_backend.producer.recorder import (
    MESSAGE_LIMIT,
    field,
    workflow,
)
from celery_kafka_backend.reads import Reading, Reads

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import GroupResult

    from celery_kafka_backend.events import Event
    from celery_kafka_backend.producer.publisher import Delivery, Record, Stored
    from celery_kafka_backend.producer.recorder import Identity

logger = get_logger(__name__)

_JSON: Final = kombu_json.JSONEncoder(allow_nan=False)
_LOST: Final = frozenset({"WorkerLostError"})
_BESIDE: Final = (("children",), ("args", "kwargs"), ("children", "args", "kwargs"))
"""What a document can do without, rather than that its result cannot be stored; the least first."""
SET_S: Final = 1.0
"""How long whoever sets a state outside of any task waits for it to be seen; Celery itself does not."""


class Ending(NamedTuple):
    """The end of a task, fixed before the part and the state are sent.

    Of a chord's member it has the state's record: what cannot be stored must not count in the chord.
    """

    task_id: str
    who: Identity
    kind: str
    more: dict[str, Any]
    record: Record | None = None


class Here(Reading):
    """What one thread is at.

    Attributes:
        planned: The end of a task that is about to be stored.
        parted: The task whose chord part is sent.
        unstored: The task whose result could not be stored.
        stored: The task whose planned end is in Kafka, and its delivery, where that is known.
        counting: Whether a chord of Celery's own backend is being counted.
    """

    planned: Ending | None = None
    parted: str | None = None
    unstored: str | None = None
    stored: tuple[str, Delivery] | None = None
    counting = False


class Writes(Reads):
    """The writing half of `backend.KafkaBackend`."""

    _here: Here

    def __init__(self, app: Celery | None, url: str | None, **kwargs: Any) -> None:
        super().__init__(app=app, url=url, expires_type=float, **kwargs)
        failure = self.app.conf.get("result_failure_expires")
        self.failure_expires: float | None = (
            self.expires if failure is None else self.prepare_expires(failure, type=float)
        )
        self._extended = bool(self.app.conf.find_value_for_key("extended", "result"))
        self._here = Here()

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
        planned = self._planned(task_id)
        record = planned and planned.record
        if record is None:
            event = self._state_event(task_id, result, encoded, state, traceback, request, planned)
            record = self._state_record(event, encoded, traceback, request)
        if state in states.READY_STATES:
            delivery = self._store(record, f"{state} of {task_id}", task_id, state, request)
            if planned is not None and delivery is not None and delivery.offset >= 0:
                self._here.stored = task_id, delivery
        else:
            self.recorder.publisher.cast(record)
            if request is None:  # an abort, or a state set from outside: what comes next may depend on it
                self._see_through(task_id)
        return encoded

    def _see_through(self, task_id: str) -> None:
        """Wait, for a moment, for what was cast: in a worker until its own reads find it, else until anybody's do."""
        role, publisher = self.recorder.role, self.recorder.publisher
        if role == events.CHILD:
            publisher.send_casts()
            return
        deadline = time.monotonic() + SET_S
        publisher.flush(SET_S)
        if role == events.CLIENT and (left_s := deadline - time.monotonic()) > 0:
            ask = partial(self.barrier.caught_up, [task_id], self.reader.positions, left_s, patient=False)
            with suppress(Unsure, Unavailable, TimeoutError):
                threads.within(left_s, ask, "celery-kafka-barrier")

    def _state_record(self, event: Event, encoded: Any, traceback: Any, request: Any) -> Record:
        if event.state in states.READY_STATES and self.settings.claim_check:
            event = self._claimed(event, request)
        try:
            return self.recorder.record(event)
        except TooLarge as exc:
            lighter = self._lighter(event, encoded, traceback, request, exc)
            if lighter is None:
                raise encode_error(exc) from exc
            return lighter

    def _lighter(self, event: Event, encoded: Any, traceback: Any, request: Any, why: TooLarge) -> Record | None:
        """Return the record of a state without what is beside its result, if it is that which makes it too large.

        A task that sends thousands of others has them all in its document, and ``result_extended`` its arguments.
        """
        meta = self._native(event.task, encoded, event.state or "", traceback, _own(event.task, request))
        meta["date_done"] = event.date_done
        tried: list[dict[str, None]] = [{}]
        for names in _BESIDE:
            without = {name: None for name in names if meta.get(name)}
            if without in tried:
                continue
            tried.append(without)
            document = {"doc": events.NOTHING, "opaque": None} | self._documents(meta | without)
            try:
                record = self.recorder.record(msgspec.structs.replace(event, **document))
            except TooLarge:
                continue
            logger.warning(
                "%s of %s is stored without its %s: %s; `trail=False` keeps no children, `claim_check` stores it whole",
                event.state, event.task, " and ".join(without), why,
            )  # fmt: skip
            return record
        return None

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

    def _store(self, record: Record, what: str, task_id: str, state: str, request: Any) -> Delivery | None:
        """See what must not be lost into Kafka, as far as ``delivery`` says; return where it is, if that is known."""
        wait_s = self._wait_s(task_id, request)
        courier = self.recorder.courier
        try:
            if wait_s:
                return courier.store(record, what, wait_s, self._retries)
            pipelined = self.settings.delivery == "pipelined" and self.recorder.role == events.CHILD
            courier.queue(record, what, remember=pipelined)
        except TooLarge as exc:
            raise encode_error(exc) from exc
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
        return None

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
        if self._here.unstored == task_id:
            # Celery makes a FAILURE of a result that was not stored: Kafka had its time already.
            return 0.0
        self._here.unstored = None
        return self.settings.delivery_timeout_s

    def _comes_back(self, request: Any) -> bool:
        """Whether a task whose result cannot be stored is to run again, as if its child had died.

        Only a prefork child can say so: Celery's other pools lose a `Reject` from here.
        """
        task = self._tasks.get(field(request, "task") or "")
        in_child = bool(self.recorder.worker_pid) and self.recorder.worker_pid != self.recorder.pid
        return bool(in_child and task is not None and task.acks_late and task.reject_on_worker_lost)

    def _acks_late(self, request: Any) -> bool:
        task = self._tasks.get(field(request, "task") or "")
        return bool(task.acks_late if task is not None else self.app.conf.task_acks_late)

    def _state_event(
        self,
        task_id: str,
        result: Any,
        encoded: Any,
        state: str,
        traceback: Any,
        request: Any,
        planned: Ending | None = None,
    ) -> Event:
        own = _own(task_id, request)
        who = planned.who if planned else self._identity(task_id, state, request)
        meta = self._native(task_id, encoded, state, traceback, own)
        more = self._outcome(result, state)
        if state == states.RETRY:
            more["due"] = self.recorder.taken_due(task_id)
        more |= planned.more if planned else {}
        if self._here.failing_chain and (root := workflow().get("root")):
            more["root"] = root  # the signature of what was chained does not say whose workflow it is of
        return self.recorder.event(
            (planned and planned.kind) or self._kind(result, state),
            task_id,
            who,
            own,
            state=state,
            date_done=meta["date_done"],
            expires_at=self._expires_at(who.wall, state, field(own, "task")),
            **self._documents(meta),
            **more,
        )

    def _native(self, task_id: str, encoded: Any, state: str, traceback: Any, own: Any) -> dict[str, Any]:
        """Return the native document as it is stored."""
        meta = self._meta(task_id, encoded, state, traceback, own)
        if "args" in meta:
            meta["args"], meta["kwargs"] = self.recorder.redacted(
                field(own, "task") or "", meta["args"], meta["kwargs"]
            )
        return meta

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
                "date_done": datetime.now(self._timezone).isoformat(),
            }
        else:
            meta = self._get_result_meta(result=encoded, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        return meta

    def _identity(self, task_id: str, state: str, request: Any) -> Identity:
        rank = order.rank_of(state)
        own = field(request, "id") == task_id
        if state == states.REVOKED and not own:
            rank = Rank.GUESSED_REVOKED
        known = None if own else self._known(task_id)
        return self.recorder.identity(task_id, rank, request, known)

    def _known(self, task_id: str) -> tuple[int | None, int] | None:
        """Return the run and HLC that the view shows, for a write without a request (abort, revoke)."""
        try:
            shown = self._within_bounds(lambda _: self.reader.shown(task_id))
        except (Unavailable, Unsure):
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
        return events.kind_of(state)

    @staticmethod
    def _outcome(result: Any, state: str) -> dict[str, Any]:
        if state in states.EXCEPTION_STATES and isinstance(result, BaseException):
            kind = type(result)
            return {"exception": f"{kind.__module__}.{kind.__qualname__}", "message": str(result)[:MESSAGE_LIMIT]}
        return {}

    def _expires_at(self, wall_ms: int, state: str, name: str | None) -> int | None:
        expires = self.failure_expires if state == states.FAILURE else self.expires
        task = self._tasks.get(name) if name else None
        own = getattr(task, "result_expires", None)
        if own is not None:
            expires = self.prepare_expires(own, type=float)
        kept_ms = events.kept_ms(expires)
        return wall_ms + kept_ms if kept_ms else None

    def _documents(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Return the native document as an event carries it: embedded JSON, or opaque with its parts."""
        if self._plain_json and (text := _json(meta)) is not None:
            return {"doc": msgspec.Raw(text.encode())}
        document = ensure_bytes(self.encode(meta))
        if not self.compression and self.content_type == "application/json" and codec.is_json_document(document):
            return {"doc": msgspec.Raw(document)}
        return {"opaque": self._opaque(document, meta)}

    # Celery's own cached properties take a lock at each look: 0.5 us for what does not change.

    @cached_property
    def _plain_json(self) -> bool:
        """Whether documents are written by kombu's own JSON encoder, and nothing else."""
        return not self.compression and self.encoder is kombu_json.dumps

    @cached_property
    def _tasks(self) -> Any:
        return self.app.tasks

    @cached_property
    def _timezone(self) -> Any:
        return older.zone_of_documents(self.app)

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

    def _planned(self, task_id: str) -> Ending | None:
        planned = self._here.planned
        if planned is None or planned.task_id != task_id:
            return None
        self._here.planned = None  # once: _fail_chain and errbacks store other things inside
        return planned

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
        self.barrier.keep_unshown(event, self._append(event, events.FORGOTTEN))

    def _append_shown(self, event: Event, what: str) -> bool:
        """Append an event and wait, bounded, until the primary view has folded it."""
        timeout_s = self.settings.barrier_timeout_s
        stored = self._append(event, what)
        if self.barrier.passed(stored, self.reader.positions, timeout_s):
            return True
        self.barrier.keep_unshown(event, stored)
        logger.warning(
            "%s of %s is safe in Kafka, but %s has not shown it within %g s: does a processor run?",
            what, event.task, self.reader.view.url, timeout_s,
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
            raise encode_error(exc) from exc
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


def _json(meta: dict[str, Any]) -> str | None:
    """Return the document as kombu's own encoder writes it, if that can be embedded for certain; None: look closer."""
    try:
        text = _JSON.encode(meta)
    except SoftTimeLimitExceeded:
        raise
    except Exception:  # noqa: BLE001 - NaN, or what no serializer can say: kombu's way to it translates that
        return None
    # Half a surrogate pair, or nested deeper than every reader goes: the only other things that cannot.
    return None if "\\ud" in text or text.count("[") + text.count("{") > codec.MAX_DEPTH else text


def _own(task_id: str, request: Any) -> Any:
    # Another task's says nothing of this one; one without an id is Celery's own for a message of an unknown task.
    return request if field(request, "id") in (None, task_id) else None


def encode_error(exc: TooLarge) -> EncodeError:
    """Celery makes a FAILURE of an `EncodeError`, and tries nothing again."""
    return EncodeError(str(exc))


def _plain(meta: dict[str, Any]) -> dict[str, Any] | None:
    """Return what of a document's parts JSON can say, for `Opaque.plain`."""
    parts = {name: meta[name] for name in ("children", "args", "kwargs") if meta.get(name)}
    if "status" not in meta:  # a saved group: (id and parent, members)
        parts = {"children": meta["result"][1]}
    found = {}
    for name, value in parts.items():
        with suppress(TypeError, ValueError, RecursionError):
            found[name] = msgspec.json.decode(msgspec.json.encode(value))
    return found or None
