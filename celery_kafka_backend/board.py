"""Numbers that several processes write and one reads: shared memory with a seat for each.

Each process writes its own seat only, so nothing is locked between them. A seat is taken by a lock
on one byte of the memory's file, which the kernel lets go when the process ends, however it ends:
so seats are found again, and a thousand processes one after another need no more room than one.
Counters go on where the last one who sat there left them, so a sum over all seats never goes back.

The file has no name and is gone with its last process. It is inherited by a fork, and handed to a
process that `multiprocessing` spawns.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import threading
from bisect import bisect_left
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_PID: Final = 0
_SAID: Final = 1
"""How many times something was said; the last is on the page of this number's parity, the next goes to the other."""
_HEAD: Final = 2
_CELL_BYTES: Final = 8
_LENGTH_BYTES: Final = 8


class Reading(NamedTuple):
    """What a seat holds.

    Attributes:
        number: Its number.
        alive: Whether the process that sits there lives.
        cells: Its numbers.
        text: What it said last, b"" if nothing.
    """

    number: int
    alive: bool
    cells: tuple[float, ...]
    text: bytes


class Board:
    """The seats.

    Args:
        seats: How many processes may sit at once.
        cells: Numbers per seat.
        text_bytes: Room for what a process says in words.
    """

    def __init__(self, seats: int, cells: int, text_bytes: int) -> None:
        self._open(_memory(), seats, cells, text_bytes)

    def _open(self, fd: int, seats: int, cells: int, text_bytes: int) -> None:
        self._fd = fd
        self._shape = seats, cells, text_bytes
        self._page_bytes = _LENGTH_BYTES + -(-text_bytes // _CELL_BYTES) * _CELL_BYTES
        self._stride = (_HEAD + cells) * _CELL_BYTES + 2 * self._page_bytes
        os.ftruncate(fd, seats * self._stride)
        self._memory = memoryview(mmap.mmap(fd, seats * self._stride))
        self._mine: dict[int, Seat] = {}

    def __reduce__(self) -> Any:
        # Works only while multiprocessing spawns a process; anything else could not share memory.
        return _handed_over, (reduction.DupFd(self._fd), self._shape)

    def take(self, number: int | None = None, clear: Iterable[int] = ()) -> Seat | None:
        """Return this process's seat, the same with every call; None if there is none left.

        Args:
            number: Which one; by default the first that is free.
            clear: Cells to be set to 0: what was true of its last owner only.
        """
        pid = os.getpid()
        mine = self._mine.get(pid)
        if mine is None:
            taken = next(filter(self._lock, range(self._shape[0]) if number is None else (number,)), None)
            if taken is None:
                return None
            seat = Seat(*self._parts(taken))
            for cell in clear:
                seat.put(cell, 0.0)
            seat.say(b"")
            seat.sit(pid)
            # Of two threads that come at once, one sits; what was inherited through a fork is another's.
            mine = self._mine.setdefault(pid, seat)
            self._mine = {pid: mine}
            mine.number = taken
        return mine

    def read(self) -> Iterator[Reading]:
        """Yield what every seat holds that was ever taken."""
        mine = self._mine.get(os.getpid())
        for number in range(self._shape[0]):
            seat = Seat(*self._parts(number))
            if not seat.taken:
                continue
            # One's own lock must not be tried: it would be given, and then lost.
            alive = mine is not None and mine.number == number
            if not alive:
                alive = not self._lock(number)
                if not alive:
                    fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, number)
            yield Reading(number, alive, seat.numbers(), seat.text())

    def _lock(self, number: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:  # another process has it
            return False
        return True

    def _parts(self, number: int) -> tuple[memoryview[float], tuple[memoryview, memoryview]]:
        start = number * self._stride
        pages = start + (_HEAD + self._shape[1]) * _CELL_BYTES
        middle, end = pages + self._page_bytes, pages + 2 * self._page_bytes
        return self._memory[start:pages].cast("d"), (self._memory[pages:middle], self._memory[middle:end])


class Seat:
    """One process's numbers. Safe for its threads."""

    number = -1

    def __init__(self, cells: memoryview[float], pages: tuple[memoryview, memoryview]) -> None:
        self._cells = cells
        self._pages = pages
        self._lock = threading.Lock()

    # -- writing: by the process that took it ------------------------------------------------------

    def sit(self, pid: int) -> None:
        """Say whose it is."""
        self._cells[_PID] = pid

    def add(self, cell: int, amount: float = 1.0) -> None:
        """Add to a number."""
        with self._lock:
            self._cells[_HEAD + cell] += amount

    def put(self, cell: int, value: float) -> None:
        """Set a number."""
        self._cells[_HEAD + cell] = value

    def observe(self, cell: int, buckets: Sequence[float], value: float) -> None:
        """Count a value in the histogram that begins at a cell."""
        at = _HEAD + cell
        with self._lock:
            self._cells[at + bisect_left(buckets, value)] += 1.0
            self._cells[at + len(buckets) + 1] += value

    def say(self, text: bytes) -> None:
        """Replace the words. A reader sees the old or the new ones, whole, even if we stop in between.

        Raises:
            ValueError: There is not so much room.
        """
        said = int(self._cells[_SAID]) + 1
        room = self._pages[said % 2]
        end = _LENGTH_BYTES + len(text)
        if end > len(room):
            raise ValueError(f"{len(text)} bytes are too long for a page of {len(room) - _LENGTH_BYTES}")
        room[:_LENGTH_BYTES] = len(text).to_bytes(_LENGTH_BYTES, "little")
        room[_LENGTH_BYTES:end] = text
        self._cells[_SAID] = said

    # -- reading: by anybody -------------------------------------------------------------------------

    @property
    def taken(self) -> bool:
        """Whether any process ever sat here."""
        return self._cells[_PID] != 0

    def get(self, cell: int) -> float:
        """Return a number."""
        return float(self._cells[_HEAD + cell])

    def numbers(self) -> tuple[float, ...]:
        """Return every number."""
        return tuple(self._cells[_HEAD:])

    def text(self) -> bytes:
        """Return the words."""
        while True:
            said = int(self._cells[_SAID])
            room = self._pages[said % 2]
            length = int.from_bytes(room[:_LENGTH_BYTES], "little")
            text = bytes(room[_LENGTH_BYTES : _LENGTH_BYTES + length])
            if int(self._cells[_SAID]) == said:  # so this page was not written meanwhile
                return text


def _memory() -> int:
    """Return the descriptor of a file without a name."""
    if hasattr(os, "memfd_create"):  # needs no disk: a hardened container may have none to write on
        return os.memfd_create("celery-kafka-metrics")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _handed_over(descriptor: Any, shape: tuple[int, int, int]) -> Board:
    board = Board.__new__(Board)
    board._open(descriptor.detach(), *shape)  # noqa: SLF001 - it is its own
    return board
