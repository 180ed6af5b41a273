"""Calls that block in librdkafka, made so that under gevent and eventlet only the caller waits.

librdkafka is C: no monkey-patching reaches it, and a call that waits in there stops every greenlet of the process. So
what can be polled is polled without waiting (`publisher`), and what cannot goes through the library's own native threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from kombu.utils.compat import detect_environment

if TYPE_CHECKING:
    from collections.abc import Callable

_Found = TypeVar("_Found")


def patched() -> bool:
    """Return whether threads of this process are greenlets."""
    return bool(detect_environment() != "default")


def aside(call: Callable[[], _Found]) -> _Found:
    """Return what a blocking call returns, or raise what it raises, while other greenlets run."""
    kind = detect_environment()
    if kind == "gevent":
        from gevent import get_hub  # noqa: PLC0415 - only where it is in use

        return get_hub().threadpool.apply(call)  # type: ignore[no-any-return]
    if kind == "eventlet":
        from eventlet import tpool  # noqa: PLC0415 - only where it is in use

        return tpool.execute(call)  # type: ignore[no-any-return]
    return call()
