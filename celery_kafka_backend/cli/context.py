"""What a command works on: the user's app, its settings and its views."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from celery_kafka_backend import configure
from celery_kafka_backend.cli.exits import EXAMPLE, Exit, Stop
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks import registry
from celery_kafka_backend.topics import view_name

if TYPE_CHECKING:
    from celery import Celery

    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import StoreOptions


class Pipeline(NamedTuple):
    """An app, as `-A` named it, and what it configures.

    Attributes:
        app: The app.
        reference: What ``-A`` said; "" if it said nothing.
        settings: The app's settings.
    """

    app: Celery
    reference: str
    settings: Settings

    def options(self, url: str) -> StoreOptions:
        """Return what a view's store needs beside its URL."""
        return configure.store_options(self.app, self.settings, url)

    @property
    def shadows(self) -> bool:
        """Whether the app has another result backend, beside which it appends to our log (`shadow`)."""
        return bool(self.app.conf.get(configure.SHADOW)) and not str(self.app.conf.result_backend).startswith("kafka:")

    @property
    def command(self) -> str:
        """How the user calls us, for remedies."""
        return called(self.reference)


def pipeline_of(ctx: click.Context) -> Pipeline:
    """Return the pipeline of the app that Celery's own command line has loaded.

    Raises:
        ImproperlyConfigured: A setting is wrong.
    """
    app = ctx.obj.app
    return Pipeline(app, reference(ctx.find_root()), configure.settings_of(app))


def called(reference: str) -> str:
    """Return how the user calls us, who said ``-A reference``."""
    return f"celery -A {reference} pipeline" if reference else EXAMPLE


def reference(root: click.Context) -> str:
    """Return what ``-A`` or its environment variable said.

    Celery 5.4 has turned that into the app by now, so that the command line is read once more.
    """
    said: Any = root.params.get("app")
    option = next((one for one in root.command.params if one.name == "app"), None)
    if option is not None and not isinstance(said, str):
        with suppress(click.UsageError):  # somebody's program called us with arguments of its own
            said, _ = option.consume_value(root, root.command.make_parser(root).parse_args(sys.argv[1:])[0])
    return said if isinstance(said, str) else ""


def chosen_views(settings: Settings, chosen: tuple[str, ...], option: str = "--view") -> list[str]:
    """Return the URLs of the views that an option names, all configured ones if it names none.

    Args:
        settings: The user's.
        chosen: Each a URL, or scheme or name (as ``status`` shows it) of a configured view: a URL on a command line
            is there for everybody on the machine to read, with its password.
        option: What the option is called, for errors.
    """
    found: list[str] = [] if chosen else list(settings.views)
    for one in chosen:
        if "://" in one:
            urls = [one]
        else:
            urls = [url for url in settings.views if one in (view_name(url), url.partition("://")[0])]
        if not urls:
            known = ", ".join(f"{view_name(url)} ({mask(url)})" for url in settings.views)
            raise Stop(Exit.CONFIGURATION, f"{option} {mask(one)}: no such view", f"a URL, or one of {known}")
        found += [url for url in urls if url not in found]
    for url in found:
        registry.store(url)  # unknown schemes and missing drivers now, not in a child process
    return found


def chosen_view(settings: Settings, chosen: str, option: str = "--view") -> str:
    """Return the URL of the one view that an option names, as `chosen_views` has it.

    Raises:
        Stop: It names none, or several.
    """
    found = chosen_views(settings, (chosen,), option)
    if len(found) > 1:
        problem = f"{option} {mask(chosen)}: that is {len(found)} views"
        raise Stop(Exit.CONFIGURATION, problem, "give the URL or the name of one")
    return found[0]
