"""What another store had, as an event: deterministic, whatever serializer wrote it, and nothing of it unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zlib
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import codec, documents, events, findings, order, timeline
from celery_kafka_backend.changes import GROUP, TASK
from celery_kafka_backend.cli.arrivals import Arriving, event_of
from celery_kafka_backend.cli.history_shown import cells
from celery_kafka_backend.errors import Unreadable
from celery_kafka_backend.events import Imported
from celery_kafka_backend.order import Rank
from celery_kafka_backend.sinks.contract import Stock
from tests.examples import tried_on

BEGAN = 1_795_000_000_000
DONE = "2026-10-01T08:00:00.123456+00:00"
DONE_MS = 1_790_841_600_123
HOW = Arriving(Imported("redis://there/1", BEGAN, "ann@desk"), 86_400_000)
GOLDEN = Path(__file__).parent.parent / "golden" / "events-v1-imported.jsonl"


def meta(state="SUCCESS", result=42, **more):
    """A document's fields, in Celery's order."""
    done = DONE if state in ("SUCCESS", "FAILURE", "REVOKED") else None
    found = {"status": state, "result": result, "traceback": None, "children": [], "date_done": done}
    return {**found, **more, "task_id": "t"}


def stock(document, **more):
    return Stock(TASK, "t", document if isinstance(document, bytes) else json.dumps(document).encode(), **more)


ENCODERS = {
    documents.JSON: lambda fields: json.dumps(fields).encode(),
    documents.PICKLE: lambda fields: pickle.dumps(fields, protocol=2),
    documents.MSGPACK: msgspec.msgpack.encode,
    documents.YAML: lambda fields: yaml.safe_dump(fields).encode(),
}
LOADERS = {
    documents.JSON: json.loads,
    documents.PICKLE: pickle.loads,
    documents.MSGPACK: msgspec.msgpack.decode,
    documents.YAML: yaml.safe_load,
}


def test_an_imported_event_is_written_as_its_golden_file_has_it():
    event = event_of(stock(meta(name="proj.add", args=[1], kwargs={}, worker="celery@w", retries=2, queue="q")), HOW)
    assert codec.encode(event) == GOLDEN.read_bytes().rstrip(b"\n")
    assert codec.encode(codec.decode(codec.encode(event))) == codec.encode(event)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("content_type", ENCODERS)
def test_a_document_is_copied_byte_for_byte_and_its_facts_are_known(content_type, compressed):
    fields = meta("FAILURE", {"exc_type": "ValueError", "exc_message": ["no"], "exc_module": "builtins"}, retries=2)
    fields |= {"name": "proj.add", "args": [1, "a"], "kwargs": {"b": 2}, "group_id": "g", "parent_id": "p"}
    document = ENCODERS[content_type](fields)
    if compressed:
        document = b"\x00celery-compressed\x00application/x-gzip\x00" + zlib.compress(document)
    event = event_of(stock(document), HOW)
    assert event.document == document
    assert (event.kind, event.state, event.exception, event.message) == (
        "failure",
        "FAILURE",
        "builtins.ValueError",
        "no",
    )
    assert (event.name, event.attempt, event.args, event.kwargs) == ("proj.add", 2, [1, "a"], {"b": 2})
    assert (event.group, event.parent, event.at, event.hlc) == ("g", "p", DONE_MS, DONE_MS)
    assert order.rank_of_key(event.key) is Rank.FAILED
    assert codec.decode(codec.encode(event)).document == document
    if event.opaque is not None:
        assert LOADERS[content_type](event.opaque.result) == fields["result"]
        assert LOADERS[content_type](event.opaque.args) == [1, "a"]
        assert event.opaque.plain["args"] == [1, "a"]


class _Armed:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def test_a_pickle_is_walked_through_and_nothing_in_it_happens(monkeypatch):
    armed = pickle.dumps(
        meta(result=[_Armed(), {1, 2}, Decimal(3), "".join], children=[(("c", None), None)]), protocol=2
    )
    called = []
    monkeypatch.setattr(os, "system", called.append)
    event = event_of(stock(armed), HOW)
    assert (event.state, event.document, called) == ("SUCCESS", armed, [])
    assert event.opaque.plain == {"children": [[["c", None], None]]}
    raised = event_of(stock(pickle.dumps(meta("FAILURE", ValueError("a", 7)), protocol=2)), HOW)
    assert (raised.exception, raised.message) == ("builtins.ValueError", "a 7")
    assert str(pickle.loads(raised.opaque.result)) == "('a', 7)"


@pytest.mark.parametrize(
    "document",
    [
        b"", b"{", b"[1]", b"null", b"junk", b"\xff\xfe", b"\x80\x02.", b"\x81\x01\x02", b'{"a": 1}',
        b'{"status": 1, "result": 2}', b"\x00celery-compressed\x00no/such\x00x",
        b"\x00celery-compressed\x00application/x-gzip\x00x",
    ],
)  # fmt: skip
def test_what_is_no_document_is_unreadable(document):
    with pytest.raises(Unreadable):
        event_of(stock(document), HOW)


@tried_on()
@given(st.binary(max_size=60))
def test_rubbish_is_unreadable_and_nothing_worse(document):
    with contextlib.suppress(Unreadable):
        event_of(stock(document), HOW)


def test_the_same_document_is_the_same_event_and_another_one_is_not():
    first = event_of(stock(meta()), HOW)
    assert codec.encode(event_of(stock(meta()), HOW)) == codec.encode(first)
    assert event_of(stock(meta(result=43)), HOW).id != first.id
    assert (first.host, first.pid, first.run) == ("", 0, None)


def test_an_expiry_is_taken_over_or_reckoned_from_when_it_was_done():
    assert event_of(stock(meta(), expires_at=BEGAN + 5), HOW).expires_at == BEGAN + 5
    assert event_of(stock(meta(), expires_at=0), HOW).expires_at is None
    assert event_of(stock(meta()), HOW).expires_at == DONE_MS + 86_400_000
    assert event_of(stock(meta("PROGRESS")), HOW).expires_at == BEGAN + 86_400_000
    assert event_of(stock(meta()), HOW._replace(kept_ms=0)).expires_at is None


def test_what_stands_beside_a_key_of_ours_is_ours_unless_it_is_further():
    ours = order.order_key(Rank.UNREADY, BEGAN, order.run_at(BEGAN))
    assert event_of(stock(meta("STARTED"), key=ours), HOW) is None
    assert event_of(stock(meta("SUCCESS"), key=ours), HOW).state == "SUCCESS"
    ended = order.order_key(Rank.SUCCEEDED, BEGAN, order.run_at(BEGAN))
    assert event_of(stock(meta("SUCCESS"), key=ended), HOW) is None


def test_arguments_that_are_to_be_redacted_are_not_taken_over():
    how = HOW._replace(redact=lambda _name, _args, _kwargs: ("…", "…"))
    secret = meta(name="proj.add", args=["secret"], kwargs={"k": "secret"})
    assert b"secret" not in codec.encode(event_of(stock(secret), how))
    with pytest.raises(Unreadable, match="redact"):
        event_of(stock(pickle.dumps(secret, protocol=2)), how)
    assert event_of(stock(pickle.dumps(meta(), protocol=2)), how).state == "SUCCESS"


@pytest.mark.parametrize("content_type", ENCODERS)
def test_a_group_is_taken_over(content_type):
    document = ENCODERS[content_type]({"result": [["g", None], [[["a", None], None], [["b", None], None]]]})
    event = event_of(Stock(GROUP, "g", document, expires_at=0), HOW)
    assert (event.kind, event.task, event.group, event.document) == (events.GROUP_SAVED, "g", "g", document)
    if event.opaque is not None:
        assert event.opaque.plain == {"children": [[["a", None], None], [["b", None], None]]}
    with pytest.raises(Unreadable, match="members"):
        event_of(Stock(GROUP, "g", ENCODERS[content_type]({"result": 5})), HOW)


times = st.integers(order.EPOCH_MS, 4_102_444_800_000)
live = st.integers(BEGAN - 5 * 365 * 86_400_000, 4_102_444_800_000)


@tried_on()
@given(st.sampled_from(Rank), times | st.none(), st.sampled_from(Rank), live, st.booleans())
def test_whatever_happens_here_is_above_whatever_is_imported(theirs, done, ours, hlc, known):
    key = order.imported_key(theirs, done)
    assert 0 < key < order.order_key(ours, hlc, order.run_at(hlc) if known else None)
    assert key < order.forget_key(None)
    assert order.rank_of_key(key) is theirs
    assert order.run_of_key(key) is None


@tried_on()
@given(times, times)
def test_of_imports_the_later_one_is_shown(a, b):
    first, second = sorted((a, b))
    assert (
        order.imported_key(Rank.SUCCEEDED, first) <= order.imported_key(Rank.FAILED, second) or second - first < 4_000
    )
    assert order.imported_key(Rank.UNREADY, None) < order.imported_key(Rank.FAILED, second + 10_000)


def test_history_says_where_it_comes_from_and_no_live_run_takes_it_in():
    past = event_of(stock(meta("FAILURE", {"exc_type": "E", "exc_message": ["x"]})), HOW)
    assert timeline.state([past]) == "failure"
    assert timeline.ended([past])
    run = order.run_at(BEGAN)
    started = events.Event(
        id="s",
        kind=events.STARTED,
        task="t",
        at=BEGAN,
        hlc=BEGAN,
        run=run,
        key=order.order_key(Rank.UNREADY, BEGAN, run),
    )
    assert timeline.state(timeline.causal([started, past])) == "started"
    assert [found.number for found in timeline.runs([started, past])] == [None, run]
    tally = timeline.Tally()
    for event in (past, started):
        tally.take(event)
    assert dict(tally.counts()) == {("", "started"): 1}
    assert "imported from redis://there/1 at 2026" in cells(past)[-1]
    assert cells(past)[-1].endswith("by ann@desk")


def test_an_import_is_no_finding():
    tasks, clocks = findings.Tasks(), findings.Clocks()
    past = event_of(stock(meta("STARTED")), HOW)
    tasks.take(past)
    clocks.take(past, BEGAN + 10**9)
    assert [*tasks.findings(BEGAN + 10**9, 1_000, 1_000), *clocks.findings()] == []
