"""The options by which `search`, `export` and `findings` choose events: the same words everywhere."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

import click
from celery.states import ALL_STATES

from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.cli.moment import Moment, Span
from celery_kafka_backend.events import KINDS
from celery_kafka_backend.query import Query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_Function = TypeVar("_Function", bound="Callable[..., Any]")

_OPTIONS = (
    click.option("--name", default="", metavar="PATTERN", help="Name of the task: shop.pay, 'shop.*'."),
    click.option(
        "--state", "states", multiple=True, metavar="STATE",
        help="FAILURE, SUCCESS, RETRY …, a state of your own, or a kind of event: sent, worker-lost … May be repeated.",
    ),
    click.option("--worker", default="", metavar="PATTERN", help="Node name of the worker: celery@h1, '*@h1'."),
    click.option("--queue", default="", metavar="PATTERN", help="Queue it was sent to."),
    click.option("--since", type=Moment(), help="Not before: 2026-01-31T03:00, 03:00, 2h."),
    click.option("--until", type=Moment(), help="Before."),
    click.option("--min-duration", "least_s", type=Span(), help="Ran at least so long: 250ms, 10s, 5m."),
    click.option("--max-duration", "most_s", type=Span(), help="Ran at most so long."),
    click.option("--retries", type=click.IntRange(0), default=0, help="At least so many attempts before this one."),
    click.option(
        "--exception", default="", metavar="PATTERN", help="Class: ValueError, 'requests.*', '*Timeout'."
    ),
    click.option("--text", default="", help="Text in the arguments or in the exception's message, in either case."),
    click.option("--root", default="", metavar="ID", help="Of the workflow of this root task."),
    click.option("--group", default="", metavar="ID", help="Of the members of this group or chord."),
)  # fmt: skip

_PLACE = (
    click.option("--view", metavar="VIEW", help="Ask this view: its URL, or scheme or name of a configured one."),
    click.option("--log", "only_log", is_flag=True, help="Read the log, also where a view keeps the history."),
    click.option("--timeout", type=click.FloatRange(min=0.1), default=10.0, help="Seconds that Kafka may take to answer."),
)  # fmt: skip


def filtered(function: _Function) -> _Function:
    """Give a command the options that become a `Query`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def placed(function: _Function) -> _Function:
    """Give a command the options that say where to read."""
    for option in reversed(_PLACE):
        function = option(function)
    return function


def meant(states: Iterable[str]) -> str:
    """Return a question, for a remedy of who found nothing, if a state may be another one's misspelling; else "".

    A state of a user's own is as good as one of Celery's, so that none can be refused.
    """
    known = {*ALL_STATES, *KINDS}
    for state in states:
        if state.upper() not in known and state.lower() not in known:
            close = get_close_matches(state.upper(), ALL_STATES, 1) or get_close_matches(state.lower(), KINDS, 1)
            if close:
                return f"--state {state}: did you mean {close[0]}? Or "
    return ""


def query_of(given: dict[str, Any], *, limit: int = 0, newest_first: bool = False) -> Query:
    """Return the query that the options ask for.

    Raises:
        Stop: It can have no answer.
    """
    since, until = given["since"], given["until"]
    if since is not None and until is not None and since >= until:
        raise Stop(Exit.CONFIGURATION, "--since is not before --until", "exchange them")
    least_s, most_s = given["least_s"], given["most_s"]
    if least_s is not None and most_s is not None and least_s > most_s:
        raise Stop(Exit.CONFIGURATION, "--min-duration is more than --max-duration", "exchange them")
    # A state is in capitals by Celery's custom and a kind is not; nobody should have to know at three in the morning.
    states = dict.fromkeys(word for state in given["states"] for word in (state, state.upper(), state.lower()))
    return Query(**{**given, "states": tuple(states)}, limit=limit, newest_first=newest_first)
