"""What the chord processor has in hand: a partition in one assignment, recent records, and counts. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future

    from confluent_kafka import Message

    from celery_kafka_backend.chord_records import Declared, Part
    from celery_kafka_backend.processors.decision import Ledger


class Statistics(msgspec.Struct):
    """What a processor has done since it was made.

    Attributes:
        decided: Decisions appended.
        lost: … of which another owner's was first.
        sent: Bodies sent.
        failed: Bodies failed, as a member had failed or the results could not be joined.
        found: Bodies of another owner that had been sent already.
        retries: Attempts to send that failed, because the broker or Kafka was away.
        dead_letters: Records given up.
        rebuilt: Times that a partition was read from its start.
        chords: Chords held, finished ones included.
        open: … of which so many are declared and not decided.
    """

    decided: int = 0
    lost: int = 0
    sent: int = 0
    failed: int = 0
    found: int = 0
    retries: int = 0
    dead_letters: int = 0
    rebuilt: int = 0
    chords: int = 0
    open: int = 0


class Held:
    """One partition in one assignment: one owner, in the protocol's words."""

    def __init__(self, partition: int, ledger: Ledger, end: int | None) -> None:
        self.partition = partition
        self.ledger = ledger
        self.end = end
        """Read up to here before acting; None: Kafka did not say, so wait for the end itself."""
        self.position = 0
        self.open = True
        self.broken = ""
        """Why this owner must start again as another."""
        self.jobs: set[Future[None]] = set()
        self.caught_up = False
        self.unsigned: list[tuple[Declared, Message]] = []
        """Declarations that do not bear our secret's signature, until it is known whether their chords are over."""

    def mark_caught_up(self) -> None:
        """Let the ledger act."""
        if not self.caught_up:
            self.caught_up = True
            self.ledger.caught_up()


class Recent:
    """The latest declarations and parts by record key: what fires soon after need not be read from Kafka again.

    Two records with one key say the same, so that it does not matter which one is here. One thread puts, any reads.

    Args:
        limit: How many bytes of values to keep; the oldest go first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._kept: dict[bytes, tuple[int, Declared | Part]] = {}

    def put(self, key: bytes, record: Declared | Part, size: int) -> None:
        """Keep a record of so many bytes, if it fits."""
        self.drop(key)
        if size > self._limit:
            return
        while self._bytes + size > self._limit:
            self.drop(next(iter(self._kept)))
        self._kept[key] = size, record
        self._bytes += size

    def drop(self, key: bytes) -> None:
        """Let go of a record."""
        found = self._kept.pop(key, None)
        if found is not None:
            self._bytes -= found[0]

    def among(self, keys: Iterable[bytes]) -> dict[bytes, Declared | Part]:
        """Return those of these that are here."""
        found = ((key, self._kept.get(key)) for key in keys)
        return {key: kept[1] for key, kept in found if kept is not None}
