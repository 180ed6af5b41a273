"""How the Elasticsearch store talks: hosts, indices, requests, and what the server's answers mean."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import unquote, urlsplit

import elasticsearch
import msgspec
from elasticsearch import exceptions

from celery_kafka_backend.errors import SettingsError, Unavailable
from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.patience import left_s

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from celery_kafka_backend.sinks.contract import StoreOptions

INDEX: Final = "celery"
PORT: Final = 9200
SHORTEST_S: Final = 0.02
"""A waiter in its last moments gives the server so long."""

READ_TIMEOUT_S: Final = 10.0
"""As Celery's backend, for a document …"""
WRITE_TIMEOUT_S: Final = 30.0
"""… of which a bulk has a thousand: a slow server must answer in time, or the same batch comes for ever."""

_DEFAULTS: Final = {
    "max_retries": 3,  # these two as in Celery's backend
    "retry_on_timeout": False,
    "connections_per_node": 10,
}
_AWAY: Final = frozenset({408, 409, 429, 500, 502, 503, 504})
"""Overload, elections, a lost race that was lost ten times: the same request may succeed later."""
_NOT_THE_DOCUMENT: Final = ("cluster_block", "index_not_found", "index_closed", "unavailable", "no_shard")
"""Beginnings of errors of an index: on a disk that is full, being made, closed."""
_RIGHTS: Final = (
    "the user needs read, write, view_index_metadata, maintenance, create_index, manage on the index and on "
    "<index>-kafka*, and manage_index_templates"
)


class Place:
    """Where a view lives: an index and those beside it, and how to connect.

    Args:
        url: ``elasticsearch://[user:password@]host[:port][,host…]/index``, or ``elasticsearch+https://…``. A document
            type behind the index, as Celery takes it, means nothing since Elasticsearch 8.
        options: Its ``options`` are the driver's, and ``save_meta_as_text``.

    Raises:
        SettingsError: It is no such URL.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = mask(url)
        given = dict(options.options)
        self.as_text = bool(given.pop("save_meta_as_text", True))
        parts = urlsplit(url)
        if parts.query or parts.fragment:
            raise _unfit(self.url, "no parameters are taken from the URL", "use view_options = {'elasticsearch': {…}}")
        login, _, hosts = parts.netloc.rpartition("@")
        scheme = "https" if parts.scheme == "elasticsearch+https" else "http"
        index = unquote(parts.path).strip("/").partition("/")[0] or INDEX
        self.native = index
        self.beside = f"{index}-kafka"
        self.history = f"{index}-kafka-history"
        prefix = options.key_prefix
        self.prefixes = {"task": f"{prefix}celery-task-meta-", "group": f"{prefix}celery-taskset-meta-"}
        self._given: dict[str, Any] = {"hosts": [_node(self.url, scheme, each) for each in hosts.split(",")]}
        user, _, password = login.partition(":")
        if user:
            self._given["basic_auth"] = (unquote(user), unquote(password))
        self._given |= {**_DEFAULTS, **given}

    def connect(self, timeout_s: float) -> elasticsearch.Elasticsearch:
        """Return a client; it connects when it is used. A timeout among the options goes before ours."""
        try:
            return elasticsearch.Elasticsearch(**{"request_timeout": timeout_s, **self._given})
        except (TypeError, ValueError) as exc:
            raise _unfit(self.url, str(exc), "check the view's URL and options") from exc


def _node(url: str, scheme: str, host: str) -> str:
    try:
        parts = urlsplit(f"//{host or 'localhost'}")
        port = parts.port or PORT
    except ValueError as exc:
        raise _unfit(url, str(exc), "elasticsearch://host:9200,host:9200/index") from exc
    name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{scheme}://{name}:{port}"


def _unfit(url: str, problem: str, remedy: str) -> SettingsError:
    return SettingsError("view", f"{url}: {problem}", remedy)


def bounded(client: elasticsearch.Elasticsearch) -> elasticsearch.Elasticsearch:
    """Return the client as this thread may use it now: in a hurry it asks once."""
    left = left_s()
    if left is None:
        return client
    return client.options(request_timeout=min(max(left, SHORTEST_S), READ_TIMEOUT_S), max_retries=0)


# -- what answers mean -------------------------------------------------------------------------


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn the driver's errors into ours."""
    try:
        yield
    except exceptions.UnsupportedProductError as exc:
        raise _unfit(url, exc.message, "Elasticsearch 7.14 or newer must answer here") from exc
    except exceptions.ApiError as exc:
        _refused(url, exc.status_code, _said(exc), exc)
    except (exceptions.TransportError, exceptions.SerializationError) as exc:
        raise Unavailable(f"{url}: {_said(exc)}") from exc


def _refused(url: str, status: int, said: str, exc: Exception) -> NoReturn:
    if status in (401, 403) and "cluster_block" not in said:
        remedy = "check user and password" if status == 401 else _RIGHTS
        raise SettingsError("view", f"{url} refuses us: {status} {said}", remedy) from exc
    if status in _AWAY or "cluster_block" in said or "index_not_found" in said:
        raise Unavailable(f"{url}: {status} {said}") from exc
    if "media_type_header_exception" in said or status == 406:
        raise SettingsError("view", f"{url}: {status} {said}", "Elasticsearch 8 must answer here") from exc
    if status in (400, 404, 405):
        raise SettingsError("view", f"{url}: {status} {said}", "check the view's URL, and who made its index") from exc
    raise exc


def _said(exc: Exception) -> str:
    info = getattr(exc, "body", None)
    error = info.get("error") if isinstance(info, dict) else None
    if isinstance(error, dict):
        return reason(error)
    return " ".join(str(getattr(exc, "message", exc)).split())[:500]


def reason(error: Mapping[str, Any]) -> str:
    """Return an error of the server's in one line."""
    found = [f"{error.get('type')}: {error.get('reason')}"]
    cause: Any = error.get("caused_by")
    while isinstance(cause, dict) and len(found) < 4:
        found.append(f"{cause.get('type')}: {cause.get('reason')}")
        cause = cause.get("caused_by")
    return "; ".join(found)[:1000]


# -- bulk --------------------------------------------------------------------------------------


class Failure(msgspec.Struct):
    """What the server says of one operation of a bulk that it did not carry out."""

    status: int
    error: dict[str, Any] = {}

    @property
    def away(self) -> bool:
        """Whether the same operation may succeed later: it is the server's or the index's matter, not the document's."""
        kind = str(self.error.get("type"))
        return self.status in _AWAY or kind.startswith(_NOT_THE_DOCUMENT) or "no write index" in reason(self.error)

    @property
    def denied(self) -> bool:
        """Whether it is a matter of rights."""
        return self.status in (401, 403) and not self.away


class _Item(msgspec.Struct):
    create: Failure | None = None
    update: Failure | None = None
    index: Failure | None = None


class _Answer(msgspec.Struct):
    items: list[_Item] = []
    errors: bool = False


def failures(answer: Any, count: int) -> list[Failure | None]:
    """Return what went wrong with each operation of a bulk; a create of what is there already did not."""
    found = msgspec.convert(answer, _Answer)
    if not found.errors:
        return [None] * count
    outcome: list[Failure | None] = []
    for item in found.items:
        said = item.create or item.update or item.index
        assert said is not None
        known = said.status < 300 or (item.create is not None and said.status == 409)
        outcome.append(None if known else said)
    return outcome


def denied(url: str, said: Sequence[Failure]) -> SettingsError:
    """Return the error for operations that the user may not do."""
    return SettingsError("view", f"{url} refuses us: {said[0].status} {reason(said[0].error)}", _RIGHTS)
