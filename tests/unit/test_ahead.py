"""Reading ahead: always one item, all of the source in one thread, and nobody waits for a silent one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from celery_kafka_backend.processors.ahead import ahead

if TYPE_CHECKING:
    from collections.abc import Generator

PATIENCE_S = 120


def test_items_come_in_order_and_the_next_one_is_made_meanwhile() -> None:
    made = [threading.Event() for _ in range(4)]

    def source() -> Generator[int, None, None]:
        for number, event in enumerate(made):
            event.set()
            yield number

    found = []
    for item in ahead(source()):
        found.append(item)
        assert made[min(item + 1, 3)].wait(PATIENCE_S)
        if item == 0:
            assert not made[2].is_set()
    assert found == [0, 1, 2, 3]


def test_what_the_source_raises_is_raised_here_behind_what_it_gave() -> None:
    def source() -> Generator[int, None, None]:
        yield 1
        raise KeyError("broken")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(KeyError, match="broken"):
        next(items)


def test_who_closes_it_does_not_wait_and_the_source_ends_in_its_own_thread() -> None:
    going_on, ended = threading.Event(), threading.Event()
    threads = set()

    def source() -> Generator[int, None, None]:
        threads.add(threading.current_thread())
        try:
            yield 1
            going_on.wait(PATIENCE_S)  # Kafka is silent
            yield 2
        finally:
            threads.add(threading.current_thread())
            ended.set()

    items = ahead(source())
    assert next(items) == 1
    items.close()
    assert not ended.is_set()
    going_on.set()
    assert ended.wait(PATIENCE_S)
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_a_source_that_nobody_asked_is_never_begun() -> None:
    begun = threading.Event()

    def source() -> Generator[int, None, None]:
        begun.set()
        yield 1

    ahead(source()).close()
    assert not begun.is_set()
