"""Servers that refuse to run as root run as nobody, where the tests are root."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NOBODY = 65534


def as_nobody(command: Sequence[str]) -> list[str]:
    """Return a command that runs as nobody if we are root."""
    if os.geteuid() != 0:
        return list(command)
    # A process would forget, with its user, to die with us.
    who = ["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--pdeathsig", "keep"]
    return ["setpriv", *who, *command]
