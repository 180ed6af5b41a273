"""The supervisor with tiny processes: what is restarted, what is given up, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from celery_kafka_backend.errors import SettingsError
from celery_kafka_backend.processors.supervisor import GAVE_UP, KILLED, MISCONFIGURED, STOPPED, ProcessSpec, Supervisor
from tests.patience import until


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def say(path: str, text: object) -> None:
    with Path(path).open("a") as file:
        file.write(f"{text}\n")


# -- tiny processes: importable, as spawn needs them ---------------------------------------------


def until_told(path: str) -> None:
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    say(path, f"up {os.getpid()}")
    while not told:
        time.sleep(0.02)
    time.sleep(0.3)  # a second signal would be counted here
    say(path, f"told {len(told)}")


def deaf(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(path, f"up {os.getpid()}")
    time.sleep(600)


def crash_at_once(path: str) -> None:
    say(path, f"up {os.getpid()}")
    os._exit(3)


def misconfigured(path: str) -> None:
    say(path, "up")
    raise SettingsError("views", "no such thing")


def right_once(path: str, for_s: float) -> None:
    first = not lines(Path(path))
    say(path, "up")
    if first:
        time.sleep(for_s)
    raise SettingsError("views", "wrong password")


def supervise(path: str) -> None:
    """A supervisor in a process of its own, to be killed."""
    sys.exit(Supervisor([ProcessSpec("one", until_told, (path,)), ProcessSpec("two", until_told, (path,))]).run())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def pids(path: Path) -> list[int]:
    return [int(line.split()[1]) for line in lines(path) if line.startswith("up ")]


# -- the facts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded_once_and_everything_finishes(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "said"

    def send() -> None:
        until(lambda: len(pids(path)) == 2)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    specs = [ProcessSpec(name, until_told, (str(path),)) for name in ("one", "two")]
    assert Supervisor(specs).run() == STOPPED
    assert sorted(lines(path))[:2] == ["told 1", "told 1"]


def test_a_dead_process_is_restarted(tmp_path: Path) -> None:
    path = tmp_path / "said"
    supervisor = Supervisor([ProcessSpec("one", until_told, (str(path),))])

    def kill_and_stop() -> None:
        until(lambda: len(pids(path)) == 1)
        os.kill(pids(path)[0], signal.SIGKILL)
        until(lambda: len(pids(path)) == 2)
        supervisor.stop()

    threading.Thread(target=kill_and_stop).start()
    assert supervisor.run() == STOPPED
    first, second = pids(path)
    assert first != second


def test_what_keeps_dying_is_given_up_and_the_others_are_stopped(tmp_path: Path) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    specs = [ProcessSpec("bad", crash_at_once, (str(bad),)), ProcessSpec("good", until_told, (str(good),))]
    assert Supervisor(specs, crashes=3).run() == GAVE_UP
    assert len(pids(bad)) == 3
    assert lines(good)[-1] == "told 1"


def test_what_keeps_dying_and_is_not_vital_stops_no_other(tmp_path: Path) -> None:
    """Insight while Kafka is away: results do not depend on it."""
    well, ill = tmp_path / "well", tmp_path / "ill"
    specs = [ProcessSpec("well", until_told, (str(well),)), ProcessSpec("ill", crash_at_once, (str(ill),), vital=False)]
    supervisor = Supervisor(specs, crashes=2, refused_s=0.1)

    def watch() -> None:
        until(lambda: len(pids(ill)) >= 4 and pids(well))
        supervisor.stop()

    threading.Thread(target=watch).start()
    assert supervisor.run() == STOPPED
    assert len(pids(well)) == 1


def test_a_wrong_setting_is_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "said"
    assert Supervisor([ProcessSpec("one", misconfigured, (str(path),))]).run() == MISCONFIGURED
    assert lines(path) == ["up"]


def test_a_setting_that_was_right_once_does_not_stop_the_others(tmp_path: Path) -> None:
    refused, good = tmp_path / "refused", tmp_path / "good"
    specs = [ProcessSpec("refused", right_once, (str(refused), 0.5)), ProcessSpec("good", until_told, (str(good),))]
    supervisor = Supervisor(specs, crashes=2, window_s=0.4, refused_s=0.05)

    def stop() -> None:
        until(lambda: len(lines(refused)) > 2)
        supervisor.stop()

    threading.Thread(target=stop).start()
    assert supervisor.run() == STOPPED
    assert (len(pids(good)), lines(good)[-1]) == (1, "told 1")


def test_a_setting_that_was_right_once_ends_who_is_alone(tmp_path: Path) -> None:
    refused = tmp_path / "refused"
    spec = ProcessSpec("refused", right_once, (str(refused), 0.5))
    assert Supervisor([spec], window_s=0.4, refused_s=0.05).run() == MISCONFIGURED


def test_what_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "said"
    supervisor = Supervisor([ProcessSpec("deaf", deaf, (str(path),))], grace_s=0.5)

    def stop() -> None:
        until(lambda: pids(path))
        supervisor.stop()

    threading.Thread(target=stop).start()
    assert supervisor.run() == KILLED
    assert not alive(pids(path)[0])


def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    path = tmp_path / "said"
    code = f"from tests.integration import test_supervisor as t; t.supervise({str(path)!r})"
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    try:
        until(lambda: len(pids(path)) == 2)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not any(map(alive, pids(path))))
    assert min(lines(path)) == "told 1", "they finished, as after any SIGTERM"
