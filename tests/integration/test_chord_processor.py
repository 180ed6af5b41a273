"""The chord processor against a Kafka that answers: librdkafka's mock broker, and the real one where it is there.

The broker of the bodies is a folder, so that a process can be killed and the queue still be looked at.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from itertools import permutations
from pathlib import Path

import msgspec
import pytest
from celery.canvas import chain, group

from celery_kafka_backend import chord_records as records
from celery_kafka_backend import codec, kafka, topics
from celery_kafka_backend.chord_records import Choice, Decided, Extended, Fired
from celery_kafka_backend.events import Event
from celery_kafka_backend.processors.chords import ChordProcessor
from celery_kafka_backend.producer import headers
from tests.integration.chord_world import (
    Chord,
    ChordsTopic,
    create_topics,
    make_app,
    make_settings,
    read_all,
    sent_bodies,
)
from tests.patience import PATIENCE_S, until
from tests.services import mock_kafka

ROOT = Path(__file__).parents[2]

logger = logging.getLogger(__name__)


KAFKA = pytest.param("kafka", marks=pytest.mark.kafka)
on_kafka_alone = pytest.mark.parametrize("config", [KAFKA], indirect=True)
"""The mock broker's groups notice who comes and who dies by rules of their own, which are no user's."""


@pytest.fixture(scope="module")
def mock():
    with mock_kafka.running() as address:
        yield address


@pytest.fixture(params=["mock", KAFKA])
def config(request, topic_prefix):
    if request.param == "mock":
        return make_settings(request.getfixturevalue("mock"), topic_prefix)
    made = make_settings(request.getfixturevalue("kafka").bootstrap, topic_prefix)
    create_topics(made)
    return made


@pytest.fixture
def app(tmp_path):
    return make_app(tmp_path)


@pytest.fixture
def fleet(config):
    return ChordsTopic(config)


@pytest.fixture
def start(app, config, caplog):
    """Start processors in threads; stop them in the end, and show their errors. A test that fails shows what they logged."""
    caplog.set_level(logging.INFO, "celery_kafka_backend")
    running = []

    def start(cls=ChordProcessor, *, settings=config, use=app, slice_size=None):
        processor = cls(use, settings)
        if slice_size:
            processor._slice = slice_size
        errors = []

        def run():
            try:
                processor.run()
            except BaseException as exc:
                logger.exception("a chord processor died")  # whoever waits for it hears why
                errors.append(exc)

        thread = threading.Thread(target=run)
        thread.start()
        processor.finish = lambda: (processor.stop(), thread.join(PATIENCE_S))
        running.append((processor, thread, errors))
        return processor

    yield start
    for processor, _, _ in running:
        processor.stop()
    for _, thread, errors in running:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert not errors


def fired(fleet, group_id):
    return [record for record in fleet.left(group_id) if isinstance(record, Fired)]


def kinds(fleet, chord):
    return sorted(type(record).__name__ for record in fleet.left(chord.group))


def decided(fleet, group_id):
    return next(record for record in fleet.history(group_id) if isinstance(record, Decided))


def test_a_chord_fires_once_in_whatever_order_its_records_came(app, fleet, start, tmp_path):
    chords = []
    for order in permutations(range(5)):
        chord = Chord(app, app.tasks["proj.xsum"].s(more=1))
        facts = [chord.declared, chord.sized, *chord.parts()]
        chords.append((chord, [facts[n] for n in order]))
    start()
    for round_ in range(5):
        for _, facts in chords:
            key, value = records.encode(facts[round_])
            partition = topics.chord_partition(facts[round_].group, fleet.partitions)
            fleet.producer.produce(fleet.topic, value, key, partition=partition)
    fleet.producer.flush(PATIENCE_S)
    until(lambda: all(fired(fleet, chord.group) for chord, _ in chords[::40]), "fired")
    bodies = until(lambda: len(found := sent_bodies(tmp_path)) >= len(chords) and found, "all bodies")
    assert sorted(body["headers"]["id"] for body in bodies) == sorted(chord.body_id for chord, _ in chords)
    by_id = {chord.body_id: chord for chord, _ in chords}
    for body in bodies:
        chord = by_id[body["headers"]["id"]]
        assert body["args"] == [[0, 10, 20]]
        assert body["kwargs"] == {"more": 1}
        assert body["headers"]["root_id"] == f"root-{chord.group}"
        assert body["headers"]["parent_id"].endswith(chord.group)
        assert headers.GENERATION not in json.dumps(body)
    chord = chords[0][0]
    body = next(body for body in bodies if body["headers"]["id"] == chord.body_id)
    assert body["headers"][headers.RUN] == decided(fleet, chord.group).body_run


def test_one_run_twice_is_one_part_and_a_success_beats_a_failure(app, fleet, start, tmp_path):
    chord = Chord(app, app.tasks["proj.xsum"].s())
    one, two, three = chord.parts()
    again = chord.part(0, 5, event="again", key=9)
    failed = chord.part(1, ValueError("late"), state="FAILURE", event="failed", key=99)
    start()
    fleet.append(chord.declared, chord.sized, one, again, one, failed, two, failed)
    time.sleep(1)
    assert not sent_bodies(tmp_path)
    fleet.append(three)
    until(lambda: fired(fleet, chord.group), "fired")
    (body,) = sent_bodies(tmp_path)
    assert body["args"] == [[5, 10, 20]]


def test_a_finished_chord_leaves_no_part_and_a_late_one_goes_at_once(app, fleet, start):
    chord = Chord(app, app.tasks["proj.xsum"].s())
    start()
    fleet.append(chord.declared, chord.sized, *chord.parts())

    until(lambda: kinds(fleet, chord) == ["Decided", "Declared", "Fired"], lambda: f"clean: {kinds(fleet, chord)}")
    fleet.append(chord.part(1, 7, event="late"), chord.declared, chord.sized)
    assert len(kinds(fleet, chord)) >= 3
    until(
        lambda: kinds(fleet, chord) == ["Decided", "Declared", "Fired"], lambda: f"clean again: {kinds(fleet, chord)}"
    )


def test_a_failed_member_fails_the_body_as_celery_does_when_all_are_in(app, fleet, start, tmp_path):
    callback = app.tasks["proj.xsum"].s()
    callback.link_error(app.signature("proj.note"))
    chord = Chord(app, callback)
    zero, _, two = chord.parts()
    start()
    fleet.append(chord.declared, chord.sized, chord.part(1, ValueError("bad luck"), state="FAILURE"), two)
    time.sleep(1)
    assert app.backend.get_state(chord.body_id) == "PENDING"
    fleet.append(zero)
    until(lambda: fired(fleet, chord.group), "fired")
    result = app.backend.get_task_meta(chord.body_id, cache=False)
    assert result["status"] == "FAILURE"
    assert str(result["result"]) == f"Dependency t1-{chord.group} raised ValueError('bad luck')"
    (errback,) = sent_bodies(tmp_path)
    assert errback["headers"]["task"] == "proj.note"
    assert errback["args"] == [chord.body_id]


def test_an_immutable_body_needs_no_results(app, fleet, start, tmp_path):
    chord = Chord(app, app.tasks["proj.note"].si("me"))
    start()
    fleet.append(chord.declared, chord.sized)
    fleet.append(*(records.Part(**chord.here, task=f"t{n}", index=n, id="e", key=1) for n in range(3)))
    until(lambda: fired(fleet, chord.group), "fired")
    (body,) = sent_bodies(tmp_path)
    assert body["args"] == ["me"]


def test_a_member_whose_result_is_gone_counts_and_contributes_none(app, fleet, start, tmp_path):
    chord = Chord(app, app.tasks["proj.note"].s())
    start()
    ignored = records.Part(**chord.here, task="t1", index=1, id="e", key=1, ignored=True)
    fleet.append(chord.declared, chord.sized, chord.part(0, "a"), ignored, chord.part(2, "b"))
    until(lambda: fired(fleet, chord.group), "fired")
    assert sent_bodies(tmp_path)[0]["args"] == [["a", None, "b"]]


def test_a_member_that_was_added_comes_after_its_parent(app, fleet, start, tmp_path):
    chord = Chord(app, app.tasks["proj.note"].s())
    added = records.Part(
        **chord.here, task="a-first-by-name", index=0, id="e", key=1, result=b'"added"', content_type="application/json"
    )
    start()
    fleet.append(Extended(**chord.here, task="a-first-by-name"), added, chord.declared, chord.sized, *chord.parts())
    until(lambda: fired(fleet, chord.group), "fired")
    assert sent_bodies(tmp_path)[0]["args"] == [[0, "added", 10, 20]]


@pytest.mark.parametrize("canvas", ["chain", "group"])
def test_a_body_may_be_any_canvas(app, fleet, start, tmp_path, canvas):
    xsum, note = app.tasks["proj.xsum"], app.tasks["proj.note"]
    callback = chain(xsum.s(), note.s(), app=app) if canvas == "chain" else group([xsum.s(), xsum.s(more=1)], app=app)
    chord = Chord(app, callback)
    start()
    fleet.append(chord.declared, chord.sized, *chord.parts())
    until(lambda: fired(fleet, chord.group), "fired")
    bodies = sent_bodies(tmp_path)
    assert len(bodies) == (1 if canvas == "chain" else 2)
    run = decided(fleet, chord.group).body_run
    assert [(body["args"], body["headers"][headers.RUN]) for body in bodies] == [([[0, 10, 20]], run)] * len(bodies)
    if canvas == "chain":
        (rest,) = bodies[0]["embed"]["chain"]
        assert rest["options"]["task_id"] == chord.body_id


def test_a_large_decision_is_written_in_slices(app, fleet, start, tmp_path):
    chord = Chord(app, app.tasks["proj.xsum"].s(), size=25)
    start(slice_size=4)
    fleet.append(chord.declared, chord.sized, *chord.parts())
    until(lambda: fired(fleet, chord.group), "fired")
    assert decided(fleet, chord.group).slices == 7
    (body,) = sent_bodies(tmp_path)
    assert body["args"] == [[n * 10 for n in range(25)]]


def test_a_chord_of_more_members_than_fit_a_record(app, fleet, start, tmp_path):
    """The members of its decision stand in slices, and all of its results in its body."""
    chord = Chord(app, app.tasks["proj.xsum"].s(), size=records.CHUNK + 1_000)
    start()
    fleet.append(chord.declared, chord.sized, *reversed(chord.parts()))
    until(lambda: fired(fleet, chord.group), "fired")
    assert decided(fleet, chord.group).slices > 1
    (body,) = sent_bodies(tmp_path)
    assert body["args"] == [[n * 10 for n in range(chord.size)]]


def test_a_declaration_with_a_wrong_mac_is_a_dead_letter(app, fleet, start, tmp_path, config):
    secret = msgspec.structs.replace(config, chord_key="secret")
    good, bad = Chord(app, app.tasks["proj.xsum"].s()), Chord(app, app.tasks["proj.xsum"].s())
    start(settings=secret)
    for chord, key in ((bad, "other"), (good, "secret")):
        fleet.append(records.sign(chord.declared, key), chord.sized, *chord.parts())
    until(lambda: fired(fleet, good.group), "fired")
    until(lambda: dead_letters(config), "dead letter")
    assert [body["headers"]["id"] for body in sent_bodies(tmp_path)] == [good.body_id]
    until(lambda: app.backend.get_state(bad.body_id) == "FAILURE", "an end of the chord that will not be decided")
    assert "declared without our chord_key" in str(app.backend.get_result(bad.body_id))


def dead_letters(config):
    return [found for n in (0, 1, 2, 3) for found in _read_if_there(config, n)]


def _read_if_there(config, partition):
    from confluent_kafka import KafkaException  # noqa: PLC0415 - only here

    try:
        return read_all(config, topics.dead_letters(config.topic_prefix), partition)
    except KafkaException:
        return []


def test_rubbish_is_a_dead_letter_once_and_stops_nothing(app, fleet, start, config):
    chord = Chord(app, app.tasks["proj.xsum"].s())
    start()
    key = f"{chord.group}|1|declared".encode()
    fleet.append_raw(chord.group, key, b"rubbish")
    fleet.append(chord.declared, chord.sized, *chord.parts())
    until(lambda: fired(fleet, chord.group), "fired")
    until(lambda: dead_letters(config), "dead letter")
    partition = topics.chord_partition(chord.group, fleet.partitions)
    until(lambda: read_all(config, fleet.topic, partition).count((key, None)) == 1, "tombstone")
    assert [value for _, value in dead_letters(config)] == [b"rubbish"]


def test_while_the_broker_is_away_chords_are_decided_and_their_bodies_wait(app, fleet, start, tmp_path):
    away = tmp_path / "away"
    (tmp_path / "queue").rename(away)
    chords = [Chord(app, app.tasks["proj.xsum"].s()) for _ in range(8)]
    processor = start()
    for chord in chords:
        fleet.append(chord.declared, chord.sized, *chord.parts())
    until(lambda: processor.statistics.retries > 8, "retries")
    until(lambda: processor.statistics.decided == 8, "decided")
    assert not any(fired(fleet, chord.group) for chord in chords)
    away.rename(tmp_path / "queue")
    until(lambda: all(fired(fleet, chord.group) for chord in chords), "fired")
    assert sorted(b["headers"]["id"] for b in sent_bodies(tmp_path)) == sorted(chord.body_id for chord in chords)


@on_kafka_alone
def test_partitions_move_between_processors_and_every_body_is_sent_once(app, fleet, start, tmp_path):
    first = start()
    chords = []

    def more(count):
        for _ in range(count):
            chord = Chord(app, app.tasks["proj.xsum"].s())
            chords.append(chord)
            fleet.append(chord.declared, chord.sized, *chord.parts())

    more(15)
    until(lambda: len(first._held) == 4, "first holds all")
    second = start()
    more(15)
    until(lambda: second._held and first._held, "shared")
    more(15)
    first.finish()
    more(15)
    until(lambda: all(fired(fleet, chord.group) for chord in chords), "fired")
    assert len(second._held) == 4
    assert sorted(b["headers"]["id"] for b in sent_bodies(tmp_path)) == sorted(chord.body_id for chord in chords)


def test_a_zombies_decision_that_came_first_is_the_decision(app, fleet, start, tmp_path):
    """Its author never comes back: the owner carries it out, as it stands."""
    chord = Chord(app, app.tasks["proj.xsum"].s())
    parts = chord.parts()
    fleet.append(chord.declared, chord.sized, *parts, chord.part(0, 99, event="better", key=50))
    partition = topics.chord_partition(chord.group, fleet.partitions)
    stored = read_all(fleet.config, fleet.topic, partition)
    offsets = {key: n for n, (key, _) in enumerate(stored)}
    choices = tuple(Choice(part.task, part.index, part.id, offsets[records.key_of(part)]) for part in parts)
    fleet.append(
        Decided(
            **chord.here, owner="zombie", body_task_id=chord.body_id, body_run=4711, parts=choices, size=3, last=2, at=1
        )
    )
    start()
    until(lambda: fired(fleet, chord.group), "fired")
    (body,) = sent_bodies(tmp_path)
    assert body["args"] == [[0, 10, 20]]
    assert body["headers"][headers.RUN] == 4711


# -- what cannot be sent -----------------------------------------------------------------------


def ends_with(app, fleet, start, chord, *records_, **settings):
    """Run a chord to its end and return its body's error."""
    start(**settings)
    fleet.append(chord.declared, chord.sized, *records_)
    until(lambda: fired(fleet, chord.group), "fired")
    meta = app.backend.get_task_meta(chord.body_id, cache=False)
    assert meta["status"] == "FAILURE"
    return str(meta["result"])


@pytest.mark.parametrize(
    "more",
    [
        {"body": b"[1, 2]"},
        {"body": b"nonsense"},
        {
            "body": b"gASVBQAAAAAAAABLKi4=",
            "content_type": "application/x-python-serialize",
            "content_encoding": "binary",
        },
    ],
    ids=["no signature", "not JSON", "a serializer that this app does not accept"],
)
def test_a_body_that_cannot_be_read_fails(app, fleet, start, more):
    chord = Chord(app, app.tasks["proj.xsum"].s())
    chord.declared = msgspec.structs.replace(chord.declared, **more)
    assert "the body of the chord" in ends_with(app, fleet, start, chord, *chord.parts())


def test_a_member_s_result_that_this_app_does_not_accept_fails_the_chord(app, fleet, start):
    chord = Chord(app, app.tasks["proj.xsum"].s())
    pickled = records.Part(
        **chord.here, task="t0", index=0, id="e", key=1, result=b"x", content_type="application/x-python-serialize",
        content_encoding="binary",
    )  # fmt: skip
    assert "ContentDisallowed" in ends_with(app, fleet, start, chord, pickled, *chord.parts()[1:])


@pytest.mark.parametrize(
    "forged", [b'{"exc_type":"system","exc_module":"os","exc_message":["touch /tmp/x"]}', b'{"no":1}', b"\xff"]
)
def test_a_forged_exception_is_not_made_and_the_chord_fails(app, fleet, start, forged):
    chord = Chord(app, app.tasks["proj.xsum"].s())
    part = records.Part(
        **chord.here, task="t0", index=0, id="e", key=1, state="FAILURE", result=forged, content_type="application/json",
        content_encoding="utf-8", exception="ValueError('as text')",
    )  # fmt: skip
    error = ends_with(app, fleet, start, chord, part, *chord.parts()[1:])
    assert error == "Dependency t0 raised ValueError('as text')"


def test_results_that_are_too_much_fail_the_body_and_call_its_errbacks(app, fleet, start, tmp_path, config):
    callback = app.tasks["proj.xsum"].s()
    callback.link_error(app.signature("proj.note"))
    chord = Chord(app, callback)
    small = msgspec.structs.replace(config, chord_max_bytes=1024)
    error = ends_with(app, fleet, start, chord, *(chord.part(n, "x" * 500) for n in range(3)), settings=small)
    assert "the members' results are more than 1024 bytes (kafka_backend_settings['chord_max_bytes'])" in error
    (errback,) = sent_bodies(tmp_path)
    assert errback["args"] == [chord.body_id]


def test_an_immutable_body_joins_nothing_however_much_there_is(app, fleet, start, tmp_path, config):
    chord = Chord(app, app.tasks["proj.note"].si("me"))
    start(settings=msgspec.structs.replace(config, chord_max_bytes=1024))
    unreadable = [
        msgspec.structs.replace(chord.part(n, "x" * 2000), content_type="application/x-unknown") for n in range(3)
    ]
    fleet.append(chord.declared, chord.sized, *unreadable)
    until(lambda: fired(fleet, chord.group), "fired")
    assert sent_bodies(tmp_path)[0]["args"] == ["me"]


def test_a_body_goes_where_its_route_says_with_its_own_options(app, fleet, start, tmp_path):
    app.conf.task_routes = {"proj.xsum": {"queue": "sums"}}
    routed = Chord(app, app.tasks["proj.xsum"].s())
    chosen = Chord(app, app.tasks["proj.xsum"].s().set(queue="mine", priority=3))
    start()
    for chord in (routed, chosen):
        fleet.append(chord.declared, chord.sized, *chord.parts())
    until(lambda: fired(fleet, routed.group) and fired(fleet, chosen.group), "fired")
    messages = [json.loads(file.read_text()) for file in Path(tmp_path, "queue").glob("*.msg")]
    went = {one["headers"]["id"]: one["properties"] for one in messages}
    assert went[routed.body_id]["delivery_info"]["routing_key"] == "sums"
    assert went[chosen.body_id]["delivery_info"]["routing_key"] == "mine"
    assert went[chosen.body_id]["priority"] == 3


def test_a_size_that_changes_counts_as_said_last(app, fleet, start, tmp_path):
    shrunk, grown = (Chord(app, app.tasks["proj.xsum"].s()) for _ in range(2))
    zero, one, two = grown.parts()
    start()
    fleet.append(shrunk.declared, records.Sized(**shrunk.here, size=9), *shrunk.parts(), shrunk.sized)
    until(lambda: fired(fleet, shrunk.group), "fired")
    fleet.append(grown.declared, records.Sized(**grown.here, size=9), zero, one, grown.sized)
    assert not fired(fleet, grown.group)
    fleet.append(two)
    until(lambda: fired(fleet, grown.group), "fired")
    assert [body["args"] for body in sent_bodies(tmp_path)] == [[[0, 10, 20]]] * 2


# -- processes that are killed, or stopped for a while -------------------------------------------


class Process:
    def __init__(self, config, folder, name, hold=""):
        given = {
            "servers": config.bootstrap_servers,
            "prefix": config.topic_prefix,
            "folder": str(folder),
            "owner": name,
            "hold": hold,
        }
        self.log = Path(folder, f"{name}.log")
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.chord_process", json.dumps(given)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self.said = []
        """All that it said up to what was waited for last."""
        self._lines = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self):
        for line in self.popen.stdout:
            self._lines.put(json.loads(line)["what"])

    def wait_for(self, what):
        def heard():
            if ended := self.popen.poll() is not None:
                self._listener.join()
            while not self._lines.empty():
                self.said.append(self._lines.get())
                if self.said[-1] == what:
                    return True
            assert not ended, f"ended instead of saying {what!r}: {self.said}\n{self.log.read_text()}"
            return False

        until(heard, lambda: f"{what!r}, but {self.said}\n{self._standing()}")

    def _standing(self):
        """Its log, with where each of its threads stands."""
        self.signal(signal.SIGUSR1)
        time.sleep(1)
        return self.log.read_text()

    def signal(self, number):
        self.popen.send_signal(number)

    def end(self):
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.kill()
        self.popen.wait(PATIENCE_S)
        self.popen.stdout.close()


@pytest.fixture
def process(config, tmp_path):
    running = []

    def process(name, hold=""):
        running.append(Process(config, tmp_path, name, hold))
        return running[-1]

    yield process
    for one in running:
        one.end()


@on_kafka_alone
@pytest.mark.parametrize("point", ["before deciding", "before reading", "before sending"])
def test_an_owner_killed_before_it_sent_is_replaced_and_the_body_is_sent_once(app, fleet, process, tmp_path, point):
    chord = Chord(app, app.tasks["proj.xsum"].s())
    first = process("first", point)
    fleet.append(chord.declared, chord.sized, *chord.parts())
    first.wait_for(point)
    first.signal(signal.SIGKILL)
    died = time.monotonic()
    assert not sent_bodies(tmp_path)
    second = process("second")
    second.wait_for("after sending")
    print(f"replaced and sent {time.monotonic() - died:.1f} s after kill -9")
    until(lambda: fired(fleet, chord.group), "fired")
    (body,) = sent_bodies(tmp_path)
    assert body["headers"]["id"] == chord.body_id
    assert body["args"] == [[0, 10, 20]]
    the = decided(fleet, chord.group)
    assert the.owner.startswith("second" if point == "before deciding" else "first")
    assert body["headers"][headers.RUN] == the.body_run
    second.signal(signal.SIGTERM)
    second.wait_for("stopped")


@on_kafka_alone
@pytest.mark.parametrize("seen", [True, False])
def test_an_owner_killed_between_sending_and_fired(app, fleet, process, tmp_path, config, seen):
    """If the body left an event in the log, it is not sent again; else it is: same id, run and results."""
    chord = Chord(app, app.tasks["proj.xsum"].s())
    first = process("first", "after sending")
    fleet.append(chord.declared, chord.sized, *chord.parts())
    first.wait_for("after sending")
    first.signal(signal.SIGKILL)
    run = sent_bodies(tmp_path)[0]["headers"][headers.RUN]
    log = topics.task_events(config.topic_prefix)
    said = Event(id="e", kind="received", task=chord.body_id, at=1, hlc=1, run=run if seen else run - 1)
    partition = topics.chord_partition(chord.body_id, 4)
    fleet.producer.produce(log, codec.encode(said), chord.body_id.encode(), partition=partition)
    assert fleet.producer.flush(PATIENCE_S) == 0
    second = process("second")
    second.wait_for("not sent: its events are in the log" if seen else "after sending")
    (mark,) = until(lambda: fired(fleet, chord.group), "fired")
    assert mark.found is seen
    bodies = sent_bodies(tmp_path)
    assert len(bodies) == (1 if seen else 2)
    same = [(b["headers"]["id"], b["headers"][headers.RUN], b["args"]) for b in bodies]
    assert set(map(str, same)) == {str((chord.body_id, run, [[0, 10, 20]]))}


@on_kafka_alone
def test_an_owner_killed_between_a_request_and_its_end(app, fleet, process, tmp_path):
    """The next one carries it out, with what the first one decided."""
    chord = Chord(app, app.tasks["proj.xsum"].s())
    first = process("first", "before deciding")
    fleet.append(chord.declared, chord.sized, *chord.parts()[:2])
    asked = [records.Cancelled(**chord.here, id=f"c{n}", by="ann", reason="enough", fire=True) for n in range(2)]
    fleet.append(*asked)
    first.wait_for("before deciding")
    first.signal(signal.SIGKILL)
    second = process("second", "after sending again")
    second.wait_for("after sending")
    until(lambda: fired(fleet, chord.group), "fired")
    assert [body["args"] for body in sent_bodies(tmp_path)] == [[[0, 10]]]
    assert decided(fleet, chord.group).why == "fired by ann with 2 of 3 members in: enough"
    events_of_members(fleet, chord, 2)
    fleet.append(records.Resent(**chord.here, id="r", by="ann", reason="lost"))
    second.wait_for("after sending again")
    second.signal(signal.SIGKILL)
    third = process("third")
    third.wait_for("sent again")
    done = until(lambda: [one for one in fleet.left(chord.group) if getattr(one, "done", 0)], "done")
    assert [(one.id, one.outcome, one.reason) for one in done] == [("r", "success", "lost")]
    bodies = sent_bodies(tmp_path)
    assert len(bodies) == 3
    assert len({str((b["headers"]["id"], b["args"])) for b in bodies}) == 1
    first_run, *again = (body["headers"][headers.RUN] for body in bodies)
    assert again == [done[0].run] * 2
    assert done[0].run > first_run


def events_of_members(fleet, chord, count):
    """What the members' workers said in the log of the tasks."""
    log = topics.task_events(fleet.config.topic_prefix)
    for n in range(count):
        part = chord.part(n)
        document = json.dumps({"status": "SUCCESS", "result": n * 10, "traceback": None, "children": []}).encode()
        said = Event(
            id=part.id, kind="success", task=part.task, at=1, hlc=1, key=1, state="SUCCESS", doc=msgspec.Raw(document)
        )
        partition = topics.chord_partition(part.task, 4)
        fleet.producer.produce(log, codec.encode(said), part.task.encode(), partition=partition)
    assert fleet.producer.flush(PATIENCE_S) == 0


@on_kafka_alone
def test_a_deadline_survives_its_owner(app, fleet, process):
    chord = Chord(app, app.tasks["proj.xsum"].s(), deadline=int(time.time() * 1000) + 3000)
    first = process("first")
    fleet.append(chord.declared, chord.sized, chord.parts()[0])
    first.wait_for("running")
    first.signal(signal.SIGKILL)
    process("second")
    until(lambda: fired(fleet, chord.group), "fired")
    result = app.backend.get_task_meta(chord.body_id, cache=False)
    assert str(result["result"]) == f"Chord {chord.group} was ended by its deadline with 1 of 3 members in"
    late = chord.parts()[1]
    fleet.append(late)
    until(lambda: records.key_of(late) not in map(records.key_of, fleet.left(chord.group)), "the late part is gone")


@on_kafka_alone
@pytest.mark.parametrize(("point", "sent"), [("before reading", 1), ("before sending", 2)])
def test_a_zombie_that_wakes_up(app, fleet, process, tmp_path, point, sent):
    """It notices that the body was sent, unless it sleeps in the very moment before it sends: then the same again."""
    chord = Chord(app, app.tasks["proj.xsum"].s())
    zombie = process("zombie", point)
    fleet.append(chord.declared, chord.sized, *chord.parts())
    zombie.wait_for(point)
    zombie.signal(signal.SIGSTOP)
    second = process("second")
    second.wait_for("after sending")
    until(lambda: fired(fleet, chord.group), "fired")
    time.sleep(1)
    Path(tmp_path, "release").touch()
    zombie.signal(signal.SIGCONT)
    zombie.wait_for("after sending" if sent == 2 else f"released at {point}")
    time.sleep(2)
    bodies = sent_bodies(tmp_path)
    assert len(bodies) == sent
    assert len({str((b["headers"]["id"], b["headers"][headers.RUN], b["args"])) for b in bodies}) == 1
    until(lambda: kinds(fleet, chord) == ["Decided", "Declared", "Fired"], "clean")


def test_kafkas_own_partitioner_puts_an_event_where_we_look_for_it(config):
    """`topics.chord_partition` is also where librdkafka puts a record with that key."""
    producer = __import__("confluent_kafka").Producer(kafka.producer_config(config))
    log = topics.task_events(config.topic_prefix)
    seen = {}
    for n in range(50):
        producer.produce(
            log, b"{}", f"task-{n}".encode(), on_delivery=lambda _, m: seen.update({m.key(): m.partition()})
        )
    producer.flush(PATIENCE_S)
    assert seen == {f"task-{n}".encode(): topics.chord_partition(f"task-{n}", 4) for n in range(50)}
