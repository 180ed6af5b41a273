"""Who carries out a decision goes on until it is done, without wearing Kafka out, and holds up nobody."""

from __future__ import annotations

import time
from concurrent.futures import wait
from types import SimpleNamespace

import pytest

from celery_kafka_backend import settings
from celery_kafka_backend.processors import sending
from celery_kafka_backend.processors.held import Held, Recent, Statistics
from celery_kafka_backend.processors.sending import SENDERS, Deed, PartsMissing, Sender
from tests.patience import PATIENCE_S


@pytest.fixture
def sender():
    app = SimpleNamespace(set_current=lambda: None)
    given = settings.parse("kafka://b1:9092/?view=memory://x")
    made = Sender(app, given, Statistics(), Recent(0), lambda: 0, lambda held, done: held.appended.append(done))
    yield made
    made.close()


@pytest.fixture
def held():
    made = Held(0, ledger=None, end=0)
    made.position = 5
    made.appended = []
    return made


def turn(sender, held):
    """What the processor's loop does, and what its threads do meanwhile."""
    sender.go_on()
    jobs, held.jobs = held.jobs, set()
    for job in wait(jobs, PATIENCE_S).done:
        job.result()


def fail(_wanted, _lost):
    raise OSError("a router's file is gone")


def test_a_declaration_that_is_gone_is_looked_for_at_intervals_and_said(sender, held, monkeypatch):
    """Somebody removed it, so the chord never ends. It was read again without a pause, with a whole core."""
    asked = []

    def once(_wanted, lost):
        asked.append(lost)
        raise PartsMissing(1, end=6)

    sender._try(Deed(held, "g", lambda: True, once))
    for _ in range(3):
        turn(sender, held)
    assert asked == [None], "the records may be gone because another owner has finished: that is not read yet"
    held.position = 6
    for _ in range(3):
        turn(sender, held)
    assert len(asked) == 2
    assert isinstance(asked[1], PartsMissing)
    assert sender.waiting == {"g": "1 records are not in the log"}
    monkeypatch.setattr(time, "monotonic", lambda at=time.monotonic: at() + sending.BACKOFF_MAX_S)
    turn(sender, held)
    assert len(asked) == 3


def test_bodies_that_always_fail_hold_up_nobody(sender, held):
    """They kept a thread each, until each thread had one, and no chord of the process got its body any more."""
    for n in range(2 * SENDERS):
        sender._try(Deed(held, f"bad {n}", lambda: True, fail))
    sender._try(Deed(held, "good", lambda: True, lambda _wanted, _lost: "fired"))
    turn(sender, held)
    assert held.appended == ["fired"]
    assert len(sender.waiting) == 2 * SENDERS


def test_what_failed_for_a_while_is_done_and_waits_no_more(sender, held, monkeypatch):
    """Each time a little later."""
    monkeypatch.setattr(sending, "BACKOFF_FIRST_S", 0.0)
    attempts = []

    def once(_wanted, _lost):
        attempts.append(1)
        return "fired" if len(attempts) == 3 else fail(None, None)

    sender._try(Deed(held, "g", lambda: True, once))
    for _ in range(4):
        turn(sender, held)
    assert held.appended == ["fired"]
    assert len(attempts) == 3
    assert not sender.waiting


def test_what_is_no_longer_ours_is_let_go_of(sender, held):
    """The partition is somebody else's, who says for himself what waits."""
    sender._try(Deed(held, "g", lambda: True, fail))
    turn(sender, held)
    assert sender.waiting
    held.open = False
    turn(sender, held)
    assert not sender.waiting
    assert not sender._paused
