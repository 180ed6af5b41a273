"""The store in `examples/`, found by its entry point, as the primary view of a fleet; and Celery's own SQL backend reads it."""

from __future__ import annotations

import pytest
from celery import Celery, chord, group

from tests.integration import as_primary_view
from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S
from tests.services import postgresql as service

pytest.importorskip("ckb_postgresql")
pytestmark = [pytest.mark.kafka, pytest.mark.redis, pytest.mark.postgresql]


@pytest.fixture(scope="module")
def fleet(kafka, redis_server, postgresql, tmp_path_factory):
    with Fleet(
        kafka.bootstrap, redis_server.clean_database(), postgresql.clean_database(), tmp_path_factory.mktemp("fleet"),
        {"poll_interval_s": 0.1}, {},
    ) as made:  # fmt: skip
        made.serve()
        yield made


def test_results_groups_and_a_chord(fleet):
    tasks = fleet.app
    assert tasks.add.delay(2, 3).get(timeout=PATIENCE_S) == 5
    assert group(tasks.add.s(n, n) for n in range(20)).apply_async().get(timeout=PATIENCE_S) == [
        2 * n for n in range(20)
    ]
    assert chord([tasks.add.s(n, 0) for n in range(20)])(tasks.total.s()).get(timeout=PATIENCE_S) == 190


def test_a_stock_client_reads_what_we_wrote(fleet):
    done, failed = fleet.app.add.delay(2, 3), fleet.app.fail.delay("broken")
    assert done.get(timeout=PATIENCE_S) == 5
    with pytest.raises(ValueError, match="broken"):
        failed.get(timeout=PATIENCE_S)
    url = fleet.view.replace("postgresql://", "db+postgresql+psycopg://")
    stock = Celery("stock", broker="memory://", backend=url, set_as_current=False)
    stock.conf.update(result_extended=True)
    assert stock.AsyncResult(done.id).get(timeout=PATIENCE_S) == 5
    assert stock.AsyncResult(done.id).name == "fleet_app.add"
    with pytest.raises(ValueError, match="broken"):
        stock.AsyncResult(failed.id).get(timeout=PATIENCE_S)


def test_doctor_history_and_status_know_it(fleet):
    result = fleet.app.add.delay(1, 1)
    assert result.get(timeout=PATIENCE_S) == 2
    assert "postgresql-" in fleet.run("pipeline", "status").stdout
    done = fleet.run("pipeline", "history", result.id)
    assert "from postgresql://" in done.stdout
    assert "success" in done.stdout


def test_a_postgresql_killed_and_frozen_during_a_load_loses_nothing(kafka, topic_prefix, tmp_path):
    server = service.start()
    try:
        as_primary_view.killed_and_frozen_during_a_load(
            server, server.clean_database(), kafka.bootstrap, topic_prefix, tmp_path
        )
    finally:
        server.stop()
