"""How fast something works, where others have to live with it."""

from __future__ import annotations

import time


class Pace:
    """Holds up whoever does more than so many things per second.

    Args:
        rate: So many; None: as fast as it goes.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._begun = time.monotonic()
        self._done = 0

    def take(self, count: int = 1) -> None:
        """Return when so many more are due."""
        if self._rate is None:
            return
        self._done += count
        ahead_s = self._begun + self._done / self._rate - time.monotonic()
        if ahead_s > 0:
            time.sleep(ahead_s)
