"""Who does what is recorded, and why: the options of every command that changes something."""

from __future__ import annotations

import getpass
import socket
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from celery_kafka_backend.cli.exits import Exit, Stop

if TYPE_CHECKING:
    from collections.abc import Callable

    _Function = TypeVar("_Function", bound="Callable[..., Any]")

REASON_LIMIT: Final = 1_000

_OPTIONS = (
    click.option("--reason", default="", help="Why, for those who read the record. Required."),
    click.option("--actor", default="", help="Who asks. Default: user@host."),
    click.option("--dry-run", is_flag=True, help="Change nothing; say what would be done."),
    click.option("--yes", is_flag=True, help="Do not ask."),
)


def recorded(function: _Function) -> _Function:
    """Give a command the options that say who, why, and whether really."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def who() -> str:
    """Return who types this: ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in many containers
        user = "?"
    return f"{user}@{socket.gethostname()}"


def checked(reason: str, what: str) -> str:
    """Return a reason as it is recorded.

    Raises:
        Stop: There is none.
    """
    if not reason.strip():
        raise Stop(Exit.CONFIGURATION, f"{what} needs --reason", "say why: it is kept, and shown to whoever looks")
    return reason.strip()[:REASON_LIMIT]


def sure(question: str) -> None:
    """Ask, or tell who cannot be asked how to answer beforehand.

    Raises:
        Stop: There is nobody to ask.
        Abort: The answer was no.
    """
    if not click.get_text_stream("stdin").isatty():
        raise Stop(
            Exit.CONFIGURATION, f"{question} Nobody is there to answer", "--yes, or --dry-run to see what would be done"
        )
    click.confirm(question, abort=True, err=True)
