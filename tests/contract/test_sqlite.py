"""What only a file can do to a view: be foreign, damaged, locked, full, shared with Celery's own backend."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from celery import VERSION

from celery_kafka_backend.changes import ChordFact, Partition
from celery_kafka_backend.errors import SettingsError, Unavailable
from celery_kafka_backend.sinks import registry, sqlite
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import FAR, batch, group_saved, stated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "view.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Any]:
    sink = registry.open_sink(f"sqlite:///{path}", StoreOptions(options={"timeout": 0.1}))
    sink.open()
    yield sink
    sink.close()


@pytest.mark.parametrize(
    "content", [b"this is no database, and long enough to be looked at" * 50, b"SQLite format 3\x00" + b"x" * 4096]
)
def test_a_foreign_file_is_named_with_the_remedy(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"view\.db.*move the file away"):
        registry.open_sink(f"sqlite:///{path}", StoreOptions()).open()
    assert path.read_bytes() == content


def test_a_newer_schema_is_refused(path: Path, opened: Any) -> None:
    opened.close()
    with sqlite3.connect(path) as other:
        other.execute("UPDATE ckb_schema SET version = 99")
    with pytest.raises(SettingsError, match="schema version 99"):
        opened.open()
    other.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite://relative.db", "sqlite:////no/such/folder/x.db"])
def test_a_url_without_a_usable_file_is_a_setting(url: str) -> None:
    with pytest.raises(SettingsError):
        registry.open_sink(url, StoreOptions()).open()


@pytest.mark.parametrize("opening", [registry.open_sink, registry.open_view])
@pytest.mark.parametrize("options", [{"timeot": 1.0}, {"timeout": "soon"}, {"timeout": None}, {"timeout": -1}])
def test_an_option_that_is_none_is_a_setting(path: Path, opening: Any, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"view_options.*time"):
        opening(f"sqlite:///{path}", StoreOptions(options=options))


def test_a_relative_path_starts_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sink = registry.open_sink("sqlite:///here.db", StoreOptions())
    sink.open()
    sink.close()
    assert (tmp_path / "here.db").exists()


def test_a_file_that_no_processor_has_made_is_unavailable_and_is_not_made(path: Path) -> None:
    view = registry.open_view(f"sqlite:///{path}", StoreOptions())
    with pytest.raises(Unavailable, match="does not exist"):
        view.documents(["t"])
    assert not path.exists()
    path.touch()
    with pytest.raises(Unavailable):
        view.documents(["t"])
    view.close()


def test_a_locked_file_is_unavailable_and_the_same_batch_succeeds_later(path: Path, opened: Any) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked"):
        opened.write(batch(stated("SUCCESS", 10)))
    other.execute("ROLLBACK")
    other.close()
    opened.write(batch(stated("SUCCESS", 10)))


def test_a_full_disk_is_unavailable_and_leaves_nothing_of_the_batch(path: Path, opened: Any) -> None:
    opened.write(batch(stated("SUCCESS", 10)))
    opened._db.execute("PRAGMA max_page_count = 1")
    large = batch(stated("SUCCESS", 10, task="u", value="x" * 100_000), positions={Partition("x", 0): 5})
    with pytest.raises(Unavailable, match="full"):
        opened.write(large)
    view = registry.open_view(f"sqlite:///{path}", StoreOptions())
    assert list(view.documents(["t", "u"])) == ["t"]
    assert view.positions() == {}
    opened._db.execute("PRAGMA max_page_count = 1000000")
    opened.write(large)
    assert view.positions() == {Partition("x", 0): 5}
    view.close()


def test_what_was_written_is_durable(opened: Any) -> None:
    assert opened._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert opened._db.execute("PRAGMA synchronous").fetchone() == (2,)


KILLED = """
import sys
from celery_kafka_backend.changes import Partition
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import batch, stated
sink = registry.open_sink(sys.argv[1], StoreOptions())
sink.open()
for n in range(10_000):
    sink.write(batch(*(stated("SUCCESS", 10, task=f"{n}-{m}") for m in range(20)), positions={Partition("x", 0): n + 1}))
    print(n, flush=True)
"""


def test_a_killed_writer_leaves_whole_batches_and_their_position(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, f"sqlite:///{path}"], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for _ in range(10):
            acknowledged = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
    view = registry.open_view(f"sqlite:///{path}", StoreOptions())
    (done,) = view.positions().values()
    assert done > acknowledged
    assert len([row for row in view.rows() if row.table == "document"]) == 20 * done
    view.close()


def test_the_tables_are_those_that_celery_makes(path: Path, opened: Any) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    from celery.backends.database.models import TaskExtended  # noqa: PLC0415

    stock = path.with_name("stock.db")
    engine = sqlalchemy.create_engine(f"sqlite:///{stock}")
    TaskExtended.metadata.create_all(engine)
    engine.dispose()

    def tables(file: Path) -> dict[str, str]:
        other = sqlite3.connect(file)
        found = other.execute(
            "SELECT name, sql FROM sqlite_master WHERE sql NOT NULL AND name NOT LIKE 'ckb_%'"
        ).fetchall()
        other.close()
        return {name: "".join(sql.split()) for name, sql in found}

    ours, celerys = tables(path), tables(stock)
    if VERSION[:2] < (5, 7):  # its tables lack columns and indexes that later ones have
        for name, sql in celerys.items():
            assert set(sql.partition("(")[2].split(",")) <= set(ours[name].partition("(")[2].split(",")), name
    else:
        assert ours == celerys


def test_tables_that_celery_made_without_extended_results_get_the_columns(path: Path) -> None:
    other = sqlite3.connect(path)
    columns = "id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, task_id VARCHAR(155), status VARCHAR(50), result BLOB"
    other.execute(f"CREATE TABLE celery_taskmeta ({columns}, date_done DATETIME, traceback TEXT, UNIQUE (task_id))")
    other.execute("INSERT INTO celery_taskmeta (task_id, status, result) VALUES ('old', 'SUCCESS', '3')")
    other.commit()
    sink = registry.open_sink(f"sqlite:///{path}", StoreOptions())
    sink.open()
    sink.write(batch(stated("SUCCESS", 10), stated("FAILURE", 10, task="old")))
    assert other.execute("SELECT task_id, status FROM celery_taskmeta ORDER BY 1").fetchall() == [
        ("old", "SUCCESS"),
        ("t", "SUCCESS"),
    ]
    sink.close()
    other.close()


def test_expired_rows_are_swept_in_bounded_steps(path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "SWEEP_ROWS", 30)
    soon = time.time_ns() // 1_000_000 + 1_000
    opened.write(
        batch(
            *(stated("SUCCESS", 10, task=f"t{n}", expires_at=soon) for n in range(50)),
            *(group_saved(f"g{n}", expires_at=soon) for n in range(50)),
            stated("SUCCESS", 10, task="stays"),
            chords=[ChordFact(f"g{n}", "sized", 1, b"1", soon) for n in range(50)],
        )
    )
    time.sleep(max(0.0, soon / 1000 - time.time()) + 0.1)

    def counts() -> list[int]:
        tables = ("ckb_task", "celery_taskmeta", "ckb_group", "celery_tasksetmeta", "ckb_history", "ckb_chord")
        return [opened._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]

    assert counts() == [51, 51, 50, 50, 101, 50]
    seen = []
    opened._sweep_due = 0.0
    for _ in range(4):  # at once again, as long as there are more
        opened.write(batch())
        seen.append(counts())
    assert seen[0] == [21, 21, 20, 20, 71, 20]
    assert seen[-1] == [1, 1, 0, 0, 1, 0]


def test_a_stock_row_is_shown_as_a_document(path: Path, opened: Any) -> None:
    opened._db.execute(
        "INSERT INTO celery_taskmeta (task_id, status, result, date_done)"
        " VALUES ('old', 'SUCCESS', ?, '2025-01-01 00:00:00.000001')",
        (b'{"big":12345678901234567890123}',),
    )
    view = registry.open_view(f"sqlite:///{path}", StoreOptions())
    assert view.documents(["old"])["old"] == (
        b'{"status":"SUCCESS","result":{"big":12345678901234567890123},"traceback":null,"children":[],'
        b'"date_done":"2025-01-01T00:00:00.000001+00:00","task_id":"old"}'
    )
    view.close()


def test_two_views_of_one_file_agree(path: Path, opened: Any) -> None:
    first, second = (registry.open_view(f"sqlite:///{path}", StoreOptions()) for _ in range(2))
    opened.write(batch(stated("STARTED", 10)))
    assert first.documents(["t"]) == second.documents(["t"])
    opened.write(batch(stated("SUCCESS", 20, expires_at=FAR)))
    assert first.documents(["t"]) == second.documents(["t"])
    first.close()
    second.close()
