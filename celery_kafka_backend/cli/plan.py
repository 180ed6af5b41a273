"""How topics differ from what they should be, and the commands that put it right. Pure: no I/O."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from celery_kafka_backend.cli.broker import Found
    from celery_kafka_backend.topics import Topic

MISSING: Final = "missing"
FEWER: Final = "fewer partitions"
MORE: Final = "more partitions"
REPLICATION: Final = "replication"
CONFIG: Final = "config"


class Difference(NamedTuple):
    """One thing about a topic that is not as wanted.

    Attributes:
        topic: The topic as wanted.
        kind: `MISSING`, `FEWER`, `MORE`, `REPLICATION` or `CONFIG`.
        is_: As it is.
        wanted: As it should be.
        setting: Kafka's name of it, for `CONFIG`.
    """

    topic: Topic
    kind: str
    is_: str
    wanted: str
    setting: str = ""

    def __str__(self) -> str:
        name = self.topic.name
        if self.kind == MISSING:
            return f"{name}: missing"
        if self.kind in (FEWER, MORE):
            return f"{name}: {self.is_} partitions, wanted {self.wanted}"
        return f"{name}: {self.setting or 'replication'} = {self.is_}, wanted {self.wanted}"

    @property
    def harmless(self) -> bool:
        """Whether all works as promised all the same."""
        return self.kind == MORE and not self.topic.fixed_partitions

    @property
    def remedy(self) -> str:
        """What puts it right."""
        if self.kind == MISSING:
            return "init creates it"
        if self.kind == CONFIG:
            return "init --alter sets it"
        if self.kind == REPLICATION:
            return "kafka-reassign-partitions.sh; or set kafka_backend_settings['replication_factor'] to what is there"
        name = self.topic.partitions_setting
        if self.topic.fixed_partitions:
            what = "a chord lives" if name == "chord_partitions" else "a task name's figures live"
            return f"never change it: {what} in one partition. Set kafka_backend_settings['{name}'] = {self.is_}"
        if self.kind == FEWER:
            return "init --grow adds them"
        return f"fine; topics never shrink. Set kafka_backend_settings['{name}'] = {self.is_} to say so"


def differences(wanted: list[Topic], found: Mapping[str, Found]) -> list[Difference]:
    """Return everything that is not as wanted."""
    return [difference for topic in wanted for difference in _of(topic, found.get(topic.name))]


def _of(topic: Topic, found: Found | None) -> Iterator[Difference]:
    if found is None:
        yield Difference(topic, MISSING, "", "")
        return
    if found.partitions != topic.partitions:
        kind = FEWER if found.partitions < topic.partitions else MORE
        yield Difference(topic, kind, str(found.partitions), str(topic.partitions))
    if found.replication < topic.replication:
        yield Difference(topic, REPLICATION, str(found.replication), str(topic.replication))
    for name, value in topic.config.items() if found.config else ():
        is_ = found.config.get(name, "")
        if is_ != value:
            yield Difference(topic, CONFIG, is_, value, name)


# -- sizes -----------------------------------------------------------------------------------

FATAL_LIMITS: Final = frozenset({"socket.request.max.bytes"})
"""A larger request is not answered: the broker cuts the connection."""
_LIMITS: Final = (*FATAL_LIMITS, "replica.fetch.max.bytes", "replica.fetch.response.max.bytes")


def too_small(known: Mapping[str, Mapping[str, str]], largest: int) -> list[tuple[str, str, int]]:
    """Return broker, setting and value where a record of ``largest`` bytes does not fit a broker's limit."""
    return [
        (number, name, int(config[name]))
        for number, config in known.items()
        for name in _LIMITS
        if config.get(name, "").isdigit() and int(config[name]) < largest
    ]


# -- for clusters where only others may do it ------------------------------------------------


def create_command(topic: Topic, servers: str) -> str:
    """Return the command that creates a topic."""
    parts = [
        "kafka-topics.sh", "--bootstrap-server", servers, "--create", "--if-not-exists", "--topic", topic.name,
        "--partitions", str(topic.partitions), "--replication-factor", str(topic.replication),
    ]  # fmt: skip
    for name, value in topic.config.items():
        parts += ["--config", f"{name}={value}"]
    return shlex.join(parts)
