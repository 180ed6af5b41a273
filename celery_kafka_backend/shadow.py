"""Shadow mode: an app keeps its result backend, and what that stores is appended to Kafka as well.

The way in without risk. The app's own backend decides everything: it stores first, and clients, chords and reads are
its own. Behind each of its writes an event is put into a queue in memory, and nothing waits for Kafka, ever: not to
connect, not when it is away, slow or full. What does not fit is dropped and counted; an error of ours is a line in the log.
Messages are not touched. `pipeline shadow` compares what both show.
"""

from __future__ import annotations

import time
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

import msgspec
from billiard.exceptions import SoftTimeLimitExceeded
from celery import signals, states
from celery.exceptions import ImproperlyConfigured
from celery.utils.log import get_logger

from celery_kafka_backend import configure, events, order
from celery_kafka_backend.configure import SHADOW
from celery_kafka_backend.producer.recorder import recorder_for
from celery_kafka_backend.writes import Writes

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery import Celery
    from celery.result import GroupResult

    from celery_kafka_backend.events import Event

logger = get_logger(__name__)

QUEUE_KBYTES: Final = 16_384
"""What a process may hold for a Kafka that is away; librdkafka's own bound is 1 GB."""
LEAVE_S: Final = 0.5
"""What a child of a worker waits at its end for what it has just queued."""
SAY_AGAIN_S: Final = 60.0


def follow(app: Celery) -> None:
    """Have an app's processes append what its result backend stores to the log that ``kafka_shadow`` names.

    To be called where the app is made; without that setting it does nothing. It never raises, and neither does what it
    installs: a wrong setting is said in the log, and the app works as without it.
    """
    make = app._get_backend  # noqa: SLF001 - where Celery makes a backend, once per thread or process
    if getattr(make, "shadowed", False):
        return
    mirrors: list[_Mirror | None] = []

    @wraps(make)
    def shadowed() -> Any:
        backend = make()
        if not mirrors:
            mirrors.append(_mirror_of(app))
        if mirrors[0] is not None:
            _write_beside(backend, mirrors[0])
        return backend

    shadowed.shadowed = True  # type: ignore[attr-defined]
    app._get_backend = shadowed  # noqa: SLF001


def _mirror_of(app: Celery) -> _Mirror | None:
    url = app.conf.get(SHADOW)
    if not url:
        return None
    if str(app.conf.result_backend or "").startswith("kafka:"):
        logger.warning("%s is of no use: result_backend is kafka:// already", SHADOW)
        return None
    try:
        return _Mirror(app, url)
    except ImproperlyConfigured as exc:
        logger.error("no shadow: %s: %s", SHADOW, exc)  # noqa: TRY400 - the message is for the user
    except Exception:
        logger.exception("no shadow: the app works as without it")
    return None


class _Mirror(Writes):
    """Makes events of what another backend stores. It reads nothing and waits for nothing."""

    def __init__(self, app: Celery, url: str) -> None:
        super().__init__(app, url)
        settings = configure.settings_of(app, url)
        bounded = {"queue.buffering.max.kbytes": QUEUE_KBYTES, **settings.producer}
        self.settings = msgspec.structs.replace(settings, producer=bounded)
        self.recorder = recorder_for(app, self.settings)
        self._said_at = float("-inf")
        signals.worker_process_shutdown.connect(self._process_ends, weak=False)
        signals.worker_shutdown.connect(self._process_ends, weak=False)

    def harmless(self, append: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Append; what goes wrong is said, now and then, and nobody else's business."""
        try:
            append(*args, **kwargs)
        except SoftTimeLimitExceeded:  # not ours: it came while we were at work
            raise
        except Exception as exc:  # noqa: BLE001 - the fleet must not be hurt by any
            if time.monotonic() > self._said_at + SAY_AGAIN_S:
                self._said_at = time.monotonic()
                logger.warning("not in the shadow (said once a minute): %s: %s", type(exc).__name__, exc)

    def stored(
        self, encoded: Any, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> None:
        """Append a state that the app's backend has stored."""
        event = self._state_event(task_id, result, encoded, state, traceback, request)
        self.recorder.publisher.cast(self._state_record(event, encoded, traceback, request))

    def forgotten(self, _: Any, task_id: str) -> None:
        """Append that a result was forgotten: all its runs up to now, for a message may carry one, or none."""
        run = order.run_at(self.recorder.clock.wall_ms())
        self._cast(events.FORGOTTEN, task_id, order.forget_key(run), run)

    def group_saved(self, _: Any, group_id: str, result: GroupResult) -> None:
        """Append a saved group."""
        run = self._group_run(group_id)
        more = self._documents({"result": self.prepare_value(result)})
        self._cast(events.GROUP_SAVED, group_id, None, run, **more)

    def group_deleted(self, _: Any, group_id: str) -> None:
        """Append that a group was deleted."""
        run = self._group_run(group_id)
        self.recorder.forgotten.keep(f"group {group_id}", run)
        self._cast(events.GROUP_DELETED, group_id, order.forget_key(run), run)

    def _cast(self, kind: str, subject: str, key: int | None, run: int, **more: Any) -> None:
        who = self.recorder.identity(subject, None)
        who.run = run
        who.key = order.order_key(order.Rank.UNREADY, who.hlc, run) if key is None else key
        group = subject if kind in events.GROUP_KINDS else None
        expires = self._expires_at(who.wall, states.SUCCESS, None)
        if kind != events.GROUP_SAVED:
            expires = who.wall + self.settings.retention_ms
        self.recorder.cast(self.recorder.event(kind, subject, who, group=group, expires_at=expires, **more))

    def _claimed(self, event: Event, request: Any) -> Event:  # noqa: ARG002 - no object store is waited for
        return event

    def _known(self, task_id: str) -> None:  # noqa: ARG002 - no view is asked
        return None

    def _process_ends(self, **_: Any) -> None:
        self.harmless(self.recorder.publisher.flush, LEAVE_S)


def _write_beside(backend: Any, mirror: _Mirror) -> None:
    """Have an instance of the app's backend tell the mirror what it has done."""
    for name, tell in (
        ("store_result", mirror.stored),
        ("forget", mirror.forgotten),
        ("save_group", mirror.group_saved),
        ("delete_group", mirror.group_deleted),
    ):
        setattr(backend, name, _telling(getattr(backend, name), tell, mirror))


def _telling(theirs: Any, tell: Callable[..., None], mirror: _Mirror) -> Any:
    @wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        found = theirs(*args, **kwargs)  # first, and alone in saying whether it is stored
        mirror.harmless(tell, found, *args, **kwargs)
        return found

    return call
