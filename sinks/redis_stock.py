"""What Celery's own backend has in a Redis, scanned. Changes nothing there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import redis

from celery_kafka_backend.changes import GROUP, TASK
from celery_kafka_backend.order import system_wall_ms
from celery_kafka_backend.sinks.contract import Page, Stock
from celery_kafka_backend.sinks.redis_wire import NATIVE, STOCK_CHORD, tells_expiry, translated, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNT: Final = 200
"""Keys per SCAN: a page's documents are in memory together."""


class _Key(NamedTuple):
    subject: str
    id: str
    native: bytes


def stock(url: str, client: redis.Redis, key_prefix: bytes, after: str) -> Iterator[Page]:
    """Yield what is there; ``after`` is a cursor of SCAN, which any server with the same keys takes."""
    prefixes = {subject: key_prefix + NATIVE[subject] for subject in (TASK, GROUP)}
    pattern = re.sub(rb"([\\*?\[\]])", rb"\\\1", key_prefix) + b"celery-task*meta-*"
    with translated(url):
        absolute = tells_expiry(client)
        cursor = int(after or 0)
        while True:
            cursor, names = client.scan(cursor, match=pattern, count=COUNT)
            keys = [key for name in dict.fromkeys(cast("list[bytes]", names)) if (key := _key(name, prefixes))]
            yield Page(list(_read(client, keys, absolute=absolute)), str(cursor) if cursor else "")
            if not cursor:
                return


def _key(name: bytes, prefixes: dict[str, bytes]) -> _Key | None:
    for subject, prefix in prefixes.items():
        if name.startswith(prefix):
            if subject == GROUP and name.endswith(STOCK_CHORD):
                return None
            return _Key(subject, name[len(prefix) :].decode(errors="backslashreplace"), name)
    return None


def _read(client: redis.Redis, keys: list[_Key], *, absolute: bool) -> Iterator[Stock]:
    pipe = client.pipeline(transaction=False)
    for key in keys:
        pipe.get(key.native)
        pipe.pexpiretime(cast("str", key.native)) if absolute else pipe.pttl(key.native)
        pipe.get(b"{%b}:k" % key.native)
    replies: list[Any] = pipe.execute(raise_on_error=False)
    now_ms = system_wall_ms()
    for key, document, expiry, side in zip(keys, replies[::3], replies[1::3], replies[2::3], strict=True):
        if isinstance(document, redis.ResponseError):
            yield Stock(key.subject, key.id, None, problem=f"the key {key.native!r} is no string: {document}")
        elif document is not None:
            # Before Redis 7 an expiry is told as what is left, a little differently each time: whole seconds are not.
            ends = 0 if expiry < 0 else expiry if absolute else -(-(now_ms + expiry) // 1000) * 1000
            ours = unpack(side)[0] if isinstance(side, bytes) else 0
            yield Stock(key.subject, key.id, document, ends, key=ours)
