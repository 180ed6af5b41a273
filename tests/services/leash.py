"""Run a command that dies with its parent: ``python leash.py PARENT_PID COMMAND…`` (Linux; elsewhere it just runs).

A little program of its own rather than a ``preexec_fn``: the test process has librdkafka's threads, and Python code
between fork and exec of a threaded process can deadlock. ``exec`` keeps the pid and the death signal.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        # SIGKILL, for a frozen server would not act on anything else.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # As in a terminal: what a shell starts with "&" ignores Ctrl-C, and so does all that it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
