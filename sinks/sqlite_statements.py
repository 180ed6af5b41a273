"""Every statement that the SQLite store writes with: the guards are here. Tables are in sqlite.sql."""

# ruff: noqa: S608 - put together from the constants of this file

from __future__ import annotations

from typing import Final

SIDE_COLUMNS: Final = "run, seen, sent, received, started, attempts, workers"
NATIVE: Final = "status, result, date_done, traceback, children, name, args, kwargs, worker, retries, queue, stamps"

LATER: Final = "CASE WHEN min(expires_at, excluded.expires_at) = 0 THEN 0 ELSE max(expires_at, excluded.expires_at) END"


def _earliest(column: str) -> str:
    smaller = f"min({column}, excluded.{column})"
    return f"{column} = CASE WHEN {smaller} = 0 THEN max({column}, excluded.{column}) ELSE {smaller} END"


MERGE_SIDE: Final = (
    f"INSERT INTO ckb_task (task_id, expires_at, {SIDE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    f" ON CONFLICT (task_id) DO UPDATE SET expires_at = {LATER},"
    " run = max(run, excluded.run), seen = max(seen, excluded.seen), attempts = max(attempts, excluded.attempts),"
    f" {_earliest('sent')}, {_earliest('received')}, {_earliest('started')},"
    " workers = CASE WHEN workers = excluded.workers THEN workers ELSE ckb_union(workers, excluded.workers) END"
)
MERGE_GROUP: Final = (
    "INSERT INTO ckb_group (task_id, expires_at) VALUES (?, ?)"
    f" ON CONFLICT (task_id) DO UPDATE SET expires_at = {LATER}"
)
# A row of Celery's own, beside no key of ours: its SUCCESS stays, unless we forget.
WIN_TASK: Final = (
    "UPDATE ckb_task SET k = :k, event_id = :e, document = :document, shown_until = :until"
    " WHERE task_id = :id AND (k, event_id) < (:k, :e) AND (k > 0 OR :document IS NULL"
    " OR NOT EXISTS (SELECT 1 FROM celery_taskmeta n WHERE n.task_id = :id AND n.status = 'SUCCESS'))"
)
WIN_GROUP: Final = (
    "UPDATE ckb_group SET k = :k, event_id = :e, document = :document, shown_until = :until"
    " WHERE task_id = :id AND (k, event_id) < (:k, :e)"
)
SHOW_TASK: Final = (
    f"INSERT INTO celery_taskmeta (task_id, {NATIVE}) SELECT ?, {', '.join('?' * 12)}"
    " WHERE EXISTS (SELECT 1 FROM ckb_task WHERE task_id = ? AND k = ? AND event_id = ?)"
    f" ON CONFLICT (task_id) DO UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in NATIVE.split(', '))}"
)
SHOW_GROUP: Final = (
    "INSERT INTO celery_tasksetmeta (taskset_id, result, date_done) SELECT ?, ?, ?"
    " WHERE EXISTS (SELECT 1 FROM ckb_group WHERE task_id = ? AND k = ? AND event_id = ?)"
    " ON CONFLICT (taskset_id) DO UPDATE SET result = excluded.result, date_done = excluded.date_done"
)
HIDE_TASK: Final = (
    "DELETE FROM celery_taskmeta WHERE task_id = ?"
    " AND EXISTS (SELECT 1 FROM ckb_task WHERE task_id = ? AND k = ? AND event_id = ?)"
)
HIDE_GROUP: Final = (
    "DELETE FROM celery_tasksetmeta WHERE taskset_id = ?"
    " AND EXISTS (SELECT 1 FROM ckb_group WHERE task_id = ? AND k = ? AND event_id = ?)"
)
LOG: Final = "INSERT OR IGNORE INTO ckb_history VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
FACT: Final = (
    "INSERT INTO ckb_chord VALUES (?, ?, ?, ?) ON CONFLICT (group_id, name)"
    " DO UPDATE SET k = excluded.k, value = excluded.value WHERE excluded.k > k"
)
FACT_EXPIRY: Final = (
    f"INSERT INTO ckb_chord_expiry VALUES (?, ?) ON CONFLICT (group_id) DO UPDATE SET expires_at = {LATER}"
)
POSITION: Final = (
    "INSERT INTO ckb_position VALUES (?, ?, ?)"
    " ON CONFLICT (topic, partition) DO UPDATE SET next = max(next, excluded.next)"
)
