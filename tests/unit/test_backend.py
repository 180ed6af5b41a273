"""What the backend says of itself to Celery and to whoever prints it."""

from __future__ import annotations

import pytest
from celery import Celery

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
