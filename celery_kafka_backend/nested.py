"""A group in a group: Celery's ``join_native`` waits for its members without a timeout, here they get what is left of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from celery_kafka_backend import older

if TYPE_CHECKING:
    from collections.abc import Iterator


class NestedGroups(older.AsyncBackendMixin):  # type: ignore[misc]
    """The part of `backend.KafkaBackend` that waits for groups in time."""

    def iter_native(self, result: Any, timeout: float | None = None, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Yield what there is of each member as it ends, of a group in a group its members, at once."""
        found = super().iter_native(result, timeout=timeout, **kwargs)
        if timeout is None:
            yield from found
            return
        until = time.monotonic() + timeout
        for task_id, meta in found:
            yield task_id, [_InTime(member, until) for member in meta] if isinstance(meta, list) else meta


class _InTime:
    """A result whose ``get`` ends with the wait for the group around it."""

    def __init__(self, result: Any, until: float) -> None:
        self._result = result
        self._until = until

    def get(self, timeout: float | None = None, **kwargs: Any) -> Any:
        """As the result's own, which it is in all else."""
        left = max(self._until - time.monotonic(), 0.0)
        return self._result.get(timeout=left if timeout is None else min(timeout, left), **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._result, name)
