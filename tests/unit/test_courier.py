"""Seeing a record into Kafka. Only librdkafka's handle is replaced, by one that answers as it is told."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from confluent_kafka import KafkaError, KafkaException

from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.errors import NoSuchTopic, NotAcknowledged, Refused, TooLarge
from celery_kafka_backend.producer.courier import Courier, Retries
from celery_kafka_backend.producer.detour import Detour
from celery_kafka_backend.producer.publisher import Publisher, Record
from celery_kafka_backend.producer.spool import Spool
from tests.patience import PATIENCE_S, until
from tests.unit.scripted_handle import TIMED_OUT, Handle

ALWAYS = Retries(most=float("inf"), base_ms=1, longest_ms=2)


@pytest.fixture
def handle():
    return Handle()


@pytest.fixture
def courier(handle):
    settings = settings_module.parse("kafka://127.0.0.1:9/?view=memory://x", {"delivery_timeout_s": 0.3})
    publisher = Publisher(settings, make=lambda _config: handle)
    yield Courier(publisher)
    publisher.close()


def record(value=b"v"):
    return Record("t", b"k", value)


def test_a_carried_record_is_where_kafka_says(courier):
    assert courier.carry(record(), "SUCCESS of x", PATIENCE_S).stored.offset == 7


def test_one_attempt_ends_when_its_time_is_over(courier, handle):
    handle.answers.extend([TIMED_OUT] * 50)
    with pytest.raises(NotAcknowledged):
        courier.carry(record(), "SUCCESS of x", 0.3)
    assert courier.lost == 0  # it was said to the caller


def test_always_retry_sends_the_same_bytes_again_until_kafka_has_them(courier, handle):
    handle.answers.extend([TIMED_OUT] * 5)
    assert courier.carry(record(b"same"), "SUCCESS of x", 0.1, ALWAYS) is not None
    assert set(handle.produced) == {b"same"}
    assert len(handle.produced) == 6


def test_a_handle_that_is_finished_for_good_is_replaced(courier, handle):
    made = []
    courier._publisher.make = lambda _config: made.append(Handle()) or made[-1]
    assert courier.carry(record(b"first"), "SUCCESS of x", 5).stored.offset == 7
    made[0].answers.append(KafkaException(KafkaError(KafkaError._FATAL)))
    assert courier.carry(record(b"second"), "SUCCESS of y", 5).stored.offset == 7
    assert [each.produced for each in made] == [[b"first"], [b"second"]]


def test_always_retry_stops_after_its_own_bound(courier, handle):
    handle.answers.extend([TIMED_OUT] * 50)
    with pytest.raises(NotAcknowledged):
        courier.carry(record(), "SUCCESS of x", 0.1, Retries(most=2, base_ms=1, longest_ms=2))
    assert len(handle.produced) == 3


@pytest.mark.parametrize(
    ("code", "error"),
    [(KafkaError.MSG_SIZE_TOO_LARGE, TooLarge), (KafkaError.TOPIC_AUTHORIZATION_FAILED, Refused)],
)
def test_what_is_final_is_not_tried_again(courier, handle, code, error):
    handle.answers.extend([code] * 50)
    with pytest.raises(error):
        courier.carry(record(), "SUCCESS of x", 0.3, ALWAYS)
    assert len(handle.produced) == 1


def test_a_topic_that_a_starting_broker_does_not_know_yet_is_asked_for_again(courier, handle):
    handle.answers.append(KafkaError.UNKNOWN_TOPIC_OR_PART)
    assert courier.carry(record(), "SUCCESS of x", PATIENCE_S) is not None
    handle.answers.extend([KafkaError.UNKNOWN_TOPIC_OR_PART] * 50)
    with pytest.raises(NoSuchTopic, match="pipeline init"):
        courier.carry(record(), "SUCCESS of x", 0.3)


@pytest.fixture
def spool(courier, tmp_path):
    found = Spool(tmp_path / "s.spool", 1 << 20)
    courier.use(Detour(courier._publisher, found))
    return found


def spooled(spool):
    return [one.record.value for one in spool.oldest()]


def test_what_kafka_does_not_take_is_spooled_and_the_next_need_not_wait(courier, handle, spool):
    handle.answers.extend([TIMED_OUT] * 3)
    courier.store(record(b"1"), "SUCCESS of x", 5)
    assert courier.detour.away
    courier.store(record(b"2"), "SUCCESS of y", 5)
    courier.queue(record(b"3"), "SUCCESS of z")
    assert spooled(spool) == [b"1", b"2", b"3"]
    assert courier.lost == 0


def test_one_spooled_record_at_a_time_is_sent_as_well_and_its_answer_ends_the_detour(courier, handle, spool):
    handle.answers.append(TIMED_OUT)
    courier.store(record(b"1"), "SUCCESS of x", 5)
    until(lambda: not courier.detour.away)
    assert handle.produced == [b"1", b"1"]
    courier.store(record(b"2"), "SUCCESS of y", 5)
    assert spooled(spool) == [b"1"]
    assert handle.produced == [b"1", b"1", b"2"]


def test_a_queued_record_that_kafka_does_not_take_is_spooled(courier, handle, spool):
    handle.answers.extend([TIMED_OUT] * 2)
    courier.queue(record(b"queued"), "SUCCESS of y")
    until(lambda: spooled(spool))
    assert spooled(spool) == [b"queued"]
    assert courier.lost == 0


def test_what_is_queued_without_an_answer_is_spooled_when_the_next_task_or_the_end_comes(courier, handle, spool):
    handle.poll = lambda timeout: time.sleep(min(timeout, 0.001))  # Kafka says nothing
    courier.detour.after_s = 0.05
    courier.queue(record(b"1"), "SUCCESS of x", remember=True)
    courier.settle()
    assert spooled(spool) == [b"1"]
    courier.detour._away = False  # as if it had not noticed yet
    courier.queue(record(b"2"), "SUCCESS of y")
    assert spooled(spool) == [b"1"]
    assert courier.finish(0.05) == 0
    assert spooled(spool) == [b"1", b"2"]


def test_a_spool_that_cannot_take_a_record_is_as_none(courier, handle, spool, tmp_path, caplog):
    spool.path = tmp_path / "s.spool" / "not a folder" / "x"
    (tmp_path / "s.spool").write_text("")
    handle.answers.extend([TIMED_OUT] * 2)
    courier.store(record(b"1"), "SUCCESS of x", 5)
    assert handle.produced == [b"1"] * 3
    assert "cannot be used" in caplog.text
    handle.answers.extend([TIMED_OUT] * 100)
    with pytest.raises(NotAcknowledged):
        courier.store(record(b"2"), "SUCCESS of y", 0.1)


def test_kafka_s_answer_ends_the_detour_also_where_the_spool_takes_nothing(courier, handle, spool, tmp_path, caplog):
    spool.path = tmp_path / "s.spool" / "not a folder" / "x"
    (tmp_path / "s.spool").write_text("")
    handle.answers.append(TIMED_OUT)
    courier.store(record(b"1"), "SUCCESS of x", 5)
    assert not courier.detour.away
    said = caplog.text.count("cannot be used")
    courier.store(record(b"2"), "SUCCESS of y", 5)
    assert caplog.text.count("cannot be used") == said == 1


def test_too_large_is_final_with_a_spool_as_well(courier, handle, spool):
    handle.answers.append(KafkaError.MSG_SIZE_TOO_LARGE)
    with pytest.raises(TooLarge):
        courier.store(record(), "SUCCESS of x", 5)
    assert spool.empty()


def test_what_is_not_a_result_is_never_spooled(courier, handle, spool):
    handle.answers.extend([TIMED_OUT] * 50)
    with pytest.raises(NotAcknowledged):
        courier.carry(record(), "declaring chord x", 0.1)
    assert spool.empty()


def test_a_new_process_knows_from_the_spool_that_kafka_is_away(courier, handle, spool):
    spool.append(record(b"1"))
    courier.store(record(b"2"), "SUCCESS of x", 5)
    assert spooled(spool) == [b"1", b"2"]


def test_a_queued_record_that_kafka_did_not_take_is_named_and_counted(courier, handle, caplog):
    handle.answers.append(KafkaError.TOPIC_AUTHORIZATION_FAILED)
    with caplog.at_level(logging.ERROR):
        courier.queue(record(), "SUCCESS of gone")
        until(lambda: courier.lost == 1)
    assert "SUCCESS of gone is lost" in caplog.text
    assert len(handle.produced) == 1


def test_queued_records_are_sent_again_in_the_background_in_their_order(courier, handle):
    handle.answers.extend([TIMED_OUT] * 3)
    handle.is_silent = True
    for value in (b"1", b"2", b"3"):
        courier.queue(record(value), f"SUCCESS of {value!r}")
    handle.is_silent = False
    until(lambda: len(handle.produced) == 6)
    assert handle.produced[3:] == [b"1", b"2", b"3"]
    assert courier.lost == 0


def a_handle_without_its_file(courier, handle):
    """The present handle is finished for good, and the next cannot be made: its certificate's file is gone."""
    made = [handle]

    def make(_config):
        if not made:
            raise ValueError("ssl.key.location failed")
        return made.pop()

    courier._publisher.make = make
    courier._publisher.open()
    handle.answers.append(KafkaException(KafkaError(KafkaError._FATAL)))


def test_what_is_queued_for_a_handle_that_cannot_be_made_is_named_and_the_next_go_on(courier, handle, caplog):
    a_handle_without_its_file(courier, handle)
    courier.queue(record(b"1"), "SUCCESS of 1")
    until(lambda: courier.lost == 1)
    assert "SUCCESS of 1 is lost" in caplog.text
    courier._publisher.make = lambda _config: handle
    courier.queue(record(b"2"), "SUCCESS of 2")
    until(lambda: handle.produced == [b"2"])


def test_what_is_stored_while_no_handle_can_be_made_is_spooled(courier, handle, spool):
    a_handle_without_its_file(courier, handle)
    for number in (b"1", b"2"):
        courier.store(record(number), "SUCCESS", 5)
    assert spooled(spool) == [b"1", b"2"]


def test_whoever_queues_hears_the_answers_that_are_there(courier, handle):
    """… and no thread has to win the interpreter for each."""
    courier._publisher.open()
    heard_by = []
    handle.poll, poll = lambda timeout: heard_by.append(threading.current_thread()) or poll(timeout), handle.poll
    courier._publisher._polling.acquire()  # so the polling thread hears none
    courier.queue(record(b"1"), "SUCCESS of 1", remember=True)
    (queued,) = courier._mine
    assert queued.done
    assert set(heard_by) == {threading.current_thread()}
    courier._publisher._polling.release()


def test_a_wait_that_was_interrupted_before_it_could_let_go_does_not_stop_the_next(courier):
    """A time limit's exception can come between any two instructions of a child's main thread."""
    courier._publisher.open()
    courier._publisher._polling.acquire()
    assert courier.carry(record(), "SUCCESS of x", PATIENCE_S).stored.offset == 7


def fatal(_timeout):
    raise KafkaException(KafkaError(KafkaError._FATAL, "no right to write", fatal=True))


def test_a_fatal_error_that_a_flush_meets_is_not_its_caller_s(courier, handle):
    """A client that sets a state flushes inside ``update_state()``, and every process does at its end."""
    courier._publisher.open()
    handle.flush = fatal
    assert courier._publisher.flush(0.1) == 0
    assert courier._publisher._producer is None  # the next record gets a new one


def test_queueing_in_the_moment_in_which_the_handle_is_retired_is_not_its_caller_s_fault(courier, handle):
    courier._publisher.open()

    def produce_and_retire(*args, **kwargs):
        Handle.produce(handle, *args, **kwargs)
        courier._publisher._producer = None  # as the polling thread does that hears of a fatal error

    handle.produce = produce_and_retire
    courier.queue(record(), "SUCCESS of x", remember=True)
    courier.settle()
    assert courier.lost == 0


def test_what_was_cast_for_a_handle_that_is_finished_goes_to_its_successor(courier, handle):
    successor = Handle()
    courier._publisher.open()
    courier._publisher.make = lambda _config: successor
    handle.answers.append(KafkaException(KafkaError(KafkaError._FATAL)))
    courier._publisher.cast(record(b"1"))
    until(lambda: courier._publisher._producer is None)
    courier._publisher.cast(record(b"2"))
    until(lambda: successor.produced == [b"1", b"2"])
    assert courier._publisher.dropped == courier._publisher.failed == 0


def test_what_was_cast_and_cannot_be_sent_is_counted_with_its_reason(courier, handle, caplog):
    courier._publisher.open()
    handle.answers.append(KafkaException(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE)))
    courier._publisher.cast(record())
    until(lambda: "0 events dropped (queue full), 1 not delivered" in caplog.text)
    assert "MSG_SIZE_TOO_LARGE" in caplog.text


def test_a_retired_handle_is_given_nothing_any_more(courier, handle):
    """Its thread lives until it has heard the last answer, beside that of its successor."""
    successor = Handle()
    handle.is_silent = True
    courier._publisher.open()
    courier.queue(record(b"1"), "SUCCESS of 1")
    courier._publisher._producer = None
    courier._publisher.make = lambda _config: successor
    for number in range(20):
        courier._publisher.cast(record(b"%d" % number))
        time.sleep(0.01)
    until(lambda: len(successor.produced) == 20)
    assert handle.produced == [b"1"]


def test_answers_are_heard_after_one_that_nobody_could_bear(courier, handle, caplog):
    courier._publisher.open()
    handle.is_silent = True  # so that it is the polling thread that hears them
    courier._publisher.send(record(b"1"), lambda _error, _message: 1 / 0)
    handle.is_silent = False
    until(lambda: "ZeroDivisionError" in caplog.text)
    delivery = courier._publisher.publish(record(b"2"))
    until(lambda: delivery.done)


def test_queueing_on_a_full_queue_neither_blocks_nor_fails_nor_loses(courier, handle):
    handle.answers.append(BufferError)
    began = time.monotonic()
    courier.queue(record(), "FAILURE of x")
    assert time.monotonic() - began < 5
    until(lambda: handle.produced == [b"v"])
    assert courier.finish(PATIENCE_S) == 0
    assert courier.lost == 0


def test_settling_waits_for_what_this_thread_queued(courier, handle):
    handle.answers.extend([TIMED_OUT] * 3)
    courier.queue(record(b"mine"), "SUCCESS of x", remember=True)
    courier.settle(ALWAYS)
    assert handle.produced[-1] == b"mine"
    assert len(handle.produced) == 4
    other = threading.Thread(target=courier.settle)  # has queued nothing
    other.start()
    other.join(PATIENCE_S)
    assert not other.is_alive()


def test_settling_ends_when_the_record_is_given_up(courier, handle):
    handle.answers.append(KafkaError.TOPIC_AUTHORIZATION_FAILED)
    courier.queue(record(), "SUCCESS of x", remember=True)
    courier.settle()
    assert courier.lost == 1


def test_settling_without_always_retry_ends_and_the_record_is_still_sent_again(courier, handle, caplog, monkeypatch):
    monkeypatch.setattr("celery_kafka_backend.producer.courier.VERDICT_S", 0.1)
    handle.answers.extend([TIMED_OUT] * 100_000)
    courier.queue(record(), "SUCCESS of slow", remember=True)
    courier.settle()
    assert "SUCCESS of slow is not in Kafka yet" in caplog.text
    sent = len(handle.produced)
    handle.answers.clear()
    until(lambda: len(handle.produced) > sent)
    assert courier.finish(PATIENCE_S) == 0
    assert courier.lost == 0
