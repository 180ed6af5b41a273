"""The fold: a batch of events to what it changes in a view. Pure; no I/O, no clock of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery_kafka_backend import events
from celery_kafka_backend.changes import GROUP, TASK, Change, Logged, beats, merge_sides, side_of

if TYPE_CHECKING:
    from collections.abc import Iterable


def fold(batch: Iterable[Logged]) -> list[Change]:
    """Return one change per task and per saved group that the batch speaks of.

    Args:
        batch: Events with the bytes they were read from, in any order, duplicates welcome.

    Returns:
        Changes in order of first appearance; each has the batch's winner by order key, the merged
        side record, and all events for the history.
    """
    tasks: dict[str, Change] = {}
    groups: dict[str, Change] = {}
    for logged in batch:
        event = logged.event
        is_group = event.kind in events.GROUP_KINDS
        changes = groups if is_group else tasks
        side = None if is_group else side_of(event)
        found = changes.get(event.task)
        if found is None:
            changes[event.task] = Change(
                subject=GROUP if is_group else TASK,
                id=event.task,
                winner=event if event.key else None,
                side=side,
                history=[logged],
            )
            continue
        found.history.append(logged)
        if event.key and (found.winner is None or beats(event, found.winner)):
            found.winner = event
        if side is not None and found.side is not None:
            found.side = merge_sides(found.side, side)
    return [*tasks.values(), *groups.values()]
