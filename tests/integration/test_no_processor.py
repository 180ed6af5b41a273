"""A worker without any processor: results are safe, and it says once that nobody will see them."""

from __future__ import annotations

import time

import pytest

from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.kafka, pytest.mark.redis]


def test_a_worker_that_nobody_folds_for_says_so_once_and_its_results_come_later(kafka, redis_server, tmp_path):
    databases = redis_server.clean_database(), redis_server.clean_database()
    with Fleet(kafka.bootstrap, *databases, tmp_path, {}, {}) as fleet:
        fleet.init()
        fleet.worker()
        result = fleet.app.add.delay(1, 2)
        fleet.until("worker", "no processor folds results into")
        assert result.state == "PENDING"
        time.sleep(2)
        assert fleet.log("worker").count("no processor folds") == 1
        fleet.pipeline()
        assert result.get(timeout=PATIENCE_S) == 3
