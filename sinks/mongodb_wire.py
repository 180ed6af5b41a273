"""How the MongoDB store talks: connections, collections, times, and what the driver's errors mean."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

import pymongo
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.datetime_ms import DatetimeMS
from pymongo import errors

from celery_kafka_backend import events
from celery_kafka_backend.changes import GROUP, TASK
from celery_kafka_backend.errors import SettingsError, Unavailable
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.patience import left_s

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from pymongo.collection import Collection

    from celery_kafka_backend.sinks.contract import StoreOptions

DATABASE: Final = "celery"
NATIVE: Final = {TASK: "celery_taskmeta", GROUP: "celery_groupmeta"}
_NAMED_BY: Final = {TASK: "taskmeta_collection", GROUP: "groupmeta_collection"}
SIDE: Final = "celery_kafka_side"
HISTORY: Final = "celery_kafka_history"
CHORD: Final = "celery_kafka_chord"
CHORD_EXPIRY: Final = "celery_kafka_chord_expiry"
POSITION: Final = "celery_kafka_position"

NEVER: Final = DatetimeMS(events.LATEST_MS + 1)
"""An expiry later than all, the year 9999: a maximum of expiries needs no special case. A stock client reads it beside
Celery's fields, and its driver fails on what Python has no date for."""

_DEFAULTS: Final = {
    "serverSelectionTimeoutMS": 5_000,
    "connectTimeoutMS": 5_000,
    "socketTimeoutMS": 30_000,  # the driver's own is for ever: a frozen server would hold the processor
    "maxPoolSize": 10,  # as Celery's backend has it
}
_OURS: Final = frozenset({"database", *_NAMED_BY.values()})
_DENIED: Final = frozenset({13, 18, 8000})
"""Unauthorized, AuthenticationFailed, Atlas' own for both."""
AWAY: Final = frozenset(
    {6, 7, 24, 50, 64, 79, 89, 91, 100, 112, 133, 134, 189, 202, 262, 317, 358, 384, 9001, 10058, 10107}
    | {11600, 11602, 13388, 13435, 13436, 14031}
)
"""Elections, shutdowns, time limits, conflicts, a full disk: the same write may succeed later."""
DUPLICATE: Final = 11000
REFUSED: Final = frozenset({2, 15, 17, 22, 52, 55, 57, 121, 9, 10334, 17280, 17419, 17420})
"""Of one document: too large, too deep, an invalid key, a validator that somebody made."""

_CODEC: Final = CodecOptions(datetime_conversion=DatetimeConversion.DATETIME_MS)  # type: ignore[var-annotated]
_DURABLE: Final = pymongo.WriteConcern(w="majority", j=True)


def expiry(ms: int | None) -> DatetimeMS:
    """Return an expiry, ms since 1970, as it is stored; 0 or None: never."""
    return min(DatetimeMS(ms), NEVER) if ms else NEVER


def expiry_ms(stored: Any) -> int:
    """Return what `expiry` was given; 0: never."""
    return 0 if stored is None or stored >= NEVER else int(stored)


class Place:
    """Where a view lives: a database, its collections, and how to connect.

    Args:
        url: ``mongodb://…`` or ``mongodb+srv://…``; it may name the database.
        options: Its ``options`` are the driver's, and ``database``, ``taskmeta_collection``, ``groupmeta_collection``.

    Raises:
        SettingsError: The URL or an option is not one that the driver takes.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = mask(url)
        given = dict(options.options)
        base, _, query = url.partition("?")
        path = base.partition("://")[2].partition("/")[2]
        self._database = str(given.get("database") or path or DATABASE)
        self._names = {subject: str(given.get(setting) or NATIVE[subject]) for subject, setting in _NAMED_BY.items()}
        in_url = {name.lower() for name, _ in parse_qsl(query, keep_blank_values=True)}
        own = {name: value for name, value in given.items() if name not in _OURS}
        stated = in_url | {name.lower() for name in own}
        self._given = {"host": url, **{n: v for n, v in _DEFAULTS.items() if n.lower() not in stated}, **own}

    def connect(self) -> pymongo.MongoClient[dict[str, Any]]:
        """Return a client; it connects when it is used."""
        try:
            return pymongo.MongoClient(**self._given, connect=False)
        except (errors.PyMongoError, TypeError, ValueError) as exc:  # srv asks the DNS here
            if isinstance(exc, errors.ConnectionFailure):
                raise Unavailable(f"{self.url}: {exc}") from exc
            raise SettingsError("view", f"{self.url}: {exc}", "check the view's URL and options") from exc

    def collection(self, client: pymongo.MongoClient[dict[str, Any]], name: str) -> Collection[dict[str, Any]]:
        """Return a collection of ours."""
        return client[self._database].get_collection(name, codec_options=_CODEC, write_concern=_DURABLE)

    def native(self, client: pymongo.MongoClient[dict[str, Any]], subject: str) -> Collection[dict[str, Any]]:
        """Return Celery's own collection of tasks or groups."""
        return self.collection(client, self._names[subject])

    def native_name(self, subject: str) -> str:
        """Return the name of Celery's own collection of tasks or groups."""
        return self._names[subject]


def bounded() -> AbstractContextManager[Any]:
    """Have what is asked for inside, retries included, end when this thread's patience does."""
    left = left_s()
    return nullcontext() if left is None else pymongo.timeout(left)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Bound what is asked for inside, and turn pymongo's errors into ours."""
    try:
        with bounded():
            yield
    except errors.ConfigurationError as exc:
        raise SettingsError("view", f"{url}: {exc}", "check the view's URL and options") from exc
    except errors.BulkWriteError as exc:
        raise _translation(url, _first_code(exc), exc) from exc
    except errors.OperationFailure as exc:
        raise _translation(url, exc.code or 0, exc) from exc
    except (errors.ConnectionFailure, errors.ExecutionTimeout) as exc:
        raise Unavailable(f"{url}: {exc}") from exc


def _first_code(exc: errors.BulkWriteError) -> int:
    found = [error["code"] for error in exc.details.get("writeErrors", ())]
    found += [error.get("code", 64) for error in exc.details.get("writeConcernErrors", ())]
    return next((code for code in found if code in _DENIED | AWAY), found[0] if found else 0)


def _translation(url: str, code: int, exc: errors.OperationFailure) -> Exception:
    said = str(exc).partition(", full error")[0]
    if code in _DENIED:
        return SettingsError("view", f"{url} refuses us: {said}", "check user, password, authSource and roles")
    if code in AWAY or exc.has_error_label("RetryableWriteError"):
        return Unavailable(f"{url}: {said}")
    return exc
