"""What every command has in common: the group, its lazy loading, and errors as messages with exit codes."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Final

import click

from celery_kafka_backend.cli.exits import EXAMPLE, MEANINGS, Exit, code_of
from celery_kafka_backend.settings import mask

VARIABLES: Final = "CELERY_PIPELINE"
DEBUG_VARIABLE: Final = "CELERY_PIPELINE_DEBUG"


class _TakesUsageErrors:
    """Makes a mistake on the command line end with `Exit.CONFIGURATION`; click's own 2 means "nobody folds" here."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc,no-any-return]
        except click.UsageError as exc:
            exc.exit_code = Exit.CONFIGURATION
            raise


class Command(_TakesUsageErrors, click.Command):
    """A command whose errors are messages, not tracebacks, and whose exit codes have names.

    Args:
        family: The command that it is a part of, if it is a part of one.
    """

    def __init__(self, *args: Any, family: str = "", **kwargs: Any) -> None:
        kwargs["help"] = _paragraphs(kwargs.get("help"))
        kwargs["context_settings"] = {"show_default": True, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        for option in self.params:
            if isinstance(option, click.Option):
                # click would name it for the function's argument, which may be another word than the user's.
                long = max(option.opts, key=len).lstrip("-").replace("-", "_")
                option.envvar = "_".join(filter(None, (VARIABLES, family, self.name, long))).upper().replace("-", "_")
                option.show_envvar = True

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; every error ends here."""
        # librdkafka's own lines say in its words what our message says in the user's.
        logging.getLogger("celery_kafka_backend.librdkafka").addHandler(logging.NullHandler())
        logging.getLogger("celery_kafka_backend.librdkafka").propagate = bool(os.environ.get(DEBUG_VARIABLE))
        try:
            code = super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            code = Exit.INTERRUPTED
        except BrokenPipeError:  # `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = Exit.OK
        except Exception as exc:  # noqa: BLE001 - the one place where they all end
            code = complain(exc, _called(ctx))
        sys.stdout.flush()
        ctx.exit(int(code or 0))


def _paragraphs(text: str | None) -> str | None:
    r"""Return a raw docstring with click's mark for "do not rewrap this paragraph", the character that ``\b`` stands for."""
    return None if text is None else text.replace("\\b\n", "\b\n")


def _called(ctx: click.Context) -> str:
    from celery_kafka_backend.cli.context import called, reference  # noqa: PLC0415 - see `Group`

    return called(reference(ctx.find_root()))


def complain(error: BaseException, command: str = EXAMPLE) -> Exit:
    """Say what went wrong, and what to type, on stderr and return how to exit."""
    code = code_of(error)
    if code is not Exit.UNEXPECTED:
        click.secho(f"error: {error}".replace(EXAMPLE, command), fg="red", err=True)
    else:
        at = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" ({os.path.basename(at[0].filename)}:{at[0].lineno})" if at else ""  # noqa: PTH119
        click.secho(f"error: {type(error).__name__}: {mask(str(error))}{where}", fg="red", err=True)
        click.echo(f"This is unexpected; {DEBUG_VARIABLE}=1 shows the traceback, for a report.", err=True)
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    return code


class Family(_TakesUsageErrors, click.Group):
    """A command that has commands of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["help"] = _paragraphs(kwargs.get("help"))
        super().__init__(*args, **kwargs)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse a command that does not exist with our exit code, and name the one that was meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            exc.exit_code = Exit.CONFIGURATION
            if close := get_close_matches(args[0], self.list_commands(ctx), n=1):
                exc.message += f" Did you mean {close[0]!r}?"
            raise


class Group(Family):
    """The group; a command's module is imported when it is asked for, because `celery worker` imports this one too.

    Args:
        lazy: Module by command name; the module's ``command`` is the command.
    """

    def __init__(self, *args: Any, lazy: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy or {}

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names in the order in which people need them."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return a command."""
        module = self._lazy.get(cmd_name)
        return import_module(module).command if module else None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add the exit codes to the help."""
        super().format_epilog(ctx, formatter)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(int(code)), meaning) for code, meaning in MEANINGS.items()])
