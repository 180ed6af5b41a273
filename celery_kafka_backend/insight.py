"""Reading insight: what the fleet does now, by task name, queue or worker.

::

    from celery_kafka_backend.insight import insight_of

    for one in insight_of(app).window("5m", by="queue"):
        print(one.name, one.rates.get("success", 0), one.run.p95, one.in_flight)

Needs the extra ``insight``. Reads the view only; no Kafka.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from celery_kafka_backend.configure import settings_of, store_options
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.partials import Cell
from celery_kafka_backend.sinks.insight import insight_url, open_insight
from celery_kafka_backend.windows import WINDOWS, Dimension, Figures, figures, needed

if TYPE_CHECKING:
    from celery import Celery

    from celery_kafka_backend.sinks.insight import InsightStore

_cells = msgspec.json.Decoder(list[Cell])


class Insight:
    """Reads the insight view.

    Args:
        store: The view.
    """

    def __init__(self, store: InsightStore) -> None:
        self._store = store

    def window(
        self,
        window: str = "1m",
        *,
        by: Dimension = "task",
        task: str | None = None,
        queue: str | None = None,
        worker: str | None = None,
        at_ms: int | None = None,
    ) -> list[Figures]:
        """Return a window's figures, one for each task name (or queue, or worker) that did something, by name.

        Args:
            window: ``1m``, ``5m`` or ``1h``.
            by: For what each.
            task: Only of this task name.
            queue: Only in this queue.
            worker: Only on this worker.
            at_ms: When, ms since 1970; now by default.

        Raises:
            Unavailable: The view is away, or nobody has written insight yet.
        """
        at = system_wall_ms() if at_ms is None else at_ms
        given: dict[Dimension, str | None] = {"task": task, "queue": queue, "worker": worker}
        only = {dimension: name for dimension, name in given.items() if name is not None}
        return figures(self.rows(window, at), WINDOWS[window], at, by, only)

    def rows(self, window: str, at_ms: int) -> list[tuple[int, str, list[Cell]]]:
        """Return what a window is made of, by `windows.figures`: minute, task name and cells. So is any shorter one.

        Raises:
            Unavailable: As `window`.
        """
        found = self._store.read(needed(WINDOWS[window], at_ms))
        return [(row.minute, row.task, _cells.decode(row.value)) for row in found]

    def written_at(self) -> int:
        """Return when the insight processor last wrote, ms since 1970; 0: never.

        Raises:
            Unavailable: As `window`.
        """
        return self._store.written_at()

    def close(self) -> None:
        """Let go of the view."""
        self._store.close()


def insight_of(app: Celery) -> Insight:
    """Return the insight of an app.

    Raises:
        ImproperlyConfigured: Its settings are wrong, or none of its views can hold insight.
    """
    settings = settings_of(app)
    url = insight_url(settings.views)
    return Insight(open_insight(url, store_options(app, settings, url)))
