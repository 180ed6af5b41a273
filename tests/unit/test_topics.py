"""The topics' names, and settings, and Kafka's own hash."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend.settings import Settings, parse
from celery_kafka_backend.topics import (
    DAY_MS,
    DEAD_LETTER_ROOM,
    Topic,
    chord_partition,
    group_id,
    murmur2,
    wanted,
)
from tests.examples import tried_on

URL = "kafka://b1/?view=redis://r"


@pytest.mark.parametrize(
    ("key", "signed"),
    [
        ("21", -973932308),
        ("foobar", -790332482),
        ("a-little-bit-long-string", -985981536),
        ("a-little-bit-longer-string", -1486304829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        ("abc", 479470107),
    ],
)
def test_murmur2_is_kafkas(key: str, signed: int):
    """The vectors of Kafka's own UtilsTest: every writer must agree for ever."""
    assert murmur2(key.encode()) == signed & 0xFFFFFFFF


@pytest.mark.parametrize(("group", "partition"), [("21", 0), ("foobar", 6), ("abc", 3)])
def test_a_chord_lives_in_one_partition_for_ever(group: str, partition: int):
    """Kafka's positive modulo (the sign bit is dropped, not negated)."""
    assert chord_partition(group, 12) == (murmur2(group.encode()) & 0x7FFFFFFF) % 12 == partition


@tried_on()
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 1000))
def test_every_group_has_a_partition(group: str, partitions: int):
    """Whatever its id is."""
    assert 0 <= chord_partition(group, partitions) < partitions


def test_groups_are_spread():
    """No partition of twelve gets more than twice its share of 1,200."""
    assert max(Counter(chord_partition(f"group-{i}", 12) for i in range(1_200)).values()) < 200


def topics(**given: int | str) -> dict[str, Topic]:
    return {topic.name: topic for topic in wanted(parse(URL, given))}


def test_the_defaults():
    """As `init` prints them."""
    log, chords, dead, *_ = topics().values()
    assert (log.name, chords.name, dead.name) == ("celery.task-events", "celery.chords", "celery.dead-letters")
    assert [(t.partitions, t.replication) for t in (log, chords, dead)] == [(12, 3), (12, 3), (1, 3)]
    for topic in (log, chords, dead):
        assert topic.config["message.timestamp.type"] == "LogAppendTime"
        assert topic.config["min.insync.replicas"] == "2"
        assert all(isinstance(value, str) for value in topic.config.values())
    assert log.config["retention.ms"] == str(7 * DAY_MS)
    assert log.config["compression.type"] == chords.config["compression.type"] == "producer"


def test_the_log_is_never_compacted():
    """A late STARTED would erase a SUCCESS."""
    assert topics()["celery.task-events"].config["cleanup.policy"] == "delete"


def test_the_chords_are_compacted_and_their_partitions_fixed():
    """A rebuild reads what the segments' bounds allow."""
    chords = topics()["celery.chords"]
    assert chords.fixed_partitions
    assert chords.config["cleanup.policy"] == "compact"
    assert chords.config["segment.ms"] == "600000"
    assert chords.config["segment.bytes"] == "67108864"
    assert chords.config["min.cleanable.dirty.ratio"] == "0.1"
    assert "retention.ms" not in chords.config


def test_a_dead_letter_has_room_for_its_reason():
    """The largest record of the log must fit into it, with what is said about it."""
    found = topics(max_message_bytes=2_000_000)
    assert found["celery.task-events"].config["max.message.bytes"] == "2000000"
    assert found["celery.dead-letters"].config["max.message.bytes"] == str(2_000_000 + DEAD_LETTER_ROOM)


def test_dead_letters_are_kept_for_a_month_or_as_long_as_the_log():
    """Whichever is longer."""
    assert topics()["celery.dead-letters"].config["retention.ms"] == str(30 * DAY_MS)
    assert topics(retention_ms=90 * DAY_MS)["celery.dead-letters"].config["retention.ms"] == str(90 * DAY_MS)


def test_sizes_and_prefix_are_the_users():
    """A test cluster of one broker, say."""
    found = topics(topic_prefix="p", partitions=2, chord_partitions=3, replication_factor=1, min_insync_replicas=1)
    assert [(t.name, t.partitions, t.replication) for t in found.values()] == [
        ("p.task-events", 2, 1),
        ("p.chords", 3, 1),
        ("p.dead-letters", 1, 1),
        ("p.task-stats", 4, 1),
        ("p.insight-minutes-changelog", 4, 1),
    ]


def test_who_wants_no_insight_has_no_topics_for_it():
    assert not [name for name in topics(insight=False) if "stats" in name or "insight" in name]


def test_statistics_and_their_changelog_have_the_same_partitions_for_ever():
    """Or Faust would look for a name's figures where they are not."""
    *_, stats, changelog = topics(insight_partitions=7).values()
    assert (stats.partitions, changelog.partitions) == (7, 7)
    assert stats.fixed_partitions
    assert changelog.fixed_partitions
    assert stats.config["cleanup.policy"] == "delete"
    assert changelog.config["cleanup.policy"] == "compact,delete"
    assert stats.config["retention.ms"] == changelog.config["retention.ms"] == str(6 * 3_600_000)


def test_more_copies_in_sync_than_copies_are_never_asked_of_kafka():
    """Settings refuse it; the topics do not rely on that."""
    log, *_ = wanted(Settings(replication_factor=1, min_insync_replicas=2))
    assert log.config["min.insync.replicas"] == "1"


def test_consumer_groups_are_named_for_prefix_and_view():
    """So that one right covers them."""
    assert group_id("celery", "redis") == "celery.redis"
