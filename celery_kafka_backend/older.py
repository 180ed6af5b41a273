"""Celery's own base classes, with what older versions lack of Celery 5.7, which the rest of this package is written for.

Each piece says what would happen without it. With Celery 5.7 as the floor, this module goes, and Celery's own names take
its place. It knows nothing of Kafka, events or views.
"""

from __future__ import annotations

import sys
import time
from datetime import timezone
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

from celery import VERSION, group, states
from celery.app.task import Context
from celery.backends import asynchronous
from celery.backends.base import BaseKeyValueStoreBackend
from celery.exceptions import BackendGetMetaError, WorkerLostError
from celery.utils.functional import maybe_list
from celery.utils.log import get_logger
from celery.utils.time import get_exponential_backoff_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import tzinfo

    from celery import Celery

logger = get_logger(__name__)

LACKS: Final = VERSION[:2] < (5, 7)
"""Whether this Celery needs what is here."""


def ignores_result(task: Any, request: Any) -> bool:
    """Whether nothing is stored of how an execution ends."""
    asked = vars(request).get("ignore_result")  # its class has a default, which is nobody's wish
    if LACKS:  # who calls a task can ask for less than it stores, not for more
        return bool(task.ignore_result or asked)
    return bool(task.ignore_result if asked is None else asked)


def stores_started(task: Any, request: Any) -> bool:
    """Whether Celery stores that an execution starts."""
    ignored = task.ignore_result if LACKS else ignores_result(task, request)
    return bool(task.track_started and not ignored)


def had_succeeded(backend: Any, task_id: str, exc: BaseException, request: Any) -> bool:
    """Whether a task had succeeded before its child was lost, which is no failure of it: errbacks, chain and chord go on.

    Celery 5.7 asks by itself, and stores no failure then.
    """
    if not LACKS or not isinstance(exc, WorkerLostError) or getattr(request, "ignore_result", False):
        return False
    try:
        succeeded = backend._get_task_meta_for(task_id)["status"] == states.SUCCESS  # noqa: SLF001 - as Celery 5.7 asks
    except BackendGetMetaError:  # nobody can tell
        return False
    if succeeded:
        logger.warning("Task %s[%s] succeeded before the worker was lost: %r", request.task, task_id, exc)
    return bool(succeeded)


def name_body(body: Any) -> None:
    """Give a chord's body that is a chain the id under which it ends; before Celery 5.6 it has none, and cannot be declared."""
    if not body.id:
        body.options["task_id"] = body._frozen[1][0].id  # noqa: SLF001 - what `chord.run` has just made, the last one first


def zone_of_documents(app: Celery) -> tzinfo:
    """Return the time zone of a document's ``date_done``."""
    if VERSION[:2] < (5, 5):
        return timezone.utc
    found: tzinfo = app.timezone
    return found


# -- writing: retries, and the ends of what never ran ---------------------------------------------


class _Backend(BaseKeyValueStoreBackend):  # type: ignore[misc]
    compression: str | None = None
    """Of results: such a Celery has no ``result_compression``."""

    def _ensure_retryable(self, func: Callable[..., Any], *args: Any) -> Any:
        """Call what ``result_backend_always_retry`` may call again, within its bounds."""
        attempt = 0
        while True:
            try:
                return func(*args)
            except Exception as exc:
                if not (self.always_retry and self.exception_safe_to_retry(exc) and attempt < self.max_retries):
                    raise
            attempt += 1
            longest_ms = self.max_sleep_between_retries_ms
            time.sleep(
                get_exponential_backoff_interval(
                    self.base_sleep_between_retries_ms, attempt, longest_ms, full_jitter=True
                ) / 1000
            )  # fmt: skip

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
        """Store a failure; of what was chained after it, also the bodies of chords, which would stay PENDING."""
        super().mark_as_failure(
            task_id, exc, traceback=traceback, request=request, store_result=store_result,
            call_errbacks=call_errbacks, state=state,
        )  # fmt: skip
        for step in getattr(request, "chain", None) or ():
            for body in _bodies(step):
                self._fail_step(body, exc, traceback, store_result, state)

    def chord_error_from_stack(self, callback: Any, exc: Any = None) -> Any:
        """Fail a chord's body; all of a group, and what was chained after it, which would stay PENDING."""
        exc = exc or sys.exc_info()[1]
        if isinstance(callback, group):
            self._fail_group(callback, exc)
            found = None
        else:
            found = super().chord_error_from_stack(callback, exc)
        self._fail_chain(callback.options.get("chain"), exc)
        return found

    def _fail_group(self, canvas: Any, exc: BaseException) -> None:
        """Fail every task of a group that is not sent. Only Celery 5.6 does, without their own errbacks."""
        cause = exc.__cause__ or exc
        results = canvas.freeze().results
        for result, task in zip(results, canvas.tasks, strict=True):
            ended, errbacks = _end_of(task, maybe_list(canvas.options.get("link_error")) or ())
            if isinstance(ended, group):
                self._fail_group(ended, exc)
                continue
            request = Context(id=result.id, errbacks=errbacks, delivery_info={}, task=ended.task)
            try:
                self._call_task_errbacks(request, cause, None)
            except Exception:
                logger.exception("an errback of task %s failed", result.id)
            self.mark_as_failure(result.id, cause)
        self.mark_as_failure(canvas.id, cause)

    def _fail_chain(
        self, chain: Any, exc: Any, traceback: Any = None, store_result: bool = True, state: str = states.FAILURE
    ) -> None:
        """Fail what was chained after a failure."""
        for step in chain or ():
            self._fail_step(step, exc, traceback, store_result, state)
            for body in _bodies(step):
                self._fail_step(body, exc, traceback, store_result, state)

    def _fail_step(self, step: Any, exc: Any, traceback: Any, store_result: bool, state: str) -> None:
        options = step["options"]
        request = Context(step)
        request.update(options, id=options.get("task_id"), group=options.get("group_id"))
        if store_result and state in states.PROPAGATE_STATES and request.id is not None:
            self.store_result(request.id, exc, state, traceback=traceback, request=request)
        if "chord" in options:
            self.on_chord_part_return(request, state, exc)


def _bodies(step: Any) -> Iterator[Any]:
    """Yield the body of a chord, and of that one's body: a chord's end is its body's."""
    while step.get("subtask_type") == "chord" and (step := (step.get("kwargs") or {}).get("body")) is not None:
        yield step


def _end_of(task: Any, errbacks: Any) -> tuple[Any, list[Any]]:
    """Return the signature whose end a task's end is, and the errbacks that hear of it, each once."""
    heard = list(maybe_list(task.options.get("link_error")) or ())
    while task.get("subtask_type") == "chord" and task.body is not None:
        task = task.body
        heard += maybe_list(task.options.get("link_error")) or ()
    heard += errbacks
    return task, [one for number, one in enumerate(heard) if one not in heard[:number]]


# -- waiting --------------------------------------------------------------------------------------


class _AsyncBackendMixin(asynchronous.AsyncBackendMixin):  # type: ignore[misc]
    """Keeps every result that waits for an id; older ones keep the first, and the others wait for ever (celery#4925)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._waiters: dict[str, tuple[dict[int, Any], WeakValueDictionary[int, Any]]] = {}
        super().__init__(*args, **kwargs)

    def _add_pending_result(self, task_id: str, result: Any, weak: bool = False) -> None:
        if not any(one is result for one in self.waiting_for(task_id)):
            # By object: results of one id are equal.
            self._waiters.setdefault(task_id, ({}, WeakValueDictionary()))[weak][id(result)] = result
            self.result_consumer.consume_from(task_id)

    def remove_pending_result(self, result: Any) -> Any:
        """Let a result wait no more; others of its id go on."""
        for kept in self._waiters.get(result.id, ()):
            if kept.get(id(result)) is result:
                kept.pop(id(result), None)
        if not self.waiting_for(result.id):
            self._waiters.pop(result.id, None)
            self.on_result_fulfilled(result)
        return result

    def waiting_for(self, task_id: str) -> list[Any]:
        """Return the results that wait for an id."""
        return [result for kept in self._waiters.get(task_id, ()) for result in list(kept.values())]


class _ResultConsumer(asynchronous.BaseResultConsumer):  # type: ignore[misc]
    """Tells every result that waits for an id."""

    def _wait_for_pending(self, result: Any, **kwargs: Any) -> Iterator[None]:
        """Wait; older ones do for a moment also where everything is there."""
        if result.on_ready.ready:
            yield  # `iter_native` hands on what it has
        else:
            yield from super()._wait_for_pending(result, **kwargs)

    def on_state_change(self, meta: dict[str, Any], message: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Hand on what became of a task."""
        if self.on_message:
            self.on_message(meta)
        if meta["status"] not in states.READY_STATES:
            return
        waiting = self.backend.waiting_for(meta["task_id"])
        if not waiting:
            self._pending_messages.put(meta["task_id"], meta)  # for who asks next
        for result in waiting:
            result._maybe_set_cache(meta)  # noqa: SLF001 - as Celery's own
            bucket = self.buckets.pop(result, None)
            if bucket is not None:
                bucket.append(result)


KeyValueBackend: Final[Any] = _Backend if LACKS else BaseKeyValueStoreBackend
AsyncBackendMixin: Final[Any] = _AsyncBackendMixin if LACKS else asynchronous.AsyncBackendMixin
BaseResultConsumer: Final[Any] = _ResultConsumer if LACKS else asynchronous.BaseResultConsumer
