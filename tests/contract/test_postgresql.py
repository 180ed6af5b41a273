"""What only PostgreSQL can do to the view of `examples/`: refuse a user, have tables of somebody's, take no long names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from celery import VERSION

from celery_kafka_backend.changes import Partition
from celery_kafka_backend.errors import Rejected, SettingsError, Unavailable
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.contract.factories import batch, json_document, stated
from tests.contract.test_native import read

if TYPE_CHECKING:
    from collections.abc import Iterator

psycopg = pytest.importorskip("psycopg")
pytest.importorskip("ckb_postgresql")
pytestmark = pytest.mark.postgresql
CELERYS = "id integer PRIMARY KEY, task_id varchar(155) UNIQUE, status varchar(50), result bytea, date_done timestamp, traceback text"


@pytest.fixture
def database(postgresql_url: str) -> Iterator[Any]:
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def sink(postgresql_url: str) -> Iterator[Any]:
    found = registry.open_sink(postgresql_url, StoreOptions())
    yield found
    found.close()


def test_rights_are_asked_for_by_name(postgresql_url: str, database: Any, sink: Any) -> None:
    """First the tables cannot be made, then, made by somebody else, not be read, then not be written."""
    user = f"u{postgresql_url.rpartition('/')[2]}"
    database.execute(f"CREATE ROLE {user} LOGIN")
    url = postgresql_url.replace("tests@", f"{user}@")
    poor, view = registry.open_sink(url, StoreOptions()), registry.open_view(url, StoreOptions())
    with pytest.raises(SettingsError, match="permission denied for schema"):
        poor.open()
    with pytest.raises(Unavailable, match="no processor has made the tables"):
        view.documents(["t"])
    sink.open()
    with pytest.raises(SettingsError, match="permission denied for table"):
        view.documents(["t"])
    database.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {user}")
    assert view.documents(["t"]) == {}
    poor.open()  # the tables are there: nothing to be made
    with pytest.raises(SettingsError, match="permission denied for table"):
        poor.write(batch(stated("SUCCESS", 10)))
    poor.close()
    view.close()


@pytest.mark.parametrize(
    "made",
    [
        "CREATE TABLE ckb_task (a int)",
        "CREATE TABLE ckb_schema (a int)",
        "CREATE VIEW celery_taskmeta AS SELECT 1 AS x",
        f"CREATE TABLE celery_taskmeta ({CELERYS.replace('task_id varchar(155)', 'task_id integer')})",
    ],
)
def test_tables_that_somebody_made_differently_are_named(database: Any, sink: Any, made: str) -> None:
    database.execute(made)
    with pytest.raises(SettingsError) as caught:
        sink.write(batch(stated("SUCCESS", 10)))
    assert "who made these tables" in caught.value.remedy


def test_a_newer_schema_is_refused(database: Any, sink: Any) -> None:
    sink.open()
    database.execute("INSERT INTO ckb_schema VALUES (99)")
    with pytest.raises(SettingsError, match="version 99, newer"):
        sink.open()


def test_celery_s_table_gets_the_columns_that_it_lacks(postgresql_url: str, database: Any, sink: Any) -> None:
    database.execute(f"CREATE TABLE celery_taskmeta ({CELERYS})")
    document = json_document("t", "SUCCESS", 7, name="proj.add", worker="celery@a", retries=0, queue="slow")
    sink.write(batch(stated("SUCCESS", 10, document=document, attempt=0)))
    job = {"backend": postgresql_url.replace("postgresql://", "db+postgresql+psycopg://"), "tasks": ["t"], "groups": []}
    asked = [{**job, "conf": {"result_extended": True}}]
    if VERSION[:2] < (5, 7):
        with pytest.raises(AssertionError, match="UnpicklingError"):
            read(asked)  # such a Celery keeps results in SQL as pickles, and reads nothing else
        return
    (answer,) = read(asked)
    assert [answer["tasks"]["t"][each] for each in ("state", "result", "name", "queue")] == [
        "SUCCESS",
        7,
        "proj.add",
        "slow",
    ]


def test_long_names_are_cut_in_celery_s_table_alone_and_long_ids_are_refused(
    postgresql_url: str, database: Any, sink: Any
) -> None:
    """What PostgreSQL does not take would end a processor again and again."""
    document = json_document("t", "SUCCESS", 7, name="n" * 200, worker="w" * 200, queue="q" * 200)
    fact = batch(
        stated("SUCCESS", 10, document=document),
        stated("SUCCESS", 10, task="x" * 156),
        positions={Partition("x", 0): 1},
    )
    with pytest.raises(Rejected) as caught:
        sink.write(fact)
    assert [each for each, _ in caught.value.reasons] == ["x" * 156]
    view = registry.open_view(postgresql_url, StoreOptions())
    assert view.documents(["t"]) == {"t": document}
    assert view.positions() == {Partition("x", 0): 1}
    view.close()
    query = "SELECT length(name), length(worker), length(queue) FROM celery_taskmeta"
    assert database.execute(query).fetchall() == [(155, 155, 155)]
