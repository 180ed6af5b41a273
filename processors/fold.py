"""The fold: a batch of events to what it changes in a view. Pure; no I/O, no clock of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery_kafka_backend import events
from celery_kafka_backend.changes import GROUP, TASK, Change, Logged, beats, side_of_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from celery_kafka_backend.events import Event


def fold(batch: Iterable[Logged]) -> list[Change]:
    """Return one change per task and per saved group that the batch speaks of.

    Args:
        batch: Events with the bytes they were read from, in any order, duplicates welcome.

    Returns:
        Changes in order of first appearance; each has the batch's winner by order key, the merged
        side record, and all events for the history.
    """
    tasks: dict[str, list[Logged]] = {}
    groups: dict[str, list[Logged]] = {}
    for logged in batch:
        event = logged.event
        stories = groups if event.kind in events.GROUP_KINDS else tasks
        story = stories.get(event.task)
        if story is None:
            stories[event.task] = [logged]
        else:
            story.append(logged)
    changes = [Change(TASK, task, _winner(story), side_of_all(story), story) for task, story in tasks.items()]
    changes += [Change(GROUP, group, _winner(story), None, story) for group, story in groups.items()]
    return changes


def _winner(story: list[Logged]) -> Event | None:
    winner = None
    for event, _ in story:
        if event.key and (winner is None or beats(event, winner)):
            winner = event
    return winner
