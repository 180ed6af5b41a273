"""The insight view: rows of figures by minute and task name, in the store of a view. Redis and SQLite have it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from celery_kafka_backend.errors import SettingsError
from celery_kafka_backend.settings import mask

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from celery_kafka_backend.sinks.contract import StoreOptions

KEPT_S: Final = 3 * 3_600
"""How long a row is kept after its last write."""


class MinuteRow(NamedTuple):
    """Figures of one task name in one minute.

    Attributes:
        minute: Minutes since 1970.
        task: The name.
        version: Grows with what is counted: a row is never replaced by one with a smaller version.
        value: The cells, encoded; opaque to the store.
    """

    minute: int
    task: str
    version: int
    value: bytes


class InsightStore(ABC):
    """Both sides: the insight processor writes, `top` and the metrics read. Errors as in `contract`."""

    @abstractmethod
    def open(self) -> None:
        """Get ready to write; called before `write`, and again after `Unavailable`. Readers need not."""

    @abstractmethod
    def write(self, rows: Sequence[MinuteRow], at_ms: int, writer: str) -> int:
        """Put rows, each unless a later one is there, and when that was.

        Args:
            rows: The rows.
            at_ms: Now, ms since 1970.
            writer: Which processor writes.

        Returns:
            The ``at_ms`` of that writer's last write, as the store has it; 0: it has none. Where that is not what the
            writer knows, the store was emptied, or has gone back: all that was put before is to be put again.
        """

    @abstractmethod
    def read(self, minutes: Iterable[int]) -> list[MinuteRow]:
        """Return the rows of some minutes."""

    @abstractmethod
    def written_at(self) -> int:
        """Return when somebody last wrote, ms since 1970; 0: never."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the store."""


_STORES: Final = {
    "redis": "insight_redis",
    "rediss": "insight_redis",
    "sentinel": "insight_redis",
    "sqlite": "insight_sqlite",
}


def insight_url(views: Sequence[str]) -> str:
    """Return the first of some views that can hold insight.

    Raises:
        SettingsError: None can.
    """
    for url in views:
        if url.partition("://")[0].lower() in _STORES:
            return url
    shown = ", ".join(map(mask, views))
    raise SettingsError("views", f"none of {shown} can hold insight", "add a redis:// or sqlite:/// view")


def open_insight(url: str, options: StoreOptions) -> InsightStore:
    """Return a store of insight; nothing is connected yet."""
    module = import_module(f"{__package__}.{_STORES[url.partition('://')[0].lower()]}")
    return cast("InsightStore", module.store(url, options))
