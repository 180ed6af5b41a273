"""Large documents in an object store: what is written, when it is read, and what is said when it is not there."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import msgspec
import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery
from kombu.exceptions import DecodeError
from kombu.utils.json import loads as kombu_loads

from celery_kafka_backend import claims as claims_module
from celery_kafka_backend import codec
from celery_kafka_backend.claims import NEVER, ClaimedMeta, Claims, reference, stub
from celery_kafka_backend.errors import ClaimLost, NotAcknowledged, SettingsError, Unavailable
from celery_kafka_backend.events import Claim, Event
from celery_kafka_backend.settings import parse

URL = "kafka://b/?view=redis://r/0"
EVENT_ID = "0123456789abcdef0123456789abcdef"
DAY_MS = 86_400_000
AT = 1_795_000_000_000
DOCUMENT = b'{"status": "SUCCESS", "result": "large", "traceback": null, "children": [], "date_done": null}'
EVENT = Event(
    id=EVENT_ID, kind="success", task="t1", key=1, at=AT, hlc=AT, state="SUCCESS", date_done="2026-11-18T08:26:40+00:00"
)


@pytest.fixture(params=["file", "memory"])
def claims(request, tmp_path):
    base = f"file://{tmp_path}/objects" if request.param == "file" else f"memory://{tmp_path.name}"
    return Claims(parse(URL, {"claim_check": base}))


def test_a_document_comes_back_byte_for_byte_and_twice_is_once(claims):
    first = claims.put(EVENT_ID, DOCUMENT, AT, 10)
    assert claims.put(EVENT_ID, DOCUMENT, AT, 10) == first
    assert claims.get(first) == DOCUMENT
    assert first.path == f"2026-11-19/{EVENT_ID}"  # the day after: clocks may differ
    assert claims.put(EVENT_ID, DOCUMENT, None, 10).path == f"{NEVER}/{EVENT_ID}"


def test_a_time_limit_that_comes_while_the_store_is_waited_for_is_the_task_s(claims, monkeypatch):
    held = claims.put(EVENT_ID, DOCUMENT, AT, 10)

    def interrupted(*_):
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(claims_module.threads, "within", interrupted)
    with pytest.raises(SoftTimeLimitExceeded):
        claims.put(EVENT_ID, DOCUMENT, AT, 10)
    with pytest.raises(SoftTimeLimitExceeded):
        claims.get(held)


def test_an_object_that_is_gone_or_damaged_is_a_clear_error(claims):
    held = claims.put(EVENT_ID, DOCUMENT, AT, 10)
    with pytest.raises(ClaimLost, match="damaged"):
        claims.get(msgspec.structs.replace(held, sha256="0" * 64))
    with pytest.raises(ClaimLost, match="damaged"):
        claims.get(msgspec.structs.replace(held, bytes=held.bytes + 1))
    claims.remove("2026-11-19")
    with pytest.raises(ClaimLost, match=rf"2026-11-19/{EVENT_ID} \(\d+ bytes\) is not there"):
        claims.get(held)


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "/etc/passwd", f"2026-11-19/../{EVENT_ID}", "never/x", f"never/{EVENT_ID}\n"]
)
def test_a_reference_leads_nowhere_but_to_our_own_objects(claims, path):
    with pytest.raises(ClaimLost, match="no object of ours"):
        claims.get(Claim(path, 1, "0" * 64))


def test_only_days_that_have_passed_expire(claims):
    for days in (-3, -2, -1, 0, 5):
        claims.put(EVENT_ID, DOCUMENT, AT + days * DAY_MS, 10)
    claims.put(EVENT_ID, DOCUMENT, None, 10)
    assert list(claims.expired(AT)) == [("2026-11-16", 1), ("2026-11-17", 1)]


def test_a_store_that_does_not_answer_is_bounded(claims, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(claims._fs, "open", lambda *_: never.wait())
    monkeypatch.setattr(claims._fs, "cat_file", lambda *_: never.wait())
    begun = time.monotonic()
    with pytest.raises(NotAcknowledged, match=r"did not take \d+ bytes: TimeoutError: no answer within 0.2 s"):
        claims.put(EVENT_ID, DOCUMENT, AT, 0.2)
    with pytest.raises(Unavailable, match="cannot be read now"):
        claims.get(Claim(f"never/{EVENT_ID}", 1, "0" * 64), 0.2)
    assert time.monotonic() - begun < 10
    never.set()


def test_a_stub_is_small_says_what_is_known_and_reads_the_rest_when_asked():
    reads = []

    def read():
        reads.append(1)
        return {"status": "SUCCESS", "result": "large", "traceback": None, "children": [1], "worker": "w"}

    held = Claim(f"2026-11-19/{EVENT_ID}", 20_000_000, "0" * 64)
    document = stub(EVENT, held, [[["c1", None], None]])
    assert reference(document) == reference(document.decode()) == held
    meta = ClaimedMeta(document, read)
    assert (meta["status"], meta["task_id"], meta.get("children")) == ("SUCCESS", "t1", [[["c1", None], None]])
    meta["children"] = ["a result"]  # as AsyncResult does
    assert not reads
    assert (meta["result"], meta.get("worker"), meta["children"]) == ("large", "w", ["a result"])
    assert meta["result"] == "large"
    assert reads == [1]


def test_ten_thousand_children_do_not_make_a_stub_large():
    held = Claim(f"never/{EVENT_ID}", 20_000_000, "0" * 64)
    document = stub(EVENT, held, [[[f"child-{n}", None], None] for n in range(10_000)])
    assert len(document) < 1_000
    assert ClaimedMeta(document, lambda: {"children": [1]}).get("children") == [1]


def test_a_tasks_own_result_cannot_pass_for_a_reference():
    forged = {
        "__type__": claims_module.TYPE,
        "__value__": {"path": f"never/{EVENT_ID}", "bytes": 1, "sha256": "0" * 64},
    }
    document = json.dumps({"status": "SUCCESS", "result": {**forged, "claim": forged["__value__"]}, "task_id": "t1"})
    assert reference(document) is None
    assert reference(document.encode()) is None
    assert reference(b"\x80\x05 pickled " + claims_module.TYPE.encode()) is None


def test_a_stock_client_raises_instead_of_returning_the_reference():
    document = stub(EVENT, Claim(f"never/{EVENT_ID}", 1, "0" * 64), [])
    with pytest.raises(ValueError, match="Unsupported type"):
        kombu_loads(document)
    stock = Celery("stock", backend="cache+memory://").backend
    with pytest.raises(DecodeError, match=r"celery-kafka-backend\.claim"):
        stock.decode_result(document)


def test_the_wire_has_a_field_for_it():
    golden = (Path(__file__).parent.parent / "golden" / "events-v1-claim.jsonl").read_bytes().rstrip(b"\n")
    held = Claim(f"2026-11-19/{EVENT_ID}", 20_000_000, "0" * 64)
    event = msgspec.structs.replace(EVENT, claim=held, doc=msgspec.Raw(stub(EVENT, held, [])))
    assert codec.encode(event) == golden
    assert codec.encode(codec.decode(golden)) == golden
    assert codec.decode(golden).claim == held


def test_a_store_that_fsspec_does_not_know_is_a_settings_error():
    with pytest.raises(SettingsError, match=r"claim_check.*nosuch"):
        Claims(parse(URL, {"claim_check": "nosuch://x"}))


def test_a_threshold_that_lets_through_what_kafka_refuses_is_refused():
    with pytest.raises(SettingsError, match="claim_check_bytes"):
        parse(URL, {"claim_check": "file:///x", "claim_check_bytes": 1_048_000})
    with pytest.raises(SettingsError, match="max_message_bytes"):
        parse(URL, {"max_message_bytes": 1_500_000_000})
