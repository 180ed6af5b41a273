"""The tables of the Cassandra store: made when missing, and refused when somebody else made them differently."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from celery_kafka_backend.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NATIVE: Final = "tasks"
"""Name of Celery's own table, as its documentation has it, when ``cassandra_table`` does not say."""
VIEW: Final = "celery_kafka_view"
HISTORY: Final = "celery_kafka_history"
POSITION: Final = "celery_kafka_position"

_OURS: Final = {
    VIEW: """
        subject text, id text, name text, k bigint, event_id text,
        expiry blob static, seen bigint static, pieces set<blob> static, hours set<int> static,
        guard blob, document blob,
        PRIMARY KEY ((subject, id), name, k, event_id)
    ) WITH CLUSTERING ORDER BY (name ASC, k DESC, event_id DESC)""",
    HISTORY: """
        task_id text, hour int, hlc bigint, event_id text,
        kind text, state text, name text, worker text, exception text, at timestamp, expires_at bigint, value blob,
        PRIMARY KEY ((task_id, hour), hlc, event_id)
    )""",
    POSITION: """
        namespace text, topic text, part int, next bigint,
        PRIMARY KEY (namespace, topic, part)
    )""",
}
_CELERYS: Final = """
        task_id text, status text, result blob, date_done timestamp, traceback blob, children blob,
        PRIMARY KEY ((task_id), date_done)
    ) WITH CLUSTERING ORDER BY (date_done DESC)"""


def make(execute: Callable[[str], Any], keyspace: str, native: str, present: Mapping[str, Any]) -> None:
    """Make the tables that are missing.

    Args:
        execute: Runs a statement.
        keyspace: Where.
        native: Name of Celery's own table.
        present: The driver's metadata of the tables that there are.

    Raises:
        SettingsError: A table has not the columns that it must have.
    """
    for table, definition in {**_OURS, native: _CELERYS}.items():
        if table in present:
            check(keyspace, table, definition, present[table])
        else:
            execute(f"CREATE TABLE IF NOT EXISTS {quoted(keyspace)}.{quoted(table)} ({definition}")


def check(keyspace: str, table: str, definition: str, found: Any) -> None:
    """Compare a table with what it must be; more columns that are not part of its key are somebody's own affair.

    Raises:
        SettingsError: It is another one.
    """
    columns, _, rest = definition.partition("PRIMARY KEY")
    wanted = dict(re.findall(r"(\w+) ([\w<>]+)", columns))
    key = re.findall(r"\w+", rest.partition(")\n")[0])
    have = {name: column.cql_type for name, column in found.columns.items()}
    wrong = [
        f"{name} is {have.get(name, 'missing')}, not {kind}" for name, kind in wanted.items() if have.get(name) != kind
    ]
    if [column.name for column in found.primary_key] != key:
        wrong.append(f"the primary key is not ({', '.join(key)})")
    if table not in _OURS and not wrong and not found.clustering_key[0].is_reversed:
        wrong.append("date_done is not in descending order")
    if wrong:
        problem = f"somebody made the table {keyspace}.{table} differently: {'; '.join(wrong)}"
        raise SettingsError("view", problem, "name another table in cassandra_table, or another keyspace")


def quoted(name: str) -> str:
    """Return a name as CQL takes it, case and all."""
    return '"{}"'.format(name.replace('"', '""'))
