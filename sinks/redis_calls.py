"""From changes to the commands that carry them out, as bytes: many tasks in a call of redis_write.lua. No I/O.

A call of a script costs Redis more than a task in it. All tasks of a call have ids of one length, as nearly all have, so
that its keys are three joins.
"""

from __future__ import annotations

import struct
from importlib import resources
from typing import TYPE_CHECKING, Final, NamedTuple

from celery_kafka_backend.changes import TASK, Side
from celery_kafka_backend.order import key_text
from celery_kafka_backend.sinks.redis_wire import CHORD, MAX_48, NATIVE, bulk, evalsha, pack, sha

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from celery_kafka_backend.changes import Change, ChordFact, Partition
    from celery_kafka_backend.sinks.contract import StoreOptions

TOGETHER: Final = 16
"""Tasks in a call: Redis serves nobody else for that long, some 0.2 ms; twice as many are no faster."""
TOGETHER_BYTES: Final = 65_536
"""… and from how many bytes on a call is full."""
OVER: Final = Side(expires_at=1)
"""A side record that leaves nothing, and changes nothing where there is one."""

WRITE: Final = resources.files(__package__).joinpath("redis_write.lua").read_bytes()
FACTS: Final = b"""-- ARGV: expiry, then name, order .. value
local digits = 19
for i = 2, #ARGV, 2 do
  local old = redis.call('HGET', KEYS[1], ARGV[i])
  if not old or old:sub(1, digits) < ARGV[i + 1]:sub(1, digits) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
local new, old = tonumber(ARGV[1]), tonumber(redis.call('HGET', KEYS[1], '') or ARGV[1])
local at = (new == 0 or old == 0) and 0 or math.max(new, old)
redis.call('HSET', KEYS[1], '', string.format('%.0f', at))
if at == 0 then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIREAT', KEYS[1], at) end
return 1
"""
POSITIONS: Final = b"""-- ARGV: topic:partition, offset ... as decimal text, which may exceed Lua's numbers
for i = 1, #ARGV, 2 do
  local old, new = redis.call('HGET', KEYS[1], ARGV[i]), ARGV[i + 1]
  if not old or #old < #new or (#old == #new and old < new) then redis.call('HSET', KEYS[1], ARGV[i], new) end
end
return 1
"""
SCRIPTS: Final = (WRITE, FACTS, POSITIONS)


class Call(NamedTuple):
    """A command, and whom it is about.

    Attributes:
        command: RESP.
        subject: Whom, where it is about one.
        changes: What it carries out.
    """

    command: bytes
    subject: str
    changes: Sequence[Change] = ()


class _Group:
    """Tasks that go into one call."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.ids: list[bytes] = []
        self.arguments: list[bytes] = []
        self.history: list[bytes] = []
        self.events = 0
        self.size = 0


class Calls:
    """Makes the commands of one view.

    Args:
        options: The view's.
    """

    together = TOGETHER
    """Tasks in a call; 1 where a call's keys have to share a slot."""
    limit = 0
    """The server's on the size of a value, bytes."""

    def __init__(self, options: StoreOptions) -> None:
        self._prefixes = {subject: options.key_prefix.encode() + name for subject, name in NATIVE.items()}
        self._chord_prefix = options.key_prefix.encode() + CHORD
        self._positions_key = f"celery-kafka:{options.namespace}:positions".encode()
        self._channel = f"celery-kafka:{options.namespace}:client:".encode()
        # Only Redis' memory is dear: elsewhere history is on by default.
        self._history = bool(options.history)
        self._keep = b"%d" % options.history_limit
        self._history_ms = options.history_retention_ms

    def of_changes(
        self, changes: Iterable[Change], now_ms: int, refused: list[tuple[str, str]], *, alone: bool = False
    ) -> Iterator[Call]:
        """Yield calls for changes; those that no Redis takes are added to ``refused``, with why.

        Args:
            changes: At most one per subject and id.
            now_ms: The wall clock, ms since 1970.
            refused: Ids and reasons.
            alone: A call for each.
        """
        most = 1 if alone else self.together
        groups: dict[tuple[str, int], _Group] = {}
        for change in changes:
            try:
                subject_id = change.id.encode()
                arguments = self._arguments(change, now_ms)
                history = self._events(change) if self._history else b""
            except (ValueError, struct.error) as exc:  # UnicodeEncodeError is one
                refused.append((change.id, str(exc)))
                continue
            place = change.subject, len(subject_id)
            group = groups.get(place)
            if group is None:
                group = groups[place] = _Group()
            group.changes.append(change)
            group.ids.append(subject_id)
            group.arguments.append(arguments)
            group.size += len(arguments)
            if self._history:
                group.history.append(history)
                group.events += len(change.history)
                group.size += len(history)
            if len(group.ids) >= most or group.size >= TOGETHER_BYTES:
                yield self._call(*place, groups.pop(place), now_ms)
        for place, group in groups.items():
            yield self._call(*place, group, now_ms)

    def _call(self, subject: str, length: int, group: _Group, now_ms: int) -> Call:
        count, prefix = len(group.ids), self._prefixes[subject]
        size = len(prefix) + length
        kinds = 4 if self._history else 3
        kept = self._history_ms
        common = (
            b"%d" % count,
            b"%d" % len(prefix) if subject == TASK else b"",
            self._channel,
            self._keep,
            b"" if kept is None else b"%d" % kept,
            b"" if kept is None else b"%d" % (now_ms - kept),
        )
        arguments = 3 + kinds * count + len(common) + 4 * count + (count + 2 * group.events if self._history else 0)
        pieces = [
            b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % (arguments, _WRITE_SHA),
            bulk(b"%d" % (kinds * count)),
            _keys(b"$%d\r\n%b" % (size, prefix), group.ids, b"\r\n"),
        ]
        start = b"$%d\r\n{%b" % (size + 4, prefix)
        pieces += (_keys(start, group.ids, b"}:%b\r\n" % kind) for kind in (b"k", b"w", b"h")[: kinds - 1])
        pieces += map(bulk, common)
        pieces += group.arguments
        pieces += group.history
        return Call(b"".join(pieces), group.changes[0].id if count == 1 else "", group.changes)

    def _arguments(self, change: Change, now_ms: int) -> bytes:
        winner, side = change.winner, change.side
        if side is None:
            side = OVER if change.only_history else Side(expires_at=change.expires_at)
        ends = min(side.expires_at, MAX_48)
        shows = document = b""
        if winner is None:
            record = pack(0, "", side)
        else:
            record = pack(winner.key, winner.id, side)
            expires_at = winner.expires_at or 0
            shown = change.document if not 0 < expires_at <= now_ms else None
            if shown is None:
                shows = b"x"
            else:
                shows, document = b"=" if expires_at == ends else b"%d" % expires_at, shown
                if len(document) > self.limit:
                    raise ValueError(f"a document of {len(document)} bytes; the server takes {self.limit}")
        until = b"%d" % ends
        return b"$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            len(record), record, len(until), until, len(shows), shows, len(document), document,
        )  # fmt: skip

    def _events(self, change: Change) -> bytes:
        pieces = [bulk(b"%d" % len(change.history))]
        for event, value in change.history:
            if len(value) > self.limit:
                raise ValueError(f"an event of {len(value)} bytes; the server takes {self.limit}")
            pieces += (bulk(b"%d" % event.hlc), bulk(value))
        return b"".join(pieces)

    def of_chords(self, facts: Iterable[ChordFact]) -> Iterator[Call]:
        """Yield a call for each chord."""
        chords: dict[str, list[ChordFact]] = {}
        for fact in facts:
            chords.setdefault(fact.group, []).append(fact)
        for group, found in chords.items():
            never = any(not fact.expires_at for fact in found)
            expiry = 0 if never else max(fact.expires_at for fact in found)
            flat = [(fact.name.encode(), key_text(fact.order).encode() + fact.value) for fact in found]
            arguments = [each for pair in flat for each in pair]
            yield Call(evalsha(FACTS, self._chord_prefix + group.encode(), b"%d" % expiry, *arguments), group)

    def of_positions(self, positions: Iterable[tuple[Partition, int]]) -> Call:
        """Return the call that moves a view's positions."""
        flat = [each for (t, p), offset in positions for each in (f"{t}:{p}", str(offset))]
        return Call(evalsha(POSITIONS, self._positions_key, *(each.encode() for each in flat)), "")


_WRITE_SHA: Final = sha(WRITE)


def _keys(start: bytes, ids: list[bytes], end: bytes) -> bytes:
    return start + (end + start).join(ids) + end
