"""Who carries out a decision goes on until it is done, without wearing Kafka out."""

from __future__ import annotations

from types import SimpleNamespace

from celery_kafka_backend import settings
from celery_kafka_backend.processors.held import Held, Recent, Statistics
from celery_kafka_backend.processors.sending import BACKOFF_MAX_S, PartsMissing, Sender


def test_a_declaration_that_is_gone_is_looked_for_at_intervals_and_said():
    """Somebody removed it, so the chord never ends. It was read again without a pause, with a whole core."""
    app = SimpleNamespace(set_current=lambda: None)
    given = settings.parse("kafka://b1:9092/?view=memory://x")
    sender = Sender(app, given, Statistics(), Recent(0), lambda: 0, lambda _held, _done: None)
    held = Held(0, ledger=None, end=0)
    held.position = 5
    paused, said = [], []

    def pause(_wanted, seconds):
        paused.append(seconds)
        said.append(dict(sender.waiting))

    def once(_wanted, _lost):
        raise PartsMissing(1, end=5)

    sender._pause = pause
    sender._insist(held, "g", lambda: len(paused) < 3, once)
    sender.close()
    assert paused == [BACKOFF_MAX_S] * 3
    assert said == [{"g": "1 records are not in the log"}] * 3
    assert not sender.waiting
