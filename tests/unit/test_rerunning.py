"""Which tasks are run again, by which message, and what of a message is kept at all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from celery import Celery
from kombu.serialization import loads

from celery_kafka_backend import codec, events, order
from celery_kafka_backend.events import Event, Imported, Parcel
from celery_kafka_backend.order import Rank
from celery_kafka_backend.producer.parcels import packed
from celery_kafka_backend.query import Query
from celery_kafka_backend.rerunning import candidate, message_of, next_run

NOON = 1_795_000_000_000
RUN = order.run_at(NOON)
OURS = ("run", "hlc", "at", "task")
PARCEL = Parcel(
    b"[[1], {}, {}]", "application/json", "utf-8", {"id": "t", "task": "a.b", "retries": 0}, {"priority": 3}
)
GOLDEN = Path(__file__).parent.parent / "golden" / "events-v1-rerun.jsonl"
RANKS = {events.FAILURE: Rank.FAILED, events.SUCCESS: Rank.SUCCEEDED, events.STARTED: Rank.UNREADY}


def event(kind, at, *, run=RUN, **more):
    key = order.order_key(RANKS[kind], NOON + at, run) if kind in RANKS else 0
    more = {"state": kind.upper()} | more if kind in RANKS else more
    return Event(
        id=f"{kind} {at}", kind=kind, task="t", name="a.b", at=NOON + at, hlc=NOON + at, run=run, key=key, **more
    )


def sent(at=0, *, parcel=PARCEL, **more):
    return event(events.SENT, at, role=events.CLIENT, parcel=parcel, sent_at=NOON + at, queue="q", **more)


FAILED = [sent(), event(events.STARTED, 10), event(events.FAILURE, 20)]
AGAIN = event(events.RERUN, 60_000, run=RUN + 9, role=events.OPERATOR, by="ann", message="why")
BY_FAILURE = Query(states=("FAILURE",))


def test_what_came_within_the_version_is_written_as_its_golden_file_has_it():
    lines = GOLDEN.read_bytes().splitlines()
    for line, told in zip(lines, (FAILED[0], AGAIN, sent(parcel=Parcel(why_not="too big"))), strict=True):
        assert codec.encode(told) == line
        assert codec.decode(line) == told


def test_a_task_is_meant_as_it_is_now():
    assert candidate(FAILED, BY_FAILURE).sent == FAILED[0]
    later = [sent(70_000, run=RUN + 9), event(events.SUCCESS, 80_000, run=RUN + 9)]
    assert candidate([*FAILED, *later], BY_FAILURE) is None
    assert candidate([*FAILED, AGAIN, later[0]], BY_FAILURE) is None
    assert candidate(FAILED[:2], Query(name="a.*")) is None
    assert candidate(FAILED[:2], Query(name="a.*", states=("STARTED",))).said == FAILED[1]
    assert candidate([*FAILED, event(events.FORGOTTEN, 30)], Query(name="a.b")) is not None
    gone = msgspec.structs.replace(event(events.FORGOTTEN, 30), key=order.forget_key(RUN))
    assert candidate([*FAILED, gone], Query(name="a.b")) is None
    assert candidate([], Query()) is None


def test_what_was_announced_and_not_sent_is_sent_as_the_same_run():
    found = candidate([*FAILED, AGAIN], BY_FAILURE)
    assert (found.run, found.announced_at, found.sent) == (RUN + 9, NOON + 60_000, FAILED[0])
    twice = event(events.RERUN, 90_000, run=RUN + 9, role=events.OPERATOR)
    assert candidate([*FAILED, AGAIN, twice], BY_FAILURE).announced_at == NOON + 90_000


def test_the_message_is_the_first_attempts_of_the_latest_run():
    retried = sent(15, attempt=1, parcel=Parcel(b"other"))
    assert candidate([FAILED[2], retried, *FAILED[:2]], BY_FAILURE).sent == FAILED[0]
    newer = [sent(100_000, run=RUN + 12), event(events.FAILURE, 100_010, run=RUN + 12)]
    assert candidate([*FAILED, *newer], BY_FAILURE).sent == newer[0]


def test_a_task_without_a_message_says_why():
    assert "not in the log" in candidate(FAILED[1:], BY_FAILURE).why_not
    assert "record_messages" in candidate([sent(parcel=None), FAILED[2]], BY_FAILURE).why_not
    assert "too big" in candidate([sent(parcel=Parcel(why_not="too big")), FAILED[2]], BY_FAILURE).why_not
    past = msgspec.structs.replace(FAILED[2], imported=Imported("redis://there", NOON, "ann"))
    assert candidate([past], BY_FAILURE) is None


def test_a_message_begins_anew():
    old = sent(eta=NOON + 5_000, message_expires=NOON + 60_000, routing_key="q")
    headers = {**PARCEL.headers, "retries": 2, "eta": "then", "expires": "soon", "run": 1}
    old = msgspec.structs.replace(old, parcel=msgspec.structs.replace(PARCEL, headers=headers))
    now = NOON + 3_600_000
    found = message_of(old, RUN + 450, now + 7, now, OURS)
    assert (found.exchange, found.routing_key, found.parcel.body) == ("", "q", PARCEL.body)
    assert found.headers == {
        "id": "t", "task": "t", "retries": 0, "eta": None, "expires": "2026-11-18T12:07:40+00:00",
        "run": RUN + 450, "hlc": now + 7, "at": now,
    }  # fmt: skip
    early = message_of(old, RUN, NOON + 1, NOON + 1, OURS)
    assert early.headers["eta"] == "then"


def test_a_run_is_above_all_that_were():
    assert next_run(FAILED, NOON) == RUN + 1
    assert next_run(FAILED, NOON + 3_600_000) == order.run_at(NOON + 3_600_000)


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_a_message_is_kept_as_its_tasks_serializer_writes_it(serializer):
    body = ((1, "ü"), {"k": None}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
    found = packed(recorder(serializer=serializer), {"task": "a.b", "id": "t"}, body, {"priority": 3})
    assert found.properties == {"priority": 3}
    value = loads(
        found.body,
        found.content_type,
        found.content_encoding,
        accept={"application/json", "application/x-python-serialize"},
    )
    assert [list(value[0]), value[1]] == [[1, "ü"], {"k": None}]
    told = sent(parcel=found)
    assert codec.decode(codec.encode(told)) == told


def recorder(redacted=None, serializer="json", most=1_000):
    app = Celery("kept", broker="memory://", set_as_current=False)

    @app.task(name="a.b", serializer=serializer, shared=False)
    def task():
        """Do nothing."""

    settings = SimpleNamespace(record_messages_bytes=most, redact="x" if redacted else "")
    return SimpleNamespace(app=app, settings=settings, redacted=redacted)


def signature(name, args, **options):
    return {"task": name, "args": args, "kwargs": {}, "options": options, "subtask_type": None}


@pytest.mark.parametrize(
    "embed",
    [
        {"callbacks": [signature("secret", [1])]},
        {"chain": [signature("open", [1], link=[signature("secret", [2])])]},
        {"errbacks": [{**signature("celery.group", []), "kwargs": {"tasks": [signature("secret", [3])]}}]},
    ],
)
def test_what_redaction_touches_is_not_kept_wherever_it_is(embed):
    def redacted(name, args, kwargs):
        return ("…", "…") if name == "secret" else (args, kwargs)

    assert packed(recorder(redacted), {"task": "open"}, ((1,), {}, {}), {}).body
    assert "redact" in packed(recorder(redacted), {"task": "secret"}, ((1,), {}, {}), {}).why_not
    found = packed(recorder(redacted), {"task": "open"}, ((1,), {}, embed), {})
    assert (found.body, found.headers) == (b"", {})
    assert "redact" in found.why_not


def test_what_is_too_large_or_cannot_be_said_or_would_count_twice_is_not_kept():
    plain = ((1,), {}, {})
    assert "record_messages_bytes = 5" in packed(recorder(most=5), {"task": "a.b"}, plain, {}).why_not
    assert "cannot say" in packed(recorder(), {"task": "a.b"}, ((object(),), {}, {}), {}).why_not
    counted = packed(recorder(), {"task": "a.b"}, ((1,), {}, {"chord": signature("body", [])}), {})
    assert "count twice" in counted.why_not
    ours = signature("body", [], ckb_generation=5)
    assert packed(recorder(), {"task": "a.b"}, ((1,), {}, {"chord": ours}), {}).body
    assert "first protocol" in packed(recorder(), {"task": "a.b"}, {"args": []}, {}).why_not
