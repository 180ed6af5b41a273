"""The insight view in each store that has it: no row goes back, what is old goes, and a store that is away says so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from celery_kafka_backend.errors import SettingsError, Unavailable
from celery_kafka_backend.sinks.contract import StoreOptions
from celery_kafka_backend.sinks.insight import KEPT_S, MinuteRow, insight_url, open_insight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery_kafka_backend.sinks.insight import InsightStore

NOW = 29_000_000 * 60_000


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def url(request: Any, tmp_path: Path) -> str:
    return request.getfixturevalue("redis_url") if request.param == "redis" else f"sqlite:///{tmp_path}/v.db"


@pytest.fixture
def store(url: str) -> Iterator[InsightStore]:
    made = open_insight(url, StoreOptions(namespace="n"))
    made.open()
    yield made
    made.close()


def row(minute: int, task: str, version: int, value: bytes = b"[]") -> MinuteRow:
    return MinuteRow(minute, task, version, value)


def test_what_was_written_is_read(store: InsightStore):
    """Of the minutes asked for."""
    rows = [row(5, "a", 1, b"[1]"), row(5, "tâsk", 2), row(6, "a", 10**15, b"\x00\xff")]
    store.write(rows, NOW // 10**9, "p")
    assert sorted(store.read([5, 6, 7])) == sorted(rows)
    assert store.read([6]) == [rows[2]]
    assert store.read([7]) == []


def test_a_row_never_goes_back(store: InsightStore):
    """A zombie's older figures are left out; the same version may be written again."""
    store.write([row(5, "a", 10, b"new")], 1, "p")
    store.write([row(5, "a", 9, b"old"), row(5, "b", 1)], 2, "p")
    assert {one.task: one.value for one in store.read([5])} == {"a": b"new", "b": b"[]"}
    store.write([row(5, "a", 10, b"again")], 3, "p")
    store.write([row(5, "a", 100, b"newer")], 3, "p")
    assert {one.task: one.value for one in store.read([5])} == {"a": b"newer", "b": b"[]"}


def test_it_says_when_it_was_written(store: InsightStore):
    """Also if there was nothing to write."""
    assert store.written_at() == 0
    store.write([], NOW, "p")
    assert store.written_at() == NOW


def test_what_is_old_goes(store: InsightStore, url: str):
    """SQLite deletes it with later rows, whatever our clock says; Redis by itself."""
    minute = NOW // 60_000
    store.write([row(minute, "a", 1)], NOW, "p")
    if url.startswith("redis"):
        client = store._client
        assert 0 < client.ttl(f"celery-kafka:n:insight:{minute}") <= KEPT_S
    else:
        store.write([row(minute + KEPT_S // 60, "a", 1)], NOW + 10 * KEPT_S * 1_000, "p")
        store.write([], NOW + 20 * KEPT_S * 1_000, "p")
        assert len(store.read([minute])) == 1
        store.write([row(minute + KEPT_S // 60 + 1, "a", 1)], NOW, "p")
        assert store.read([minute]) == []


def test_it_says_what_it_has_of_a_writer(store: InsightStore, url: str):
    """So a writer learns that the store was emptied, though another one writes there, too."""
    assert [store.write([], at, name) for at, name in ((1, "p"), (2, "q"), (3, "p"), (4, "q"))] == [0, 0, 1, 2]
    assert store.written_at() == 4
    if url.startswith("redis"):
        store._client.flushdb()
    else:
        Path(store._path).unlink()
        with pytest.raises(Unavailable):
            store.write([], 5, "q")
        store.open()
    assert [store.write([], at, name) for at, name in ((5, "q"), (6, "p"), (7, "p"))] == [0, 0, 6]


@pytest.mark.redis
def test_two_pipelines_in_one_redis_are_apart(redis_url: str):
    one, other = (open_insight(redis_url, StoreOptions(namespace=name)) for name in "ab")
    one.write([row(5, "a", 1)], 1, "p")
    assert other.read([5]) == []
    assert other.written_at() == 0


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "sqlite:////no/such/folder/v.db"], indirect=False)
def test_a_store_that_is_away_says_so(url: str):
    made = open_insight(url, StoreOptions())
    for ask in (lambda: made.read([1]), made.written_at, made.open, lambda: made.write([], 1, "p")):
        with pytest.raises(Unavailable):
            ask()


def test_a_file_without_insight_says_so(tmp_path: Path):
    """A view that was never told of any."""
    (tmp_path / "v.db").touch()
    with pytest.raises(Unavailable, match="no such table"):
        open_insight(f"sqlite:///{tmp_path}/v.db", StoreOptions()).read([1])


def test_the_first_view_that_can_hold_it_does():
    views = ["mongodb://m/d", "sqlite:///v.db", "redis://r/0"]
    assert insight_url(views) == "sqlite:///v.db"
    with pytest.raises(SettingsError, match="can hold insight") as caught:
        insight_url(["mongodb://u:secret@m/d"])
    assert "secret" not in str(caught.value)
