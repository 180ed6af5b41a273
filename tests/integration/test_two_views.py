"""Several views at once: each has its own processes, so that one that stands still slows no other, and catches up."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S
from tests.services import native
from tests.services import redis as service
from tests.services.proxy import Proxy

pytestmark = [pytest.mark.kafka, pytest.mark.redis]


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_view_that_is_away_slows_no_other_and_catches_up(kafka, redis_server, tmp_path, how):
    second = service.start(appendonly=True)
    primary, other = redis_server.clean_database(), f"{second.url}?socket_timeout=2"
    views = f"{primary}&view={other}"
    try:
        with Fleet(kafka.bootstrap, redis_server.clean_database(), views, tmp_path, {}, {}) as fleet:
            fleet.serve()
            add = fleet.app.add
            assert add.delay(1, 2).get(timeout=PATIENCE_S) == 3
            getattr(second, how)()
            results = [add.delay(n, n) for n in range(100)]
            assert [each.get(timeout=PATIENCE_S) for each in results] == [2 * n for n in range(100)]
            status = fleet.run("pipeline", "status").stdout
            assert status.count("redis-") >= 2, status
            (second.restart if how == "kill" else second.thaw)()
            become_the_same(fleet, primary, other)
    finally:
        second.stop()


@pytest.mark.elasticsearch
def test_an_elasticsearch_that_is_slow_and_then_gone_slows_no_redis_and_status_says_of_each_how_it_is(
    kafka, redis_server, elasticsearch, tmp_path
):
    with contextlib.closing(Proxy(elasticsearch.port)) as proxy:
        index = elasticsearch.clean_index()
        primary, other = redis_server.clean_database(), index.replace(str(elasticsearch.port), str(proxy.port))
        views = f"{primary}&view={other}"
        with Fleet(kafka.bootstrap, redis_server.clean_database(), views, tmp_path, {}, {}) as fleet:
            fleet.serve()
            results_come(fleet)
            proxy.slow(2.0)
            results_come(fleet)
            proxy.cut()
            results_come(fleet)
            deadline = time.monotonic() + PATIENCE_S
            while (told := status(fleet))["redis"]["lag_events"]:
                assert time.monotonic() < deadline, told["redis"]
            assert told["redis"]["error"] == ""
            assert str(proxy.port) in told["elasticsearch"]["error"]
            assert told["elasticsearch"]["folders"], "its processor is there, and waits"
            native.end(fleet.processes.pop("pipeline"))
            fleet.pipeline()  # as after a crash of its machine, while one store is away
            assert "its processors wait for it" in fleet.log("pipeline")
            results_come(fleet)
            proxy.heal()
            become_the_same(fleet, primary, other)
        elasticsearch.drop(index)


def results_come(fleet):
    results = [fleet.app.add.delay(n, n) for n in range(50)]
    assert [each.get(timeout=PATIENCE_S) for each in results] == [2 * n for n in range(50)]


def status(fleet):
    """What is said of each view, by its scheme: with the exit code for a view that cannot be read."""
    done = fleet.run("pipeline", "status", "--json")
    assert done.returncode == 7, done.stdout + done.stderr
    return {view["name"].partition("-")[0]: view for view in json.loads(done.stdout)["views"]}


def become_the_same(fleet, primary, other):
    deadline = time.monotonic() + PATIENCE_S
    while (done := fleet.run("pipeline", "verify", "--view", primary, "--against", other)).returncode:
        assert done.returncode == 10, done.stdout + done.stderr
        assert time.monotonic() < deadline, done.stdout
        time.sleep(0.5)
    assert "The views are the same." in done.stdout
