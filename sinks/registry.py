"""Which store a URL means. Drivers are imported only when a URL asks for them.

A third party adds a store by an entry point in the group ``celery_kafka_backend.sinks``, named
for the URL's scheme, that refers to a module with the two functions of a store's file::

    def sink(url: str, options: StoreOptions) -> Sink: …
    def view(url: str, options: StoreOptions) -> View: …
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Final, Protocol, cast

from celery_kafka_backend.errors import SettingsError
from celery_kafka_backend.settings import mask

if TYPE_CHECKING:
    from celery_kafka_backend.sinks.contract import Sink, StoreOptions, View

ENTRY_POINTS: Final = "celery_kafka_backend.sinks"

_STORES: Final = {
    "memory": "celery_kafka_backend.sinks.memory",
    "sqlite": "celery_kafka_backend.sinks.sqlite",
    "redis": "celery_kafka_backend.sinks.redis",
    "rediss": "celery_kafka_backend.sinks.redis",
    "sentinel": "celery_kafka_backend.sinks.redis",
    "cassandra": "celery_kafka_backend.sinks.cassandra",
    "mongodb": "celery_kafka_backend.sinks.mongodb",
    "mongodb+srv": "celery_kafka_backend.sinks.mongodb",
    "elasticsearch": "celery_kafka_backend.sinks.elasticsearch",
    "elasticsearch+http": "celery_kafka_backend.sinks.elasticsearch",
    "elasticsearch+https": "celery_kafka_backend.sinks.elasticsearch",
}
_EXTRAS: Final = {
    "redis": "redis",
    "pymongo": "mongodb",
    "bson": "mongodb",
    "elasticsearch": "elasticsearch",
    "elastic_transport": "elasticsearch",
    "cassandra": "cassandra",
}


class Store(Protocol):
    """A store's module."""

    def sink(self, url: str, options: StoreOptions) -> Sink:
        """Return the write side."""

    def view(self, url: str, options: StoreOptions) -> View:
        """Return the read side."""


def schemes() -> list[str]:
    """Return every scheme that a view's URL may have."""
    return sorted({*_STORES, *(entry.name for entry in metadata.entry_points(group=ENTRY_POINTS))})


def known(scheme: str) -> bool:
    """Return whether a view's URL may have this scheme."""
    return scheme in _STORES or scheme in schemes()


def check_scheme(url: str) -> str:
    """Return the scheme of a view's URL, in lower case; no driver is imported.

    Raises:
        SettingsError: Nobody knows it.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise SettingsError("view", f"{mask(url)!r} is not a URL", f"one of {', '.join(schemes())}, then ://")
    scheme = scheme.lower()
    if not known(scheme):
        raise SettingsError(
            "view", f"nobody knows the scheme {scheme!r} of this view's URL", f"known: {', '.join(schemes())}"
        )
    return scheme


def store(url: str) -> Store:
    """Return the store's module for a view's URL.

    Raises:
        SettingsError: Nobody knows the scheme, or its driver is not installed.
    """
    scheme = check_scheme(url)
    name = _STORES.get(scheme)
    try:
        if name is not None:
            return cast("Store", import_module(name))
        (entry,) = list(metadata.entry_points(group=ENTRY_POINTS, name=scheme))[:1]
        return cast("Store", entry.load())
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").partition(".")[0]
        extra = _EXTRAS.get(missing)
        remedy = f"pip install 'celery-kafka-backend[{extra}]'" if extra else f"install the package {missing!r}"
        raise SettingsError(
            "view", f"{scheme}:// needs the package {missing!r}, which is not installed", remedy
        ) from exc


def open_sink(url: str, options: StoreOptions) -> Sink:
    """Return the write side of a view, not yet opened."""
    return store(url).sink(url, options)


def keeps_history(url: str, options: StoreOptions) -> bool:
    """Return whether the store at a URL is told to keep history, or does so by itself."""
    return open_view(url, options).keeps_history if options.history is None else options.history


def open_view(url: str, options: StoreOptions) -> View:
    """Return the read side of a view."""
    return store(url).view(url, options)
