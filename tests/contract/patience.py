"""Waiting for a store that was away."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from celery_kafka_backend.errors import Unavailable
from tests.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def again(ask: Callable[[], T]) -> T:
    """Ask as the host does, until the store is back."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except Unavailable:
            assert time.monotonic() < deadline
            time.sleep(0.05)
