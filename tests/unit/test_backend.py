"""What the backend says of itself to Celery and to whoever prints it."""

from __future__ import annotations

import os
from datetime import timedelta
from threading import Event
from types import SimpleNamespace

import pytest
from celery import Celery, states

from celery_kafka_backend import reads
from celery_kafka_backend.events import PARENT

SECRET = "p4ssw0rd"
URL = f"kafka://b1:9092,b2:9092/?view=redis://reader:{SECRET}@host:6379/1&view=sqlite:////views/audit.db"


@pytest.fixture
def backend():
    return Celery("told", broker="memory://", backend=URL, set_as_current=False).backend


def test_its_url_hides_passwords_unless_they_are_asked_for(backend):
    masked = "kafka://b1:9092,b2:9092/?view=redis://reader:**@host:6379/1&view=sqlite:////views/audit.db"
    assert backend.as_uri() == masked
    assert backend.as_uri(include_password=True) == URL
    assert SECRET not in f"{backend!r} {backend.settings!r} {backend.recorder.settings}"


def test_it_joins_groups_and_expires_results_by_itself(backend):
    assert backend.supports_native_join
    assert backend.supports_autoexpire


def test_a_worker_s_main_process_waits_for_a_frozen_view_no_longer_than_it_may(backend, monkeypatch):
    """A revoke without a request looks up the task's run, in the event loop."""
    thawed = Event()
    backend.recorder.worker_pid = os.getpid()
    monkeypatch.setattr(reads, "PARENT_WAIT_S", 0.05)
    backend.reader = SimpleNamespace(shown=lambda _task_id: thawed.wait())
    assert backend.recorder.role == PARENT
    assert backend._known("x") is None
    thawed.set()


@pytest.mark.parametrize("kept", [timedelta.max, 10**12])
def test_what_is_kept_for_a_thousand_years_is_kept_for_ever(kept):
    """The wire has no such times: an event with one is a dead letter."""
    app = Celery("lasting", broker="memory://", backend=URL, set_as_current=False)
    app.conf.result_expires = kept
    assert app.backend._expires_at(1, states.SUCCESS, None) is None
    assert app.backend.recorder.knowledge_expires() is None
    app = Celery("lasting", broker="memory://", backend=URL, set_as_current=False)
    app.conf.result_expires = timedelta(days=36_500)
    assert app.backend._expires_at(1, states.SUCCESS, None) == 1 + 36_500 * 86_400_000
