"""What the log says of one chord: facts, counted. Pure, and without any payload. What follows from it is `decision`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from celery_kafka_backend import chord_records as records

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from celery_kafka_backend.chord_records import Cancelled, Choice, Decided

Id: TypeAlias = tuple[str, int]
"""Group id and generation."""

Member: TypeAlias = tuple[str, int | None]
"""Task id and header index."""


class Candidate(NamedTuple):
    """The best part of a member so far. Compares as the rule says."""

    succeeded: bool
    key: int
    id: str
    offset: int


class Chord:
    """What the log says of one group and generation. Holds no payload."""

    __slots__ = (
        "body_task_id", "cancelled", "deadline", "doing", "extended", "fired_at", "first", "first_at", "forgetting", "keep", "live", "members",
        "seen_ms", "size", "slices",
    )  # fmt: skip

    def __init__(self) -> None:
        self.live: dict[bytes, int] = {}
        """Offset of the last record of every key that is not tombstoned."""
        self.body_task_id: str | None = None
        self.deadline: int | None = None
        self.cancelled: Cancelled | None = None
        """The first request to end it."""
        self.size: int | None = None
        self.extended: dict[str, tuple[int, int]] = {}
        """Task id to delta and offset."""
        self.members: dict[Member, Candidate] = {}
        self.slices: dict[tuple[str, int], tuple[Choice, ...]] = {}
        self.first: Decided | None = None
        self.first_at = 0
        self.keep = b""
        """Of a fired chord: key of the first decision."""
        self.fired_at: int | None = None
        self.seen_ms = 0
        """Broker's time of the last record."""
        self.doing = Doing()
        self.forgetting: AbstractSet[bytes] = NO_KEYS
        """Keys for which a tombstone is under way."""

    @property
    def expected(self) -> int | None:
        """How many members there are; None if that is not known yet."""
        return None if self.size is None else self.size + sum(delta for delta, _ in self.extended.values())

    @property
    def complete(self) -> bool:
        """Whether every member's part is in."""
        expected = self.expected
        # Not equality: with a member too many (an unknown one) the body must not wait for ever.
        return self.body_task_id is not None and expected is not None and len(self.members) >= expected

    def ended(self, now_ms: int) -> Ended | None:
        """Return who or what has ended it before it was complete, if anything has."""
        if self.body_task_id is None:
            return None
        if (asked := self.cancelled) is not None:
            what = "fired" if asked.fire else "cancelled"
            return Ended(asked.fire, f"{what} by {asked.by or 'somebody'} {self._so_far()}: {asked.reason}")
        if self.deadline is not None and now_ms >= self.deadline:
            return Ended(fire=False, why=f"ended by its deadline {self._so_far()}")
        return None

    def _so_far(self) -> str:
        return f"with {len(self.members)} of {'?' if self.expected is None else self.expected} members in"

    def ordered(self) -> list[tuple[Member, Candidate]]:
        """Members in header order; one that a member added comes after it, with the same index."""

        def place(item: tuple[Member, Candidate]) -> tuple[bool, int, int, str]:
            task, index = item[0]
            return index is None, index or 0, self.extended.get(task, (0, -1))[1], task

        return sorted(self.members.items(), key=place)


class Ended(NamedTuple):
    """A chord that waits no longer, though it is not complete."""

    fire: bool
    why: str


class Doing:
    """What the host was told to do for one chord and has not yet shown in the log."""

    __slots__ = ("deciding", "firing", "inherited", "overtaken_at")

    def __init__(self) -> None:
        self.deciding = False
        self.firing = False
        self.inherited = False
        """The decision was in the log before this owner had the partition."""
        self.overtaken_at: int | None = None
        """When, by our wall clock, another owner's decision appeared."""


_STAY: Final = frozenset(kind.encode() for kind in (records.DECLARED, records.FIRED, records.CANCELLED, records.RESENT))
"""Kinds that a finished chord keeps until the retention is over."""


def stays(key: bytes, decision: bytes) -> bool:
    """Return whether a finished chord keeps a record, given the key of the decision that counts."""
    kind = key.split(b"|", 3)[2]
    return kind in _STAY or key == decision or (bool(decision) and key.startswith(slices_of(decision)))


def slices_of(decision: bytes) -> bytes:
    """Return how the keys of a decision's slices begin."""
    return decision.replace(f"|{records.DECIDED}|".encode(), f"|{records.CHOSEN}|".encode()) + b"|"


# Shared by all finished chords, and never written to.
NO_KEYS: Final[frozenset[bytes]] = frozenset()
NO_MEMBERS: Final[dict[Member, Candidate]] = {}
NO_SLICES: Final[dict[tuple[str, int], tuple[Choice, ...]]] = {}
NO_EXTENSIONS: Final[dict[str, tuple[int, int]]] = {}
DONE: Final = Doing()
