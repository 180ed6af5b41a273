"""The publisher on librdkafka's own broker, which lives in this process: no server needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from confluent_kafka import Consumer, Producer

from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.errors import NotAcknowledged, SettingsError, TooLarge
from celery_kafka_backend.producer.publisher import CAST_S, Publisher, Record
from tests.patience import PATIENCE_S, until
from tests.services import mock_kafka


@pytest.fixture(scope="module")
def broker():
    mock = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "ignored", "log_level": 0})
    address = next(iter(mock.list_topics(timeout=PATIENCE_S).brokers.values()))
    yield f"{address.host}:{address.port}"
    del mock


@pytest.fixture
def publisher():
    made = []

    def make(address, **given):
        made.append(Publisher(settings_module.parse(f"kafka://{address}/?view=memory://x", given)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def read(address, topic, n):
    consumer = Consumer({"bootstrap.servers": address, "group.id": f"reads-{topic}", "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    found = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < n and time.monotonic() < deadline:
        message = consumer.poll(0.2)
        if message is not None and message.error() is None:
            found.append(message.value())
    consumer.close()
    return found


def test_a_delivery_knows_where_its_record_is(broker, publisher):
    made = publisher(broker)
    delivery = made.publish(Record("where", b"k", b"v"), wait_s=PATIENCE_S)
    delivery.wait(PATIENCE_S)
    assert delivery.done
    assert delivery.stored.partition.topic == "where"
    assert delivery.stored.offset >= 0


def test_what_was_refused_once_is_not_reported_as_stored_because_of_what_came_behind_it(publisher):
    """With two requests under way librdkafka did so, and the first one's records were nowhere."""
    with mock_kafka.broker() as slow:
        made = publisher(slow.address)
        made.publish(Record("refused", b"k", b"before")).wait(PATIENCE_S)
        slow.answer_after(ms=100)
        slow.refuse_records()
        deliveries = []
        for n in range(5):
            deliveries.append(made.publish(Record("refused", b"k", b"%d" % n)))
            time.sleep(0.02)  # so that each has a request of its own, where the machine is quick enough
        for one in deliveries:
            one.wait(PATIENCE_S)
        assert [one.stored.offset for one in deliveries] == [1, 2, 3, 4, 5]
        assert read(slow.address, "refused", 6) == [b"before", b"0", b"1", b"2", b"3", b"4"]


def test_a_fork_parks_the_inherited_handle_and_both_sides_deliver(broker, publisher):
    made = publisher(broker)
    made.publish(Record("forked", b"k", b"parent before")).wait(PATIENCE_S)
    inherited = made._producer
    child = os.fork()
    if child == 0:
        code = 1
        try:
            made.publish(Record("forked", b"k", b"child")).wait(PATIENCE_S)
            code = 0 if made._producer is not inherited else 2
        finally:
            os._exit(code)
    made.publish(Record("forked", b"k", b"parent after")).wait(PATIENCE_S)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(read(broker, "forked", 3)) == [b"child", b"parent after", b"parent before"]


def test_a_forking_thread_does_not_jam_the_child_s_lock(broker, publisher):
    made = publisher(broker)
    made.publish(Record("locked", b"k", b"1")).wait(PATIENCE_S)
    with made._lock():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                made.publish(Record("locked", b"k", b"2")).wait(PATIENCE_S)
                code = 0
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_answer_is_bounded_and_says_so(publisher):
    made = publisher("127.0.0.1:9", delivery_timeout_s=1.0)
    delivery = made.publish(Record("t", b"k", b"v"))
    with pytest.raises(NotAcknowledged, match=r"within 0\.3 s"):
        delivery.wait(0.3)
    with pytest.raises(NotAcknowledged):
        delivery.wait(PATIENCE_S)  # librdkafka's own bound


def test_a_record_over_the_limit_is_refused_at_once(broker, publisher):
    made = publisher(broker, max_message_bytes=2000)
    with pytest.raises(TooLarge):
        made.publish(Record("t", b"k", b"x" * 3000))


def test_casting_never_fails_and_counts_what_it_dropped(publisher):
    made = publisher("127.0.0.1:9", producer={"queue.buffering.max.messages": 2})
    assert all(made.cast(Record("t", b"k", b"v")) for _ in range(4))
    made.flush(0)
    assert made.dropped == 2


def test_what_nobody_waits_for_leaves_with_what_somebody_waits_for(broker, publisher):
    made = publisher(broker)
    made.publish(Record("company", b"k", b"first")).wait(PATIENCE_S)
    made.cast(Record("company", b"k", b"started"))
    made.publish(Record("company", b"k", b"success")).wait(PATIENCE_S)
    assert read(broker, "company", 3) == [b"first", b"started", b"success"]


def test_what_is_waited_for_takes_along_what_was_cast_in_one_request(broker):
    said = []

    def make(config):
        return Producer({**config, "statistics.interval.ms": 50, "stats_cb": said.append})

    # A linger long enough for all of a slow machine's pairs: that none takes it shows that whoever waits flushes.
    settings = settings_module.parse(f"kafka://{broker}/?view=memory://x", {"producer": {"linger.ms": 2_000}})
    made = Publisher(settings, make)
    made.publish(Record("one-request", b"k", b"librdkafka meets the topic")).wait(PATIENCE_S)
    for n in range(20):
        made.cast(Record("one-request", b"%d" % n, b"started"))
        made.publish(Record("one-request", b"%d" % n, b"success")).wait(PATIENCE_S)
    until(lambda: said and json.loads(said[-1])["txmsgs"] == 41)
    assert sum(each["req"].get("Produce", 0) for each in json.loads(said[-1])["brokers"].values()) == 21
    made.close()


def test_a_chord_s_part_leaves_before_what_was_cast(broker, publisher):
    made = publisher(broker)
    made.publish(Record("parts", b"k", b"a part", group="g"), wait_s=PATIENCE_S).wait(PATIENCE_S)
    made.cast(Record("states", b"k", b"started"))
    made.publish(Record("parts", b"k", b"a part", group="g"), wait_s=PATIENCE_S).wait(PATIENCE_S)
    made.publish(Record("states", b"k", b"success")).wait(PATIENCE_S)
    assert read(broker, "states", 2) == [b"started", b"success"]


def test_in_a_crowd_that_does_not_end_records_leave_all_the_same(broker, publisher):
    made = publisher(broker)

    def one_more():
        made.cast(Record("crowd", b"k", b"v"))
        return made.latest is not None

    until(one_more, every_s=0.002)


def test_an_option_that_librdkafka_does_not_know_is_named(publisher):
    made = publisher("127.0.0.1:9", client={"no.such.option": "1"})
    with pytest.raises(SettingsError, match=r"no\.such\.option"):
        made.publish(Record("t", b"k", b"v"))


@pytest.mark.parametrize("token", ["slow", "broken"])
def test_casting_does_not_wait_for_a_token(publisher, token):
    """The driver waits in the making of a handle until it has one, up to 10 s; we do for one before 2.13."""
    made = publisher("127.0.0.1:9", client={**OAUTH, "oauth_cb": f"{__name__}.{token}_token"})
    TOKEN.clear()
    assert all(made.cast(Record("t", b"k", b"v")) for _ in range(3))
    assert made.waiting() == 3
    assert made._maker.is_alive()  # it alone waits
    TOKEN.set()
    made._maker.join(PATIENCE_S)
    assert made.flush(0.1) == 3  # handed to librdkafka, or still ours: nothing is forgotten
    assert made.waiting() == (3 if token == "broken" else 0)


OAUTH = {"security.protocol": "sasl_plaintext", "sasl.mechanism": "OAUTHBEARER"}
TOKEN = threading.Event()


def slow_token(_config):
    TOKEN.wait(PATIENCE_S)
    return "token", time.time() + 3600


def broken_token(_config):
    TOKEN.wait(PATIENCE_S)
    raise OSError("the token service is away")


def test_what_was_dropped_is_counted_and_said_once_per_interval(publisher, caplog):
    made = publisher("127.0.0.1:9", producer={"queue.buffering.max.messages": 1})
    for _ in range(5):
        made.cast(Record("t", b"k", b"v"))
        made.flush(0)
        time.sleep(2 * CAST_S)  # the poller has looked, and would have said it again
    assert made.dropped == 4
    assert caplog.text.count("events dropped (queue full)") == 1


def test_a_short_script_without_kafka_ends_with_a_word(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from celery import Celery\n"
        "app = Celery('s', broker='memory://', backend='kafka://127.0.0.1:9/?view=redis://127.0.0.1:9/0')\n"
        "@app.task\n"
        "def add(x): ...\n"
        "app.backend\n"
        "for n in range(3): add.delay(n)\n"
        "print('sent')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (0, "sent\n"), done.stderr
    assert "3 events had not reached Kafka at 127.0.0.1:9 when this process ended" in done.stderr
