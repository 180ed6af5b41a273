"""Chords that Celery's own backend for the primary view counts, in that store: a fleet that is being switched has both kinds.

A chord is of one kind for all its life, the one that it was begun as: declared in Kafka, or not. This process begins its
chords here with ``chords = "view"``, and finishes here whatever was not declared in Kafka, however it is set.
docs/switching.md has the steps that make every chord meet only workers who can count it.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

from celery import states
from celery.app import backends
from celery.app.task import Context
from celery.utils.log import get_logger

from celery_kafka_backend import events
from celery_kafka_backend.errors import Unavailable, Unsure
from celery_kafka_backend.producer import headers as names
from celery_kafka_backend.producer.members import last_tasks
from celery_kafka_backend.producer.recorder import current_request, field
from celery_kafka_backend.producer.stubs import is_declared
from celery_kafka_backend.reads import PARENT_WAIT_S
from celery_kafka_backend.writes import Writes

if TYPE_CHECKING:
    from celery import Celery

logger = get_logger(__name__)

COUNTING: Final = frozenset({"redis", "rediss", "sentinel"})
"""Schemes of the stores that count chords; with any other one Celery sends a task that polls until all members are done."""


class StockChords(Writes):
    """The part of `backend.KafkaBackend` for chords that are not in Kafka."""

    @cached_property
    def _counter(self) -> Any:
        """Celery's own backend for the primary view, None if that does not count chords. One per process."""
        url = self.settings.views[0]
        if url.partition("://")[0] not in COUNTING:
            return None
        found = _counters.get((id(self.app), url))
        if found is None:
            found = _counters[id(self.app), url] = _counter(self.app, url)
        return found

    def _apply_stock_chord(self, header_result_args: tuple[Any, ...], body: Any, **options: Any) -> None:
        # Applied before, while chords were begun in Kafka: as such it would be waited for there.
        self.recorder.generations.pop(header_result_args[0], None)
        body.options.pop(names.GENERATION, None)
        body.options.pop(names.DEADLINE, None)  # Celery's own have none
        counting: Any = super() if self._counter is None else self._counter
        counting.apply_chord(header_result_args, body, **options)

    def _set_stock_chord_size(self, group_id: str, chord_size: int) -> None:
        # Of a group inside a chord in Kafka nobody will ask: its size is part of that one's.
        around = field(current_request(), "chord")
        mine = self.settings.chords == "view" or (around is not None and not is_declared(around))
        if mine and self._counter is not None:
            self._counter.set_chord_size(group_id, chord_size)

    def _add_to_stock_chord(self, group_id: str, result: Any) -> None:
        counting: Any = super() if self._counter is None else self._counter
        counting.add_to_chord(group_id, result)

    def _count_stock_part(self, request: Any, state: str, result: Any) -> None:
        """Count a member whose state is stored already: a task that polls for it reads that, else the store counts."""
        task_id, group_id = field(request, "id"), field(request, "group")
        counter = self._counter
        if counter is None or not (task_id and group_id and field(request, "chord")):
            return
        if self.reader.groups([group_id]):  # saved with the chord, because its header is nested
            self._wait_until_shown(task_id)
        self._here.counting = True
        try:
            # Again while the store blinks: the parts are a set.
            counter.ensure(partial(counter.on_chord_part_return, request, state, result), ())
        finally:
            self._here.counting = False

    def _wait_until_shown(self, task_id: str) -> None:
        """Let a view that lags catch up: who completes a chord of groups reads its members' results there, for seconds only."""
        in_parent = self.recorder.role == events.PARENT
        bound_s = PARENT_WAIT_S if in_parent else self.settings.delivery_timeout_s
        try:
            if self.barrier.caught_up([task_id], self.reader.positions, bound_s):
                return
            problem = f"not within {bound_s:g} s"
        except (Unsure, Unavailable) as exc:
            problem = str(exc)
        logger.warning(
            "the view does not show the result of %s yet, which a chord is about to read (%s): does a processor run?",
            task_id, problem,
        )  # fmt: skip

    def _group_document(self, group_id: str) -> bytes | None:
        """Return a saved group; that of a chord counted here was written into the store itself, not into the log."""
        if self._here.counting:
            return self.reader.groups([group_id]).get(group_id)
        return super()._group_document(group_id)


def _counter(app: Celery, url: str) -> Any:
    cls, url = backends.by_url(url, app.loader)

    class Counter(cls):  # type: ignore[misc,valid-type]
        """Counts, and fails what does not complete."""

        def chord_error_from_stack(self, callback: Any, exc: Any = None) -> Any:
            """Fail the body; and the chord in Kafka that it is a member of, which would wait for ever."""
            for task in last_tasks(callback):
                options = task.get("options") or {}
                if is_declared(options.get("chord")) and options.get("group_id"):
                    member = Context(options, id=options.get("task_id"), group=options["group_id"])
                    app.backend.on_chord_part_return(member, states.FAILURE, exc)
            return super().chord_error_from_stack(callback, exc)

    return Counter(app=app, url=url)


_counters: Final[dict[tuple[int, str], Any]] = {}
