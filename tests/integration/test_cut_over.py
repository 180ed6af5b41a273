"""docs/cut-over.md, executed: readers go to another view and back, under load, and no answer is wrong, missing or late.

The first view is a Redis, which tells who waits; the second one a file, which is asked. CUT_OVER_ROUNDS makes it longer.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from celery_kafka_backend.topics import view_name
from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S
from tests.services import native
from tests.services import redis as service

if TYPE_CHECKING:
    import subprocess

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

ROUNDS = int(os.environ.get("CUT_OVER_ROUNDS", "1"))
RUNBOOK = Path(__file__).parents[2] / "docs" / "cut-over.md"
CLIENT = Path(__file__).with_name("cutover_client.py")
FEED_OLD = "celery -A proj pipeline run --view $OLD --no-chords"
THREADS = 6


def step(name: str) -> list[str]:
    """The commands of the runbook's section of that name."""
    section = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL)
    assert section, name
    return [line for block in re.findall(r"```sh\n(.*?)```", section[1], re.DOTALL) for line in block.splitlines()]


class Moving:
    """A fleet with two views, and clients that live through all of it."""

    def __init__(self, fleet: Fleet, folder: Path, names: dict[str, str]) -> None:
        self.fleet = fleet
        self.journal = folder / "journal"
        self.names = names

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        for name, value in self.names.items():
            line = line.replace(f"${name}", value)
        words = line.partition("#")[0].split()
        assert words[:3] == ["celery", "-A", "proj"], line
        return self.fleet.run(*words[3:])

    def follow(self, name: str, line: str) -> None:
        """A command that goes on running."""
        words = line.replace("$NEW", self.names["NEW"]).replace("$OLD", self.names["OLD"]).partition("#")[0].split()
        self.fleet.start(name, *words[3:], ready="assigned")

    def until_succeeds(self, line: str) -> None:
        """A refusal changes nothing: it may be repeated."""
        deadline = time.monotonic() + PATIENCE_S
        while (done := self.run(line)).returncode:
            assert done.returncode in (10, 13), done.stdout + done.stderr
            assert time.monotonic() < deadline, done.stdout + done.stderr

    def clients(self) -> list[str]:
        names = ["client-1", "client-2"]
        for seed, name in enumerate(names):
            command = [sys.executable, str(CLIENT), str(self.journal), str(1000 * seed), str(THREADS)]
            with (self.fleet.folder / f"{name}.log").open("wb") as output:
                self.fleet.processes[name] = native.popen(command, output=output, env=self.fleet.environment)
            self.fleet.until(name, "sending")
        return names

    def answers(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines() if line.endswith("}")]

    def until_read_from(self, scheme: str, count: int = 40) -> None:
        """All that clients are told comes from one view."""
        deadline = time.monotonic() + PATIENCE_S
        while len(last := self.answers()[-count:]) < count or {one["view"] for one in last} != {scheme}:
            assert time.monotonic() < deadline, Counter(one["view"] for one in last)
            time.sleep(0.1)

    def end(self, name: str) -> None:
        process = self.fleet.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, self.fleet.log(name)[-3000:]


@pytest.fixture
def moving(kafka, redis_server, tmp_path):
    old, new = redis_server.clean_database(), f"sqlite:///{tmp_path}/new.db"
    with Fleet(kafka.bootstrap, redis_server.clean_database(), f"{old}&view={new}", tmp_path, {}, {}) as fleet:
        fleet.init()
        yield Moving(fleet, tmp_path, {"OLD": view_name(old), "NEW": view_name(new)})


def test_readers_go_to_another_view_and_back_under_load(moving):
    fleet = moving.fleet
    fleet.start("chords", "pipeline", "run", "--chords-only", ready="assigned")
    moving.follow("old", FEED_OLD)
    fleet.worker("-c", "3")
    fleet.app.add.delay(1, 1).get(timeout=PATIENCE_S)
    (cut_over, *_), (compare,), (feed,) = step("Cut over"), step("Compare"), step("Feed the new view")
    moving.follow("new", feed)
    moving.end("new")
    fleet.app.add.delay(1, 1).get(timeout=PATIENCE_S)
    refused = moving.run(f"{cut_over} --lag 0.1")
    assert refused.returncode == 13, refused.stdout + refused.stderr
    assert re.search(rf"{moving.names['NEW']} lags: after .* it is \d+ events behind", refused.stderr), refused.stderr
    moving.follow("new", feed)
    clients = moving.clients()
    moving.until_read_from("redis")
    moving.until_succeeds(compare)
    for _ in range(ROUNDS):
        for line in step("Cut over"):
            done = moving.run(line)
            assert done.returncode == 0, done.stdout + done.stderr
        moving.until_read_from("sqlite")
        moving.end("old")  # nobody reads it any more
        moving.until_read_from("sqlite", 80)
        moving.follow("old", FEED_OLD)
        (back,) = step("And back")
        moving.until_succeeds(back)  # refused while the old view catches up
        moving.until_read_from("redis")
    for name in clients:
        moving.end(name)
    answers = moving.answers()
    wrong = [one for one in answers if one["wrong"]]
    ways = Counter(one["way"] for one in answers)
    print(f"{len(answers)} answers, slowest {max(one['s'] for one in answers)} s; {dict(ways)}")
    assert not wrong, f"{len(wrong)} of {len(answers)}: {wrong[:5]}"
    assert len(ways) == 9, ways


def test_the_old_view_is_lost_and_who_waits_is_answered_by_the_new_one(kafka, redis_server, tmp_path):
    lost = service.start(appendonly=True)
    old, new = lost.url, f"sqlite:///{tmp_path}/new.db"
    name = view_name(new)
    try:
        with Fleet(kafka.bootstrap, redis_server.clean_database(), f"{old}&view={new}", tmp_path, {}, {}) as fleet:
            fleet.serve()
            app = fleet.app
            assert app.add.delay(1, 1).get(timeout=PATIENCE_S) == 2
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(app.nap.delay(3).get, timeout=PATIENCE_S)
                lost.kill()
                refused = fleet.run("pipeline", "cutover", "--to", name)
                assert refused.returncode == 7, refused.stdout + refused.stderr
                assert "--force" in refused.stderr
                forced = fleet.run("pipeline", "cutover", "--to", name, "--force")
                assert forced.returncode == 13, forced.stdout + forced.stderr
                assert waiting.result(PATIENCE_S) == 3
            assert app.add.delay(2, 2).get(timeout=PATIENCE_S) == 4
            lost.restart()
            assert "does not say so" in fleet.run("pipeline", "status").stdout
            again = fleet.run("pipeline", "cutover", "--to", name)
            assert again.returncode == 0, again.stdout + again.stderr
            assert "does not say so" not in fleet.run("pipeline", "status").stdout
    finally:
        lost.stop()
