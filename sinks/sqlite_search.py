"""A search of the history as SQL: by the index on time, everything else from within the recorded events. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery_kafka_backend.query import Query


def search_condition(query: Query) -> tuple[str, tuple[Any, ...]]:
    """Return what narrows a search down, as the condition of a WHERE and its values; text is left to `Query.matches`."""
    found = list(_conditions(query))
    return " AND ".join(["1", *(condition for condition, _ in found)]), tuple(v for _, values in found for v in values)


def _conditions(query: Query) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if query.since is not None:
        yield "at >= ?", (query.since,)
    if query.until is not None:
        yield "at < ?", (query.until,)
    if query.states:
        marks = ", ".join("?" * len(query.states))
        yield f"(state IN ({marks}) OR kind IN ({marks}))", query.states * 2
    for field, pattern in (("name", query.name), ("worker", query.worker), ("queue", query.queue)):
        if pattern:
            yield f"{_field(field)} GLOB ?", (_glob(pattern),)
    if query.exception:
        pattern = _glob(query.exception)
        yield f"({_field('exception')} GLOB ? OR {_field('exception')} GLOB ?)", (pattern, f"*.{pattern}")
    for field, value in (("root", query.root), ("group", query.group)):
        if value:
            yield f"(task_id = ? OR {_field(field)} = ?)", (value, value)
    if query.retries:
        yield f"{_field('attempt')} >= ?", (query.retries,)
    if query.least_s is not None:
        yield f"{_field('runtime_s')} >= ?", (query.least_s,)
    if query.most_s is not None:
        yield f"{_field('runtime_s')} <= ?", (query.most_s,)


def _field(name: str) -> str:
    return f"json_extract(CAST(value AS TEXT), '$.{name}')"


def _glob(pattern: str) -> str:
    return pattern.replace("[", "[[]")
