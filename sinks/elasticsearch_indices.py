"""The indices of a view: their mappings and templates, and how they are made.

Every mapping is explicit and takes no field that it does not know, so that no task's result or arguments can conflict
with another's. A template beside each index makes it come again as it was, should it be deleted.

History is cut into indices by when its events expire, so that to forget is to drop an index: deleting single documents
costs as much as writing them. Days for what lives up to a week, months up to a year, else years: an event stays on disk
for as long again at most, and a few dozen indices are enough.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final

from elasticsearch import exceptions

from celery_kafka_backend.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from elasticsearch import Elasticsearch

    from celery_kafka_backend.sinks.elasticsearch_wire import Place

VERSION: Final = 1
"""Of the mappings; a template of this version is left as it is, for whoever adds replicas to it."""
NEVER: Final = 1 << 53
"""An expiry later than all: a maximum of expiries needs no special case."""
DAY_MS: Final = 86_400_000
_YEAR_9998_MS: Final = 253_339_228_800_000
"""The last that has a year after it."""

_TIME: Final = {"type": "date", "format": "epoch_millis"}
_KEYWORD: Final = {"type": "keyword", "ignore_above": 512}
_TEXT: Final = {"type": "text", "norms": False}
_STORED: Final = {"type": "keyword", "index": False, "doc_values": False}

CKB: Final[dict[str, Any]] = {"type": "object", "dynamic": False, "properties": {"x": _TIME, "u": _TIME}}
_NATIVE: Final = {"@timestamp": {"type": "date"}, "ckb": CKB}
_OBJECT: Final[dict[str, Any]] = {
    "type": "object",
    "dynamic": False,
    "properties": {
        **dict.fromkeys(("status", "task_id", "name", "worker", "queue", "group_id", "parent_id"), _KEYWORD),
        "date_done": {"type": "date"},
        "retries": {"type": "integer"},
    },
}
_BESIDE: Final = {"what": _KEYWORD, "g": {"type": "keyword"}, "x": _TIME}
HISTORY: Final = {
    "task": {"type": "keyword"},
    "hlc": {"type": "long"},
    "event": {"type": "keyword"},
    **dict.fromkeys(("kind", "state", "name", "worker", "exception", "queue", "host", "group", "root"), _KEYWORD),
    **dict.fromkeys(("args", "kwargs", "message"), _TEXT),
    "attempt": {"type": "integer"},
    "runtime_s": {"type": "double"},
    "at": _TIME,
    "x": _TIME,
}


def mappings(place: Place) -> dict[str, dict[str, Any]]:
    """Return the fields of each index, by its name or, of the history's, by its pattern."""
    native = {**_NATIVE, "result": _STORED if place.as_text else _OBJECT}
    return {place.native: native, place.beside: _BESIDE, f"{place.history}-*": HISTORY}


def ensure(client: Elasticsearch, place: Place) -> None:
    """Make the templates and indices that are missing; what is there stays.

    Raises:
        SettingsError: Somebody else made the index, and its ``result`` is not what we would write.
    """
    for name, fields in mappings(place).items():
        mapping = {"dynamic": False, "properties": fields}
        template = name.rstrip("-*")
        if not client.indices.exists_index_template(name=template):
            _ignoring(
                "already exists",
                client.indices.put_index_template,
                name=template, index_patterns=[name], priority=500, version=VERSION, create=True,
                template={"mappings": mapping},
            )  # fmt: skip
        if "*" not in name and not client.indices.exists(index=name):
            create(client, name, fields)
    _fit(client, place)


def create(client: Elasticsearch, name: str, fields: Mapping[str, Any]) -> None:
    """Make an index unless it is there."""
    mapping = {"dynamic": False, "properties": fields}
    _ignoring("resource_already_exists_exception", client.indices.create, index=name, mappings=mapping)


def _ignoring(known: str, call: Any, **arguments: Any) -> None:
    try:
        call(**arguments)
    except exceptions.BadRequestError as exc:
        if known not in str(exc):
            raise


def _fit(client: Elasticsearch, place: Place) -> None:
    """Add our field to an index that Celery's own backend made, and see that its ``result`` is of our kind."""
    for found in client.indices.get_mapping(index=place.native).values():
        fields = found["mappings"].get("properties", {})
        if (fields.get("ckb") or {}).get("properties", {}).keys() < CKB["properties"].keys():
            client.indices.put_mapping(index=place.native, properties={"ckb": CKB})
        result = fields.get("result")
        if result is not None and ("properties" in result or result.get("type") == "object") == place.as_text:
            there, ours = ("an object", "text") if place.as_text else ("text", "an object")
            raise SettingsError(
                "elasticsearch_save_meta_as_text",
                f"{place.as_text}, but index {place.native!r} at {place.url} has results as {there}, not as {ours}",
                f"set it to {not place.as_text}, or name another index in the view's URL",
            )


def warnings(client: Elasticsearch, place: Place) -> list[str]:
    """Return which indices confirm what a crash may lose."""
    found = client.indices.get_settings(index=f"{place.native},{place.beside}*", ignore_unavailable=True)
    relaxed = [
        name
        for name, settings in found.items()
        if settings["settings"]["index"].get("translog", {}).get("durability", "request").lower() == "async"
    ]
    if not relaxed:
        return []
    names = ", ".join(sorted(relaxed))
    loss = "a crash loses what was acknowledged in its last seconds, while the log counts as folded"
    return [f"index.translog.durability is async on {names}: {loss}; set it to request"]


# -- the history's -----------------------------------------------------------------------------


def partition(place: Place, at: int, expires_at: int) -> str:
    """Return the index of an event that happened ``at``, named for the day from which on it may be dropped."""
    return f"{place.history}-{_last(at, expires_at):%Y.%m.%d}" if expires_at else f"{place.history}-never"


def _last(at: int, expires_at: int) -> datetime:
    expires_at = min(expires_at, _YEAR_9998_MS)
    day = datetime.fromtimestamp(expires_at // 1000, timezone.utc).replace(hour=0, minute=0, second=0)
    lives = expires_at - at
    if lives <= 7 * DAY_MS:
        return day + timedelta(days=1)
    if lives <= 366 * DAY_MS:
        return (day.replace(day=28) + timedelta(days=4)).replace(day=1)
    return day.replace(year=day.year + 1, month=1, day=1)


def expired(place: Place, name: str, now_ms: int) -> bool:
    """Whether everything in one of the history's indices has expired."""
    ends = name.removeprefix(f"{place.history}-")
    try:
        last = datetime.strptime(ends, "%Y.%m.%d").replace(tzinfo=timezone.utc)
    except ValueError:  # "never", or somebody else's
        return False
    return last.timestamp() * 1000 <= now_ms
