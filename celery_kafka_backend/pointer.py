"""The cut-over pointer: which of the configured views readers of ours read. Pure: no I/O.

It is kept in every view, among the positions: a position is a number under a name, which every store keeps, never lets
go back, and leaves out of dump, replay and verify. The name says which view, the number since when; the latest counts,
and those before it tell where readers came from. A view is named as its consumer group is (`topics.view_name`), which
holds no credentials: each reader finds the name among the views that it is configured with. docs/adr/0024 has the reasons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from celery_kafka_backend.changes import Partition

if TYPE_CHECKING:
    from collections.abc import Mapping

_PLACE: Final = "/primary/"
"""Between topic prefix and view: no topic's name holds a slash."""


class Pointer(NamedTuple):
    """Where readers are to be.

    Attributes:
        view: The view's name.
        at: Since when, ms since 1970.
        forced: They go there even if it shows less than the one they leave.
    """

    view: str
    at: int
    forced: bool = False


def position(prefix: str, pointer: Pointer) -> dict[Partition, int]:
    """Return the position that a sink is to write."""
    return {Partition(prefix + _PLACE + pointer.view, 0): pointer.at << 1 | pointer.forced}


def is_pointer(at: Partition) -> bool:
    """Return whether this position is a cut-over's, and none of the view's own."""
    return _PLACE in at.topic


def pointers(prefix: str, positions: Mapping[Partition, int]) -> list[Pointer]:
    """Return all pointers that a view holds of a pipeline, the latest first."""
    place = prefix + _PLACE
    found = [
        Pointer(at.topic.removeprefix(place), value >> 1, bool(value & 1))
        for at, value in positions.items()
        if at.topic.startswith(place)
    ]
    return sorted(found, key=lambda one: one.at, reverse=True)
