"""What a request says, and which run a message gets. Records are caught at the producer's handle."""

from __future__ import annotations

import os
from signal import alarm

import pytest
from celery import Celery
from celery._state import _task_stack
from celery.app.task import Context
from celery.beat import Scheduler
from celery.signals import after_task_publish, before_task_publish
from kombu import Exchange, Queue

from celery_kafka_backend import codec, events, order
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.producer import headers as names
from celery_kafka_backend.producer import recorder as recorder_module
from celery_kafka_backend.producer import signals
from celery_kafka_backend.producer.publisher import Publisher
from celery_kafka_backend.producer.recorder import Recorder, about, held_ids, millis

NOW = 1_790_000_000_000


class Handle:
    """A producer handle that keeps what it is given."""

    def __init__(self, _config):
        self.records = []

    def produce(self, topic, value=None, key=None, headers=None, partition=-1, on_delivery=None):
        self.records.append((topic, key, value, headers))

    def poll(self, timeout):
        import time  # noqa: PLC0415

        time.sleep(min(timeout, 0.05))

    def flush(self, _timeout):
        return 0

    def __len__(self):
        return 0


@pytest.fixture
def wall():
    return [NOW]


@pytest.fixture
def make(wall, monkeypatch):
    def made(conf=None, **given):
        app = Celery("recorded", broker="memory://", set_as_current=False)
        app.conf.update(conf or {})
        settings = settings_module.parse("kafka://127.0.0.1:9/?view=memory://x", given)
        recorder = Recorder(app, settings, Publisher(settings, make=Handle), order.Clock(lambda: wall[0]))
        monkeypatch.setattr(recorder_module, "_recorders", {1: recorder})
        return recorder

    return made


def published(recorder):
    recorder.publisher.flush(1)
    return [codec.decode(value) for _, _, value, _ in recorder.publisher._producer.records]


def message(task_id="t1", **more):
    return {"id": task_id, "task": "proj.add", "retries": 0, "root_id": task_id, "parent_id": None, **more}


def running(app, task_id, **request):
    task = app.tasks["celery.backend_cleanup"]
    task.push_request(id=task_id, **request)
    _task_stack.push(task)
    return task


def test_a_publication_starts_a_run_of_the_wall_clock_and_is_sent(make):
    recorder = make()
    headers = message()
    signals.before_publish(headers=headers, body=((1,), {}, {}))
    assert headers[names.RUN] == order.run_at(NOW)
    assert headers[names.HLC] >= NOW
    signals.after_publish(headers=headers, body=((1,), {}, {}), exchange="", routing_key="celery")
    (sent,) = published(recorder)
    assert (sent.kind, sent.task, sent.run, sent.queue, sent.key) == (events.SENT, "t1", order.run_at(NOW), "celery", 0)
    assert sent.args is None


def test_what_is_sent_tells_its_queue_and_priority_as_the_caller_chose_them(make):
    recorder = make()
    headers, queue = message(), Queue("prices", Exchange("shop", type="topic"), routing_key="shop.prices")
    body = ((), {}, {})
    signals.before_publish(headers=headers, body=body, properties={"priority": 7}, declare=[queue])
    signals.after_publish(headers=headers, body=body, exchange=queue.exchange, routing_key=queue.routing_key)
    (sent,) = published(recorder)
    assert (sent.queue, sent.exchange, sent.routing_key, sent.priority) == ("prices", "shop", "shop.prices", 7)


def test_what_beat_sends_tells_the_schedules_entry_and_so_do_its_retries_but_not_its_children(make, monkeypatch):
    for signal in (before_task_publish, after_task_publish):
        monkeypatch.setattr(signal, "receivers", [])  # any backend of this process has connected ours already
    recorder = make()
    app = recorder.app
    app.conf.beat_schedule = {"every-hour": {"task": "celery.backend_cleanup", "schedule": 3600.0}}
    found = []

    def publish(headers=None, **more):
        found.append(headers)
        signals.before_publish(headers=headers, **more)
        signals.after_publish(headers=headers, **more)

    before_task_publish.connect(publish)
    scheduler = Scheduler(app=app)
    scheduler.apply_async(scheduler.schedule["every-hour"])
    (headers,) = found
    retry, child = message(headers["id"], retries=1), message("child")
    task = running(app, headers["id"], **{names.BEAT: headers[names.BEAT]})
    try:
        publish(retry, body=((), {}, {}))
        publish(child, body=((), {}, {}))
    finally:
        _task_stack.pop()
        task.pop_request()
    publish(message("in-a-database"), body=((), {}, {}), properties={names.BEAT: "every-day"})
    assert [event.beat for event in published(recorder)] == ["every-hour", "every-hour", None, "every-day"]


def test_arguments_are_recorded_only_with_result_extended_and_redacted(make):
    recorder = make({"result_extended": True}, redact="all")
    headers = message()
    body = (("secret",), {}, {})
    signals.before_publish(headers=headers, body=body)
    signals.after_publish(headers=headers, body=body, exchange="", routing_key="celery")
    assert published(recorder)[0].args == "…"


def test_a_retry_keeps_its_run_and_takes_its_moment_before_the_successor(make, wall):
    recorder = make()
    old = order.run_at(NOW) - 100
    task = running(recorder.app, "t1", **{names.RUN: old, names.TASK: "t1"})
    try:
        headers = message(retries=1, eta="2026-09-21T14:13:30+00:00")
        signals.before_publish(headers=headers, body=((), {}, {}))
        assert headers[names.RUN] == old
        taken = recorder.taken_hlc("t1")
        assert taken < headers[names.HLC]
        assert recorder.taken_due("t1") == millis("2026-09-21T14:13:30+00:00")
        assert recorder.taken_hlc("t1") is None
    finally:
        _task_stack.pop()
        task.pop_request()


def test_a_successor_whose_id_the_message_holds_inherits_and_another_child_does_not(make):
    recorder = make()
    old = order.run_at(NOW) - 100
    held = {"task": "proj.next", "options": {"task_id": "next"}, "kwargs": {}}
    task = running(recorder.app, "t1", **{names.RUN: old, names.TASK: "t1", "chain": [held]})
    try:
        successor, child = message("next"), message("child")
        signals.before_publish(headers=successor, body=((), {}, {}))
        signals.before_publish(headers=child, body=((), {}, {}))
        assert successor[names.RUN] == old
        assert child[names.RUN] == order.run_at(NOW)
    finally:
        _task_stack.pop()
        task.pop_request()


def test_headers_forwarded_to_another_task_do_not_pass_the_run_on(make):
    make()
    forwarded = message("other", **{names.RUN: 5, names.TASK: "t1"})
    signals.before_publish(headers=forwarded, body=((), {}, {}))
    assert forwarded[names.RUN] == order.run_at(NOW)


def test_an_explicit_run_is_kept(make):
    make()
    headers = message("body", **{names.RUN: order.run_at(NOW) - 7})
    signals.before_publish(headers=headers, body=((), {}, {}))
    assert headers[names.RUN] == order.run_at(NOW) - 7


def test_forgotten_and_published_again_at_once_is_a_later_run(make):
    recorder = make()
    run = order.run_at(NOW)
    recorder.forgotten.keep("t1", run)
    headers = message()
    signals.before_publish(headers=headers, body=((), {}, {}))
    assert headers[names.RUN] == run + 1
    assert headers[names.HLC] >= order.run_start_ms(run + 1)


def test_an_update_of_another_task_is_not_given_the_caller_s_run(make):
    recorder = make()
    who = recorder.identity("other", order.Rank.UNREADY, Context(id="t1", **{names.RUN: 5}))
    assert who.run is None


def test_a_publisher_at_2099_counts_as_an_unknown_run(make):
    recorder = make()
    far = order.run_at(NOW + 70 * 365 * 86_400_000)
    who = recorder.identity("t1", order.Rank.SUCCEEDED, Context(id="t1", **{names.RUN: far, names.HLC: NOW * 2}))
    assert who.run is None
    assert who.hlc <= NOW + 10


def test_a_chord_s_body_becomes_a_stub_that_is_still_a_signature(make):
    recorder = make()
    body = {
        "task": "proj.sum",
        "args": ["x" * 1000],
        "kwargs": {},
        "options": {"task_id": "b", names.GENERATION: 7},
        "immutable": True,
    }
    embed = {"chord": body}
    signals.before_publish(headers=message(), body=((), {}, embed))
    stub = recorder.app.signature(embed["chord"])
    assert stub.task == "proj.sum"
    assert stub.options == {"task_id": "b", names.GENERATION: 7}
    assert not stub.args
    assert stub.immutable
    assert body["args"], "the caller's own signature is left alone"


@pytest.mark.parametrize(
    ("given", "name", "task_id", "wanted"),
    [
        ({}, "proj.add", "t1", True),
        ({"record": ["success"]}, "proj.add", "t1", False),
        ({"exclude": ["proj.*"]}, "proj.add", "t1", False),
        ({"sample": {"proj.add": 0.0}}, "proj.add", "t1", False),
        ({"sample": {"proj.add": 1.0}}, "proj.add", "t1", True),
        ({"sample": {"proj.other": 0.0}}, "proj.add", "t1", True),
    ],
)
def test_which_events_are_recorded(make, given, name, task_id, wanted):
    assert make(**given).wants(events.SENT, task_id, name) is wanted


def test_sampling_is_by_task_and_close_to_its_share(make):
    recorder = make(sample={"proj.add": 0.25})
    chosen = [recorder.wants(events.SENT, f"task {i}", "proj.add") for i in range(4000)]
    assert 0.2 < sum(chosen) / len(chosen) < 0.3
    assert recorder.wants(events.SENT, "task 1", "proj.add") == recorder.wants(events.STARTED, "task 1", "proj.add")


def test_what_a_request_says():
    found = about(
        Context(
            id="t1", task="proj.add", hostname="w@h", retries=2, delivery_info={"exchange": "", "routing_key": "q", "priority": 3},
            eta="2026-01-01T00:00:00Z", group="g", group_index=0, chord={"options": {"task_id": "b"}}, stamped_headers=["s"], stamps={"s": {"v"}},
        )
    )  # fmt: skip
    assert found["queue"] == "q"
    assert found["attempt"] == 2
    assert found["eta"] == 1_767_225_600_000
    assert found["chord"] == "b"
    assert found["index"] == 0
    assert found["stamps"] == {"s": ["v"]}


def test_a_request_with_nonsense_in_its_headers_still_gives_an_event(make):
    recorder = make()
    request = Context(
        id="t1", task=5, hostname=b"x", retries="many", delivery_info={"priority": "high"}, eta="never", root_id=["a"]
    )
    event = recorder.event(events.STARTED, "t1", recorder.identity("t1", None, request), request)
    assert codec.decode(codec.encode(event)).task == "t1"


def test_every_id_of_chain_link_and_nested_canvas_is_held():
    chord = {
        "task": "celery.chord", "subtask_type": "chord", "options": {},
        "kwargs": {
            "header": {"subtask_type": "group", "options": {"task_id": "g"}, "kwargs": {"tasks": [{"options": {"task_id": "m"}}]}},
            "body": {"task": "proj.sum", "options": {"task_id": "b", "link_error": [{"options": {"task_id": "e"}}]}},
        },
    }  # fmt: skip
    request = Context(
        id="t", chain=[{"options": {"task_id": "next"}}, chord], callbacks=[{"options": {"task_id": "link"}}]
    )
    assert set(held_ids(request)) == {"next", "g", "m", "b", "e", "link"}


def test_whatever_another_thread_held_in_the_moment_of_a_fork_the_child_goes_on(make):
    """Any server that sends tasks from threads and forks: gunicorn that replaces a worker, multiprocessing."""
    recorder = make()
    clock = recorder_module._clock
    with clock._lock, recorder_module._lock:
        child = os.fork()
        if child == 0:
            alarm(60)  # a child that is jammed is to end
            clock.tick()
            recorder_module.recorder_for(recorder.app, recorder.settings)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
