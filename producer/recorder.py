"""What happened to a task, turned into events: who says so, of which run, with which order key.

Knows Celery's requests and the log; knows neither documents (the backend makes those) nor signals
(`signals` calls in here). One per process and configuration, because ``app.backend`` is per thread.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import zlib
from collections import OrderedDict
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
from celery import current_task
from celery._state import _task_stack, get_current_task
from celery.app.task import Context
from celery.utils.saferepr import saferepr

from celery_kafka_backend import codec, events, order, topics
from celery_kafka_backend.complaints import imported
from celery_kafka_backend.errors import TooLarge
from celery_kafka_backend.events import Event
from celery_kafka_backend.producer import headers as names
from celery_kafka_backend.producer.courier import ONCE, Courier
from celery_kafka_backend.producer.detour import Detour
from celery_kafka_backend.producer.publisher import Record, publisher_for
from celery_kafka_backend.settings import SETTING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from celery import Celery

    from celery_kafka_backend.order import Clock
    from celery_kafka_backend.producer.publisher import Publisher
    from celery_kafka_backend.settings import Settings

REMEMBERED: Final = 10_000
"""Forgotten ids and chord generations that one process keeps in mind."""

MESSAGE_LIMIT: Final = 1024
_RECORD_OVERHEAD: Final = 512
_ARGS_LIMIT: Final = 1024
BEGAN: Final = "_ckb_monotonic"
"""Attribute of a request that this process runs: when it began, by the monotonic clock."""
_UNREADY: Final = order.Rank.UNREADY  # looking an enum's member up takes longer than comparing it


class Remembered(OrderedDict[str, int]):
    """The last so many pairs; the oldest is dropped."""

    def keep(self, key: str, value: int) -> None:
        """Add a pair."""
        self[key] = value
        self.move_to_end(key)
        while len(self) > REMEMBERED:
            self.popitem(last=False)


class Identity(msgspec.Struct, gc=False):
    """An event's identity, fixed before its content: a chord part names it, and is sent first."""

    id: str
    wall: int
    hlc: int
    run: int | None
    key: int


class _Retry(threading.local):
    """What a thread knows of the RETRY that it is about to store: the task, its HLC, when the successor is due."""

    taken: tuple[str, int, int | None] | None = None


class _Sending(threading.local):
    """What a thread knows of the message that it is sending."""

    properties: Mapping[str, Any] = MappingProxyType({})
    queue: str | None = None


class Recorder:
    """Appends what a process knows to the log.

    Args:
        app: The user's app.
        settings: Its settings.
        publisher: Where records go.
        clock: The process's hybrid logical clock.
    """

    def __init__(self, app: Celery, settings: Settings, publisher: Publisher, clock: Clock) -> None:
        self.app = app
        self.settings = settings
        self.publisher = publisher
        self.courier = Courier(publisher)
        self.clock = clock
        self.topic = topics.task_events(settings.topic_prefix)
        self.chords_topic = topics.chords(settings.topic_prefix)
        self.app_name = str(app.main or "")
        self.forgotten = Remembered()
        self.generations = Remembered()
        self.node = ""
        """Node name of the worker that this process belongs to, "" outside workers."""
        self.worker_pid = 0
        """Pid of the worker's main process, 0 outside workers."""
        self.result_retries = ONCE
        """``result_backend_always_retry`` and its bounds; the backend puts them here."""
        self.retries = _Retry()
        self.sending = _Sending()
        self.host = socket.gethostname()
        self._redact = self._redactor(settings.redact)
        self._hints: dict[str, tuple[int, dict[str, Any]]] = {}

    @staticmethod
    def _redactor(redact: str) -> Callable[[str, Any, Any], tuple[Any, Any]] | None:
        if not redact:
            return None
        if redact == "all":
            return lambda _name, _args, _kwargs: ("…", "…")
        found: Callable[[str, Any, Any], tuple[Any, Any]] = imported(f"{SETTING}['redact']", redact)
        return found

    # -- who and when ------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Pid of this process."""
        return os.getpid()

    def in_worker(self, parent_pid: int, node: str) -> None:
        """Say that this process belongs to a worker. Backends are made after ``worker_init``, too late to hear it."""
        self.worker_pid, self.node = parent_pid, node
        if self.settings.spool:
            from celery_kafka_backend.producer.spool import spool_for  # noqa: PLC0415 - sqlite3, for who needs it

            self.courier.use(Detour(self.publisher, spool_for(self.settings)))

    def spooled(self, task_id: str) -> list[bytes]:
        """Return the events of a task, encoded, that this host has stored and Kafka may not have yet; oldest first."""
        detour = self.courier.detour
        return [] if detour is None else [record.value or b"" for record in detour.spool.holding(task_id)]

    @property
    def role(self) -> str:
        """Which part of the system this thread is right now."""
        if not self.worker_pid:
            return events.CLIENT
        if os.getpid() != self.worker_pid or self.runs_task:
            return events.CHILD
        return events.PARENT

    @property
    def runs_task(self) -> bool:
        """Whether this thread runs a task, also in a worker that a test runs in a thread of its own process."""
        return _task_stack.top is not None

    @property
    def between_tasks(self) -> bool:
        """Whether this thread is a worker's and runs no task: what it does is Celery's own doing."""
        return bool(self.worker_pid) and not self.runs_task

    def identity(
        self, task_id: str, rank: order.Rank | None, request: Any = None, known: tuple[int | None, int] | None = None
    ) -> Identity:
        """Fix who an event is.

        Args:
            task_id: Whose state it tells.
            rank: What it claims; None if it touches no document.
            request: The task's own request, if there is one; another task's is not trusted.
            known: Run and HLC that the view shows, for a write without a request.
        """
        run, hlc = self.run_of(task_id, request)
        if run is None and known is not None:
            run, hlc = known
        self.clock.observe(hlc)
        wall = self.clock.wall_ms()
        run = order.trusted_run(run, wall)
        if run is not None:
            # A publisher some minutes ahead: below its unit's start all our readings would tie at 0.
            self.clock.observe(order.run_start_ms(run))
        taken = self.taken_hlc(task_id) if rank is _UNREADY else None
        tick = taken if taken is not None else self.clock.tick()
        return Identity(os.urandom(16).hex(), wall, tick, run, 0 if rank is None else order.order_key(rank, tick, run))

    def run_of(self, task_id: str, request: Any) -> tuple[int | None, int | None]:
        """Return the run and HLC that a request carries for a task; None for what it does not."""
        get = _as_sent(request)
        if get("id") != task_id:
            hinted = self._hints.get(task_id)
            return (hinted[0] if hinted else None), None
        owner = get(names.TASK)
        if owner is not None and owner != task_id:
            return None, None
        return get(names.RUN), get(names.HLC)

    @contextmanager
    def hinting(self, task_id: str, run: int, known: dict[str, Any]) -> Iterator[None]:
        """Say, of a task without a request, which run it belongs to, and what else is known, under the names of `Event`."""
        self._hints[task_id] = run, known
        try:
            yield
        finally:
            self._hints.pop(task_id, None)

    # A RETRY's HLC is taken before its successor is published, as Celery publishes first.

    def take_hlc(self, task_id: str, due: int | None) -> None:
        """Keep this moment as that of the RETRY which the running task is about to store."""
        self.retries.taken = (task_id, self.clock.tick(), due)

    def taken_hlc(self, task_id: str) -> int | None:
        """Return the moment kept for a RETRY of this task, if any."""
        taken = self.retries.taken
        return taken[1] if taken is not None and taken[0] == task_id else None

    def taken_due(self, task_id: str) -> int | None:
        """Return when the successor of this task's RETRY is due, and forget the moment kept."""
        taken = self.retries.taken
        if taken is None or taken[0] != task_id:
            return None
        self.retries.taken = None
        return taken[2]

    # -- what --------------------------------------------------------------------------------

    def event(self, kind: str, task_id: str, who: Identity, request: Any = None, **more: Any) -> Event:
        """Return an event with everything that the request knows."""
        known = about(request) if request is not None else {}
        if task_id in self._hints:
            known = {**self._hints[task_id][1], **known}
        began = field(request, BEGAN)
        since = known.get("started_at", who.wall)  # later than now: the clock was set back
        if began and kind != events.STARTED and who.wall >= since and field(request, "id") == task_id:
            known["runtime_s"] = round(time.monotonic() - began, 6)
        known.update(more)
        return Event(
            id=who.id,
            kind=kind,
            task=task_id,
            key=who.key,
            at=who.wall,
            hlc=who.hlc,
            run=who.run,
            role=self.role,
            host=self.host,
            pid=os.getpid(),
            **known,
        )

    def recorded_args(self, name: str, args: Any, kwargs: Any) -> dict[str, str]:
        """Return a task's arguments as text for an event, as ``result_extended`` and ``redact`` say."""
        if not self.app.conf.result_extended:
            return {}
        args, kwargs = self.redacted(name, args, kwargs)
        return {
            "args": args if isinstance(args, str) else saferepr(args, _ARGS_LIMIT),
            "kwargs": kwargs if isinstance(kwargs, str) else saferepr(kwargs, _ARGS_LIMIT),
        }

    def knowledge_expires(self) -> int | None:
        """Return when an event without a document is to be forgotten by views: as a result stored now would be."""
        return self.clock.wall_ms() + self._kept_ms if self._kept_ms else None

    @cached_property
    def _kept_ms(self) -> int:
        # Looked up once, as Celery's backends do: each look at the configuration costs 7 us.
        expires = self.app.conf.result_expires
        return events.kept_ms(expires.total_seconds() if isinstance(expires, timedelta) else expires)

    def keeps_message(self, name: str) -> bool:
        """Return whether a task's messages are recorded."""
        return any(fnmatchcase(name, pattern) for pattern in self.settings.record_messages)

    def redacted(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return arguments as they may be recorded."""
        if self._redact is None:
            return args, kwargs
        return self._redact(name, args, kwargs)

    def wants(self, kind: str, task_id: str, name: str | None) -> bool:
        """Return whether an event without a document is to be recorded."""
        settings = self.settings
        if kind not in settings.record:
            return False
        if not (name and (settings.exclude or settings.sample)):
            return True
        if any(fnmatchcase(name, pattern) for pattern in settings.exclude):
            return False
        share = settings.sample.get(name)
        # By the id, so that all events of a task are in or out together.
        return share is None or zlib.crc32(task_id.encode()) < share * (1 << 32)

    # -- where to ----------------------------------------------------------------------------

    def cast(self, event: Event) -> None:
        """Append an event that nobody waits for; never blocks, never fails."""
        self.publisher.cast(
            Record(self.topic, event.task.encode(), codec.encode(event), codec.headers(event, self.app_name))
        )

    def record(self, event: Event) -> Record:
        """Return an event's record.

        Raises:
            TooLarge: It would be over the limit: final, so it is said before anything is sent.
        """
        record = Record(self.topic, event.task.encode(), codec.encode(event), codec.headers(event, self.app_name))
        return self._within_limit(record, "the event of task", event.task)

    def chord_record(self, group: str, key: bytes, value: bytes) -> Record:
        """Return a record of the chords' topic, for the group's own partition.

        Raises:
            TooLarge: As `record`.
        """
        return self._within_limit(Record(self.chords_topic, key, value, group=group), "a record of chord", group)

    def _within_limit(self, record: Record, what: str, whose: str) -> Record:
        size = len(record.value or b"") + len(record.key) + _RECORD_OVERHEAD
        if size > self.settings.max_message_bytes:
            raise TooLarge(
                f"{what} {whose} is {size} bytes, over max_message_bytes = {self.settings.max_message_bytes}"
            )
        return record


def field(request: Any, name: str) -> Any:
    """Return a field of a request in any of its shapes: Context, dict, the worker's Request; else None."""
    if request is None:
        return None
    if isinstance(request, dict):
        return request.get(name)
    found = getattr(request, name, None)
    if found is None:
        inner = getattr(request, "request_dict", None)
        if inner is not None:
            return inner.get(name)
    return found


def millis(when: str | datetime | None) -> int | None:
    """Return a time from a message's header as ms since 1970, or None."""
    if when is None:
        return None
    try:
        moment = datetime.fromisoformat(when.replace("Z", "+00:00")) if isinstance(when, str) else when
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return int(moment.timestamp() * 1000)


def about(request: Any) -> dict[str, Any]:
    """Return what a request says about its task, under the names of `Event`; only what is known and of its type.

    A request can hold anything that somebody put in a message; a fake one (errbacks, _fail_chain) holds a signature's
    options.
    """
    get = _fields_of(request)
    found: dict[str, Any] = {}
    for name, theirs in _TEXTS:
        value = get(theirs)
        if isinstance(value, str):
            found[name] = value
    for name, theirs in _NUMBERS:
        value = get(theirs)
        if isinstance(value, int):
            found[name] = value
    delivery = get("delivery_info")
    if delivery:
        _add_delivery(found, delivery)
    eta, expires, chord, stamped = get("eta"), get("expires"), get("chord"), get("stamped_headers")
    if eta is not None:
        found["eta"] = millis(eta)
    if expires is not None and not isinstance(expires, (int, float)):
        found["message_expires"] = millis(expires)
    if chord is not None:
        found["chord"] = body_id(chord)
    if stamped:
        stamps = get("stamps") or {}
        found["stamps"] = {name: plain(stamps.get(name)) for name in stamped}
    return found


def workflow() -> dict[str, str]:
    """Return the root and the parent that a task would have if the current one sent it; nothing where none runs."""
    current = get_current_task()
    if current is None or not current.request.id:
        return {}
    return {"root": current.request.root_id or current.request.id, "parent": current.request.id}


def _as_sent(request: Any) -> Callable[[str], Any]:
    """Return what looks up a message's headers by its request; None for those it does not have.

    In a Context's own dictionary, or that of the worker's Request, where it can: two dozen attributes cost a tenth of all that
    storing a result does, and half of what noting a task's arrival does.
    """
    message = vars(request) if isinstance(request, Context) else getattr(request, "request_dict", None)
    return message.get if isinstance(message, dict) else partial(field, request)


def _fields_of(request: Any) -> Callable[[str], Any]:
    """Return what looks up a request's fields; None for those it does not have."""
    message = getattr(request, "request_dict", None)
    if isinstance(message, dict):
        return {**message, **{name: getattr(request, name, None) for name in _NOT_AS_SENT}}.get
    return _as_sent(request)


_NOT_AS_SENT: Final = ("eta", "expires", "chord", "stamps")
"""What the worker's Request has made of its message, or has elsewhere."""


def _add_delivery(found: dict[str, Any], delivery: Mapping[str, Any]) -> None:
    exchange, routing_key = delivery.get("exchange"), delivery.get("routing_key")
    priority = delivery.get("priority")
    if isinstance(routing_key, str):
        found["routing_key"] = routing_key
        if not exchange:
            found["queue"] = routing_key
    if exchange and isinstance(exchange, str):
        found["exchange"] = exchange
    if isinstance(priority, int):
        found["priority"] = priority
    if delivery.get("redelivered"):
        found["redelivered"] = True


_TEXTS: Final = (
    ("name", "task"),
    ("worker", "hostname"),
    ("parent", "parent_id"),
    ("root", "root_id"),
    ("group", "group"),
    ("beat", names.BEAT),
)
_NUMBERS: Final = (
    ("attempt", "retries"),
    ("index", "group_index"),
    ("sent_at", names.SENT_AT),
    ("received_at", names.RECEIVED_AT),
    ("started_at", names.STARTED_AT),
)


def plain(value: Any) -> Any:
    """Return a stamp's value as JSON can hold it."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def body_id(chord: Any) -> str | None:
    """Return the task id of a chord's body, from the signature that a member carries."""
    if not isinstance(chord, dict):
        return None
    found = (chord.get("options") or {}).get("task_id")
    return found if isinstance(found, str) else None


def held_ids(request: Any) -> Iterator[str]:
    """Yield every id that a request's message already holds: of its chain, links and errbacks.

    Their tasks inherit its run: a redelivered parent sends them again under the same ids.
    """
    pending: list[Any] = [
        field(request, "chain"),
        field(request, "callbacks"),
        field(request, "errbacks"),
        field(request, "chord"),
    ]
    while pending:
        found = pending.pop()
        if isinstance(found, dict):
            task_id = (found.get("options") or {}).get("task_id")
            if isinstance(task_id, str):
                yield task_id
            options = found.get("options") or {}
            pending += [options.get("link"), options.get("link_error"), options.get("chain")]
            if found.get("subtask_type") in ("chain", "group", "chord"):
                inner = found.get("kwargs") or {}
                pending += [inner.get("tasks"), inner.get("header"), inner.get("body")]
        elif isinstance(found, (list, tuple)):
            pending += found


def current_request() -> Any:
    """Return the request of the task that this thread runs, or None."""
    task = current_task
    if not task:
        return None
    request = task.request
    return request if request is not None and request.id else None


_clock: Final = order.Clock()
_recorders: Final[dict[int, Recorder]] = {}
_lock = threading.Lock()


def recorder_for(app: Celery, settings: Settings) -> Recorder:
    """Return the process's recorder for an app; all share one clock."""
    with _lock:
        found = _recorders.get(id(app))
        if found is None or found.settings != settings:
            found = _recorders[id(app)] = Recorder(app, settings, publisher_for(settings), _clock)
        return found


def recorders() -> list[Recorder]:
    """Return every recorder of this process."""
    return list(_recorders.values())


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - another thread of the parent may have held it, and the clock's
    _lock = threading.Lock()
    _clock.renew_lock()


os.register_at_fork(after_in_child=_after_fork)
