"""How the backend reads: clients from the view, Celery's own code in a worker past the barrier.

Celery's own code in a worker reads results back, and a view that lags would fail a task that succeeded. Which reads these
are, and what is safe where nobody can tell, is in docs/adr/0013. No writing here.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from celery import states
from celery.exceptions import BackendGetMetaError
from celery.utils.log import get_logger
from kombu.utils.encoding import bytes_to_str

from celery_kafka_backend import codec, configure, events, older, threads
from celery_kafka_backend.changes import GROUP, TASK
from celery_kafka_backend.claims import ClaimedMeta, Claims, reference
from celery_kafka_backend.errors import CodecError, SettingsError, SpoolError, Unavailable, Unsure
from celery_kafka_backend.primary import reader_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from celery_kafka_backend.barrier import Barrier
    from celery_kafka_backend.producer.recorder import Recorder
    from celery_kafka_backend.reader import Reader
    from celery_kafka_backend.settings import Settings

logger = get_logger(__name__)

PARENT_WAIT_S: Final = 2.0
"""What a read may take of the worker's event loop."""

_Found = TypeVar("_Found")


class Reading(threading.local):
    """What one thread is at, as far as reading goes.

    Attributes:
        ordinary: A read that needs no barrier.
        failing_chain: Celery fails what was chained after a task.
        pending: Tasks that have been asked for just now, and have not ended.
    """

    ordinary = False
    failing_chain = False
    pending: AbstractSet[str] = frozenset()


class Reads(older.KeyValueBackend):  # type: ignore[misc]
    """The reading half of `backend.KafkaBackend`, which provides these."""

    settings: Settings
    recorder: Recorder
    barrier: Barrier
    _here: Reading

    @cached_property
    def reader(self) -> Reader:
        """Reads the primary view; its driver is imported only now.

        Raises:
            ImproperlyConfigured: Its driver is not installed, or refuses an option.
        """
        options = {url: configure.store_options(self.app, self.settings, url) for url in self.settings.views}
        try:
            return reader_of(self.settings, options)
        except SettingsError as exc:
            raise configure.improperly_configured(exc) from exc

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

    def get(self, key: bytes) -> bytes | None:
        """Return the value under one of Celery's native keys."""
        if key.startswith(self.group_keyprefix):
            return self._group_document(bytes_to_str(key[len(self.group_keyprefix) :]))
        return self.mget([key])[0]

    def mget(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values under several native keys of tasks."""
        ids = [bytes_to_str(key[len(self.task_keyprefix) :]) for key in keys]
        found = self.documents(ids)
        return [found.get(one) for one in ids]

    def documents(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Return the documents there are of some tasks.

        Raises:
            Unavailable: The view does not answer.
        """
        return self._documents_of(TASK, [one for one in ids if one not in self._here.pending])

    @contextmanager
    def pending(self, ids: AbstractSet[str]) -> Iterator[None]:
        """Answer for this thread that these tasks have not ended, without asking again."""
        self._here.pending = ids
        try:
            yield
        finally:
            self._here.pending = frozenset()

    def _documents_of(self, subject: str, ids: Sequence[str]) -> dict[str, bytes]:
        return self.barrier.documents(self.reader, subject, ids, self.recorder.clock.wall_ms())

    # -- by Celery's own code in a worker --------------------------------------------------------

    def _get_task_meta_for(self, task_id: str) -> Any:
        """Return a task's meta; of a read by Celery's own code in a worker, as of now."""
        if self.recorder.worker_pid and not self._here.ordinary:
            return self._certain_meta(task_id)  # Request._success_was_stored comes here directly
        return super()._get_task_meta_for(task_id)

    def get_task_meta(self, task_id: str, cache: bool = True) -> Any:
        """Return a task's meta, as `AsyncResult` reads it."""
        here = self._here
        outer = here.ordinary
        # Deduplication reads an AsyncResult too, before its task begins: no user's code does it there.
        here.ordinary = not (self.recorder.between_tasks and self.app.conf.worker_deduplicate_successful_tasks)
        try:
            return super().get_task_meta(task_id, cache=cache)
        finally:
            here.ordinary = outer

    def get_state(self, task_id: str) -> Any:
        """Return a task's state: what revoke asks in a worker, where it is as of now."""
        if self._here.failing_chain:
            return states.PENDING  # see _fail_chain
        if self.recorder.worker_pid:
            return self._certain_meta(task_id)["status"]
        return super().get_state(task_id)

    def _certain_meta(self, task_id: str) -> Any:
        """Return a task's meta as of now.

        Raises:
            BackendGetMetaError: Nobody can tell. Each of Celery's readers then does what loses nothing.
        """
        try:
            return self._within_bounds(partial(self._read_certain_meta, task_id))
        except (Unsure, Unavailable, SpoolError, CodecError) as exc:
            logger.warning("cannot tell whether task %s has a result: %s", task_id, exc)
            raise BackendGetMetaError(f"cannot tell whether it has a result: {exc}", task_id=task_id) from exc

    def _read_certain_meta(self, task_id: str, timeout_s: float) -> Any:
        shown = self.reader.shown(task_id)
        meta = self._meta_of(shown.document if shown else None)
        if meta["status"] == states.SUCCESS:
            return meta  # the first success of a run stays
        # Looked at first: what is drained into Kafka meanwhile is in one of the two.
        spooled = [codec.decode(value) for value in self.recorder.spooled(task_id)]
        now_ms = self.recorder.clock.wall_ms()
        return self._meta_of(self.barrier.task_document(self.reader, task_id, timeout_s, now_ms, spooled))

    def _meta_of(self, document: bytes | None) -> Any:
        return self.decode_result(document) if document else {"status": states.PENDING, "result": None}

    def _group_document(self, group_id: str) -> bytes | None:
        """Return a saved group; in a worker as of now, for one task restores what another has just saved."""
        if not self.recorder.worker_pid:
            return self._documents_of(GROUP, [group_id]).get(group_id)
        try:
            return self._within_bounds(partial(self._read_certain_group, group_id))
        except Unsure as exc:
            found = self._documents_of(GROUP, [group_id]).get(group_id)
            if found is None:
                raise BackendGetMetaError(f"cannot tell whether group {group_id} was saved: {exc}") from exc
            return found

    def _read_certain_group(self, group_id: str, timeout_s: float) -> bytes | None:
        return self.barrier.group_document(self.reader, group_id, timeout_s, self.recorder.clock.wall_ms())

    def _within_bounds(self, read: Callable[[float], _Found]) -> _Found:
        """Read, in ``barrier_timeout_s``; in the worker's event loop in what all such reads together may take.

        Raises:
            Unsure: There was no answer in that time, whoever does not give one.
        """
        bound_s = self.settings.barrier_timeout_s
        if self.recorder.role != events.PARENT:
            return read(bound_s)
        allowance = self.barrier.allowance
        bound_s = min(bound_s, PARENT_WAIT_S, allowance.left_s())
        if bound_s <= 0:
            raise Unsure("the worker's main process has spent too much time on such reads just now")
        began = time.monotonic()
        try:
            # A view that is frozen holds its socket for half a minute. Whoever waits inside gives up a little sooner: his
            # error says why.
            return threads.within(bound_s, partial(read, 0.9 * bound_s), "celery-kafka-barrier")
        except TimeoutError:
            raise Unsure(f"no answer within {bound_s:g} s") from None
        finally:
            allowance.spend(time.monotonic() - began)

    def _fail_chain(
        self, chain: Any, exc: Any, traceback: Any = None, store_result: bool = True, state: str = states.FAILURE
    ) -> None:
        """Fail what was chained after a failed task.

        Celery reads the state of each chord member among them, lest a second part be counted. Here parts are a set:
        a second one changes nothing, and one that is left out, for the state was of an earlier run, hangs the chord.
        So it is always sent, and nothing is read.
        """
        self._here.failing_chain = True
        try:
            super()._fail_chain(chain, exc, traceback, store_result=store_result, state=state)
        finally:
            self._here.failing_chain = False

    # -- by clients ------------------------------------------------------------------------------

    def catch_up(self, *ids: str, timeout_s: float | None = None) -> bool:
        """Wait until the primary view shows all that Kafka has acknowledged about some tasks or groups by now.

        For a client that was told by another way that a task is done, and reads its result next.

        Args:
            ids: Ids of tasks or saved groups.
            timeout_s: Bound on the wait; default: ``barrier_timeout_s``.

        Returns:
            False if it did not in time.

        Raises:
            BackendGetMetaError: Kafka did not say how far that is. The right Describe on the log is needed.
        """
        bound = self.settings.barrier_timeout_s if timeout_s is None else timeout_s
        try:
            return self.barrier.caught_up(ids, self.reader.positions, bound)
        except Unsure as exc:
            raise BackendGetMetaError(f"cannot tell whether the view is up to date: {exc}") from exc
