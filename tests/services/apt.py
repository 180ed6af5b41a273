"""Debian's packages, where we may install some."""

from __future__ import annotations

import os
import shutil
import subprocess

from tests.services import cache, commands


def works() -> bool:
    """Whether this process may install packages."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def install(package: str) -> None:
    """Try to; whoever asks looks whether it is there then. ``RUNLEVEL=1`` keeps Debian from starting a server of its own."""
    if not works():
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install_it = ["apt-get", "install", "--yes", "--no-install-recommends", package]
    with cache.locked("apt"):
        # The second time after an update: a fresh image has no package lists.
        for command in (install_it, ["apt-get", "update"], install_it):
            try:
                done = subprocess.run(
                    command,
                    env=quiet,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=commands.DOWNLOAD_TIMEOUT_S,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired):
                return
            if done.returncode == 0 and command is install_it:
                return
