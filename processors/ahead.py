"""Reading ahead: the next item is made in a thread of its own, while the one before it is worked on."""

from __future__ import annotations

from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from celery_kafka_backend import threads

if TYPE_CHECKING:
    from collections.abc import Generator

Item = TypeVar("Item")


def ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yield what a generator yields, which is always one item ahead; raise what it raises.

    All of the generator runs in the one thread, its end as well. Whoever closes this one does not wait for that: a
    source that is silent must not hold up Ctrl-C.
    """
    asked: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[Item | BaseException] = SimpleQueue()

    def make() -> None:
        try:
            while asked.get():
                made.put(next(items))
        except BaseException as exc:  # noqa: BLE001 - raised where the items are wanted; the end is one, too
            made.put(exc)
        else:
            items.close()

    threads.start(make, "celery-kafka-ahead")
    asked.put(True)
    try:
        while not isinstance(item := made.get(), BaseException):
            asked.put(True)
            yield item
        if not isinstance(item, StopIteration):
            raise item
    finally:
        asked.put(False)
