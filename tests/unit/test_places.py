"""Where events of an id may be after partitions were added: by when each partition had its first record."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import past, places, topics
from tests.examples import tried_on

DAY = 86_400_000


def keys(count, grown):
    """Keys that belong elsewhere since there are more partitions."""
    return [
        key
        for key in (f"t{n}" for n in range(20))
        if topics.partition_of(key, count) != topics.partition_of(key, grown)
    ]


@pytest.mark.parametrize("key", keys(4, 12))
def test_what_was_written_before_partitions_were_added_is_looked_for_where_it_belonged(key):
    found = places.earlier(key, [0, 0, 5, 9, *[3 * DAY] * 8])
    old, (since, until) = max(found, key=lambda each: each[1][1] - each[1][0])
    assert old == topics.partition_of(key, 4)
    assert since <= 9
    assert 3 * DAY < until < 3 * DAY + 2 * places.HEARD_MS
    # A count that there never was asks for minutes.
    assert all(until - since < 3 * places.HEARD_MS for place, (since, until) in found if place != old)


@tried_on(100)
@given(st.data())
def test_no_place_is_left_out_however_often_partitions_were_added(data):
    counts = sorted(data.draw(st.sets(st.integers(1, 40), min_size=2, max_size=4)))
    grown_at = [
        0,
        *sorted(data.draw(st.lists(st.integers(0, DAY), min_size=len(counts) - 1, max_size=len(counts) - 1))),
    ]
    born = [
        at for at, count, before in zip(grown_at, counts, [0, *counts], strict=False) for _ in range(count - before)
    ]
    firsts = [at + data.draw(st.integers(0, 60_000)) for at in born]
    key = data.draw(st.text(min_size=1))
    which = data.draw(st.integers(0, len(counts) - 1))
    begins, ends = grown_at[which], (*grown_at[1:], 2 * DAY)[which]
    at = data.draw(st.integers(begins, ends + 60_000))  # some producer hears of it a minute late
    place = topics.partition_of(key, counts[which])
    if place != topics.partition_of(key, counts[-1]):
        assert any(one == place and since <= at <= until for one, (since, until) in places.earlier(key, firsts))


class Index:
    """A time index: of each partition the times of its records."""

    def __init__(self, *partitions):
        self.times = partitions

    def offsets_for_times(self, asked, timeout):
        def first(at):
            times = self.times[at.partition]
            return next((n for n, time in enumerate(times) if time >= at.offset), -1)

        return [SimpleNamespace(partition=at.partition, offset=first(at), error=None) for at in asked]


def test_when_a_partition_began_is_known_by_the_time_index():
    index = Index([1_000_000, 2_000_000], [], [1_234_567_890_123], [7])
    found = places.first_written(index, "t", {0: (0, 2), 1: (0, 0), 2: (0, 1), 3: (5, 6)}, 1)
    assert 0 <= found[0] - 1_000_000 <= places.STEP_MS
    assert found[1] > 1_700_000_000_000  # nothing yet: by now
    assert 0 <= found[2] - 1_234_567_890_123 <= places.STEP_MS
    assert found[3] == 0  # deleted: as old as the log


class Log:
    """The records of partition 1 of a topic, by their keys."""

    def __init__(self, keys):
        self.keys = keys
        self.reads = []

    def batches(self, _consumer, spans, *_):
        self.reads.append(spans)
        (at, (start, end)), *_ = spans.items()
        yield (
            [
                SimpleNamespace(key=key.encode, partition=lambda: at[1], offset=lambda n=n: n)
                for n, key in enumerate(self.keys[start:end], start)
            ],
            {},
        )

    def moved(self, monkeypatch):
        monkeypatch.setattr(past, "batches", self.batches)
        aside = places.Oldest("log", {1: (0, len(self.keys)), 2: (0, 0)}, 8)
        return aside.moved(lambda: SimpleNamespace(close=lambda: None))


STAYED = [key for key in (f"k{n}" for n in range(5_000)) if {topics.partition_of(key, n) for n in (4, 8)} == {1}]
MOVED = next(
    key for key in (f"m{n}" for n in range(99)) if topics.partition_of(key, 4) == 1 != topics.partition_of(key, 8)
)


def test_a_partition_with_a_record_out_of_place_was_there_when_there_were_fewer(monkeypatch):
    assert Log([STAYED[0], MOVED]).moved(monkeypatch) == {1}
    assert Log([STAYED[0]]).moved(monkeypatch) == set()
    assert Log([]).moved(monkeypatch) == set()


def test_a_task_with_many_events_hides_no_record_that_is_out_of_place(monkeypatch):
    log = Log([STAYED[0]] * 5_000 + [MOVED] + STAYED[:500])
    assert log.moved(monkeypatch) == {1}
    assert log.reads == [{("log", 1): (0, 100)}, {("log", 1): (100, 5_501)}]


def test_the_oldest_records_of_many_tasks_are_enough(monkeypatch):
    log = Log([*STAYED[:100], MOVED])
    assert log.moved(monkeypatch) == set()
    assert log.reads == [{("log", 1): (0, 100)}]


def test_where_the_oldest_records_are_of_too_few_tasks_there_may_have_been_fewer_partitions(monkeypatch):
    assert Log([STAYED[0]] * (places.DEEPER + 1)).moved(monkeypatch) == {1}
    assert Log([STAYED[0]] * places.DEEPER).moved(monkeypatch) == set()  # that was all
