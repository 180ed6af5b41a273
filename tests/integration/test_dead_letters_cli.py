"""`pipeline dead-letters` beside a running fleet: looking, requeueing, dropping; and that nothing is requeued twice."""

from __future__ import annotations

import json
import signal
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
import redis
from celery import chord
from celery.bin.base import CLIContext
from click.testing import CliRunner
from confluent_kafka import Consumer, Producer, TopicPartition

from celery_kafka_backend import codec, topics
from celery_kafka_backend.cli import pipeline
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.dealing import Dealing, Reading
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.resending import Resending
from celery_kafka_backend.configure import settings_of
from celery_kafka_backend.events import Event
from celery_kafka_backend.kafka import consumer_config, producer_config
from celery_kafka_backend.processors.deadletters import DeadLetters
from tests.patience import PATIENCE_S
from tests.services import native

pytestmark = [pytest.mark.kafka, pytest.mark.redis]


class Desk:
    """An operator's desk beside a fleet."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.settings = settings_of(fleet.app.app)
        self.log = topics.task_events(self.settings.topic_prefix)
        self.chords = topics.chords(self.settings.topic_prefix)

    def __call__(self, action, *arguments):
        """Type a command; return its exit code, its JSON and all it said."""
        context = CLIContext(self.fleet.app.app, no_color=True, workdir=None)
        done = CliRunner().invoke(pipeline, ["dead-letters", action, *arguments], obj=context)
        assert "Traceback" not in done.output
        found = json.loads(done.stdout) if "--json" in arguments and done.stdout.strip() else None
        return Exit(done.exit_code), found, done.output

    def records(self, topic):
        """Every record of a topic that a transaction has not hidden."""
        consumer = Consumer({**consumer_config(self.settings, None), "enable.partition.eof": True})
        try:
            at = [
                TopicPartition(topic, n, 0)
                for n in consumer.list_topics(topic, timeout=PATIENCE_S).topics[topic].partitions
            ]
            consumer.assign(at)
            left, found = {one.partition for one in at}, []
            while left:
                for message in consumer.consume(1000, 0.1):
                    if message.error() is None:
                        found.append(message)
                    else:
                        left.discard(message.partition())
            return found
        finally:
            consumer.close()

    def give_up(self, reason, *messages):
        """Write dead letters, as a processor that cannot write these records."""
        sender = DeadLetters(producer_config(self.settings), topics.dead_letters(self.settings.topic_prefix), by="test")
        for topic, partition, offset, key, value, headers in messages:
            sender.put(topic, partition, offset, key, value, headers, reason)
        sender.flush(PATIENCE_S)

    def append(self, key, value):
        """Append a record to the log; return where it stands."""
        stands = []
        producer = Producer(producer_config(self.settings))
        producer.produce(self.log, key=key, value=value, on_delivery=lambda error, message: stands.append(message))
        assert producer.flush(PATIENCE_S) == 0
        return f"{self.log}/{stands[0].partition()}@{stands[0].offset()}"

    def until_given_up(self, place):
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            _, found, _ = self("list", place, "--json")
            if found:
                return found[0]
        pytest.fail(f"{place} was not given up")


@pytest.fixture(scope="module")
def desk(fleet):
    return Desk(fleet)


def until(ask, holds):
    """What a question is answered with once the answer is right: a transaction's end takes a moment to reach its partitions."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds(found := ask()):
        assert time.monotonic() < deadline, found
    return found


def successes(desk, task_id):
    return [m for m in desk.records(desk.log) if m.key() == task_id.encode() and b'"success"' in m.value()]


def parts(message):
    return message.topic(), message.partition(), message.offset(), message.key(), message.value(), message.headers()


def test_what_nobody_can_read_is_listed_shown_refused_and_dropped(desk):
    place = desk.append(b"some-task", b"\x00 rubbish")
    case = desk.until_given_up(place)
    assert (case["state"], case["subject"], case["size"]) == ("open", "some-task", 9)
    assert "Unreadable" in case["given_up"][0]["reason"]
    code, _, said = desk("show", place)
    assert code is Exit.OK
    assert "\\x00 rubbish" in said
    assert "requeue: no: it would be given up again" in said
    code, found, _ = desk("requeue", place, "--reason", "why not", "--yes", "--json")
    assert (code, found["done"]) == (Exit.NOT_DONE, [])
    assert "given up again" in found["refused"][0]["why"]
    before = desk("list", "--json")[1]
    assert desk("drop", place, "--dry-run")[0] is Exit.OK
    assert desk("list", "--json")[1] == before
    assert desk("drop", place, "--reason", "a test's", "--actor", "ann", "--yes")[0] is Exit.OK
    code, _, said = desk("list", "--state", "dropped")
    assert "ann: a test's" in said
    code, _, said = desk("drop", place, "--reason", "again", "--yes")
    assert code is Exit.NOT_DONE
    assert "dropped by ann: a test's" in said
    assert desk("drop", "--because", "Unreadable*", "--reason", "x", "--yes")[0] is Exit.NOT_FOUND


def test_a_requeued_result_is_in_the_view_and_its_record_is_the_same(desk):
    """As after a view that refused a document, and was put right."""
    result = desk.fleet.app.add.delay(20, 22)
    assert result.get(timeout=PATIENCE_S) == 42
    (success,) = successes(desk, result.id)
    store = redis.Redis.from_url(desk.fleet.view)
    assert store.delete(*store.keys(f"*{result.id}*")) >= 2  # the document, and what guards it
    place = f"{desk.log}/{success.partition()}@{success.offset()}"
    desk.give_up("Rejected: no room", parts(success))
    desk.give_up("Rejected: no room", parts(success))  # the processor died before its commit
    code, found, _ = desk("requeue", "--because", "*no room", "--reason", "disk added", "--yes", "--json")
    assert code is Exit.OK
    (done,) = found["done"]
    assert done["record"] == place
    first, second = until(lambda: successes(desk, result.id), lambda found: len(found) > 1)
    assert parts(first)[3:] == parts(second)[3:]
    assert done["to"] == f"{desk.log}/{second.partition()}@{second.offset()}"
    assert desk.fleet.app.app.AsyncResult(result.id).get(timeout=PATIENCE_S) == 42
    (case,) = desk("list", place, "--json")[1]
    assert (case["state"], case["done"]["reason"], case["done"]["to"]) == ("requeued", "disk added", done["to"])
    assert len(case["given_up"]) == 2
    code, _, said = desk("requeue", place, "--reason", "again", "--yes")
    assert code is Exit.NOT_DONE
    assert "requeued by" in said
    desk.give_up("Rejected: still no room", parts(second))
    assert desk("list", done["to"], "--json")[1][0]["again"] == place


def event(n):
    at = time.time_ns() // 1_000_000
    return Event(id=f"e{n}", kind="received", task=f"many-{n}", name="many", at=at, hlc=at)


def test_whoever_is_killed_or_shut_out_and_begins_again_appends_none_twice(desk):
    """Two operators at once, killed again and again; what they append is there once, and so says the list."""
    count = 1500
    desk.give_up(
        "Rejected: many",
        *((desk.log, 0, 1_000_000 + n, f"many-{n}".encode(), codec.encode(event(n)), []) for n in range(count)),
    )
    command = desk.fleet.celery(
        "pipeline", "dead-letters", "requeue", "--because", "*many", "--reason", "now", "--yes", "--json"
    )
    for delay in (0.0, 0.1):
        operators = []
        for n in range(2):
            with (desk.fleet.folder / f"operator-{n}.log").open("wb") as output:
                operators.append(native.popen(command, output=output, env=desk.fleet.environment))
        deadline = time.monotonic() + PATIENCE_S
        before = len(moved(desk))
        while len(moved(desk)) == before and any(each.poll() is None for each in operators):
            assert time.monotonic() < deadline
        time.sleep(delay)
        for each in operators:
            each.send_signal(signal.SIGKILL)
            each.wait()
    code, _, said = desk("requeue", "--because", "*many", "--reason", "the rest", "--yes")
    assert code in (Exit.OK, Exit.NOT_FOUND), said
    until(lambda: len(moved(desk)), lambda there: there >= count)
    keys = [message.key() for message in moved(desk)]
    assert len(keys) == len(set(keys)) == count
    cases = desk("list", "--name", "many", "--json")[1]
    assert {case["state"] for case in cases} == {"requeued"}
    stands = {f"{m.topic()}/{m.partition()}@{m.offset()}" for m in moved(desk)}
    assert {case["done"]["to"] for case in cases} == stands


def test_whoever_is_shut_out_is_told_that_it_may_have_been_a_rerun(desk):
    desk.give_up("Rejected: shut out", (desk.log, 0, 3_000_000, b"out", codec.encode(event(-2)), []))
    with closing(Broker(desk.settings, PATIENCE_S)) as broker:
        reading = Reading(broker)
        reading.go_on()
        dealing = Dealing(broker, "ann", "why not")
        dealing.begin()
        Resending(SimpleNamespace(app=desk.fleet.app.app), broker, "ben", "the bank was down").begin()
        with pytest.raises(Stop, match="requeue, drop or rerun began, and ended this one after 0"):
            list(dealing.drop([case for case in reading.cases if case.record.offset == 3_000_000]))


def moved(desk):
    return [message for message in desk.records(desk.log) if (message.key() or b"").startswith(b"many-")]


def test_a_chords_record_goes_back_to_the_partition_in_which_its_chord_lives(desk):
    tasks = desk.fleet.app
    result = chord([tasks.add.si(1, 1), tasks.add.si(2, 2)])(tasks.total.s())
    assert result.get(timeout=PATIENCE_S) == 6
    decided = [m for m in desk.records(desk.chords) if b"|decided" in m.key() and m.value() is not None]
    desk.give_up("Rejected: chord", *map(parts, decided[-1:]))
    code, found, _ = desk("requeue", "--topic", "*.chords", "--all", "--reason", "put right", "--yes", "--json")
    assert code is Exit.OK, found
    (one,) = found["done"]
    assert one["to"].partition("@")[0] == one["record"].partition("@")[0]


@pytest.mark.parametrize(
    ("arguments", "code", "remedy"),
    [
        (("requeue", "--yes", "--reason", "x"), Exit.CONFIGURATION, "--all"),
        (("requeue", "--all", "--yes"), Exit.CONFIGURATION, "--reason"),
        (("requeue", "x/0@1", "--yes", "--reason", "x"), Exit.NOT_FOUND, "TOPIC/PARTITION@OFFSET"),
        (("show", "x/0@1"), Exit.NOT_FOUND, "TOPIC/PARTITION@OFFSET"),
        (("frob",), Exit.CONFIGURATION, "frob"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(desk, arguments, code, remedy):
    found, _, said = desk(*arguments)
    assert found is code
    assert remedy in said


def test_who_cannot_be_asked_must_have_said_yes(desk):
    desk.give_up("Rejected: ask", (desk.log, 0, 2_000_000, b"ask", codec.encode(event(-1)), []))
    code, _, said = desk("requeue", "--because", "*ask", "--reason", "x")
    assert code is Exit.CONFIGURATION
    assert "--yes" in said
