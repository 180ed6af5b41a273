"""Every error that this package raises on its own account.

The tree::

    PipelineError
    ├── SettingsError        a setting is unknown, contradictory or unusable; names it and the remedy
    ├── CodecError           bytes from the log that are not an event
    │   ├── Unreadable
    │   └── UnknownVersion
    ├── PublishError         Kafka did not take a record
    │   ├── NotAcknowledged  … in time; it may arrive yet
    │   ├── Refused          … and never will: rights, topic, configuration
    │   │   └── NoSuchTopic  … unless the broker has just started, and does not know it yet
    │   └── TooLarge         … and never will: the record is over the limit
    ├── SpoolError           this host's spool cannot be used
    ├── StoreError           a view's store
    │   ├── Unavailable      … is away; the same call again may succeed
    │   └── Rejected         … will never take these records; the others were written
    ├── ClaimLost            the object that holds a large result is gone or damaged
    ├── Unsure               nobody can tell in time what the log says beyond a view
    ├── Crashed              a process of ours that had a part of the work
    └── ForeignLog           the topics belong to another app

A driver's exceptions are translated into these in the one file that imports the driver.
"""

# ruff: noqa: N818 - users catch these by the fact they state, as in `Rejected`

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class PipelineError(Exception):
    """Root of the tree."""


class SettingsError(PipelineError):
    """Raised when a setting is unknown, contradictory or unusable.

    Args:
        setting: Its name as the user wrote it.
        problem: What is wrong with it, with the value (secrets masked).
        remedy: What to do.
    """

    def __init__(self, setting: str, problem: str, remedy: str = "") -> None:
        self.setting = setting
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{setting}: {problem}" + (f". {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type[SettingsError], tuple[str, str, str]]:
        """Let it be raised again in the process that asked."""
        return type(self), (self.setting, self.problem, self.remedy)


class CodecError(PipelineError):
    """Raised when bytes from the log are not an event this version can read."""


class Unreadable(CodecError):
    """Raised when the bytes are not JSON of the documented shape."""


class UnknownVersion(CodecError):
    """Raised when a record's schema version is newer than this software."""


class PublishError(PipelineError):
    """Raised when Kafka did not take a record."""


class NotAcknowledged(PublishError):
    """Raised when no acknowledgement came within the bound; the record may arrive yet."""


class Refused(PublishError):
    """Raised when Kafka will not take the record: rights, a missing topic, configuration."""


class NoSuchTopic(Refused):
    """Raised when the broker knows no such topic; one that has just started may not know it yet."""


class TooLarge(PublishError):
    """Raised when the record is over the producer's, topic's or broker's limit."""


class SpoolError(PipelineError):
    """Raised when this host's spool cannot be used: it is full, the disk is, the folder is not writable."""


class StoreError(PipelineError):
    """Raised when a view's store did not do as asked."""


class Unavailable(StoreError):
    """Raised when the store is away or overloaded; the same call may succeed later."""


class Rejected(StoreError):
    """Raised when the store will never take some records of a batch.

    Args:
        reasons: Pairs of the refused change's subject id and why. Everything else in the
            batch has been written when this is raised.
    """

    def __init__(self, reasons: Sequence[tuple[str, str]]) -> None:
        self.reasons = tuple(reasons)
        shown = "; ".join(f"{subject}: {why}" for subject, why in self.reasons[:3])
        super().__init__(f"{len(self.reasons)} refused: {shown}")


class ClaimLost(PipelineError):
    """Raised when the object that holds a large result is not there, or not what was stored."""


class Unsure(PipelineError):
    """Raised when nobody can tell in time what the log says beyond what a view shows."""


class Crashed(PipelineError):
    """Raised when a process of ours ended before it had done its part."""


class ForeignLog(PipelineError):
    """Raised when a topic prefix already serves another app."""

    exit_code: ClassVar[int] = 9
    """Of a worker as of ``pipeline``."""
