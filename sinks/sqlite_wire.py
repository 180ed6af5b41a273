"""How the SQLite store talks: its file, connections, and errors."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from celery_kafka_backend.errors import SettingsError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery_kafka_backend.sinks.contract import StoreOptions


def path_of(url: str) -> Path:
    """Return the file that a view's URL names."""
    scheme, _, rest = url.partition("://")
    if not rest.startswith("/") or len(rest) < 2 or "?" in rest:
        raise SettingsError("view", f"{url!r} names no file", f"{scheme}:///relative.db or {scheme}:////absolute.db")
    return Path(rest[1:])


def timeout_of(options: StoreOptions) -> float:
    """Return for how many seconds to wait for another writer: the one option that there is.

    Raises:
        SettingsError: There is another one, or it is no such time.
    """
    given = dict(options.options)
    timeout_s = given.pop("timeout", 10.0)
    setting = "kafka_backend_settings['view_options']['sqlite']"
    if given:
        raise SettingsError(setting, f"no such option: {', '.join(sorted(given))}", "known: timeout")
    if not isinstance(timeout_s, int | float) or timeout_s < 0:
        raise SettingsError(setting, f"timeout = {timeout_s!r} is no time", "give seconds")
    return float(timeout_s)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn sqlite3's errors into ours."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.InterfaceError) as exc:  # locked, disk full, read-only, no table yet
        raise Unavailable(f"{path}: {exc}") from exc
    except sqlite3.DatabaseError as exc:
        if type(exc) is not sqlite3.DatabaseError:
            raise  # a constraint or a wrong number of parameters: a bug of ours
        remedy = "move the file away; the processor makes a new one, and a replay fills it"
        raise SettingsError("view", f"{path} is damaged or no SQLite file ({exc})", remedy) from exc


def connect(path: Path, mode: str, timeout_s: float) -> sqlite3.Connection:
    """Open the file: ``mode`` is ``rw``, or ``rwc`` to make it. Whoever uses it sees to it that one thread does at a time.

    Raises:
        Unavailable: There is none, and it is not to be made.
    """
    if mode == "rw" and not path.exists():  # SQLite says no more than that it cannot open it
        raise Unavailable(f"{path} does not exist: `pipeline run` makes it for a view that is configured, a replay any")
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, timeout_s, uri=True, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    return connection
