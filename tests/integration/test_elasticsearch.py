"""Elasticsearch as the primary view of a fleet; killed and frozen while the log is folded into it."""

from __future__ import annotations

import pytest

from tests.integration import as_primary_view
from tests.integration.conftest import Fleet

pytest.importorskip("elasticsearch")
pytestmark = [pytest.mark.kafka, pytest.mark.elasticsearch]


@pytest.fixture(scope="module")
def elastic_fleet(kafka, redis_server, elasticsearch, tmp_path_factory):
    with Fleet(
        kafka.bootstrap, redis_server.clean_database(), elasticsearch.clean_index(), tmp_path_factory.mktemp("fleet"),
        {"poll_interval_s": 0.1}, {},
    ) as made:  # fmt: skip
        made.serve()
        yield made


@pytest.mark.redis
def test_results_groups_and_a_chord_with_elasticsearch_as_the_primary_view(elastic_fleet):
    as_primary_view.results_groups_and_a_chord(elastic_fleet)


def test_an_elasticsearch_killed_and_frozen_during_a_load_loses_nothing(kafka, elasticsearch, topic_prefix, tmp_path):
    as_primary_view.killed_and_frozen_during_a_load(
        elasticsearch, elasticsearch.clean_index(), kafka.bootstrap, topic_prefix, tmp_path
    )
