"""Waiting for a store that was away."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from celery_kafka_backend.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
PATIENCE_S = 30.0


def again(ask: Callable[[], T]) -> T:
    """Ask as the host does, until the store is back."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except Unavailable:
            assert time.monotonic() < deadline
            time.sleep(0.05)
