"""What an audit asks of a history: one frozen value, the same for every store and for the log. Pure.

`Query.matches` is the meaning. A store narrows down what it can by its own means, and whatever it hands back is
matched once more, so that every store gives the same answer.
"""

from __future__ import annotations

import re
import string
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from celery_kafka_backend.events import Event

_LOWER: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """Which events. Everything that is set must hold; an event that lacks a fact does not match a filter on it.

    In patterns ``*`` stands for any text and ``?`` for one character; everything else for itself, case included.

    Attributes:
        name: Pattern of the task's name.
        states: Names of states (``FAILURE``, or one of the task's own) and kinds of events (``worker-lost``): any of them.
        worker: Pattern of the worker's node name.
        queue: Pattern of the queue.
        exception: Pattern of the exception's class, dotted (``requests.*``) or its last part (``ConnectionError``).
        text: Text within the arguments, as JSON, or the exception's message; ASCII letters in either case.
        root: Id of the first task of a workflow: it, and all of it.
        group: Id of a group: its members, and what was said of itself.
        since: Not before, ms since 1970, by the wall clock of the process that says so.
        until: Before.
        least_s: Ran at least so long, seconds.
        most_s: Ran at most so long.
        retries: At least so many attempts before this one.
        limit: At most so many events; 0: all.
        newest_first: With a limit the newest, newest first; else the oldest, oldest first.
    """

    name: str = ""
    states: tuple[str, ...] = ()
    worker: str = ""
    queue: str = ""
    exception: str = ""
    text: str = ""
    root: str = ""
    group: str = ""
    since: int | None = None
    until: int | None = None
    least_s: float | None = None
    most_s: float | None = None
    retries: int = 0
    limit: int = 0
    newest_first: bool = False

    def matches(self, event: Event) -> bool:
        """Return whether an event is one of those, whatever the limit."""
        return (
            (self.since is None or event.at >= self.since)
            and (self.until is None or event.at < self.until)
            and (not self.states or event.state in self.states or event.kind in self.states)
            and (not self.root or self.root in (event.root, event.task))
            and (not self.group or self.group in (event.group, event.task))
            and event.attempt >= self.retries
            and (self.least_s is None or (event.runtime_s is not None and event.runtime_s >= self.least_s))
            and (self.most_s is None or (event.runtime_s is not None and event.runtime_s <= self.most_s))
            and like(self.name, event.name)
            and like(self.worker, event.worker)
            and like(self.queue, event.queue)
            and (like(self.exception, event.exception) or like(f"*.{self.exception}", event.exception))
            and (not self.text or _lower(self.text) in _lower(_texts(event)))
        )


def like(pattern: str, value: str | None) -> bool:
    """Return whether a value is as a pattern says; none is needed where there is no pattern."""
    return not pattern or (value is not None and _compiled(pattern).fullmatch(value) is not None)


@lru_cache(64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(expression(pattern), re.DOTALL)


def expression(pattern: str) -> str:
    """Return a pattern as a regular expression, which is to match from start to end."""
    return re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")


def _lower(text: str) -> str:
    return text.translate(_LOWER)


def _texts(event: Event) -> str:
    return "\n".join(_text(each) for each in (event.args, event.kwargs, event.message) if each is not None)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
