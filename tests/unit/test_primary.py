"""Which of several configured views a process reads, and how it goes from one to another."""

from __future__ import annotations

import secrets
import threading
import time
from types import SimpleNamespace

import pytest

from celery_kafka_backend import backend, primary, settings, topics
from celery_kafka_backend.changes import Batch, Partition
from celery_kafka_backend.cli import cutover
from celery_kafka_backend.pointer import Pointer, is_pointer, pointers, position
from celery_kafka_backend.primary import Gate, Primary, reader_of
from celery_kafka_backend.producer.publisher import Stored
from celery_kafka_backend.reader import Ear, Reader
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.registry import open_sink
from tests.contract.factories import batch, json_document, stated
from tests.patience import PATIENCE_S

NOBODY = "127.0.0.1:1"
LOG = Partition("celery.task-events", 0)


@pytest.fixture(autouse=True)
def look_every_time(monkeypatch):
    for name in ("LOOK_S", "AGAIN_S"):
        monkeypatch.setattr(primary, name, 0.0)


@pytest.fixture
def urls():
    return [f"memory://{secrets.token_hex(4)}" for _ in range(2)]


def configured(views):
    return settings.parse(f"kafka://{NOBODY}/", {"views": views})


def following(views):
    """Another process that reads these views."""
    found = Primary(configured(views), {url: StoreOptions() for url in views})
    return found, primary.FollowingReader(found, ())


def point(to, *, holders, at=1, forced=False):
    for url in holders:
        sink = open_sink(url, StoreOptions())
        sink.write(Batch([], positions=position("celery", Pointer(topics.view_name(to), at, forced))))


def folded(url, offset):
    open_sink(url, StoreOptions()).write(batch(positions={LOG: offset}))


def read_by(reader):
    reader.documents(["t"])
    return reader.view.url


def test_a_pointer_is_a_position_and_the_latest_comes_first():
    held = position("p", Pointer("a-1", 7)) | position("p", Pointer("b-2", 8, forced=True)) | {LOG: 99}
    held |= position("other", Pointer("c-3", 9))
    assert [at for at in held if not is_pointer(at)] == [LOG]
    assert pointers("p", held) == [Pointer("b-2", 8, forced=True), Pointer("a-1", 7)]


def test_one_configured_view_is_read_without_a_look():
    (url,) = views = [f"memory://{secrets.token_hex(4)}"]
    assert type(reader_of(configured(views), {url: StoreOptions()})) is Reader


def test_threads_of_a_process_read_the_same_view(urls):
    config, options = configured(urls), {url: StoreOptions() for url in urls}
    one, other = reader_of(config, options), reader_of(config, options)
    assert read_by(one) == read_by(other) == urls[0]
    point(urls[1], holders=urls, forced=True)
    assert read_by(one) == urls[1]
    assert other.view is one.view


def test_a_process_that_starts_later_goes_where_the_pointer_says(urls):
    point(urls[1], holders=urls)
    assert read_by(following(urls)[1]) == urls[1]
    assert read_by(following(urls[::-1])[1]) == urls[1], "its list has them the other way round"
    assert read_by(following(urls[:1])[1]) == urls[0], "it knows no other one"


def test_back_and_forth(urls):
    _, reader = following(urls)
    seen = [read_by(reader)]
    for at, to in enumerate((1, 0, 1, 1, 0), 1):
        point(urls[to], holders=urls, at=at, forced=True)
        seen.append(read_by(reader))
    assert seen == [urls[n] for n in (0, 1, 0, 1, 1, 0)]
    point(urls[1], holders=urls, at=3, forced=True)
    assert read_by(reader) == urls[0], "an older pointer that comes back with a store says nothing"


def test_a_view_that_shows_less_is_not_read_until_it_shows_as_much(urls, caplog):
    """Kafka is away here, so that positions are compared."""
    _, reader = following(urls)
    folded(urls[0], 5)
    assert read_by(reader) == urls[0]
    folded(urls[1], 4)
    point(urls[1], holders=urls)
    assert read_by(reader) == urls[0]
    assert "is behind what is shown here" in caplog.text
    folded(urls[1], 5)
    assert read_by(reader) == urls[1]


def test_a_forced_pointer_does_not_ask(urls):
    _, reader = following(urls)
    folded(urls[0], 5)
    assert read_by(reader) == urls[0]
    point(urls[1], holders=urls, forced=True)
    assert read_by(reader) == urls[1]


def test_a_view_that_is_not_configured_or_not_installed_is_said_once_and_not_read(urls, caplog):
    _, reader = following(urls)
    point("redis://elsewhere/0", holders=urls)
    assert [read_by(reader) for _ in range(3)] == [urls[0]] * 3
    (said,) = [one.message for one in caplog.records if "readers are to read" in one.message]
    assert "is none of kafka_backend_settings['views']" in said

    unknown = [urls[0], "nostore://x"]
    _, reader = following(unknown)
    assert read_by(reader) == urls[0]
    point(unknown[1], holders=urls[:1], at=2)
    assert read_by(reader) == urls[0]
    assert "nobody knows the scheme" in caplog.text


def test_the_first_view_is_lost_and_the_others_say_where_to_read(urls):
    lost = [f"redis://{NOBODY}/0", *urls]
    point(urls[1], holders=urls)
    assert read_by(following(lost)[1]) == urls[1]


def test_no_pointer_and_no_first_view_leave_the_configured_one(urls):
    found, _ = following([f"redis://{NOBODY}/0", *urls])
    with found.steady():
        assert found.view.url == f"redis://{NOBODY}/0"


def test_who_waits_in_the_old_view_is_answered_by_the_new_one(urls):
    _, reader = following(urls)
    ear = Ear(reader, poll_interval_s=0.05)
    assert ear.meet(["t", "there"]) == {}
    open_sink(urls[1], StoreOptions()).write(batch(stated("SUCCESS", 10, task="there")))
    point(urls[1], holders=urls, forced=True)
    heard = ear.hear(0.1)
    assert heard == {"there": json_document("there", "SUCCESS")}, "what is there already is met at once"
    open_sink(urls[1], StoreOptions()).write(batch(stated("SUCCESS", 10)))
    deadline = time.monotonic() + PATIENCE_S
    while "t" not in heard and time.monotonic() < deadline:
        heard = ear.hear(0.1)
    assert heard == {"t": json_document("t", "SUCCESS")}


def test_a_move_waits_for_reads_and_reads_wait_for_a_move():
    gate, order = Gate(), []
    reading, go_on, moving, moved = (threading.Event() for _ in range(4))

    def read():
        with gate.reading(), gate.reading():
            reading.set()
            go_on.wait(PATIENCE_S)
            order.append("read")

    def move():
        moving.set()
        with gate.moving(PATIENCE_S):
            order.append("moved")
            moved.wait(0.1)

    def read_late():
        with gate.reading():
            order.append("late")

    first, mover, late = (threading.Thread(target=each) for each in (read, move, read_late))
    first.start()
    assert reading.wait(PATIENCE_S)
    mover.start()
    assert moving.wait(PATIENCE_S)
    go_on.set()
    while "moved" not in order:
        time.sleep(0.001)
    late.start()
    for each in (first, mover, late):
        each.join(PATIENCE_S)
    assert order == ["read", "moved", "late"]


def test_a_read_that_hangs_does_not_hold_up_a_move_for_ever():
    gate, go_on = Gate(), threading.Event()

    def hang():
        with gate.reading():
            go_on.wait(PATIENCE_S)

    hanging = threading.Thread(target=hang)
    hanging.start()
    while not gate._reading:
        time.sleep(0.001)
    with gate.moving(0.05):
        assert hanging.is_alive()
    go_on.set()
    hanging.join(PATIENCE_S)


# -- what `status` and `cutover` say -----------------------------------------------------------


def standing(*held):
    config = configured(["redis://a/0", "redis://b/0", "redis://c/0"])
    names = [topics.view_name(url) for url in config.views]
    pointing = [None if one is None else [Pointer(names[n], at) for n, at in one] for one in held]
    return names, cutover.standing(config, dict(zip(names, pointing, strict=True)))


def test_without_a_pointer_readers_read_the_first_view():
    (a, *_), found = standing([], None, [])
    assert (found.view, found.since, found.before, found.outdated) == (a, None, None, [])


def test_the_latest_pointer_counts_and_older_copies_are_named():
    (a, b, c), found = standing([(1, 5)], [(0, 9), (1, 5)], None)
    assert (found.view, found.since, found.before, found.outdated) == (a, 9, b, [a])
    assert found.copies == {a: b, b: a, c: None}


def test_before_the_first_cut_over_readers_read_the_first_view():
    (a, b, c), found = standing([(1, 5)], [(1, 5)], [])
    assert (found.view, found.before, found.outdated) == (b, a, [c])


def test_the_warning_that_nobody_folds_names_the_view_that_is_read(urls, monkeypatch, caplog):
    _, reader = following(urls)
    point(urls[1], holders=urls)
    assert read_by(reader) == urls[1]
    monkeypatch.setattr(backend, "IDLE_AFTER_S", 0.0)
    publisher = SimpleNamespace(latest=Stored(LOG, 7))
    recorder = SimpleNamespace(publisher=publisher, settings=configured(urls), app_name="shop")
    backend._watch(SimpleNamespace(recorder=recorder, reader=reader))
    assert f"no processor folds results into {urls[1]}" in caplog.text
