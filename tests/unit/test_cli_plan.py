"""What `init` makes of the difference between topics as they are and as they should be."""

from __future__ import annotations

import pytest

from celery_kafka_backend import topics
from celery_kafka_backend.cli import plan
from celery_kafka_backend.cli.broker import Found
from celery_kafka_backend.settings import parse

SETTINGS = parse("kafka://b:9092/?view=redis://r/0", {"topic_prefix": "x"})
WANTED = topics.wanted(SETTINGS)
LOG, CHORDS, _, STATS, _ = WANTED


def as_wanted(topic, **changes):
    return Found(topic.partitions, topic.replication, topic.config)._replace(**changes)


def differences(**found):
    every = {topic.name: as_wanted(topic) for topic in WANTED}
    every.update({f"x.{name.replace('_', '-')}": is_ for name, is_ in found.items()})
    return plan.differences(WANTED, {name: is_ for name, is_ in every.items() if is_ is not None})


def test_topics_as_wanted_do_not_differ():
    assert differences() == []


def test_a_missing_topic_is_one_difference():
    assert [str(one) for one in differences(task_events=None)] == ["x.task-events: missing"]


def test_a_log_with_too_few_partitions_can_be_grown():
    (one,) = differences(task_events=as_wanted(LOG, partitions=3))
    assert str(one) == "x.task-events: 3 partitions, wanted 12"
    assert "--grow" in one.remedy
    assert not one.harmless


def test_a_log_with_more_partitions_is_harmless_for_topics_never_shrink():
    (one,) = differences(task_events=as_wanted(LOG, partitions=24))
    assert one.harmless


@pytest.mark.parametrize("partitions", [3, 24])
def test_the_partitions_of_the_chords_are_never_to_be_changed(partitions):
    (one,) = differences(chords=as_wanted(CHORDS, partitions=partitions))
    assert not one.harmless
    assert "--grow" not in one.remedy
    assert f"chord_partitions'] = {partitions}" in one.remedy


@pytest.mark.parametrize("partitions", [3, 24])
def test_the_partitions_of_the_statistics_are_never_to_be_changed(partitions):
    (one,) = differences(task_stats=as_wanted(STATS, partitions=partitions))
    assert not one.harmless
    assert "--grow" not in one.remedy
    assert f"insight_partitions'] = {partitions}" in one.remedy


def test_a_compacted_log_is_named_with_both_values():
    config = {**LOG.config, "cleanup.policy": "compact", "segment.bytes": "1"}
    (one,) = differences(task_events=as_wanted(LOG, config=config))
    assert str(one) == "x.task-events: cleanup.policy = compact, wanted delete"
    assert "--alter" in one.remedy


def test_a_brokers_limit_below_the_largest_record_is_named():
    known = {"1": {"socket.request.max.bytes": "104857600", "replica.fetch.max.bytes": "1048576"}, "2": {}}
    assert plan.too_small(known, 1_000_000) == []
    assert plan.too_small(known, 5_000_000) == [("1", "replica.fetch.max.bytes", 1_048_576)]
    assert ("1", "socket.request.max.bytes", 104_857_600) in plan.too_small(known, 200_000_000)


def test_settings_that_kafka_did_not_tell_do_not_differ():
    assert differences(task_events=as_wanted(LOG, config={})) == []


def test_the_printed_commands_create_every_topic_with_every_setting():
    lines = [plan.create_command(topic, "b:9092") for topic in WANTED]
    for topic, line in zip(WANTED, lines, strict=True):
        assert f"--topic {topic.name} --partitions {topic.partitions} --replication-factor 3" in line
        for name, value in topic.config.items():
            assert f"--config {name}={value}" in line
