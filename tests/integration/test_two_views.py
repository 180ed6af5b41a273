"""Several views at once: each has its own processes, so that one that stands still slows no other, and catches up."""

from __future__ import annotations

import time

import pytest

from tests.integration.conftest import Fleet
from tests.services import redis as service

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

SOON = 40


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_view_that_is_away_slows_no_other_and_catches_up(kafka, redis_server, tmp_path, how):
    second = service.start(appendonly=True)
    primary, other = redis_server.clean_database(), f"{second.url}?socket_timeout=2"
    views = f"{primary}&view={other}"
    try:
        with Fleet(kafka.bootstrap, redis_server.clean_database(), views, tmp_path, {}, {}) as fleet:
            fleet.serve()
            add = fleet.app.add
            assert add.delay(1, 2).get(timeout=SOON) == 3
            getattr(second, how)()
            results = [add.delay(n, n) for n in range(100)]
            assert [each.get(timeout=SOON) for each in results] == [2 * n for n in range(100)]
            status = fleet.run("pipeline", "status").stdout
            assert status.count("redis-") >= 2, status
            (second.restart if how == "kill" else second.thaw)()
            deadline = time.monotonic() + SOON
            while (done := fleet.run("pipeline", "verify", "--view", primary, "--against", other)).returncode:
                assert done.returncode == 10, done.stdout + done.stderr
                assert time.monotonic() < deadline, done.stdout
                time.sleep(0.5)
            assert "The views are the same." in done.stdout
    finally:
        second.stop()
