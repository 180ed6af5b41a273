"""Celery's own columns are held against the event that is shown; without it, against what its document says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery_kafka_backend.events import Opaque
from celery_kafka_backend.sinks.native_columns import wrong
from tests.contract.factories import logged, stated

if TYPE_CHECKING:
    from celery_kafka_backend.events import Event

SHOWN = stated("STARTED", 10, worker="celery@a")
DOCUMENT = SHOWN.document or b""


def said(event: Event, document: bytes) -> dict[str, Any]:
    """A store that keeps a state, and times and ids that no document has."""
    del document
    return {"status": event.state, "at": event.at, "group": event.group}


def found(*recorded: Event, document: bytes = DOCUMENT, **columns: Any) -> dict[str, Any]:
    values = [logged(event).value for event in recorded]
    right = {"status": "STARTED", "at": SHOWN.at, "group": None}
    return wrong({**right, **columns}, said, document, SHOWN.id, lambda: values)


def test_the_shown_event_says_each_column() -> None:
    other = stated("SUCCESS", 20)
    assert found(other, SHOWN) == {}
    assert found(other, SHOWN, at=7) == {"native.at": f"7, not {SHOWN.at}"}
    assert found(SHOWN, status=None, group="g") == {
        "native.group": "'g', not None",
        "native.status": "None, not 'STARTED'",
    }


def test_a_column_of_another_type_is_wrong() -> None:
    assert list(found(SHOWN, at=float(SHOWN.at))) == ["native.at"]


def test_without_the_event_only_what_the_document_says_is_known() -> None:
    assert found(status="LOST", at=7, group="g") == {"native.status": "'LOST', not 'STARTED'"}
    assert found(at=7) == {}


def test_without_the_event_a_document_that_is_not_json_says_nothing() -> None:
    assert found(document=b"\x80\x02}.", status="LOST") == {}
    pickled = stated("STARTED", 10, id=SHOWN.id, opaque=Opaque(meta=b"\x80\x02}."))
    assert list(found(pickled, document=b"\x80\x02}.", status="LOST")) == ["native.status"]


def test_of_events_with_one_order_key_a_store_may_mix_columns() -> None:
    rival = stated("STARTED", 10, name="rival", group="h")
    values = [logged(event).value for event in (SHOWN, rival)]
    mix = {"status": "STARTED", "at": SHOWN.at, "group": "h"}
    assert wrong(mix, said, DOCUMENT, SHOWN.id, lambda: values, mixed=True) == {}
    assert list(wrong(mix, said, DOCUMENT, SHOWN.id, lambda: values)) == ["native.group"]
    assert list(wrong({**mix, "group": "x"}, said, DOCUMENT, SHOWN.id, lambda: values, mixed=True)) == ["native.group"]
