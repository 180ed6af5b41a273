"""The demo itself, as a user runs it: it succeeds, it notices what is wrong, and it leaves nothing behind."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.patience import PATIENCE_S
from tests.services import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN = Path(__file__).parents[2] / "examples" / "demo" / "run.py"
MARK = "CKB_DEMO_TEST"
BILLIARD = tuple(int(number) for number in version("billiard").split(".")[:3])


class Demo:
    """A run of the demo, in a process group of its own as a shell would start it."""

    def __init__(self, *arguments: str) -> None:
        self.mark = secrets.token_hex(8)
        self.process = subprocess.Popen(
            [sys.executable, str(RUN), "--quick", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, MARK: self.mark, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
            start_new_session=True,
        )

    def finished(self) -> tuple[int, str]:
        """Its exit code and what it printed."""
        said, _ = self.process.communicate(timeout=PATIENCE_S)
        print(said)
        return self.process.returncode, said

    def until_said(self, text: str) -> None:
        """Wait until it prints a line with this text."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(line, end="")
            if text in line:
                return
        pytest.fail(f"the demo ended without saying {text!r}")

    def left(self) -> list[processes.Running]:
        """Every live process that it started, at any depth; they inherit its environment."""
        return processes.started_by(self.process.pid, MARK, self.mark)


@pytest.fixture
def demo(request: pytest.FixtureRequest) -> Iterator[Demo]:
    """A running demo; its parametrization is its arguments."""
    arguments = getattr(request, "param", ())
    if "--no-redis" in arguments and BILLIARD < (4, 3, 2):
        pytest.skip("billiard before 4.3.2: a child that is terminated may leave the queue of them all locked")
    one = Demo(*arguments)
    yield one
    for process in one.left():
        processes.kill(process)
    one.process.kill()
    one.process.wait()


def nothing_is_left(demo: Demo, within_s: float) -> None:
    """Fail if a process outlives the demo."""
    end = time.monotonic() + within_s
    while (left := demo.left()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize("demo", [(), ("--no-redis",)], ids=["default", "no-redis"], indirect=True)
def test_the_demo_holds_what_it_shows(demo: Demo) -> None:
    """With Redis if there is one, and as on a machine without."""
    code, said = demo.finished()
    assert code == 0
    assert "✗" not in said
    assert re.search(r"\d+ checks, all held", said)
    nothing_is_left(demo, 0)


@pytest.mark.parametrize(
    "demo", [("--tamper",), ("--tamper", "--no-redis")], ids=["default", "no-redis"], indirect=True
)
def test_a_falsified_result_fails_the_demo(demo: Demo) -> None:
    """Both by the value that AsyncResult reads and by the row in the database."""
    code, said = demo.finished()
    assert code == 1
    assert "✗ every result is what it must be" in said
    assert "✗ every row and column is as in the live view" in said
    nothing_is_left(demo, 0)


@pytest.mark.parametrize(
    ("how", "moment"),
    [
        ("terminal", "The stack, each"),
        ("terminal", "A chord over"),
        ("only-the-driver", "Retries, a revoke"),
        ("only-the-driver", "A chord over"),
        ("sigterm", "A chord over"),
    ],
)
def test_whoever_stops_the_demo_stops_everything(demo: Demo, moment: str, how: str) -> None:
    """Ctrl-C reaches the foreground group, ``kill`` one process; at any moment nothing may be left."""
    demo.until_said(moment)
    time.sleep(0.5)
    if how == "terminal":
        os.killpg(demo.process.pid, signal.SIGINT)
    else:
        demo.process.send_signal(signal.SIGTERM if how == "sigterm" else signal.SIGINT)
    code, _ = demo.finished()
    assert code == (128 + signal.SIGTERM if how == "sigterm" else 128 + signal.SIGINT)
    nothing_is_left(demo, 0)


FINALIZED = """
import os, signal, sys, time
import run

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.01)

signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.unraisablehook = run.send_again
Finalized()
print("dropped", flush=True)
time.sleep({patience})
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_that_falls_into_a_finalizer_stops_all_the_same(name: str) -> None:
    """The interpreter only prints what a finalizer raises; whoever pressed Ctrl-C then waited in vain."""
    said = subprocess.run(
        [sys.executable, "-c", FINALIZED.format(name=name, patience=PATIENCE_S)],
        cwd=RUN.parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert said.stdout == "dropped\n"
    assert said.returncode == (-signal.SIGINT if name == "SIGINT" else 128 + signal.SIGTERM)


def test_not_even_kill_9_leaves_something_running(demo: Demo) -> None:
    """Nobody can clean up then but those who notice that they are alone."""
    demo.until_said("A chord over")
    time.sleep(0.5)
    assert demo.left()
    demo.process.kill()
    demo.process.wait()
    nothing_is_left(demo, PATIENCE_S)
