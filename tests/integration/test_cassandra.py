"""Cassandra as the primary view of a fleet; killed and frozen while the log is folded into it."""

from __future__ import annotations

import pytest

from tests.integration import as_primary_view
from tests.integration.conftest import Fleet
from tests.services import cassandra as service

pytest.importorskip("cassandra", exc_type=ImportError)
pytestmark = [pytest.mark.kafka, pytest.mark.cassandra]


@pytest.fixture(scope="module")
def server():
    """One for this file, which a test may kill, and must leave running."""
    found = service.start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def cassandra_fleet(kafka, redis_server, server, tmp_path_factory):
    """Told where its view is by Celery's own settings alone."""
    conf = {"servers": ["127.0.0.1"], "port": server.port, "keyspace": server.new_keyspace(), "table": "results"}
    with Fleet(
        kafka.bootstrap, redis_server.clean_database(), "cassandra://", tmp_path_factory.mktemp("fleet"),
        {"poll_interval_s": 0.1}, {f"cassandra_{name}": value for name, value in conf.items()},
    ) as made:  # fmt: skip
        made.serve()
        yield made


@pytest.mark.redis
def test_results_groups_and_a_chord_with_cassandra_as_the_primary_view(cassandra_fleet):
    as_primary_view.results_groups_and_a_chord(cassandra_fleet)


def test_a_cassandra_killed_and_frozen_during_a_load_loses_nothing(kafka, server, topic_prefix, tmp_path):
    url = server.url(server.new_keyspace())
    as_primary_view.killed_and_frozen_during_a_load(server, url, kafka.bootstrap, topic_prefix, tmp_path)
