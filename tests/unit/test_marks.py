"""A replay's marks among a view's positions, and where a part of the log begins as one types it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import pytest

from celery_kafka_backend.changes import Partition
from celery_kafka_backend.cli.edge import Edge
from celery_kafka_backend.processors import marks
from celery_kafka_backend.processors.marks import Marks
from celery_kafka_backend.processors.selection import Wanted

if TYPE_CHECKING:
    from pathlib import Path

A, B = Partition("celery.task-events", 0), Partition("celery.chords", 11)


def kept(store: dict[Partition, int], written: dict[Partition, int]) -> dict[Partition, int]:
    """What a store holds after a write: no position goes back."""
    return {at: max(store.get(at, 0), written.get(at, 0)) for at in {*store, *written}}


def test_a_new_replay_begins_before_the_old_one_ended():
    first = Marks(1, 77, next={A: 900, B: 800}, ends={A: 1000}, starts={A: 0})
    second = Marks(2, 0, next={A: 5})
    store = kept({A: 10**9}, marks.positions(first))
    assert marks.read(store) == first
    store = kept(store, marks.positions(second))
    assert marks.read(store) == second
    assert marks.read(kept(store, marks.moved(2, {A: 6, B: 1}))) == Marks(2, 0, next={A: 6, B: 1})
    assert marks.own(store).keys() == {A}


def test_a_store_without_marks_has_had_no_replay():
    assert marks.read({A: 5}) == Marks()


def test_what_is_wanted_has_one_number():
    assert Wanted().digest == 0
    assert Wanted("a", ("X", "Y")).digest == Wanted("a", ("Y", "X", "Y")).digest != Wanted("a", ("X",)).digest
    assert 0 < Wanted("a").digest < 1 << marks.BITS


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("earliest", {}),
        ("celery.task-events:0:5", {A: 5}),
        ("celery.task-events:0:5,celery.chords:11:7", {A: 5, B: 7}),
        ("2026-01-31T12:00:00Z", 1_769_860_800_000),
    ],
)
def test_an_edge_is_a_time_or_offsets(typed: str, meant: object):
    assert Edge("earliest").convert(typed, None, None) == meant


def test_an_edge_may_be_what_kafkas_own_tool_exported(tmp_path: Path):
    exported = tmp_path / "offsets.csv"
    exported.write_text('"celery.task-events",0,5\ngroup,celery.chords,11,7\n')
    assert Edge("earliest").convert(f"@{exported}", None, None) == {A: 5, B: 7}


@pytest.mark.parametrize("typed", ["0:5:x", "celery.task-events:0", "celery.task-events:0:5;", "latest", "@/nowhere"])
def test_nonsense_is_no_edge(typed: str):
    with pytest.raises(click.BadParameter):
        Edge("earliest").convert(typed, None, None)
