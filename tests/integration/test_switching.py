"""docs/switching.md, executed: a fleet goes from Celery's Redis backend to ours and back, process by process, under load.

Groups and chords of every shape are open all the time. SWITCHING_FLEET="workers clients rounds" makes it longer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from celery import VERSION

from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S
from tests.services import native, ports

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

WORKERS, CLIENTS, ROUNDS = map(int, os.environ.get("SWITCHING_FLEET", "2 1 1").split())
CLIENT = Path(__file__).with_name("switching_client.py")
THREADS = 6


class Switching:
    """A fleet of workers and clients, each restarted alone; what a process starts with is the step that it belongs to."""

    def __init__(self, fleet: Fleet, folder: Path, port: int) -> None:
        self.fleet = fleet
        self.folder = folder
        self.port = port
        self.kafka = fleet.environment["FLEET_BACKEND"]
        self.settings = json.loads(fleet.environment["FLEET_SETTINGS"])
        self.generation = Counter()

    def configure(self, step: str) -> None:
        """What ``result_backend`` and ``chords`` are from now on: "redis", "view" or "kafka"."""
        chords = "kafka" if step == "kafka" else "view"
        self.fleet.environment["FLEET_BACKEND"] = self.fleet.view if step == "redis" else self.kafka
        self.fleet.environment["FLEET_SETTINGS"] = json.dumps({**self.settings, "chords": chords})

    def start(self, role: str, number: int) -> None:
        self.generation[role, number] += 1
        name = f"{role}{number}-{self.generation[role, number]}"
        if role == "worker":
            self.fleet.worker("-c", "3", name=name)
            return
        with (self.folder / f"{name}.log").open("wb") as output:
            self.fleet.processes[name] = native.popen(
                [
                    sys.executable,
                    str(CLIENT),
                    str(self.journal),
                    str(1000 * number + self.generation[role, number]),
                    str(THREADS),
                ],
                output=output,
                env=self.fleet.environment,
            )
        self.fleet.until(name, "sending")

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    def end(self, role: str, number: int) -> None:
        """As a service manager does: SIGTERM, and what is open may end."""
        self._ended(*self._told_to_end(role, number))

    def _told_to_end(self, role: str, number: int):
        name = f"{role}{number}-{self.generation[role, number]}"
        process = self.fleet.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return name, process

    def _ended(self, name, process) -> None:
        try:
            code = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)  # each says where it stands (PYTHONFAULTHANDLER)
            process.wait(PATIENCE_S)
            pytest.fail(f"{name} did not end: {self.fleet.log(name)[-20000:]}")
        assert code == 0, self.fleet.log(name)[-3000:]

    def restart(self, role: str) -> None:
        """Each alone: the next one when the new one runs and the old one has ended."""
        for number in range(WORKERS if role == "worker" else CLIENTS):
            old = self._told_to_end(role, number)
            self.start(role, number)
            self._ended(*old)

    def open_in_kafka(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(
            int(float(line.split()[-1])) for line in text.splitlines() if line.startswith("celery_kafka_chords_open")
        )

    def until_none_is_open(self) -> None:
        """The metric is up to 5 s old."""
        deadline = time.monotonic() + PATIENCE_S
        quiet_since = None
        while quiet_since is None or time.monotonic() - quiet_since < 6:
            quiet_since = (quiet_since or time.monotonic()) if self.open_in_kafka() == 0 else None
            assert time.monotonic() < deadline, f"{self.open_in_kafka()} chords are still open in Kafka"
            time.sleep(0.25)


@pytest.fixture
def switching(kafka, redis_server, tmp_path):
    (port,) = ports.free(1)
    with Fleet(
        kafka.bootstrap, redis_server.clean_database(), redis_server.clean_database(), tmp_path, {}, {}
    ) as fleet:
        fleet.init()
        fleet.start("pipeline", "pipeline", "run", "--metrics-port", str(port), ready="assigned")
        yield Switching(fleet, tmp_path, port)


def test_a_switch_there_and_back_under_load_loses_nothing(switching):
    switching.configure("redis")
    for number in range(WORKERS):
        switching.start("worker", number)
    for number in range(CLIENTS):
        switching.start("client", number)
    for _ in range(ROUNDS):
        for step in ("view", "kafka", "view"):
            switching.configure(step)
            switching.restart("worker")
            switching.restart("client")
        switching.until_none_is_open()
        switching.configure("redis")
        switching.restart("client")
        switching.restart("worker")
    for number in range(CLIENTS):
        switching.end("client", number)
    answers = [json.loads(line) for line in switching.journal.read_text().splitlines()]
    wrong = [one for one in answers if one["found"] != one["expected"]]
    assert not wrong, f"{len(wrong)} of {len(answers)}: {wrong[:5]}"
    shapes = Counter(one["way"] for one in answers)
    print(f"{len(answers)} answers, slowest {max(one['s'] for one in answers)} s; {dict(shapes)}")
    assert len(shapes) == (11 if VERSION[:2] >= (5, 7) else 10), shapes
