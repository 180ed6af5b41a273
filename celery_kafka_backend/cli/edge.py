"""Where a part of the log begins or ends, as Kafka's operators type it: a time, or offsets."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from celery_kafka_backend.changes import Partition
from celery_kafka_backend.cli.moment import Moment

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from celery_kafka_backend.processors.extent import Edge as Found

_OFFSET: Final = re.compile(r"([A-Za-z0-9._-]*[A-Za-z_][A-Za-z0-9._-]*):(\d+):(\d+)")
_MANY: Final = re.compile(rf"{_OFFSET.pattern}(,{_OFFSET.pattern})*")


class Edge(click.ParamType):
    """A time as `Moment` has it; ``TOPIC:PARTITION:OFFSET``, several with commas; or ``@FILE``: offsets as CSV.

    Args:
        all_of_it: The word for "as far as there is".
    """

    name = "time|offsets"

    def __init__(self, all_of_it: str) -> None:
        self._all_of_it = all_of_it

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Found:
        """Return ms since 1970, the offsets of partitions, or {} for as far as there is."""
        if isinstance(value, int | dict):
            return value
        text = str(value)
        if text == self._all_of_it:
            return {}
        if text.startswith("@"):
            return self._exported(text[1:], param, ctx)
        # A topic is all digits and dashes only if somebody wants trouble: 2026-01-31T12:00:00 is a time.
        if _MANY.fullmatch(text) and not re.match(r"\d{4}-\d\d-\d\d", text):
            return _offsets(each.split(":") for each in text.split(","))
        try:
            return Moment().convert(value, param, ctx)
        except click.BadParameter as exc:
            self.fail(f"{exc.message}; {self._all_of_it}; TOPIC:PARTITION:OFFSET, …; or @FILE", param, ctx)

    def _exported(self, path: str, param: click.Parameter | None, ctx: click.Context | None) -> Found:
        """Read what ``kafka-consumer-groups.sh --reset-offsets --export`` wrote: [group,] topic, partition, offset."""
        try:
            with Path(path).open(newline="", encoding="utf-8") as lines:
                return _offsets(row[-3:] for row in csv.reader(lines) if row)
        except (OSError, ValueError) as exc:
            self.fail(f"{path}: {exc}; wanted are lines of topic,partition,offset", param, ctx)


def _offsets(rows: Iterable[Sequence[str]]) -> dict[Partition, int]:
    return {Partition(topic, int(number)): int(offset) for topic, number, offset in rows}
