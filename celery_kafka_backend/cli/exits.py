"""How a command ends: exit codes by name, and which error means which."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from celery.exceptions import ImproperlyConfigured

from celery_kafka_backend.errors import (
    Crashed,
    ForeignLog,
    NoSuchTopic,
    NotAcknowledged,
    PipelineError,
    Refused,
    SettingsError,
    StoreError,
)


class Exit(IntEnum):
    """Exit codes; part of the interface, documented in docs/cli.md."""

    OK = 0
    UNEXPECTED = 1
    NOBODY_FOLDS = 2
    CONFIGURATION = 3
    KAFKA_UNREACHABLE = 4
    RIGHTS_MISSING = 5
    TOPICS_WRONG = 6
    VIEW_UNUSABLE = 7
    PROCESSORS_CRASHED = 8
    FOREIGN_LOG = ForeignLog.exit_code
    DIFFERENT = 10
    NOT_FOUND = 11
    KILLED = 12
    NOT_DONE = 13
    INTERRUPTED = 130


MEANINGS: Final = {
    Exit.OK: "all is well, or all was done",
    Exit.UNEXPECTED: "an error of ours: please report it",
    Exit.NOBODY_FOLDS: "nobody folds: a view (or the chords) has no processor",
    Exit.CONFIGURATION: "a setting, an option or a view's URL is wrong, or an extra is missing",
    Exit.KAFKA_UNREACHABLE: "Kafka did not answer in time",
    Exit.RIGHTS_MISSING: "Kafka answered, and refused: rights or credentials",
    Exit.TOPICS_WRONG: "topics are missing, or not as they should be",
    Exit.VIEW_UNUSABLE: "a view's store cannot be reached or used",
    Exit.PROCESSORS_CRASHED: "a processor crashed too often; the others were stopped",
    Exit.FOREIGN_LOG: "the topics belong to another app",
    Exit.DIFFERENT: "verify or shadow found differences; findings: there are some; spool: records are set aside",
    Exit.NOT_FOUND: "no such event, task, chord or dead letter is to be found",
    Exit.KILLED: "a processor did not stop in time and was killed; its last batch will be repeated",
    Exit.NOT_DONE: "what was asked for, or a part of it, is refused as things are, or could not be done; forget: a view still shows the result",
    Exit.INTERRUPTED: "interrupted",
}


class Stop(PipelineError):  # noqa: N818 - says what it does
    """Raised when a command cannot go on, for a reason that the user can do something about.

    Args:
        code: How to exit.
        problem: What is wrong, with setting and value.
        remedy: What to do.
    """

    def __init__(self, code: Exit, problem: str, remedy: str = "") -> None:
        self.code = code
        self.problem = problem
        self.remedy = remedy
        super().__init__(problem + (f"\n{remedy}" if remedy else ""))


EXAMPLE: Final = "celery -A proj pipeline"
"""How the user calls us, in the words of whoever cannot know it."""


def no_topic(topic: str, command: str = EXAMPLE) -> Stop:
    """Return what to say where a topic is missing."""
    return Stop(Exit.TOPICS_WRONG, f"no topic {topic}", f"create the topics: `{command} init`")


_CODES: Final[tuple[tuple[type[BaseException], Exit], ...]] = (
    (ImproperlyConfigured, Exit.CONFIGURATION),
    (SettingsError, Exit.CONFIGURATION),
    (ForeignLog, Exit.FOREIGN_LOG),
    (NotAcknowledged, Exit.KAFKA_UNREACHABLE),
    (NoSuchTopic, Exit.TOPICS_WRONG),
    (Refused, Exit.RIGHTS_MISSING),
    (StoreError, Exit.VIEW_UNUSABLE),
    (Crashed, Exit.PROCESSORS_CRASHED),
)


def code_of(error: BaseException) -> Exit:
    """Return how to exit after an error."""
    if isinstance(error, Stop):
        return error.code
    return next((code for kind, code in _CODES if isinstance(error, kind)), Exit.UNEXPECTED)
