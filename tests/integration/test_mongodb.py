"""MongoDB as the primary view of a fleet; killed and frozen while the log is folded into it."""

from __future__ import annotations

import pytest

from tests.integration import as_primary_view
from tests.integration.conftest import Fleet
from tests.services import mongodb as service

pytest.importorskip("pymongo")
pytestmark = [pytest.mark.kafka, pytest.mark.mongodb]


@pytest.fixture(scope="module")
def mongo_fleet(kafka, redis_server, mongodb, tmp_path_factory):
    with Fleet(
        kafka.bootstrap, redis_server.clean_database(), mongodb.clean_database(), tmp_path_factory.mktemp("fleet"),
        {"history": {"mongodb": True}, "poll_interval_s": 0.1}, {},
    ) as made:  # fmt: skip
        made.serve()
        yield made


@pytest.mark.redis
def test_results_groups_and_a_chord_with_mongodb_as_the_primary_view(mongo_fleet):
    as_primary_view.results_groups_and_a_chord(mongo_fleet)


def test_a_mongod_killed_and_frozen_during_a_load_loses_nothing(kafka, topic_prefix, tmp_path):
    server = service.start()
    url = f"{server.clean_database()}?socketTimeoutMS=5000"
    try:
        as_primary_view.killed_and_frozen_during_a_load(server, url, kafka.bootstrap, topic_prefix, tmp_path)
    finally:
        server.stop()
