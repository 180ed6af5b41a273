"""On how many examples hypothesis tries a property: all of them in `make test`, a share of them in `make test-quick`."""

from __future__ import annotations

import os

from hypothesis import settings

SHARE = float(os.environ.get("EXAMPLES_SHARE", "1"))
"""Above 1 is a hunt."""


def tried_on(examples: int = 100) -> settings:
    """Decorate a property that is tried on so many, however slow the machine."""
    return settings(max_examples=max(1, round(examples * SHARE)), deadline=None)
