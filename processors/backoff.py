"""How long to wait before trying again, for everything that insists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

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
