"""What Celery's own `report`, `inspect report` and `inspect conf` show of our settings: no secret.

Celery masks a password in ``result_backend``, but not in the URLs inside it, and what has a telling name, but not what
has none (``basic_auth``, ``views``). It asks nobody; so two functions of its reports are wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any, Final

from celery.app import utils

from celery_kafka_backend.settings import SETTING, UNSHOWN, Settings, mask

_MASK: Final = "*" * 8


def keep_secrets() -> None:
    """Wrap them, once per process."""
    if getattr(utils.filter_hidden_settings, "keeps_our_secrets", False):
        return
    sanitizer = "sanitize_url" if hasattr(utils, "sanitize_url") else "maybe_sanitize_url"  # before Celery 5.7
    setattr(utils, sanitizer, _sanitizing(getattr(utils, sanitizer)))
    utils.filter_hidden_settings = _filtering(utils.filter_hidden_settings)
    utils.filter_hidden_settings.keeps_our_secrets = True


def _sanitizing(theirs: Any) -> Any:
    @wraps(theirs)
    def sanitize_url(url: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(url, str) and url.startswith("kafka:"):
            return mask(url)
        return theirs(url, *args, **kwargs)

    return sanitize_url


def _filtering(theirs: Any) -> Any:
    @wraps(theirs)
    def filter_hidden_settings(conf: Mapping[str, Any]) -> Any:
        shown = theirs(conf)
        if isinstance(ours := shown.get(SETTING), Mapping):
            shown[SETTING] = {
                name: _shown(value, secret=name in UNSHOWN or name not in Settings.__struct_fields__)
                for name, value in ours.items()
            }
        return shown

    return filter_hidden_settings


def _shown(value: Any, *, secret: bool = False) -> Any:
    """Return a setting of ours as a report may have it: of those that may hold secrets, only which there are."""
    if isinstance(value, Mapping):
        return {name: _shown(found, secret=secret) for name, found in value.items()}
    if secret:
        return _MASK
    if isinstance(value, (list, tuple)):
        return [_shown(found) for found in value]
    return mask(value) if isinstance(value, str) and "://" in value else value
