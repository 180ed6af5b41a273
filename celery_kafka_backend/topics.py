"""The log's topics: names, settings, and who may do what; and the names of views, which name their groups. Pure data; creating them is the CLI's work."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from urllib.parse import SplitResult

    from celery_kafka_backend.settings import Settings

DAY_MS: Final = 86_400_000
INSIGHT_MS: Final = DAY_MS // 4
"""How long partial statistics are kept, and what is made of them."""
DEAD_LETTER_ROOM: Final = 65_536
"""Bytes that a dead letter may add to the record that it holds."""


_PORTS: Final = {
    "redis": ":6379",
    "rediss": ":6379",
    "sentinel": ":26379",
    "mongodb": ":27017",
    "elasticsearch": ":9200",
    "elasticsearch+https": ":9200",
    "cassandra": ":9042",
}
_REDIS: Final = ("redis", "rediss", "sentinel")
"""Whose path is a database's number."""


class Topic(NamedTuple):
    """A topic as it should be.

    Attributes:
        name: Its name.
        partitions: How many; never shrunk.
        replication: Copies of each.
        config: Topic settings under Kafka's own names.
        fixed_partitions: The count may never change, not even grow.
        partitions_setting: The setting that says how many.
    """

    name: str
    partitions: int
    replication: int
    config: dict[str, str]
    fixed_partitions: bool = False
    partitions_setting: str = "partitions"


def task_events(prefix: str) -> str:
    """Return the name of the topic that is the log, keyed by task id."""
    return f"{prefix}.task-events"


def chords(prefix: str) -> str:
    """Return the name of the chords' topic: input and state store in one, compacted."""
    return f"{prefix}.chords"


def dead_letters(prefix: str) -> str:
    """Return the name of the topic for records that could not be folded or written."""
    return f"{prefix}.dead-letters"


def task_stats(prefix: str) -> str:
    """Return the name of the topic of partial statistics, keyed by task name."""
    return f"{prefix}.task-stats"


def insight(prefix: str) -> str:
    """Return the id of the Faust app that merges them: its consumer group, and the beginning of its changelogs' names."""
    return f"{prefix}.insight"


def insight_changelog(prefix: str) -> str:
    """Return the name of the changelog of its one table; Faust puts it together like this."""
    return f"{insight(prefix)}-minutes-changelog"


def operators(prefix: str) -> str:
    """Return the transactional id of operators who requeue or drop dead letters, or run tasks again: one at a time."""
    return dead_letters(prefix)


def group_id(prefix: str, role: str) -> str:
    """Return the consumer group of a view (its name) or of the chord processor (``chords``)."""
    return f"{prefix}.{role}"


def view_name(url: str) -> str:
    """Return the stable name of a view, for its consumer group: ``redis-1a2b3c4d``.

    Made from scheme, hosts with their ports in any order, and path (Redis: also ``db=``), so that a changed password or
    timeout is the same view. Two SQLite paths that are spelt differently are two views, and so are two lists of hosts.
    """
    first, *others = url.split(";") if url.startswith("sentinel:") else [url]
    parts = urlsplit(first)
    path = parts.path
    if parts.scheme in _REDIS:
        path = path.strip("/") or dict(parse_qsl(parts.query)).get("db", "0")
    hosts = ",".join(sorted(host for each in [first, *others] for host in _hosts(urlsplit(each))))
    digest = hashlib.sha256(f"{parts.scheme}://{hosts}/{path}".encode()).hexdigest()
    return f"{parts.scheme}-{digest[:8]}"


def _hosts(parts: SplitResult) -> list[str]:
    hosts = parts.netloc.rpartition("@")[2].lower()
    port = _PORTS.get(parts.scheme)
    if port is None:
        return [hosts]
    return [each if ":" in each.rpartition("]")[2] else (each or "localhost") + port for each in hosts.split(",")]


def wanted(settings: Settings) -> list[Topic]:
    """Return the topics that this configuration wants, with reasons in docs/topics.md."""
    prefix = settings.topic_prefix
    common = {
        # Kafka refuses a producer's clock an hour ahead, and retention would eat spooled events.
        "message.timestamp.type": "LogAppendTime",
        "min.insync.replicas": str(min(settings.min_insync_replicas, settings.replication_factor)),
        "max.message.bytes": str(settings.max_message_bytes),
    }
    found = [
        Topic(
            task_events(prefix),
            settings.partitions,
            settings.replication_factor,
            # Never compact: a late STARTED would erase a SUCCESS.
            common
            | {"cleanup.policy": "delete", "retention.ms": str(settings.retention_ms), "compression.type": "producer"},
        ),
        Topic(
            chords(prefix),
            settings.chord_partitions,
            settings.replication_factor,
            common
            | {
                "cleanup.policy": "compact",
                "compression.type": "producer",
                # Together these bound what an owner re-reads when it starts.
                "segment.ms": "600000",
                "segment.bytes": str(64 << 20),
                "min.cleanable.dirty.ratio": "0.1",
            },
            fixed_partitions=True,
            partitions_setting="chord_partitions",
        ),
        Topic(
            dead_letters(prefix),
            1,
            settings.replication_factor,
            common
            | {
                "cleanup.policy": "delete",
                "retention.ms": str(max(settings.retention_ms, 30 * DAY_MS)),
                # A record as large as the log allows must fit with its reason and position beside it.
                "max.message.bytes": str(settings.max_message_bytes + DEAD_LETTER_ROOM),
            },
        ),
    ]
    return found + _of_insight(settings, common) if settings.insight else found


def _of_insight(settings: Settings, common: dict[str, str]) -> list[Topic]:
    # What is older than this no window shows.
    kept = {"retention.ms": str(INSIGHT_MS), "segment.ms": str(INSIGHT_MS // 6), "compression.type": "producer"}
    compacted = {"cleanup.policy": "compact,delete", "min.cleanable.dirty.ratio": "0.1"}
    return [
        Topic(
            name,
            # Faust wants a table's changelog to have as many as the stream that feeds it.
            settings.insight_partitions,
            settings.replication_factor,
            common | kept | cleanup,
            fixed_partitions=True,
            partitions_setting="insight_partitions",
        )
        for name, cleanup in (
            (task_stats(settings.topic_prefix), {"cleanup.policy": "delete"}),
            (insight_changelog(settings.topic_prefix), compacted),
        )
    ]


def chord_partition(group: str, partitions: int) -> int:
    """Return the partition of ``<prefix>.chords`` that a group lives in, for ever."""
    return partition_of(group, partitions)


def partition_of(key: str, partitions: int) -> int:
    """Return the partition of a record's key, as Java's clients and librdkafka's ``murmur2_random`` choose it."""
    return place_of(key.encode(), partitions)


def place_of(key: bytes, partitions: int) -> int:
    """Return the partition of a record's key as it stands in Kafka."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def murmur2(data: bytes) -> int:
    """Return Kafka's own 32-bit hash of a key (seed 0x9747b28c), unsigned.

    Computed by us for chords, because every writer must agree for ever, whatever its client
    library's default partitioner is.
    """
    m = 0x5BD1E995
    mask = 0xFFFFFFFF
    length = len(data)
    h = 0x9747B28C ^ length
    whole = length & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = h * m & mask ^ k
    if whole < length:
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15
