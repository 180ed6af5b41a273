"""Insight in Redis.

Keys (``N`` is the pipeline's namespace)::

    celery-kafka:N:insight:<minute>    hash: task name → 16 digits of version, then the cells; expires by itself
    celery-kafka:N:insight             when a processor last wrote, ms since 1970
    celery-kafka:N:insight:by:<id>     when that processor last wrote; expires by itself

Guarantee: a row is never replaced by an earlier one, whoever writes. A Redis that was emptied, or has lost its last
writes with its primary, is noticed by each processor with its next write; single keys that it evicts are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from celery_kafka_backend.settings import mask
from celery_kafka_backend.sinks.insight import KEPT_S, InsightStore, MinuteRow
from celery_kafka_backend.sinks.redis_wire import connect, translated

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from celery_kafka_backend.sinks.contract import StoreOptions

DIGITS: Final = 16
_PUT: Final = """-- ARGV: seconds to keep, then task, version and cells ..
for i = 2, #ARGV, 2 do
  local old = redis.call('HGET', KEYS[1], ARGV[i])
  if not old or old:sub(1, 16) <= ARGV[i + 1]:sub(1, 16) then redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""
_STAMP: Final = """-- ARGV: now, seconds to keep
local old = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return old
"""


class RedisInsight(InsightStore):
    """Insight in a Redis."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url = mask(url)
        self._client = connect(url, options, retries=1)
        self._key = f"celery-kafka:{options.namespace}:insight"

    def open(self) -> None:
        with translated(self.url):
            self._client.ping()

    def write(self, rows: Sequence[MinuteRow], at_ms: int, writer: str) -> int:
        found: dict[int, list[bytes | str]] = {}
        for row in rows:
            found.setdefault(row.minute, []).extend((row.task, b"%016d%b" % (row.version, row.value)))
        stamp = f"{self._key}:by:{writer}"
        with translated(self.url):
            pipeline = self._client.pipeline(transaction=False)
            # Before the rows: who empties it in between takes this along.
            pipeline.eval(_STAMP, 1, stamp, at_ms, KEPT_S)
            for minute, values in found.items():
                pipeline.eval(_PUT, 1, f"{self._key}:{minute}", KEPT_S, *values)
            pipeline.set(self._key, at_ms)
            return int(pipeline.execute()[0] or 0)

    def read(self, minutes: Iterable[int]) -> list[MinuteRow]:
        wanted = list(minutes)
        with translated(self.url):
            pipeline = self._client.pipeline(transaction=False)
            for minute in wanted:
                pipeline.hgetall(f"{self._key}:{minute}")
            found = cast("list[dict[bytes, bytes]]", pipeline.execute())
        return [
            MinuteRow(minute, task.decode(), int(value[:DIGITS]), value[DIGITS:])
            for minute, rows in zip(wanted, found, strict=True)
            for task, value in rows.items()
        ]

    def written_at(self) -> int:
        with translated(self.url):
            return int(cast("bytes | None", self._client.get(self._key)) or 0)

    def close(self) -> None:
        self._client.close()


def store(url: str, options: StoreOptions) -> InsightStore:
    """Return the store for a URL."""
    return RedisInsight(url, options)
