"""``python -m tests.services preflight | install | up``: the tests' servers from the command line."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import time

from tests.services import apt, preflight
from tests.services.catalogue import SERVICES
from tests.services.errors import ServiceError


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.services", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, what in (
        ("preflight", "name everything that is missing"),
        ("install", "download, start nothing"),
        ("up", "start, print the addresses, stop at Ctrl-C"),
    ):
        one = commands.add_parser(command, help=what)
        one.add_argument("services", nargs="*", metavar="service", help=f"from {', '.join(SERVICES)}; all if none")
    arguments = parser.parse_args()
    names = arguments.services or list(SERVICES)
    unknown = [name for name in names if name not in SERVICES]
    if unknown:
        parser.error(f"no such service: {', '.join(unknown)}; there are {', '.join(SERVICES)}")
    try:
        return {"preflight": preflight.report, "install": _install, "up": _up}[arguments.command](names)
    except ServiceError as error:
        print(error, file=sys.stderr)
        return 1


def _install(names: list[str]) -> int:
    for name in names:
        started = time.monotonic()
        SERVICES[name].install()
        print(f"{name}: installed ({time.monotonic() - started:.1f} s)")
    if shutil.which("promtool") is None:  # checks compose/prometheus; without it these tests are skipped
        apt.install("prometheus")
    return 0


def _up(names: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as running:
        for name in names:
            started = time.monotonic()
            server = SERVICES[name].started()
            running.callback(server.stop)
            print(f"{name}: {SERVICES[name].address(server)} ({time.monotonic() - started:.1f} s)", flush=True)
        print("Ctrl-C stops them.", flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
