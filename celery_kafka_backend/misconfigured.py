"""One exception, apart because it needs click, which no client should import before something is wrong."""

from __future__ import annotations

from typing import Final

import click
from celery.exceptions import ImproperlyConfigured

EXIT_CODE: Final = 3
"""As `pipeline` uses it for configuration."""


class Misconfigured(ImproperlyConfigured, click.ClickException):  # type: ignore[misc]
    """Raised when a setting is wrong.

    In a program it is Celery's own `ImproperlyConfigured`; on Celery's command line click prints
    its message without a traceback and exits with `EXIT_CODE`.
    """

    exit_code = EXIT_CODE

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)
