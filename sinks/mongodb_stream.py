"""Hearing of changes in MongoDB: one change stream for all that a process waits for, where the server has such."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import bson
import pymongo
from pymongo import errors

from celery_kafka_backend.errors import Unavailable
from celery_kafka_backend.sinks.contract import Subscription
from celery_kafka_backend.sinks.mongodb_wire import bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pymongo.client_session import ClientSession
    from pymongo.collection import Collection
    from pymongo.command_cursor import RawBatchCommandCursor

AWAIT_MS: Final = 50
"""The server answers as soon as something changes, and after so long if nothing does: so much later a wait may end."""
CLOSE_S: Final = 1.0


class ChangeStream(Subscription):
    """Hears of some tasks.

    It is not resumed. Whatever ends it (a new primary, an oplog that has moved on, a collection that is dropped) makes
    `wait` raise: the reader opens another one, whose first `wait` reads all of its tasks. That cannot miss anything.
    All is asked in one session, so that a secondary is read only when it has what was heard of.

    Args:
        url: For messages.
        tasks: The collection with their documents.
        ids: Which tasks.
        read: Returns the documents that there are of some of them.

    Raises:
        pymongo.errors.OperationFailure: The server has no change streams, or does not let us have one.
    """

    def __init__(
        self,
        url: str,
        tasks: Collection[dict[str, Any]],
        ids: Sequence[str],
        read: Callable[[Sequence[str], ClientSession], dict[str, bytes]],
    ) -> None:
        self._url = url
        self._read = read
        self._unread = ids
        self._session = tasks.database.client.start_session(causal_consistency=True)
        pipeline: list[dict[str, Any]] = [
            {"$changeStream": {}},
            {"$match": {"documentKey._id": {"$in": list(ids)}}},
            {"$project": {"documentKey": 1}},
        ]
        try:
            # Raw: a batch of changes at a time. The driver's own `watch` gives one, and cannot say whether more are there.
            opened: Any = tasks.aggregate_raw_batches(pipeline, maxAwaitTimeMS=AWAIT_MS, session=self._session)
        except BaseException:
            self._session.end_session()
            raise
        self._cursor: RawBatchCommandCursor[dict[str, Any]] = opened  # not what the driver's annotation says

    def wait(self, timeout_s: float) -> dict[str, bytes]:
        """Return documents: at first those that are there, then those of tasks that were heard of."""
        try:
            with bounded():
                changed, self._unread = self._unread or self._changed(timeout_s), []
                return self._read(changed, self._session) if changed else {}
        except (errors.PyMongoError, ValueError) as exc:  # ValueError: the view was closed meanwhile
            raise Unavailable(f"{self._url}: the change stream has ended: {exc}") from exc

    def _changed(self, timeout_s: float) -> list[str]:
        until = time.monotonic() + timeout_s
        while True:
            batch: Any = self._cursor.try_next()
            if batch:
                return list(dict.fromkeys(each["documentKey"]["_id"] for each in bson.decode_all(batch)))
            if not self._cursor.alive:
                raise Unavailable(f"{self._url}: the change stream has ended")
            if time.monotonic() >= until:
                return []

    def fileno(self) -> int:
        """Return -1: the driver's connections are its own."""
        return -1

    def close(self) -> None:
        """Have the server forget the cursor."""
        with suppress(errors.PyMongoError), pymongo.timeout(CLOSE_S):
            self._cursor.close()
        self._session.end_session()
