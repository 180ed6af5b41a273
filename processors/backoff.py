"""How long to wait before trying again, for everything that insists; and insisting on a store, for a while."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, Final, TypeVar

from celery_kafka_backend.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

PATIENCE_S: Final = 60.0
"""How long a store may be away before somebody who has an end to reach gives up."""
FIRST_S: Final = 0.1
MAX_S: Final = 5.0


def backoff_s(failures: int, jitter: Callable[[], float]) -> float:
    """Return the wait after so many failures in a row: half to all of 0.1, 0.2, 0.4 … 5 s.

    Args:
        failures: At least 1.
        jitter: A random number from 0 to 1, so that processes that failed together do not retry
            together.
    """
    return min(FIRST_S * 2.0 ** min(failures - 1, 10), MAX_S) * (0.5 + jitter() / 2)


def insist(action: Callable[[], Answer], patience_s: float) -> Answer:
    """Do it until it works.

    Raises:
        Unavailable: The store was away for longer than ``patience_s``.
    """
    since = time.monotonic()
    failures = 0
    while True:
        try:
            return action()
        except Unavailable as exc:
            failures += 1
            if time.monotonic() - since > patience_s:
                raise
            logger.warning("the store is away, attempt %d: %s", failures, exc)
            time.sleep(backoff_s(failures, random.random))
