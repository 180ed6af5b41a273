"""The contract of a store, played into every store: same cases, real bytes, real servers."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_kafka_backend import codec
from celery_kafka_backend.changes import Batch, ChordFact, Partition, Side
from celery_kafka_backend.errors import Rejected
from celery_kafka_backend.events import Opaque
from celery_kafka_backend.pointer import Pointer, pointers, position
from tests.contract.factories import (
    FAR,
    NOON_2025,
    RUN,
    R,
    batch,
    event_id,
    forgotten,
    group_deleted,
    group_saved,
    json_document,
    sent,
    stated,
)
from tests.contract.order_cases import CASES, Case
from tests.examples import tried_on
from tests.patience import PATIENCE_S

if TYPE_CHECKING:
    from celery_kafka_backend.events import Event
    from celery_kafka_backend.sinks.contract import Row, View
    from tests.contract.conftest import Place


# -- which event a document shows --------------------------------------------------------------


def play(place: Place, sequences: list[list[Event]]) -> View:
    """Write each sequence in its order, one event at a time; all sequences side by side."""
    sink = place.sink()
    for step in itertools.zip_longest(*sequences):
        sink.write(batch(*(event for event in step if event is not None)))
    return place.view()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_order_of_a_real_sequence_shows_the_same_event(place: Place, case: Case) -> None:
    orders = list(itertools.permutations(range(len(case.events("t")))))
    sequences, expected = [], {}
    for number, order in enumerate(orders):
        task = f"task-{number}"
        found = case.events(task)
        # Once in this order, then all of it again, as a replay would.
        sequences.append([found[i] for i in order] * 2)
        if case.shown is not None:
            expected[task] = found[case.shown].document
    view = play(place, sequences)
    assert view.documents([f"task-{number}" for number in range(len(orders))]) == expected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_batch_shows_the_same_event(place: Place, case: Case) -> None:
    found = case.events("t")
    place.sink().write(batch(*found, *found))
    shown = place.view().documents(["t"])
    assert shown == ({} if case.shown is None else {"t": found[case.shown].document})


@pytest.mark.parametrize("state", ["FAILURE", "SUCCESS", "STARTED"])
@pytest.mark.parametrize("before", [[], [sent(0)]], ids=["nothing of ours", "a side record of ours"])
def test_a_stock_success_stays(place: Place, before: list[Event], state: str) -> None:
    place.sink().write(batch(*before))
    place.stock("t", "SUCCESS")
    place.sink().write(batch(stated(state, 10)))
    assert b'"stock"' in place.view().documents(["t"])["t"]
    assert place.view().shown(["t"])["t"].key == 0
    assert place.view().shown(["t"])["t"].side is not None


@pytest.mark.parametrize(
    ("state", "over"), [("STARTED", "STARTED"), ("RETRY", "STARTED"), ("FAILURE", "SUCCESS"), ("REVOKED", "FAILURE")]
)
def test_any_other_stock_document_gives_way(place: Place, state: str, over: str) -> None:
    place.sink().write(batch(sent(0)))
    place.stock("t", state)
    ours = stated(over, 10)
    place.sink().write(batch(ours))
    assert place.view().documents(["t"]) == {"t": ours.document}


def test_a_side_record_alone_leaves_a_stock_document_alone(place: Place) -> None:
    place.sink().write(batch())
    place.stock("t", "STARTED")
    place.sink().write(batch(sent(0)))
    assert b'"stock"' in place.view().documents(["t"])["t"]


def test_a_forget_removes_a_stock_success(place: Place) -> None:
    place.sink().write(batch())
    place.stock("t", "SUCCESS")
    place.sink().write(batch(forgotten(10)))
    assert place.view().documents(["t"]) == {}


def test_equal_keys_are_decided_by_event_id(place: Place) -> None:
    ids = ["a", "b", "é", "a" * 32, event_id("x"), "b1", "00000000-0000-0000-0000-00000000000a", "Z"]
    rivals = {name: stated("STARTED", 10, id=name, value=name) for name in ids}
    sink, view = place.sink(), place.view()
    for name, other in itertools.permutations(ids, 2):
        task = f"{name} then {other}"
        for each in (name, other):
            sink.write(batch(stated("STARTED", 10, id=each, value=each, task=task)))
        winner = max(name, other)
        assert view.shown([task])[task].event_id == winner
    assert len({event.key for event in rivals.values()}) == 1


def test_keys_that_differ_only_in_their_lowest_bit_are_told_apart(place: Place) -> None:
    lower, higher = stated("SUCCESS", 11), stated("SUCCESS", 10)
    assert higher.key - lower.key == 1
    assert float(higher.key) == float(lower.key)
    sink = place.sink()
    for each in (higher, lower, higher, lower):
        sink.write(batch(each))
    assert place.view().documents(["t"]) == {"t": higher.document}


# -- a view is a function of the set of events -------------------------------------------------

POOL = [
    sent(0, task="a"),
    stated("STARTED", 10, task="a", worker="celery@one", received_at=R + 5, started_at=R + 10),
    stated("STARTED", 10, task="a", worker="celery@two", name="same ms", started_at=R + 9, attempt=3),
    stated("RETRY", 300_000, task="a", worker="zebra@skewed", started_at=R + 299_000, expires_at=FAR + 7),
    stated("SUCCESS", 20, task="a", worker="celery@two", value=[1, 2]),
    stated("SUCCESS", 20, task="a", worker="celery@one", value=[1, 3], name="equal key", expires_at=FAR - 9),
    sent(0, task="b", expires_at=None),
    stated("RETRY", 25, task="b", sent_at=R - 5, received_at=R + 3, worker="celery@one"),
    stated("STARTED", 5, task="b", sent_at=R + 2, received_at=R + 1, started_at=R + 4, worker="celery@two"),
    stated("FAILURE", 30, task="b", worker="ärger@host"),
    forgotten(40, task="b"),
    stated("STARTED", 50, task="b", run=RUN + 1),
    stated("PROGRESS", 60, task="c", expires_at=None),
    stated("PROGRESS", 70, task="c"),
    group_saved("g", 0, members=("a", "b")),
    group_saved("g", 9_000, members=("a",), expires_at=FAR + 3),
    group_deleted("h", 10, expires_at=FAR + 4),
    group_saved("h", 5),
]
FACTS = [
    ChordFact("g", "part|a|0", 1, b"{}", FAR),
    ChordFact("g", "part|a|0", 2, b'{"ok":1}', FAR + 1),
    ChordFact("g", "declared", (1 << 63) - 1, b"{}", FAR),
    ChordFact("g", "declared", (1 << 63) - 2, b'{"no":1}', FAR),
    ChordFact("i", "sized", 0, b"3", 0),
    ChordFact("i", "sized", 0, b"3", FAR),
]
ITEMS: list[Any] = [*POOL, *FACTS]


def apply(place: Place, batches: list[list[Any]], **options: Any) -> list[Row]:
    """Empty the place, write the batches, return the dump."""
    sink = place.sink(**options)
    place.empty()
    for items in batches:
        facts = [item for item in items if isinstance(item, ChordFact)]
        sink.write(batch(*(item for item in items if not isinstance(item, ChordFact)), chords=facts))
    sink.close()
    return place.dump(**options)


@st.composite
def deliveries(draw: st.DrawFn) -> list[list[Any]]:
    """All items in any order, some of them again, cut into any batches."""
    order = draw(st.permutations(range(len(ITEMS))))
    again = draw(st.lists(st.sampled_from(range(len(ITEMS))), max_size=8))
    items = [ITEMS[i] for i in (*order, *again)]
    cuts = sorted(draw(st.sets(st.integers(1, len(items) - 1), max_size=6)))
    return [items[a:b] for a, b in itertools.pairwise([0, *cuts, len(items)])]


@pytest.mark.parametrize(("limit", "retention_ms"), [(0, FAR - R), (2, None)])
def test_order_duplicates_and_batching_leave_no_trace(place: Place, limit: int, retention_ms: int | None) -> None:
    """Every key, column and expiry of the dump is the same, whether or not history has a retention of its own."""
    options = {"history_limit": limit, "history_retention_ms": retention_ms}
    at_once = apply(place, [ITEMS], **options)

    @settings(tried_on(20), derandomize=True)
    @given(batches=deliveries())
    def delivered(batches: list[list[Any]]) -> None:
        assert apply(place, batches, **options) == at_once

    delivered()


@pytest.mark.parametrize("retention_ms", [None, FAR - R])
def test_every_store_has_the_same_rows(place: Place, retention_ms: int | None, tmp_path: Any) -> None:
    """The memory store is the reference."""
    kept = {"history_retention_ms": retention_ms}
    from tests.contract.conftest import _Memory  # noqa: PLC0415

    def comparable(rows: list[Row]) -> list[Row]:
        if retention_ms is not None:
            return rows
        return [row._replace(expires_at=0) if row.table == "history" else row for row in rows]

    reference = _Memory(f"memory://{tmp_path}")
    assert comparable(apply(place, [ITEMS], **kept)) == comparable(apply(reference, [ITEMS], **kept))
    reference.empty()


def test_side_records_are_merged_field_by_field(place: Place) -> None:
    sink = place.sink()
    for event in POOL:
        sink.write(batch(event))
    found = place.view().shown(["a", "b", "c", "nobody"])
    assert found["a"].side == Side(
        run=RUN,
        seen=R + 300_000,
        sent=R,
        received=R + 5,
        started=R + 9,
        attempts=3,
        workers=("celery@one", "celery@two", "zebra@skewed"),
        expires_at=FAR + 7,
    )
    assert found["b"].side is not None
    assert found["b"].side.expires_at == 0
    assert found["b"].side.workers == ("celery@one", "celery@two", "ärger@host")
    assert (found["b"].side.sent, found["b"].side.received, found["b"].side.started) == (R - 5, R + 1, R + 4)
    assert "nobody" not in found


# -- documents, groups, chords, history --------------------------------------------------------


@pytest.mark.parametrize("task", ["é世界🙂", "with space\nand line", "{braces}", "a'b\"c;--", "x" * 150, "%s{}$1"])
def test_any_text_may_be_an_id(place: Place, task: str) -> None:
    event = stated("SUCCESS", 10, task=task)
    place.sink().write(batch(event, sent(0, task=task), positions={Partition("t", 0): 1}))
    view = place.view()
    assert view.documents([task]) == {task: event.document}
    assert len(view.history(task)) == 2
    assert {row.key for row in place.dump() if row.table in {"document", "side"}} == {task}


def test_who_asks_for_an_id_that_cannot_be_stored_finds_nothing(place: Place) -> None:
    place.sink().write(batch(stated("SUCCESS", 10)))
    view, odd = place.view(), ["x" * 70_000, "x" * 600, "nul\0", ""]
    assert view.documents([*odd, "t"]).keys() == {"t"}
    assert view.shown([*odd, "t"]).keys() == {"t"}
    assert view.groups(odd) == {}
    assert [view.history(each) for each in odd] == [[]] * len(odd)
    assert [view.chord(each) for each in odd] == [{}] * len(odd)


def test_a_megabyte_survives_byte_for_byte(place: Place) -> None:
    document = json_document("t", "SUCCESS", "ä" * 500_000, big=12345678901234567890123, empty=[])
    place.sink().write(batch(stated("SUCCESS", 10, document=document)))
    assert place.view().documents(["t"]) == {"t": document}


def test_a_binary_document_survives_byte_for_byte(place: Place) -> None:
    meta = pickle.dumps({"status": "SUCCESS", "result": b"\r\n\x00\xff$5\r\n-ERR"})
    event = stated("SUCCESS", 10, opaque=Opaque(meta=meta, content_type="application/x-python-serialize"))
    place.sink().write(batch(event))
    assert place.view().documents(["t"]) == {"t": meta}


def test_many_ids_are_read_at_once(place: Place) -> None:
    ids = [f"task-{number}" for number in range(2_300)]
    place.sink().write(batch(*(stated("SUCCESS", 10, task=each) for each in ids)))
    view = place.view()
    assert view.documents(["nobody", *ids]).keys() == set(ids)
    assert view.shown(ids).keys() == set(ids)
    assert view.documents([]) == {}


def test_a_saved_group_is_replaced_and_deleted(place: Place) -> None:
    first, second = group_saved("g", 0, members=("a",)), group_saved("g", 9_000, members=("b",))
    sink, view = place.sink(), place.view()
    sink.write(batch(second))
    sink.write(batch(first))
    assert view.groups(["g", "nobody"]) == {"g": second.document}
    sink.write(batch(group_deleted("g", 9_100)))
    sink.write(batch(second))
    assert view.groups(["g"]) == {}


def test_a_group_and_a_task_of_one_id_are_two_things(place: Place) -> None:
    task, group = stated("SUCCESS", 10, task="x"), group_saved("x", 5)
    place.sink().write(batch(task, group))
    assert place.view().documents(["x"]) == {"x": task.document}
    assert place.view().groups(["x"]) == {"x": group.document}


def test_of_two_chord_facts_with_one_name_the_greater_order_stays(place: Place) -> None:
    sink, view = place.sink(), place.view()
    for facts in (FACTS, FACTS[::-1], FACTS[:1]):
        sink.write(Batch(changes=[], chords=facts))
    assert view.chord("g") == {"part|a|0": b'{"ok":1}', "declared": b"{}"}
    assert view.chord("nobody") == {}


def test_history_is_in_the_order_of_its_clock_and_each_event_once(place: Place) -> None:
    events = [sent(0), stated("STARTED", 10), stated("RETRY", 20), stated("STARTED", 30), stated("SUCCESS", 40)]
    sink = place.sink()
    for event in [*events[::-1], *events]:
        sink.write(batch(event))
    assert [b'"hlc":%d,' % event.hlc in value for event, value in zip(events, place.view().history("t"), strict=True)]
    assert place.view().history("nobody") == []


def test_a_history_of_many_pages_is_whole_and_in_order(place: Place) -> None:
    sink, events = place.sink(), [stated("PROGRESS", n // 2, name=f"{n}") for n in range(2_600)]
    for start in range(5):
        sink.write(batch(*events[start::5]))
    ordered = sorted(events, key=lambda event: (event.hlc, event.id))
    assert [codec.decode(value).id for value in place.view().history("t")] == [event.id for event in ordered]


def test_history_keeps_the_latest_whatever_came_last(place: Place) -> None:
    events = [stated("PROGRESS", at) for at in range(10)]
    sink = place.sink(history_limit=3)
    for event in [*events[5:], *events[:5]]:
        sink.write(batch(event))
    whole = place.url.startswith(
        ("sqlite", "mongodb", "elasticsearch", "cassandra", "postgresql")
    )  # what is on disk is for audits, and never cut
    kept = [b'"hlc":%d,' % event.hlc for event in (events if whole else events[-3:])]
    assert all(mark in value for mark, value in zip(kept, place.view().history("t"), strict=True))


def test_without_history_nothing_of_it_is_kept(place: Place) -> None:
    place.sink(history=False).write(batch(stated("SUCCESS", 10)))
    assert place.view().history("t") == []
    assert place.view().documents(["t"])


# -- positions ---------------------------------------------------------------------------------


def test_positions_never_go_back(place: Place) -> None:
    sink, view = place.sink(), place.view()
    a, b = Partition("celery.task-events", 0), Partition("with:colon", 11)
    greatest = 0
    for offset in (5, 9, 7, 10, 9, (1 << 53) + 1, 1 << 53, (1 << 62) + 1, 1 << 62):  # a replay's marks are so large
        greatest = max(greatest, offset)
        sink.write(Batch(changes=[], positions={a: offset, b: 1}))
        assert view.positions() == {a: greatest, b: 1}
    assert place.dump() == []


def test_the_cut_over_pointer_is_kept_and_never_goes_back(place: Place) -> None:
    """It is a position like any other, whatever its name: every store can keep it."""
    sink, view = place.sink(), place.view()
    first, second = Pointer("mongodb+srv-0a1b2c3d", NOON_2025), Pointer("redis-4e5f6a7b", NOON_2025 + 1, forced=True)
    for one in (first, second, first._replace(at=1)):
        sink.write(Batch(changes=[], positions=position("celery", one)))
    assert pointers("celery", view.positions()) == [second, first]
    assert pointers("other", view.positions()) == []
    assert place.dump() == []


def test_empty_batches_and_repeated_closes_do_nothing(place: Place) -> None:
    sink, view = place.sink(), place.view()
    sink.write(batch())
    assert view.positions() == {}
    for each in (sink, view):
        each.close()
        each.close()
    assert place.dump() == []
    assert view.documents(["t"]) == {}, "a closed view opens again"
    sink.open()
    sink.write(batch(stated("SUCCESS", 10)))
    assert view.documents(["t"])


def test_closing_what_was_never_opened_is_fine(place: Place) -> None:
    from celery_kafka_backend.sinks import registry  # noqa: PLC0415
    from celery_kafka_backend.sinks.contract import StoreOptions  # noqa: PLC0415

    registry.open_sink(place.url, StoreOptions()).close()
    registry.open_view(place.url, StoreOptions()).close()


# -- refusals ----------------------------------------------------------------------------------


def test_what_can_never_be_written_is_named_and_the_rest_is_written(place: Place) -> None:
    sink = place.sink()
    size = place.poison(sink)
    good = stated("SUCCESS", 10, task="good")
    found = batch(
        stated("SUCCESS", 10, task="large", document=json_document("large", "SUCCESS", "x" * size)),
        good,
        positions={Partition("t", 0): 7},
    )
    found.changes[0].history.clear()
    surrogate = batch(stated("SUCCESS", 10, task="bad", document=b"{}")).changes[0]
    surrogate.id = "\ud800"
    with pytest.raises(Rejected) as caught:
        sink.write(Batch(changes=[*found.changes, surrogate], positions=found.positions))
    assert [each for each, _ in caught.value.reasons] == ["large", "\ud800"]
    assert place.view().documents(["large", "good"]) == {"good": good.document}
    assert place.view().positions() == {Partition("t", 0): 7}


# -- expiry ------------------------------------------------------------------------------------


def soon(place: Place) -> int:
    """An expiry that this test will see."""
    return time.time_ns() // 1_000_000 + place.soon_ms


def test_expiries_are_absolute_and_exact(place: Place) -> None:
    at = FAR + 123
    place.sink().write(
        batch(
            stated("SUCCESS", 10, expires_at=at),
            stated("SUCCESS", 10, task="never", expires_at=None),
            group_saved("g", expires_at=at + 1),
            chords=[ChordFact("c", "sized", 1, b"1", at + 2)],
        )
    )
    found = {(row.table, row.key): row.expires_at for row in place.dump() if row.table != "history"}
    assert found == {
        ("document", "t"): at,
        ("side", "t"): at,
        ("document", "never"): 0,
        ("side", "never"): 0,
        ("group", "g"): at + 1,
        ("group-side", "g"): at + 1,
        ("chord", "c/sized"): at + 2,
    }


def test_a_later_winner_sets_its_own_expiry_and_the_side_record_keeps_the_latest(place: Place) -> None:
    sink = place.sink(history=False)
    sink.write(batch(stated("STARTED", 10, expires_at=FAR + 50)))
    sink.write(batch(stated("SUCCESS", 20, expires_at=FAR)))
    found = {row.table: row.expires_at for row in place.dump()}
    assert (found["document"], found["side"]) == (FAR, FAR + 50)


def test_what_has_expired_is_not_there(place: Place) -> None:
    sink, view = place.sink(), place.view()
    at = soon(place)
    sink.write(
        batch(
            stated("SUCCESS", 10, expires_at=at),
            group_saved("g", expires_at=at),
            chords=[ChordFact("c", "sized", 1, b"1", at)],
        )
    )
    assert view.documents(["t"])
    time.sleep(max(0.0, at / 1000 - time.time()) + 0.1)
    assert (view.documents(["t"]), view.shown(["t"]), view.groups(["g"]), view.chord("c")) == ({}, {}, {}, {})
    assert place.dump() == []
    # … and neither is its key: whatever comes next is the first.
    sink.write(batch(stated("STARTED", 5), group_saved("g", 5), chords=[ChordFact("c", "sized", 0, b"0", FAR)]))
    assert view.documents(["t"])
    assert view.groups(["g"])
    assert view.chord("c") == {"sized": b"0"}


def test_an_expired_winner_shows_nothing_and_still_guards(place: Place) -> None:
    """A failure may expire before the STARTED that it replaced would have: that must not come back."""
    past = 1_000_000_000_000
    sink, view = place.sink(), place.view()
    sink.write(batch(stated("STARTED", 10)))
    sink.write(batch(stated("FAILURE", 20, expires_at=past)))
    sink.write(batch(stated("STARTED", 10)))
    assert view.documents(["t"]) == {}
    assert view.shown(["t"])["t"].key == stated("FAILURE", 20).key


def test_what_arrives_expired_leaves_nothing(place: Place) -> None:
    past = 1_000_000_000_000
    place.sink().write(batch(stated("SUCCESS", 10, expires_at=past), group_saved("g", expires_at=past)))
    assert [row for row in place.dump() if row.table != "history"] == []


# -- processes, threads, leaks -----------------------------------------------------------------


def test_nothing_is_left_open(place: Place) -> None:
    def used() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208

    def once() -> None:
        sink, view = place.sink(), place.view()
        sink.write(batch(stated("SUCCESS", 10)))
        assert view.documents(["t"])
        thread = threading.Thread(target=view.documents, args=(["t"],))
        thread.start()
        thread.join()
        if view.push:
            ear = view.subscribe("me")
            ear.close()
            ear.close()
        sink.close()
        view.close()

    once()
    before = used()
    for _ in range(5):
        once()
    # A driver's threads that were told to end may take a moment.
    deadline = time.monotonic() + PATIENCE_S
    while any(now > then for now, then in zip(used(), before, strict=True)):
        assert time.monotonic() < deadline, (used(), before)
        time.sleep(0.05)


def test_a_view_serves_many_threads(place: Place) -> None:
    place.sink().write(batch(*(stated("SUCCESS", 10, task=f"task-{n}") for n in range(50))))
    view, errors = place.view(), []

    def read() -> None:
        try:
            for n in range(50):
                assert view.documents([f"task-{n}"])
        except BaseException as exc:  # noqa: BLE001
            errors.append(exc)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert errors == []


def test_a_forked_child_reads_and_its_parent_reads_on(place: Place) -> None:
    place.sink().write(batch(stated("SUCCESS", 10)))
    view = place.view()
    assert view.documents(["t"])
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            found = view.documents(["t"])
            view.close()
            status = 0 if found else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert view.documents(["t"])


WRITER = """
import json, sys
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import batch, stated
url, state, at, rounds = json.loads(sys.argv[1])
sink = registry.open_sink(url, StoreOptions())
sink.open()
for n in range(rounds):
    sink.write(batch(*(stated(state, at, task=f"t{m}", worker=f"celery@{state}") for m in range(100))))
sink.close()
"""


def test_a_zombie_that_writes_at_the_same_time_changes_nothing(place: Place) -> None:
    if place.url.startswith("memory"):
        pytest.skip("one process only")
    place.sink().close()
    url, rounds = place.url, 40 if place.url.startswith("redis") else 8
    command = [sys.executable, "-c", WRITER]
    writers = [
        subprocess.Popen([*command, json.dumps([url, state, at, rounds])])
        for state, at in (("STARTED", 10), ("SUCCESS", 20), ("FAILURE", 30))
    ]
    assert [writer.wait(PATIENCE_S) for writer in writers] == [0, 0, 0]
    ids = [f"t{n}" for n in range(100)]
    view = place.view()
    assert view.documents(ids) == {task: stated("SUCCESS", 20, task=task).document for task in ids}
    workers = ("celery@FAILURE", "celery@STARTED", "celery@SUCCESS")
    assert {shown.side.workers for shown in view.shown(ids).values() if shown.side} == {workers}


# -- push --------------------------------------------------------------------------------------


def test_a_registered_client_hears_of_changes_and_of_nothing_else(push_place: Place) -> None:
    sink, view = push_place.sink(), push_place.view()
    ear = view.subscribe("me")
    view.register("me", ["t", "u"], 60)
    sink.write(batch(stated("STARTED", 10), stated("STARTED", 10, task="other")))
    assert list(ear.wait(PATIENCE_S)) == ["t"]
    sink.write(batch(sent(0)))
    sink.write(batch(stated("STARTED", 10)))
    assert ear.wait(0.05) == {}, "no change, no noise"
    sink.write(batch(stated("SUCCESS", 20), stated("SUCCESS", 20, task="u")))
    heard = ear.wait(PATIENCE_S)
    while len(heard) < 2:
        heard |= ear.wait(PATIENCE_S)
    assert sorted(heard) == ["t", "u"]
    for task, document in heard.items():
        assert document in (b"", view.documents([task])[task])
    ear.close()


def test_registering_reads_in_the_same_breath(push_place: Place) -> None:
    sink, view = push_place.sink(), push_place.view()
    sink.write(batch(stated("SUCCESS", 10)))
    assert view.register("me", ["t", "u"], 60) == {"t": json_document("t", "SUCCESS")}


def test_a_registration_ends_by_itself(push_place: Place) -> None:
    sink, view = push_place.sink(), push_place.view()
    ear = view.subscribe("me")
    view.register("me", ["t"], 0.05)
    time.sleep(0.15)
    sink.write(batch(stated("SUCCESS", 10)))
    assert ear.wait(0.05) == {}
    ear.close()


def test_two_clients_both_hear(push_place: Place) -> None:
    sink, view = push_place.sink(), push_place.view()
    ears = [view.subscribe(name) for name in ("one", "two")]
    for name in ("one", "two"):
        view.register(name, ["t"], 60)
    sink.write(batch(forgotten(10)))
    assert [list(ear.wait(PATIENCE_S)) for ear in ears] == [["t"], ["t"]]
    for ear in ears:
        ear.close()
