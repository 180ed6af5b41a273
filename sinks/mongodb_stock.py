"""What Celery's own backend has in a MongoDB, scanned. Changes nothing there."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from bson.datetime_ms import DatetimeMS

from celery_kafka_backend.changes import GROUP, TASK
from celery_kafka_backend.sinks.contract import Page, Stock
from celery_kafka_backend.sinks.mongodb_native import stock_document, stock_group
from celery_kafka_backend.sinks.mongodb_wire import translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pymongo.collection import Collection

COUNT: Final = 200
"""Documents per page: they are in memory together."""


def stock(url: str, native: Callable[[str], Collection[dict[str, Any]]], after: str) -> Iterator[Page]:
    """Yield what is there, tasks before groups, by id; ``after`` is the last of a page."""
    begun, last = json.loads(after) if after else (TASK, None)
    subjects = [TASK, GROUP] if begun == TASK else [GROUP]
    with translated(url):
        for subject in subjects:
            # Only text is an id of Celery's; ours have a field of their own, which a stock backend's write takes away.
            wanted = {"$gt": last} if last is not None and subject == begun else {"$type": "string"}
            source = native(subject).find({"_id": wanted, "ckb": {"$exists": False}}).sort("_id", 1).batch_size(COUNT)
            while chunk := list(islice(source, COUNT)):
                yield Page([_read(subject, each) for each in chunk], json.dumps([subject, chunk[-1]["_id"]]))
        yield Page([], "")


def _read(subject: str, found: dict[str, Any]) -> Stock:
    document = (stock_document if subject == TASK else stock_group)(found)
    done = found.get("date_done")
    problem = "" if document is not None else "of the serializer bson, or one that Celery does not have"
    return Stock(
        subject, found["_id"], document, done=int(done) if isinstance(done, DatetimeMS) else None, problem=problem
    )
