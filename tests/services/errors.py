"""What can go wrong with a service, as one exception that a fixture turns into a skip or a failure."""

from __future__ import annotations

from typing import NamedTuple


class ServiceError(Exception):
    """Raised when a server cannot be installed, or does not start; the message says why and what to do."""


class Missing(NamedTuple):
    """Something that has to be on the machine first, and how to get it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        """As one line of the preflight report."""
        return f"{self.what}: {self.remedy}"
