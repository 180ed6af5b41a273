"""Each event of a stream once, however far apart its copies are."""

from __future__ import annotations

import random

from celery_kafka_backend.changes import Logged
from celery_kafka_backend.cli.once import CHUNK, once
from celery_kafka_backend.events import SENT, Event


def logged(number, at=None):
    at = number // 3 if at is None else at
    return Logged(Event(id=f"e{number}", kind=SENT, task="t", at=at, hlc=at), b"%d" % number)


def test_what_comes_again_next_to_itself_or_much_later_is_given_once_in_the_order_of_the_first():
    whole = [logged(number) for number in range(3 * CHUNK)]
    again = random.Random(7).sample(whole, 500)
    stream = [*whole[: 2 * CHUNK], *whole[2 * CHUNK - 5 :], *again, *whole]
    assert list(once(stream)) == whole


def test_two_events_of_one_moment_are_two():
    assert len(list(once([logged(1, at=5), logged(2, at=5)]))) == 2
    assert list(once([])) == []


def test_nothing_is_read_ahead_of_need_but_a_chunk():
    read = []
    found = once(read.append(n) or logged(n) for n in range(10 * CHUNK))
    next(found)
    assert len(read) == CHUNK
