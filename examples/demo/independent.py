"""Compare two SQLite views, sharing no code with what wrote them: only sqlite3, and a short list of what not to compare.

    python independent.py live.sqlite copy.sqlite

Every table that either file has is compared, every row and every column, as multisets of rows: whatever this program
has not heard of counts. Exit code 0 if they are equal, 1 if not, 2 if a file cannot be read.
"""

import sqlite3
import sys
from collections import Counter
from pathlib import Path

NOT_COMPARED_TABLES = {
    "ckb_position": "bookkeeping: how far each view has read; a copy need not read in the same order",
    "sqlite_sequence": "SQLite's own: the next row number",
}
NOT_COMPARED_COLUMNS = {
    ("celery_taskmeta", "id"): "row number: the order in which rows happened to be written",
    ("celery_tasksetmeta", "id"): "row number, likewise",
}


def tables_of(connection):
    """Return the names of all tables but those not compared."""
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return {name for (name,) in rows if name not in NOT_COMPARED_TABLES}


def columns_of(connection, table):
    """Return a table's columns but those not compared."""
    rows = connection.execute(f'PRAGMA table_info("{table}")')
    return [row[1] for row in rows if (table, row[1]) not in NOT_COMPARED_COLUMNS]


def rows_of(connection, table, columns):
    """Return a table's rows as a multiset; each value with its type, for SQLite says 1 = 1.0."""
    listed = ", ".join(f'"{column}"' for column in columns)
    found = Counter()
    for row in connection.execute(f'SELECT {listed} FROM "{table}"'):
        found[tuple((type(value).__name__, value) for value in row)] += 1
    return found


def compare(left, right):
    """Return the number of rows and of values compared, and a line for each difference found."""
    differences, rows, values = [], 0, 0
    with Opened(left) as one, Opened(right) as other:
        for connection, path in ((one, left), (other, right)):
            if not tables_of(connection):
                differences.append(f"{path} has no tables")
        for table in sorted(tables_of(one) | tables_of(other)):
            columns = columns_of(one, table)
            if sorted(columns) != sorted(columns_of(other, table)):
                differences.append(f"{table}: columns {columns} here, {columns_of(other, table)} there")
                continue
            here, there = rows_of(one, table, columns), rows_of(other, table, columns)
            rows += max(sum(here.values()), sum(there.values()))
            values += max(sum(here.values()), sum(there.values())) * len(columns)
            differences += explained(table, columns, here - there, there - here)
    return rows, values, differences


def explained(table, columns, only_here, only_there):
    """Return a line for each row that only one side has; two that begin alike are shown as one that differs."""
    lines = []
    there = {row[0]: row for row in only_there}
    for row in only_here:
        partner = there.pop(row[0], None)
        if partner is None:
            lines.append(f"{table}: {row[0][1]!r} is only in the first")
            continue
        for column, mine, theirs in zip(columns, row, partner, strict=True):
            if mine != theirs:
                lines.append(
                    f"{table}: {row[0][1]!r}: {column} is {mine[1]!r:.80} in the first, {theirs[1]!r:.80} in the second"
                )
    lines += [f"{table}: {key[1]!r} is only in the second" for key in there]
    return lines or ([f"{table}: rows differ"] if only_here or only_there else [])


class Opened:
    """A database file, read only; it must exist."""

    def __init__(self, path):
        self.path = Path(path).resolve()

    def __enter__(self):
        self.connection = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)
        self.connection.execute("BEGIN")
        return self.connection

    def __exit__(self, *_):
        self.connection.close()


def main(left, right):
    try:
        rows, values, differences = compare(left, right)
    except sqlite3.Error as error:
        print(f"cannot read: {error}")
        return 2
    for line in differences[:20]:
        print(line)
    for name, reason in NOT_COMPARED_TABLES.items():
        print(f"not compared: {name} ({reason})")
    for (table, column), reason in NOT_COMPARED_COLUMNS.items():
        print(f"not compared: {table}.{column} ({reason})")
    print(f"{rows} rows, {values} values compared: {len(differences)} differences")
    return 1 if differences else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: independent.py FIRST.sqlite SECOND.sqlite")
    sys.exit(main(sys.argv[1], sys.argv[2]))
