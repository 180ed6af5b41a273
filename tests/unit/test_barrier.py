"""What a view will show once it has folded what it has not: pure."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import msgspec
import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from celery_kafka_backend import events, places, settings, topics
from celery_kafka_backend.barrier import Allowance, Barrier, _ends, document_after, greatest
from celery_kafka_backend.changes import GROUP, Partition
from celery_kafka_backend.errors import SettingsError, Unavailable, Unsure
from celery_kafka_backend.events import Event
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.producer.publisher import Stored
from celery_kafka_backend.reads import Reads
from celery_kafka_backend.sinks.contract import Shown
from tests.patience import PATIENCE_S

NOW = 1_900_000_000_000


def event(key=5, event_id="b", kind=events.SUCCESS, doc=b'{"status":"SUCCESS"}', **more):
    return Event(id=event_id, kind=kind, task="t", key=key, at=1, hlc=1, doc=msgspec.Raw(doc), **more)


def shown(key, event_id="a", document=b"old"):
    return Shown(document, key, event_id, None)


def test_the_greater_key_is_shown_and_equal_keys_go_by_event_id():
    late = event(5)
    assert document_after(None, late, NOW) == late.document
    assert document_after(shown(4), late, NOW) == late.document
    assert document_after(shown(6), late, NOW) == b"old"
    assert document_after(shown(5, "a"), late, NOW) == late.document
    assert document_after(shown(5, "c"), late, NOW) == b"old"


def test_what_the_view_has_folded_meanwhile_stays():
    assert document_after(shown(5, "b"), event(5, "b"), NOW) == b"old"


def test_without_an_event_the_view_is_right():
    assert document_after(shown(1), None, NOW) == b"old"
    assert document_after(None, None, NOW) is None


def test_a_forget_and_what_has_expired_show_nothing():
    assert document_after(shown(4), event(5, kind=events.FORGOTTEN, doc=b""), NOW) is None
    assert document_after(shown(4), event(5, expires_at=NOW), NOW) is None
    assert document_after(shown(4), event(5, expires_at=NOW + 1), NOW) is not None


def test_events_that_no_document_may_show_never_win():
    assert greatest([event(0, kind=events.RECEIVED)]) is None
    assert greatest([event(2), event(0), event(3), event(1)]).key == 3
    assert greatest([]) is None


class Moving:
    """A consumer whose partition's next leader does not know yet that it is one."""

    def __init__(self, *codes):
        self.codes = list(codes)

    def get_watermark_offsets(self, _at, timeout):
        if self.codes:
            raise KafkaException(KafkaError(self.codes.pop(0)))
        return 0, 7


def test_a_partition_that_changes_its_leader_is_asked_again():
    """A read would be unsure for a moment's sake, and a worker fail a task that has succeeded."""
    at, moving = TopicPartition("t", 0), KafkaError.NOT_LEADER_FOR_PARTITION
    assert _ends(Moving(moving, moving), at, time.monotonic() + PATIENCE_S) == (0, 7)
    with pytest.raises(KafkaException):
        _ends(Moving(moving, moving), at, time.monotonic())
    with pytest.raises(KafkaException):
        _ends(Moving(KafkaError.TOPIC_AUTHORIZATION_FAILED), at, time.monotonic() + PATIENCE_S)


def test_the_partitioner_is_ours_to_set():
    url = "kafka://x/?view=memory://x"
    with pytest.raises(SettingsError, match="partitioner"):
        settings.parse(url, {"producer": {"partitioner": "consistent"}})


def test_a_key_s_partition_is_java_s():
    # From Kafka's own UtilsTest: murmur2("21") = -973932308.
    assert topics.murmur2(b"21") == -973932308 & 0xFFFFFFFF
    assert topics.partition_of("21", 7) == (-973932308 & 0x7FFFFFFF) % 7


def test_an_allowance_is_spent_and_comes_back():
    now = [0.0]
    allowance = Allowance(4, 0.25, clock=lambda: now[0])
    allowance.spend(3)
    assert allowance.left_s() == 1
    allowance.spend(3)
    assert allowance.left_s() < 0
    now[0] = 12.0
    assert allowance.left_s() == 1
    now[0] = 10_000.0
    assert allowance.left_s() == 4


def test_a_store_that_hangs_holds_an_event_loop_no_longer_than_its_bound():
    def within(bound_s, read):
        settings, recorder = SimpleNamespace(barrier_timeout_s=bound_s), SimpleNamespace(role=events.PARENT)
        barrier = SimpleNamespace(allowance=Allowance(60, 1))
        return Reads._within_bounds(SimpleNamespace(settings=settings, recorder=recorder, barrier=barrier), read)

    hanging = threading.Event()
    with pytest.raises(Unsure, match=r"no answer within 0\.05 s"):
        within(0.05, lambda _bound_s: hanging.wait())
    hanging.set()
    assert within(60, lambda _bound_s: 7) == 7

    def away(_bound_s):
        raise Unavailable("away")

    with pytest.raises(Unavailable):
        within(60, away)


class FoldingAtTheWorstMoment:
    """A view that folds a process's delete right after that process asked it something, or just before."""

    at = Partition("log", 0)

    def __init__(self, folded):
        self.folded = folded

    def positions(self):
        answer = {self.at: 2 if self.folded else 1}
        self.folded = True
        return answer

    def groups(self, ids):
        answer = {} if self.folded else {"t": b"deleted"}
        self.folded = True
        return answer


@pytest.mark.parametrize("folded", [True, False])
def test_a_delete_stays_done_while_the_view_folds_it(folded):
    barrier = Barrier(settings.parse("kafka://x/?view=memory://x"))
    barrier.keep_unshown(event(kind=events.GROUP_DELETED, doc=b""), Stored(FoldingAtTheWorstMoment.at, 1))
    view = FoldingAtTheWorstMoment(folded)
    assert barrier.documents(view, GROUP, ["t"], NOW) == {}
    assert barrier.documents(view, GROUP, ["t"], NOW) == {}


class Index:
    """A log: of each partition when its records were written."""

    def __init__(self, *partitions):
        self._times = partitions

    def list_topics(self, topic, timeout):
        found = {number: SimpleNamespace(error=None) for number in range(len(self._times))}
        return SimpleNamespace(topics={topic: SimpleNamespace(error=None, partitions=found)})

    def offsets_for_times(self, asked, timeout):
        def first(at):
            return next((n for n, time in enumerate(self._times[at.partition]) if time >= at.offset), -1)

        return [SimpleNamespace(topic=at.topic, partition=at.partition, offset=first(at), error=None) for at in asked]

    def get_watermark_offsets(self, at, timeout):
        return 0, len(self._times[at.partition])


NEW, OLD = 1_000, places.HEARD_MS + 60_000


@pytest.mark.parametrize(
    ("ages", "looks"),
    [
        (([OLD], []), True),
        (([OLD], [NEW]), True),  # nothing new in the first one: it is older than the other all the same
        (([OLD, NEW], [NEW]), True),
        (([NEW], [NEW]), False),
        (([], [NEW]), False),
    ],
)
def test_where_an_id_belonged_before_partitions_were_added_is_looked_at_by_a_process_that_never_saw_it(
    ages, looks, monkeypatch
):
    now = system_wall_ms()
    task = next(f"t{n}" for n in range(99) if topics.partition_of(f"t{n}", 2) == 1)  # of one partition it was in 0
    grown = msgspec.structs.replace(settings.parse("kafka://x/?view=memory://x"), partitions=2)
    log = Barrier(grown)._log
    monkeypatch.setattr(log, "_handle", lambda: Index(*([now - age for age in each] for each in ages)))
    found = log.ends([task], time.monotonic() + PATIENCE_S, dict)
    assert {at.partition for at in found} == ({0, 1} if looks else {1})


def test_for_what_this_process_has_stored_itself_kafka_is_not_asked():
    nowhere = settings.parse("kafka://127.0.0.1:1/?view=memory://x")
    barrier, stored = Barrier(nowhere), Stored(Partition("log", 2), 7)
    at = iter([7, 7, 8])
    assert barrier.passed(stored, lambda: {stored.partition: next(at)}, PATIENCE_S)
    assert not barrier.passed(stored, lambda: {Partition("log", 1): 9}, 0.01)
    asked = []
    assert not barrier.passed(stored, lambda: asked.append(1) or {}, PATIENCE_S, patient=False), (
        "a view that stands still"
    )
    assert len(asked) == 1
