"""Every table and statement of the PostgreSQL store: the guards are here."""

from __future__ import annotations

from typing import Final

SCHEMA_VERSION: Final = 1

TABLES: Final = """
CREATE TABLE IF NOT EXISTS ckb_schema (version integer NOT NULL);

-- What Celery's own SQL backend makes, by SQLAlchemy, so that db+postgresql:// reads it.
CREATE SEQUENCE IF NOT EXISTS task_id_sequence;
CREATE SEQUENCE IF NOT EXISTS taskset_id_sequence;
CREATE TABLE IF NOT EXISTS celery_taskmeta (
  id integer NOT NULL PRIMARY KEY, task_id varchar(155) UNIQUE, status varchar(50), result bytea, date_done timestamp,
  traceback text, children bytea, name varchar(155), args bytea, kwargs bytea, worker varchar(155), retries integer,
  queue varchar(155), stamps bytea
);
-- An older Celery, or one without result_extended, made fewer.
ALTER TABLE celery_taskmeta
  ADD COLUMN IF NOT EXISTS children bytea, ADD COLUMN IF NOT EXISTS name varchar(155),
  ADD COLUMN IF NOT EXISTS args bytea, ADD COLUMN IF NOT EXISTS kwargs bytea,
  ADD COLUMN IF NOT EXISTS worker varchar(155), ADD COLUMN IF NOT EXISTS retries integer,
  ADD COLUMN IF NOT EXISTS queue varchar(155), ADD COLUMN IF NOT EXISTS stamps bytea;
CREATE INDEX IF NOT EXISTS ix_celery_taskmeta_date_done ON celery_taskmeta (date_done);
CREATE TABLE IF NOT EXISTS celery_tasksetmeta (
  id integer NOT NULL PRIMARY KEY, taskset_id varchar(155) UNIQUE, result bytea, date_done timestamp
);
CREATE INDEX IF NOT EXISTS ix_celery_tasksetmeta_date_done ON celery_tasksetmeta (date_done);

-- Ours. Times are ms since 1970; an expiry of 0 is never. Event ids are compared as bytes, hence the collation.
-- One row per task or saved group: k and event_id are the winner's, document is what it shows (until shown_until),
-- the rest is the side record.
CREATE TABLE IF NOT EXISTS ckb_task (
  subject text NOT NULL, id text NOT NULL, k bigint NOT NULL DEFAULT 0, event_id text COLLATE "C" NOT NULL DEFAULT '',
  document bytea, shown_until bigint NOT NULL DEFAULT 0, expires_at bigint NOT NULL, run bigint NOT NULL,
  seen bigint NOT NULL, sent bigint NOT NULL, received bigint NOT NULL, started bigint NOT NULL,
  attempts bigint NOT NULL, workers text NOT NULL, PRIMARY KEY (subject, id)
);
CREATE INDEX IF NOT EXISTS ckb_task_expires_at ON ckb_task (expires_at) WHERE expires_at > 0;
CREATE INDEX IF NOT EXISTS ckb_task_shown_until ON ckb_task (shown_until) WHERE shown_until > 0;
CREATE TABLE IF NOT EXISTS ckb_history (
  task_id text NOT NULL, hlc bigint NOT NULL, event_id text COLLATE "C" NOT NULL, kind text NOT NULL, state text,
  at bigint NOT NULL, value bytea NOT NULL, expires_at bigint NOT NULL, PRIMARY KEY (task_id, hlc, event_id)
);
CREATE INDEX IF NOT EXISTS ckb_history_expires_at ON ckb_history (expires_at) WHERE expires_at > 0;
CREATE TABLE IF NOT EXISTS ckb_chord (
  group_id text NOT NULL, name text NOT NULL, k bigint NOT NULL, value bytea NOT NULL, PRIMARY KEY (group_id, name)
);
CREATE TABLE IF NOT EXISTS ckb_chord_expiry (group_id text NOT NULL PRIMARY KEY, expires_at bigint NOT NULL);
CREATE TABLE IF NOT EXISTS ckb_position (
  namespace text NOT NULL, topic text NOT NULL, partition integer NOT NULL, next bigint NOT NULL,
  PRIMARY KEY (namespace, topic, partition)
);
"""

SIDE: Final = "run, seen, sent, received, started, attempts, workers"
NATIVE: Final = "status, result, date_done, traceback, children, name, args, kwargs, worker, retries, queue, stamps"
_COLUMNS: Final = NATIVE.split(", ")
_TYPES: Final = {"date_done": "timestamp", "retries": "integer"} | dict.fromkeys(
    ("result", "children", "args", "kwargs", "stamps"), "bytea"
)
_VALUES: Final = {each: f"%({each})s::{_TYPES.get(each, 'text')}" for each in _COLUMNS}


def _later(table: str) -> str:
    return (
        f"CASE WHEN least({table}.expires_at, excluded.expires_at) = 0 THEN 0"
        f" ELSE greatest({table}.expires_at, excluded.expires_at) END"
    )


def _earliest(column: str) -> str:
    smaller = f"least(t.{column}, excluded.{column})"
    return f"{column} = CASE WHEN {smaller} = 0 THEN greatest(t.{column}, excluded.{column}) ELSE {smaller} END"


_UNION: Final = (
    "array_to_string(ARRAY(SELECT DISTINCT each FROM unnest(string_to_array(t.workers, E'\\n')"
    " || string_to_array(excluded.workers, E'\\n')) AS each WHERE each <> '' ORDER BY each), E'\\n')"
)
MERGE_SIDE: Final = (
    f"INSERT INTO ckb_task AS t (subject, id, expires_at, {SIDE})"
    " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
    f" ON CONFLICT (subject, id) DO UPDATE SET expires_at = {_later('t')},"
    " run = greatest(t.run, excluded.run), seen = greatest(t.seen, excluded.seen),"
    f" attempts = greatest(t.attempts, excluded.attempts), {_earliest('sent')}, {_earliest('received')},"
    f" {_earliest('started')}, workers = CASE WHEN t.workers = excluded.workers THEN t.workers ELSE {_UNION} END"
)
# A row of Celery's own, beside no key of ours: its SUCCESS stays, unless we forget.
WIN: Final = (
    "UPDATE ckb_task SET k = %(k)s, event_id = %(e)s, document = %(document)s, shown_until = %(until)s"
    ' WHERE subject = %(subject)s AND id = %(id)s::text AND (k, event_id) < (%(k)s, %(e)s COLLATE "C")'
    " AND (k > 0 OR %(document)s::bytea IS NULL OR subject <> 'task'"
    " OR NOT EXISTS (SELECT 1 FROM celery_taskmeta n WHERE n.task_id = %(id)s::text AND n.status = 'SUCCESS'))"
)
_WINS: Final = "EXISTS (SELECT 1 FROM ckb_task WHERE subject = %(subject)s AND id = %(id)s::text AND k = %(k)s AND event_id = %(e)s)"
# First the row that is there: an upsert would use up a number of Celery's integer ids each time.
RENEW_TASK: Final = (
    f"UPDATE celery_taskmeta SET {', '.join(f'{each} = {value}' for each, value in _VALUES.items())}"
    f" WHERE task_id = %(id)s::text AND {_WINS}"
)
SHOW_TASK: Final = (
    f"INSERT INTO celery_taskmeta (id, task_id, {NATIVE})"
    f" SELECT nextval('task_id_sequence'), %(id)s::text, {', '.join(_VALUES.values())}"
    f" WHERE {_WINS} AND NOT EXISTS (SELECT 1 FROM celery_taskmeta WHERE task_id = %(id)s::text)"
    " ON CONFLICT (task_id) DO NOTHING"
)
RENEW_GROUP: Final = f"UPDATE celery_tasksetmeta SET result = %(result)s::bytea, date_done = %(date_done)s::timestamp WHERE taskset_id = %(id)s::text AND {_WINS}"
SHOW_GROUP: Final = (
    "INSERT INTO celery_tasksetmeta (id, taskset_id, result, date_done)"
    " SELECT nextval('taskset_id_sequence'), %(id)s::text, %(result)s::bytea, %(date_done)s::timestamp"
    f" WHERE {_WINS} AND NOT EXISTS (SELECT 1 FROM celery_tasksetmeta WHERE taskset_id = %(id)s::text)"
    " ON CONFLICT (taskset_id) DO NOTHING"
)
HIDE_TASK: Final = f"DELETE FROM celery_taskmeta WHERE task_id = %(id)s::text AND {_WINS}"
HIDE_GROUP: Final = f"DELETE FROM celery_tasksetmeta WHERE taskset_id = %(id)s::text AND {_WINS}"
LOG: Final = "INSERT INTO ckb_history VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
FACT: Final = (
    "INSERT INTO ckb_chord AS c VALUES (%s, %s, %s, %s) ON CONFLICT (group_id, name)"
    " DO UPDATE SET k = excluded.k, value = excluded.value WHERE excluded.k > c.k"
)
FACT_EXPIRY: Final = (
    f"INSERT INTO ckb_chord_expiry AS c VALUES (%s, %s) ON CONFLICT (group_id) DO UPDATE SET expires_at = {_later('c')}"
)
POSITION: Final = (
    "INSERT INTO ckb_position AS p VALUES (%s, %s, %s, %s) ON CONFLICT (namespace, topic, partition)"
    " DO UPDATE SET next = greatest(p.next, excluded.next)"
)

# -- what has expired: of given ids, and a bounded number of rows ----------------------------------

_DEAD: Final = "(expires_at BETWEEN 1 AND %(now)s OR shown_until BETWEEN 1 AND %(now)s)"
EXPIRED: Final = f"SELECT subject, id FROM ckb_task WHERE {_DEAD} LIMIT %(limit)s"
_THIS: Final = "subject = %(subject)s AND id = %(id)s::text"
BURY: Final = (
    (
        "DELETE FROM celery_taskmeta WHERE task_id = %(id)s::text AND EXISTS"
        f" (SELECT 1 FROM ckb_task WHERE {_THIS} AND subject = 'task' AND document IS NOT NULL AND {_DEAD})"
    ),
    (
        "DELETE FROM celery_tasksetmeta WHERE taskset_id = %(id)s::text AND EXISTS"
        f" (SELECT 1 FROM ckb_task WHERE {_THIS} AND subject = 'group' AND document IS NOT NULL AND {_DEAD})"
    ),
    f"DELETE FROM ckb_task WHERE {_THIS} AND expires_at BETWEEN 1 AND %(now)s",
    f"UPDATE ckb_task SET document = NULL, shown_until = 0 WHERE {_THIS} AND shown_until BETWEEN 1 AND %(now)s",
)
SWEEP_HISTORY: Final = (
    "DELETE FROM ckb_history WHERE ctid IN"
    " (SELECT ctid FROM ckb_history WHERE expires_at BETWEEN 1 AND %(now)s LIMIT %(limit)s)"
)
EXPIRED_CHORDS: Final = "SELECT group_id FROM ckb_chord_expiry WHERE expires_at BETWEEN 1 AND %(now)s LIMIT %(limit)s"
BURY_CHORD: Final = (
    (
        "DELETE FROM ckb_chord WHERE group_id = %(id)s::text AND EXISTS"
        " (SELECT 1 FROM ckb_chord_expiry WHERE group_id = %(id)s::text AND expires_at BETWEEN 1 AND %(now)s)"
    ),
    "DELETE FROM ckb_chord_expiry WHERE group_id = %(id)s::text AND expires_at BETWEEN 1 AND %(now)s",
)

# -- reading ---------------------------------------------------------------------------------------

_ALIVE: Final = "expires_at NOT BETWEEN 1 AND %(now)s"
_SHOWN: Final = f"document IS NOT NULL AND shown_until NOT BETWEEN 1 AND %(now)s AND {_ALIVE}"
READ: Final = (
    f"SELECT id, k, event_id, document, shown_until, expires_at, {SIDE} FROM ckb_task"
    f" WHERE subject = 'task' AND id = ANY(%(ids)s) AND {_ALIVE}"
)
# Beside a key of ours, also one that has expired and waits to be swept, the row is ours.
READ_STOCK: Final = (
    f"SELECT task_id, {NATIVE} FROM celery_taskmeta n WHERE task_id = ANY(%(ids)s)"
    " AND NOT EXISTS (SELECT 1 FROM ckb_task WHERE subject = 'task' AND id = n.task_id AND k > 0)"
)
READ_GROUPS: Final = f"SELECT id, document FROM ckb_task WHERE subject = 'group' AND id = ANY(%(ids)s) AND {_SHOWN}"
READ_STOCK_GROUPS: Final = (
    "SELECT taskset_id, result FROM celery_tasksetmeta n WHERE taskset_id = ANY(%(ids)s)"
    " AND NOT EXISTS (SELECT 1 FROM ckb_task WHERE subject = 'group' AND id = n.taskset_id)"
)
READ_HISTORY: Final = f"SELECT value FROM ckb_history WHERE task_id = %(id)s::text AND {_ALIVE} ORDER BY hlc, event_id"
READ_CHORD: Final = f"SELECT name, value FROM ckb_chord JOIN ckb_chord_expiry USING (group_id) WHERE group_id = %(id)s::text AND {_ALIVE}"
READ_POSITIONS: Final = "SELECT topic, partition, next FROM ckb_position WHERE namespace = %(namespace)s"

BESIDE: Final = {"task": _COLUMNS, "group": ["result", "date_done"]}
"""Celery's own columns, by subject."""
_BESIDE_ID: Final = {"task": "celery_taskmeta n ON n.task_id", "group": "celery_tasksetmeta n ON n.taskset_id"}
ROWS_DOCUMENT: Final = {
    subject: (
        f"SELECT o.id, o.document, o.shown_until, o.event_id, {', '.join(f'n.{each}' for each in BESIDE[subject])}"
        f" FROM ckb_task o LEFT JOIN {native} = o.id WHERE o.subject = '{subject}' AND {_SHOWN}"
    )
    for subject, native in _BESIDE_ID.items()
}
ROWS_SIDE: Final = f"SELECT subject, id, k, event_id, expires_at, {SIDE} FROM ckb_task WHERE {_ALIVE}"
ROWS_HISTORY: Final = (
    f"SELECT task_id, hlc, event_id, value, expires_at, kind, state, at FROM ckb_history WHERE {_ALIVE}"
)
ROWS_CHORD: Final = (
    f"SELECT group_id, name, k, value, expires_at FROM ckb_chord JOIN ckb_chord_expiry USING (group_id) WHERE {_ALIVE}"
)
