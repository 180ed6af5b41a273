"""Celery's signals, each turned into at most one event; and the headers that a message carries for us.

Connected once per process, by the first backend made in it. None of the handlers may fail or
block: they run inside ``delay()`` and inside the worker's event loop.
"""

from __future__ import annotations

import logging
import os
import time
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from billiard.process import current_process
from celery import signals
from celery import states as states_of
from celery.app import trace

from celery_kafka_backend import events, older, order, ownership
from celery_kafka_backend.errors import PipelineError, PublishError, SettingsError
from celery_kafka_backend.producer import greenlets, schedule
from celery_kafka_backend.producer import headers as names
from celery_kafka_backend.producer.recorder import (
    BEGAN,
    MESSAGE_LIMIT,
    body_id,
    current_request,
    field,
    held_ids,
    millis,
    plain,
    recorders,
)
from celery_kafka_backend.producer.stubs import is_declared, stub, without_bodies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from celery_kafka_backend.producer.recorder import Recorder

logger = logging.getLogger(__name__)

_Handler = TypeVar("_Handler", bound="Callable[..., None]")

CHILD_FLUSH_S: Final = 5.0
"""What a process of a worker waits at its end for what it queued; acknowledged results are not among it."""

OWNER_S: Final = 5.0
"""How long a worker that starts waits to hear whose log it is."""


def _harmless(handler: _Handler) -> _Handler:
    """Keep an error of ours out of the user's ``delay()`` and the worker's loop; say it in the log."""

    @wraps(handler)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            handler(*args, **kwargs)
        except PipelineError as exc:
            logger.error("recording a signal failed; the task itself is not affected: %s", exc)  # noqa: TRY400
        except Exception:
            logger.exception("recording a signal failed; the task itself is not affected")

    return cast("_Handler", guarded)


def connect() -> None:
    """Connect every handler; any number of times."""
    for signal, handler in _HANDLERS:
        signal.connect(handler, weak=False, dispatch_uid=f"celery-kafka-backend.{handler.__name__}")


def _recorder() -> Recorder | None:
    found = recorders()
    return found[-1] if found else None


# -- the client: sending ---------------------------------------------------------------------


@_harmless
def before_publish(
    headers: dict[str, Any] | None = None,
    body: Any = None,
    properties: dict[str, Any] | None = None,
    declare: Sequence[Any] | None = None,
    **_: Any,
) -> None:
    """Put run and HLC into the message, and replace embedded chord bodies by stubs."""
    recorder = _recorder()
    if recorder is None or not headers or "id" not in headers:
        return
    if properties:
        properties.pop(names.DEADLINE, None)  # Celery hands a chord's options to its header, too
    task_id = headers["id"]
    clock = recorder.clock
    request = current_request()
    if request is not None and request.id == task_id:
        # A retry, or a replacement: what this attempt stores next happened before the successor.
        recorder.take_hlc(task_id, millis(headers.get("eta")))
    run = _run(recorder, task_id, headers, request)
    headers.pop(names.RECEIVED_AT, None)
    headers.pop(names.RECEIVED_HLC, None)
    headers.pop(names.STARTED_AT, None)
    headers[names.RUN] = run
    headers[names.HLC] = clock.tick()
    headers[names.SENT_AT] = clock.wall_ms()
    headers[names.TASK] = task_id
    headers.pop(names.BEAT, None)
    if scheduled := _scheduled(task_id, properties or {}, request):
        headers[names.BEAT] = scheduled
    recorder.sending.properties = dict(properties or {})
    recorder.sending.queue = getattr(declare[0], "name", None) if declare and len(declare) == 1 else None
    if isinstance(body, tuple) and len(body) == 3 and isinstance(body[2], dict):
        embed = body[2]
        if is_declared(embed.get("chord")):
            embed["chord"] = stub(embed["chord"])
        if embed.get("chain"):
            embed["chain"] = without_bodies(embed["chain"])


def _scheduled(task_id: str, properties: dict[str, Any], request: Any) -> str | None:
    """Return the schedule entry that a message comes from, if any."""
    if request is not None:
        # What a task sends no schedule does; but its retry comes from where it came from.
        return cast("str | None", field(request, names.BEAT)) if request.id == task_id else None
    return properties.get(names.BEAT) or schedule.entry()


def _run(recorder: Recorder, task_id: str, headers: dict[str, Any], request: Any) -> int:
    clock = recorder.clock
    given = headers.get(names.RUN)
    if given is not None and headers.get(names.TASK, task_id) == task_id:
        trusted = order.trusted_run(given, clock.wall_ms())
        if trusted is not None:
            return trusted
    # replace() drops headers; a chain, link or errback of this message is sent again with it.
    if request is not None and (request.id == task_id or task_id in held_ids(request)):
        inherited = order.trusted_run(field(request, names.RUN), clock.wall_ms())
        if inherited is not None:
            return inherited
    run = order.run_at(clock.wall_ms())
    forgotten = recorder.forgotten.get(task_id)
    if forgotten is not None and forgotten >= run:
        run = forgotten + 1
        clock.observe(order.run_start_ms(run))
    return run


@_harmless
def after_publish(
    headers: dict[str, Any] | None = None,
    body: Any = None,
    exchange: Any = None,
    routing_key: str | None = None,
    **_: Any,
) -> None:
    """A message left: sent."""
    recorder = _recorder()
    if recorder is None or not headers or names.TASK not in headers:
        return
    task_id, name = headers["id"], headers.get("task")
    if not recorder.wants(events.SENT, task_id, name):
        return
    who = recorder.identity(task_id, None, headers)
    who.hlc = headers[names.HLC]  # as in the message: everything that a worker says of it is later
    arguments = recorder.recorded_args(name or "", body[0], body[1]) if isinstance(body, tuple) else {}
    stamped = headers.get("stamped_headers")
    stamps = headers.get("stamps") or {}
    exchange = getattr(exchange, "name", exchange)
    priority = recorder.sending.properties.get("priority")
    recorder.cast(
        recorder.event(
            events.SENT,
            task_id,
            who,
            name=name,
            attempt=headers.get("retries") or 0,
            queue=recorder.sending.queue or (routing_key if not exchange else None),
            exchange=exchange or None,
            routing_key=routing_key,
            priority=priority if isinstance(priority, int) else None,
            eta=millis(headers.get("eta")),
            message_expires=millis(headers.get("expires")),
            parent=headers.get("parent_id"),
            root=headers.get("root_id"),
            group=headers.get("group"),
            index=headers.get("group_index"),
            chord=body_id(body[2].get("chord")) if isinstance(body, tuple) else None,
            sent_at=headers[names.SENT_AT],
            beat=headers.get(names.BEAT),
            stamps={one: plain(stamps.get(one)) for one in stamped} if stamped else None,
            ignored=bool(headers.get("ignore_result")),
            parcel=_parcel(recorder, headers, body),
            expires_at=recorder.knowledge_expires(),
            **arguments,
        )
    )


def _parcel(recorder: Recorder, headers: dict[str, Any], body: Any) -> events.Parcel | None:
    if not (recorder.settings.record_messages and recorder.keeps_message(str(headers.get("task")))):
        return None
    from celery_kafka_backend.producer.parcels import packed  # noqa: PLC0415 - for who records messages

    return packed(recorder, headers, body, recorder.sending.properties)


# -- the worker's parent ---------------------------------------------------------------------


@_harmless
def received(request: Any = None, **_: Any) -> None:
    """The parent got a message."""
    recorder = _recorder()
    if recorder is None or request is None:
        return
    request.request_dict[names.RECEIVED_AT] = recorder.clock.wall_ms()
    recorder.clock.observe(field(request, names.HLC))
    _note(recorder, events.RECEIVED, request.id, request, request.name)
    request.request_dict[names.RECEIVED_HLC] = recorder.clock.tick()


@_harmless
def rejected(message: Any = None, exc: Any = None, **_: Any) -> None:
    """The parent refused a message."""
    recorder = _recorder()
    headers = dict(getattr(message, "headers", None) or {})
    if recorder is not None and headers.get("id"):
        _note(recorder, events.REJECTED, headers["id"], headers, headers.get("task"), message=str(exc)[:MESSAGE_LIMIT])


@_harmless
def unknown(name: str | None = None, id: str | None = None, message: Any = None, exc: Any = None, **_: Any) -> None:  # noqa: A002
    """The parent knows no such task."""
    recorder = _recorder()
    headers = dict(getattr(message, "headers", None) or {})
    if recorder is not None and id:
        _note(recorder, events.UNKNOWN_TASK, id, headers, name, message=str(exc)[:MESSAGE_LIMIT])


# -- the worker's child ----------------------------------------------------------------------


@_harmless
def prerun(task_id: str | None = None, task: Any = None, **_: Any) -> None:
    """An attempt starts; what it stores from now on knows since when."""
    recorder = _recorder()
    if recorder is None or task is None or not task_id:
        return
    request = task.request
    if request.is_eager:
        return
    if recorder.settings.delivery == "pipelined":
        recorder.courier.settle(recorder.result_retries)
    recorder.retries.taken = None
    recorder.clock.observe(field(request, names.HLC))
    recorder.clock.observe(field(request, names.RECEIVED_HLC))
    setattr(request, names.STARTED_AT, recorder.clock.wall_ms())
    setattr(request, BEGAN, time.monotonic())
    if not older.stores_started(task, request):  # else that is about to be stored, and says the same
        _note(
            recorder, events.STARTED, task_id, request, task.name, ignored=older.ignores_result(task, request)
        )  # fmt: skip


@_harmless
def postrun(
    task_id: str | None = None, task: Any = None, retval: Any = None, state: str | None = None, **_: Any
) -> None:
    """An attempt ended in a way that stores nothing: the task refused its message, or ignored it."""
    recorder = _recorder()
    if recorder is None or task is None or not task_id or state not in _STORED_NOWHERE or task.request.is_eager:
        return
    if state == states_of.REJECTED:
        more = {
            "requeue": bool(getattr(retval, "requeue", False)),
            "message": str(getattr(retval, "reason", ""))[:MESSAGE_LIMIT],
        }
        _note(recorder, events.REJECTED, task_id, task.request, task.name, **more)
    else:
        _note(recorder, events.STATE, task_id, task.request, task.name, state=state)


_STORED_NOWHERE: Final = frozenset({states_of.REJECTED, states_of.IGNORED})


def _note(recorder: Recorder, kind: str, task_id: str, request: Any, name: str | None, **more: Any) -> None:
    """Append an event that touches no document."""
    if recorder.wants(kind, task_id, name):
        who = recorder.identity(task_id, None, request)
        more.setdefault("expires_at", recorder.knowledge_expires())
        if name:
            more.setdefault("name", name)
        recorder.cast(recorder.event(kind, task_id, who, request, **more))


# -- processes -------------------------------------------------------------------------------


def refuse_second_app(sender: Any = None, **_: Any) -> None:
    """Refuse to be the second app's worker on a log: a worker is ready, and has not looked at a message yet.

    Raises:
        SystemExit: With `ForeignLog`'s exit code; nothing else would get through Celery's signals.
    """
    from celery.apps.worker import Worker  # noqa: PLC0415 - only a worker gets here, and has it

    if not isinstance(getattr(sender, "controller", None), Worker):
        return  # a worker in a thread of somebody's tests: not ours to end
    for recorder in recorders():
        try:
            found = ownership.read(recorder.settings, OWNER_S)
        except (PublishError, SettingsError) as exc:  # a locked-down cluster may not let a worker ask
            logger.info("not checked whose log it is: %s", exc)
            continue
        if found is not None and found.app != recorder.app_name:
            error = ownership.foreign(recorder.settings, found, recorder.app_name)
            logger.critical("%s", error)
            raise SystemExit(error.exit_code)


def refuse_unpatched_pool(sender: Any = None, **_: Any) -> None:
    """Refuse a pool of greenlets in a process whose threads are none: each wait for Kafka would stop them all.

    Raises:
        SystemExit: With the exit code of a wrong configuration.
    """
    pool = getattr(sender, "pool", None)
    if getattr(pool, "is_green", False) and not greenlets.patched():
        name = type(pool).__module__.rpartition(".")[2]
        logger.critical(
            "worker_pool = %r, but nothing is monkey-patched: Celery does that only if the pool is named on the command "
            "line. Start the worker with -P %s",
            name, name,
        )  # fmt: skip
        from celery_kafka_backend.misconfigured import EXIT_CODE  # noqa: PLC0415 - see there

        raise SystemExit(EXIT_CODE)


@_harmless
def worker_ready(sender: Any = None, **_: Any) -> None:
    """This is a worker's parent: make its handle ready."""
    for recorder in recorders():
        recorder.in_worker(os.getpid(), str(getattr(sender, "hostname", "")))
        recorder.publisher.warm_up()
        if recorder.courier.detour is not None:
            from celery_kafka_backend.producer.drain import Drainer  # noqa: PLC0415 - sqlite3, for who needs it

            Drainer(recorder.courier.detour, recorder.publisher).start()


@_harmless
def child_init(**_: Any) -> None:
    """Make a child's own handle ready before its first task."""
    for recorder in recorders():
        recorder.in_worker(os.getppid(), recorder.node)
        recorder.publisher.warm_up()


def catch_up() -> None:
    """Do what `child_init` missed: a child that was spawned makes its first backend after that signal."""
    if trace._localized and current_process()._name != "MainProcess":  # noqa: SLF001 - nothing public says so
        for recorder in recorders():
            if not recorder.worker_pid:
                recorder.in_worker(os.getppid(), str(trace._localized[1]))  # noqa: SLF001
                recorder.publisher.warm_up()


@_harmless
def child_shutdown(**_: Any) -> None:
    """Wait for what is queued: children leave by ``os._exit``, so nothing else would."""
    for recorder in recorders():
        settings = recorder.settings
        waits = settings.delivery == "pipelined"
        left = recorder.courier.finish(settings.delivery_timeout_s if waits else CHILD_FLUSH_S)
        if left:
            logger.error(
                "this process ends before Kafka at %s has acknowledged %d records: they may be lost",
                settings.bootstrap_servers, left,
            )  # fmt: skip


_HANDLERS: Final = (
    (signals.before_task_publish, before_publish),
    (signals.after_task_publish, after_publish),
    (signals.task_received, received),
    (signals.task_rejected, rejected),
    (signals.task_unknown, unknown),
    (signals.task_prerun, prerun),
    (signals.task_postrun, postrun),
    (signals.worker_ready, refuse_unpatched_pool),
    (signals.worker_ready, refuse_second_app),
    (signals.worker_ready, worker_ready),
    (signals.worker_process_init, child_init),
    (signals.worker_process_shutdown, child_shutdown),
    (signals.worker_shutdown, child_shutdown),
)
