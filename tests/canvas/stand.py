"""A fleet that plays programs: a broker, a view, workers, processors, and whoever kills them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from tests.services import kafka, native, redis

ROOT = Path(__file__).parents[2]
READY_S = 180.0
PROCESSORS_EVERY_S = 15.0
"""A supervisor whose processes die more often than five times a minute gives up."""


class Stand:
    """Starts on entry, and ends with all that it held."""

    def __init__(self, name: str, folder: Path, conf: dict, *, kills: bool) -> None:
        self.name = name
        self._folder = folder / name
        self._conf = conf
        self._kills = kills
        self._killed = {"child": 0, "processor": 0}
        self._running = contextlib.ExitStack()
        self._over = threading.Event()

    def __enter__(self):
        self._folder.mkdir(parents=True)
        server = redis.start()
        self._running.callback(server.stop)
        conf = dict(self._conf)
        backend = server.clean_database()
        if self.name == "kafka":
            cluster = kafka.start()
            self._running.callback(cluster.stop)
            backend = f"kafka://{cluster.bootstrap}/?view={backend}"
            conf["kafka_backend_settings"] = {
                "topic_prefix": f"c{secrets.token_hex(4)}",
                "replication_factor": 1,
                "min_insync_replicas": 1,
                "partitions": 4,
                "chord_partitions": 4,
            }
        self._environment = {
            "CANVAS_FOLDER": str(self._folder),
            "CANVAS_BROKER": server.url,
            "CANVAS_BACKEND": backend,
            "CANVAS_CONF": json.dumps(conf),
        }
        if self.name == "kafka":
            done = subprocess.run(
                self._celery("pipeline", "init"), cwd=ROOT, env={**os.environ, **self._environment},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            self._start("pipeline", self._celery("pipeline", "run"), "assigned")
        self._start(
            "worker",
            self._celery(
                "worker", "-c", "4", "-l", "INFO", "--without-gossip", "--without-mingle", "-Q", "celery,aside"
            ),
            "ready.",
        )
        self._player = self._popen("player", [sys.executable, "-m", "tests.canvas.player"])
        if self._kills:
            threading.Thread(target=self._kill, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._running.close()

    def run(self, programs: dict, expected: dict | None = None) -> dict:
        """Return the answers of programs, by seed."""
        self._player.stdin.write(json.dumps({"programs": programs, "expected": expected}) + "\n")
        self._player.stdin.flush()
        for line in self._player.stdout:
            if line.startswith("ANSWER "):
                return {int(seed): answer for seed, answer in json.loads(line[7:]).items()}
        raise RuntimeError(f"the player of {self.name} ended: {(self._folder / 'player.log').read_text()[-3000:]}")

    def said(self) -> str:
        return ", ".join(f"{number} {whom} killed" for whom, number in self._killed.items())

    def _celery(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "tests.canvas.app", *arguments]

    def _popen(self, name, command):
        log = (self._folder / f"{name}.log").open("ab")
        self._running.callback(log.close)
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **self._environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, text=True,
        )  # fmt: skip
        self._running.callback(process.kill)
        return process

    def _start(self, name, command, ready):
        log = self._folder / f"{name}.log"
        with log.open("ab") as output:
            process = native.popen(command, output=output, env=self._environment, cwd=ROOT)
        self._running.callback(native.end, process)
        setattr(self, f"_{name}", process)
        deadline = time.monotonic() + READY_S
        while ready not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text()[-3000:])
            time.sleep(0.1)

    def _kill(self):
        chance = random.Random(1)
        last = time.monotonic()
        while not self._over.wait(chance.uniform(0.5, 4)):
            due = time.monotonic() - last > PROCESSORS_EVERY_S
            whom = "processor" if due else "child"
            root = self._pipeline if due else self._worker
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(root.pid).children(recursive=True)
                if due:
                    last = time.monotonic()
                    children = [one for one in children if "resource_tracker" not in " ".join(one.cmdline())]
                if children:
                    chance.choice(children).kill()
                    self._killed[whom] += 1
