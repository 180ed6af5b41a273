"""How a prefork worker's processes come and go: recycled, resized, ended warm and cold, cut off, managed by `multi`."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from celery_kafka_backend import events
from tests.patience import PATIENCE_S
from tests.services.proxy import Proxy

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

RECYCLED = int(os.environ.get("RECYCLED_CHILDREN", "40"))
"""How many children the recycling test wears out; ``make recycle`` takes a thousand."""


@pytest.fixture
def tasks(fleet):
    return fleet.app


@pytest.fixture
def worker(fleet):
    """Start workers of a queue of their own, each gone at the end."""
    made = []
    queue = f"q{secrets.token_hex(4)}"

    def start(*arguments):
        name = f"w{secrets.token_hex(4)}"
        fleet.worker("-Q", queue, *arguments, name=name)
        made.append(name)
        return Worker(fleet, queue, name)

    yield start
    for name in made:
        ended(fleet, name, signal.SIGTERM)


class Worker:
    def __init__(self, fleet, queue, name):
        self.fleet, self.queue, self.name = fleet, queue, name

    @property
    def process(self):
        return self.fleet.processes[self.name]

    def send(self, task, *args, **options):
        return task.apply_async(args, queue=self.queue, **options)

    def signal(self, number):
        self.process.send_signal(number)

    def end(self, number):
        ended(self.fleet, self.name, number)

    def finished(self):
        """Ids of the tasks whose end a child has logged: by then the result is acknowledged by Kafka."""
        return set(re.findall(r"\[([0-9a-f-]{36})\] succeeded", self.fleet.log(self.name)))


def ended(fleet, name, number):
    process = fleet.processes.pop(name, None)
    if process is not None:
        process.send_signal(number)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{name} hangs at exit:\n{fleet.log(name)[-3000:]}")


def children(worker):
    return psutil.Process(worker.process.pid).children(recursive=True)


def test_a_child_per_task_loses_nothing_and_leaks_nothing(worker, tasks):
    recycled = worker("--max-tasks-per-child=1")
    parent = psutil.Process(recycled.process.pid)
    half = RECYCLED // 2

    def wear_out(count):
        sent = [recycled.send(tasks.add, i, i) for i in range(count)]
        assert [one.get(timeout=20 * PATIENCE_S) for one in sent] == [2 * i for i in range(count)]
        return parent.num_threads(), parent.num_fds(), len(parent.net_connections("tcp"))

    threads, files, connections = wear_out(half)
    after = wear_out(RECYCLED - half)
    # Two children are replaced now and then while we look: each has two pipes and a sentinel. A handle has 5 threads.
    assert after[0] <= threads + 1
    assert after[1] <= files + 12
    assert after[2] <= connections + 2
    recycled.end(signal.SIGTERM)


def test_a_child_that_grew_too_large_is_replaced_after_its_result(worker, tasks):
    heavy = worker("--max-memory-per-child=1")
    sent = [heavy.send(tasks.whoami) for _ in range(8)]
    assert len({one.get(timeout=PATIENCE_S) for one in sent}) == 8


def test_children_that_are_spawned_rather_than_forked_know_what_they_are(fleet, worker, tasks, monkeypatch):
    monkeypatch.setitem(fleet.environment, "FLEET_CONF", '{"worker_pool_start_method": "spawn"}')
    spawning = worker("--max-tasks-per-child=5")
    sent = [spawning.send(tasks.add, i, i) for i in range(20)]
    assert [one.get(timeout=PATIENCE_S) for one in sent] == [2 * i for i in range(20)]
    for one in sent:
        (success,) = [event for event in fleet.history(one.id) if event.kind == events.SUCCESS]
        assert success.role == events.CHILD
        assert success.pid != spawning.process.pid


def test_an_autoscaled_pool_loses_nothing_while_it_grows_and_shrinks(worker, tasks, fleet, monkeypatch):
    monkeypatch.setitem(fleet.environment, "AUTOSCALE_KEEPALIVE", "0.5")
    scaled = worker("--autoscale=6,1")
    for _ in range(2):
        sent = [scaled.send(tasks.nap, 0.1) for _ in range(40)]
        assert [one.get(timeout=PATIENCE_S) for one in sent] == [0.1] * 40
        deadline = time.monotonic() + PATIENCE_S
        while len(children(scaled)) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert "Scaling up" in fleet.log(scaled.name)


WAYS = {
    "SIGTERM": [signal.SIGTERM],
    "SIGTERM twice": [signal.SIGTERM, signal.SIGTERM],
    "SIGTERM, then SIGQUIT": [signal.SIGTERM, signal.SIGQUIT],
    "SIGQUIT": [signal.SIGQUIT],
    "SIGINT": [signal.SIGINT],
    "control.shutdown": [],
}


@pytest.fixture(scope="module")
def shut_down(fleet):
    """A worker for each way to end one, all ended in the middle of their work, and then one more that does the rest."""
    ways, tasks = {}, fleet.app
    for number, how in enumerate(WAYS):
        queue, name = f"q{secrets.token_hex(4)}", f"ending{number}"
        fleet.worker("-Q", queue, name=name)
        worker = Worker(fleet, queue, name)
        ways[how] = worker, [worker.send(tasks.nap_late, 0.05) for _ in range(40)]
    for how, (worker, sent) in ways.items():
        sent[0].get(timeout=PATIENCE_S)
        for number in WAYS[how][:1]:
            worker.signal(number)
        if not WAYS[how]:
            tasks.app.control.shutdown(destination=[fleet.node(worker.name)])
    for how, (worker, _) in ways.items():
        for number in WAYS[how][1:]:
            fleet.until(worker.name, "Warm shutdown")
            worker.signal(number)
    for worker, _ in ways.values():
        worker.process.wait(PATIENCE_S)
    fleet.worker("-Q", ",".join(worker.queue for worker, _ in ways.values()), name="rescuer")
    yield ways
    ended(fleet, "rescuer", signal.SIGTERM)
    for worker, _ in ways.values():
        fleet.processes.pop(worker.name)


@pytest.mark.parametrize("how", WAYS)
def test_what_a_worker_finished_before_it_was_shut_down_is_stored(fleet, shut_down, how):
    worker, sent = shut_down[how]
    assert not children_left(worker)
    finished = worker.finished()
    assert finished
    for task_id in finished:
        assert fleet.app.app.AsyncResult(task_id).get(timeout=PATIENCE_S) == 0.05
        assert events.SUCCESS in fleet.kinds(task_id)
    # acks_late: what it did not finish was delivered again
    assert [one.get(timeout=PATIENCE_S) for one in sent] == [0.05] * len(sent)


def children_left(worker):
    needle = f"-n {worker.name}@"
    return [
        process.pid
        for process in psutil.process_iter()
        if needle in " ".join(_cmdline(process)) and process.status() != psutil.STATUS_ZOMBIE
    ]


def _cmdline(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_task_cancelled_because_the_broker_was_cut_off_runs_again(fleet, worker, tasks, tmp_path, monkeypatch):
    broker = urlsplit(fleet.environment["FLEET_BROKER"])
    proxy = Proxy(broker.port)
    conf = '{"result_extended": true, "worker_cancel_long_running_tasks_on_connection_loss": true}'
    monkeypatch.setitem(fleet.environment, "FLEET_BROKER", f"redis://127.0.0.1:{proxy.port}{broker.path}")
    monkeypatch.setitem(fleet.environment, "FLEET_CONF", conf)
    try:
        away = worker()
        marker = tmp_path / "started"
        result = away.send(tasks.long_once, str(marker))
        deadline = time.monotonic() + PATIENCE_S
        while not marker.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        proxy.cut()
        proxy.heal()
        fleet.until(away.name, "Connection to broker lost")
        again = [away.send(tasks.add, i, i) for i in range(10)]
        assert [one.get(timeout=PATIENCE_S) for one in again] == [2 * i for i in range(10)]
        assert result.get(timeout=PATIENCE_S) == "second life"
        away.end(signal.SIGTERM)
    finally:
        proxy.close()


def test_celery_multi_starts_restarts_and_stops(fleet, tasks, tmp_path):
    queue = f"q{secrets.token_hex(4)}"

    def multi(verb):
        command = [sys.executable, "-m", "celery", "multi", verb, "one", "two", "-A", "fleet_app"]
        command += [
            "-c",
            "1",
            "-Q",
            queue,
            "-l",
            "INFO",
            f"--pidfile={tmp_path}/%n.pid",
            f"--logfile={tmp_path}/%n.log",
        ]
        done = subprocess.run(
            command,
            env=fleet.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def pids():
        return [int(path.read_text()) for path in sorted(Path(tmp_path).glob("*.pid"))]

    def until_ready(times):
        deadline = time.monotonic() + PATIENCE_S
        logs = [tmp_path / f"{node}.log" for node in ("one", "two")]
        while any(not log.exists() or log.read_text().count(" ready.") < times for log in logs):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def work():
        sent = [tasks.nap.apply_async((0.02,), queue=queue) for _ in range(30)]
        return [one.get(timeout=PATIENCE_S) for one in sent]

    started = []
    try:
        multi("start")
        until_ready(1)  # or one of them does the work while the other has not written its pid yet
        assert work() == [0.02] * 30
        started = pids()
        assert len(started) == 2
        sent = [tasks.nap.apply_async((0.02,), queue=queue) for _ in range(60)]
        multi("restart")
        assert [one.get(timeout=PATIENCE_S) for one in sent] == [0.02] * 60
        assert not set(started) & set(pids())
        started += pids()
        until_ready(2)  # a worker that is told to stop before it listens leaves its pid file behind
        multi("stopwait")
        assert pids() == []
    finally:
        for pid in {*started, *pids()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
