"""Other people's programs, run to their end: bounded, deaf, and what they said kept for the error."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.services.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Sequence

DOWNLOAD_TIMEOUT_S = 600


def run(command: Sequence[str], timeout_s: float, problem: str) -> str:
    """Return what a program said.

    Raises:
        ServiceError: It failed or took longer; ``problem``, then what it said.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"{problem}: {error}") from error
    if done.returncode != 0:
        raise ServiceError(f"{problem}:\n{done.stdout}")
    return done.stdout


def pip_download(requirement: str, into: Path, *options: str, sha256: str | None = None) -> Path:
    """Fetch one wheel or source archive, without what it depends on, into an empty folder.

    Raises:
        ServiceError: pip failed, or it is not the file that ``sha256`` names.
    """
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", *options, "--dest", str(into)]
    run(command, DOWNLOAD_TIMEOUT_S, f"pip could not fetch {requirement}")
    (found,) = Path(into).iterdir()
    if sha256 is not None and (is_ := hashlib.sha256(found.read_bytes()).hexdigest()) != sha256:
        raise ServiceError(f"{found.name} has the sha256 {is_}, not {sha256}")
    return found
