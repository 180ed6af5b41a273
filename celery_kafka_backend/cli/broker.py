"""Questions to Kafka, every one bounded, its errors in our words and exit codes."""

from __future__ import annotations

import logging
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]  # its __init__ only imports it

from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.complaints import CREDENTIALS, Complaints, NoToken
from celery_kafka_backend.kafka import DENIED, MOVING, consumer_config, producer_config, transaction_config
from celery_kafka_backend.past import EMBEDDED
from celery_kafka_backend.rights import OPERATOR, Right, lacking
from celery_kafka_backend.settings import SETTING
from celery_kafka_backend.topics import operators

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from confluent_kafka.admin import ClusterMetadata  # type: ignore[attr-defined]

    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

_PRODUCERS_ONLY: Final = frozenset(
    {
        "linger.ms", "compression.type", "partitioner", "delivery.timeout.ms", "request.timeout.ms",
        "queue.buffering.max.messages", "acks", "enable.idempotence", "max.in.flight.requests.per.connection",
    }
)  # fmt: skip

_DENIED: Final = DENIED | {
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.SECURITY_DISABLED,
    KafkaError._AUTHENTICATION,  # noqa: SLF001 - how confluent-kafka names its client-side codes
}
_MISSING: Final = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
    KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
}
_PASSING: Final = MOVING | {
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
}
"""For a moment after a topic has been created, or a broker has gone."""
AGAIN_AFTER_S: Final = 0.1
_NO_GROUP: Final = 69  # GROUP_ID_NOT_FOUND, for which confluent-kafka has no name

Answer = TypeVar("Answer")


def _camel(name: str) -> str:
    """Return a right as Kafka's tools spell it: ``DescribeConfigs`` for ``DESCRIBE_CONFIGS``."""
    return "".join(word.capitalize() for word in name.split("_"))


class Unanswered(Stop):
    """Raised when a broker cannot answer this kind of question: it is old, or embedded."""


class Found(NamedTuple):
    """A topic as it is.

    Attributes:
        partitions: How many.
        replication: Copies of the partition that has fewest.
        config: Topic settings; {} if Kafka did not tell.
    """

    partitions: int
    replication: int
    config: Mapping[str, str]


class Member(NamedTuple):
    """A member of a consumer group.

    Attributes:
        client: Its client id.
        host: Where it connects from.
        id: Member id.
        partitions: What it has.
    """

    client: str
    host: str
    id: str
    partitions: tuple[tuple[str, int], ...]


class Broker:
    """One connection for a command's questions.

    Args:
        settings: The user's.
        timeout_s: Bound on each question.
    """

    def __init__(self, settings: Settings, timeout_s: float) -> None:
        self.settings = settings
        self.timeout_s = timeout_s
        self._complaints = Complaints(settings, quiet=True)

    def _made(self, make: Callable[[dict[str, Any]], Answer], config: Mapping[str, Any]) -> Answer:
        try:
            return cast("Answer", self._complaints.handle(make, config))
        except NoToken as exc:
            raise Stop(Exit.RIGHTS_MISSING, str(exc)) from exc

    @cached_property
    def admin(self) -> AdminClient:
        """An admin client; no producer's settings, and above all no idempotence, which needs rights."""
        config = producer_config(self.settings)
        own = {
            name: value for name, value in config.items() if name not in _PRODUCERS_ONLY | set(self.settings.producer)
        }
        return self._made(AdminClient, own | {name: config[name] for name in self.settings.client})

    @cached_property
    def consumer(self) -> Consumer:
        """A consumer that joins no group."""
        return self._made(Consumer, consumer_config(self.settings, None))

    def reader(self) -> Consumer:
        """Return a new consumer that says when a partition ends: the last records may be control records, or gone.

        For one read: after another `assign` it would hand out an end-of-partition of the one before.
        """
        return self._made(Consumer, {**consumer_config(self.settings, None), "enable.partition.eof": True})

    def member_of(self, group: str) -> Consumer:
        """Return a consumer that can commit for a group (and joins it only if it subscribes)."""
        return self._made(Consumer, consumer_config(self.settings, group))

    def transactional(self) -> Producer:
        """Return an operator's producer of transactions. Whoever had one is shut out, and what that left open is ended.

        Raises:
            Stop: Kafka does not let us, or does not answer.
        """
        name = operators(self.settings.topic_prefix)
        producer = self._made(Producer, transaction_config(self.settings, name))
        self.ask(
            "beginning a transaction",
            lambda: producer.init_transactions(self.timeout_s),
            Right(OPERATOR, "transactional-id", name, "Write"),
            Right(OPERATOR, "transactional-id", name, "Describe"),
        )
        return producer

    def close(self) -> None:
        """Let go of the consumer."""
        if "consumer" in self.__dict__:
            self.__dict__.pop("consumer").close()

    # -- asking ------------------------------------------------------------------------------

    def ask(self, what: str, question: Callable[[], Answer], *needed: Right) -> Answer:
        """Ask, and translate what goes wrong.

        Args:
            what: What is asked, for errors.
            question: Asks.
            needed: The rights without which Kafka refuses to answer.

        Raises:
            Stop: Kafka did not answer, or refused.
            Unanswered: Kafka does not know such a question.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                return question()
            except KafkaException as exc:
                passing = isinstance(exc.args[0], KafkaError) and exc.args[0].code() in _PASSING
                if not passing or time.monotonic() >= deadline:
                    raise self.translated(exc.args[0], what, *needed) from exc
                time.sleep(AGAIN_AFTER_S)

    def translated(self, error: Any, what: str, *needed: Right) -> Stop:
        """Return one of librdkafka's errors as ours."""
        if not isinstance(error, KafkaError):
            return Stop(Exit.UNEXPECTED, f"{what}: {error}")
        code, text = error.code(), f"{what}: {error.str()} ({error.name()})"
        if code in DENIED and needed:
            problem, remedy = lacking(self.settings, needed)
            return Stop(
                Exit.RIGHTS_MISSING, f"Kafka at {self.settings.bootstrap_servers} refused: {text}; {problem}", remedy
            )
        if code in _DENIED:
            return Stop(
                Exit.RIGHTS_MISSING,
                f"Kafka at {self.settings.bootstrap_servers} refused: {text}",
                "grant the rights that `celery -A proj pipeline init --print` lists, "
                f"or correct the credentials in {SETTING}['client']",
            )
        if code in _MISSING:
            return Stop(Exit.TOPICS_WRONG, text, "create the topics: `celery -A proj pipeline init`")
        if code in (KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION):  # noqa: SLF001
            return Unanswered(Exit.UNEXPECTED, text)
        if code in (KafkaError.POLICY_VIOLATION, KafkaError.INVALID_CONFIG, KafkaError.INVALID_REPLICATION_FACTOR):
            return Stop(Exit.TOPICS_WRONG, text)
        if self.reached and code == KafkaError._TIMED_OUT:  # noqa: SLF001
            # The embedded broker has no controller: some questions just time out there.
            return Unanswered(Exit.KAFKA_UNREACHABLE, text)
        return self.unreachable(text)

    reached = False

    def unreachable(self, text: str) -> Stop:
        """Return the error for a Kafka that does not answer."""
        self.admin.poll(0)  # what librdkafka has to say comes by callbacks
        if self._complaints.kind == CREDENTIALS:
            return Stop(Exit.RIGHTS_MISSING, self._complaints.latest)
        why = f"\nlibrdkafka says: {self._complaints.latest}" if self._complaints.latest else ""
        return Stop(
            Exit.KAFKA_UNREACHABLE,
            f"no answer from Kafka at {self.settings.bootstrap_servers} within {self.timeout_s:g} s ({text}){why}",
            f"check the address in result_backend (or {SETTING}['bootstrap_servers']), the network, "
            f"and {SETTING}['client'] if it asks for TLS or a password",
        )

    @cached_property
    def metadata(self) -> ClusterMetadata:
        """Brokers and topics. The first question: a wrong address is noticed here."""
        found = self.ask("asking for metadata", lambda: self.admin.list_topics(timeout=self.timeout_s))
        self.reached = True
        return found

    def forget_metadata(self) -> None:
        """Ask again next time."""
        self.__dict__.pop("metadata", None)

    @property
    def embedded(self) -> bool:
        """Whether this is librdkafka's in-process broker, which keeps nothing and answers little."""
        return str(self.metadata.cluster_id or "").startswith(EMBEDDED)

    def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has; 0 if there is no such topic (that we may see)."""
        if self.embedded:  # there, topics appear by being asked for
            found = self.ask(f"asking about {topic}", lambda: self.admin.list_topics(topic, timeout=self.timeout_s))
            return len(found.topics[topic].partitions)
        known = self.metadata.topics.get(topic)
        return 0 if known is None or known.error is not None else len(known.partitions)

    def found(self, names: Sequence[str]) -> dict[str, Found]:
        """Return those of these topics that exist."""
        counts = {name: self.partitions(name) for name in names}
        present = [name for name in names if counts[name]]
        configs = self.configs(present)
        return {
            name: Found(
                counts[name],
                min((len(p.replicas) for p in self._topic(name).partitions.values()), default=0),
                configs.get(name, {}),
            )
            for name in present
        }

    def _topic(self, name: str) -> Any:
        if name in self.metadata.topics:
            return self.metadata.topics[name]
        return self.ask(f"asking about {name}", lambda: self.admin.list_topics(name, timeout=self.timeout_s)).topics[
            name
        ]

    def configs(self, topics: Sequence[str]) -> dict[str, dict[str, str]]:
        """Return topics' settings; {} on an embedded broker.

        Raises:
            Stop: Kafka refused, or did not answer.
        """
        if self.embedded or not topics:
            return {}
        found = {}
        for topic in topics:
            resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
            entries = self.ask(
                f"reading the settings of {topic}",
                lambda one=resource: self.admin.describe_configs([one], request_timeout=self.timeout_s)[one].result(),  # type: ignore[misc]
                Right(OPERATOR, "topic", topic, "DescribeConfigs"),
            )
            found[topic] = {name: str(entry.value) for name, entry in entries.items()}
        return found

    def limits(self) -> dict[str, dict[str, str]] | None:
        """Return each broker's settings by its number; None if it does not tell us."""
        if self.embedded:
            return None
        found = {}
        for number in self.metadata.brokers:
            resource = ConfigResource(ConfigResource.Type.BROKER, str(number))
            try:
                entries = self.ask(
                    f"reading the settings of broker {number}",
                    lambda one=resource: self.admin.describe_configs([one], request_timeout=self.timeout_s)[
                        one
                    ].result(),  # type: ignore[misc]
                )
            except Stop as exc:
                if exc.code is Exit.RIGHTS_MISSING or isinstance(exc, Unanswered):
                    return None
                raise
            found[str(number)] = {name: str(entry.value) for name, entry in entries.items()}
        return found

    def ends(self, topic: str) -> dict[int, tuple[int, int]]:
        """Return the first and the next offset of each of a topic's partitions."""
        return {
            n: self.ask(
                f"asking for the end of {topic}/{n}",
                lambda n=n: self._marks(TopicPartition(topic, n)),  # type: ignore[misc]
                Right(OPERATOR, "topic", topic, "Describe"),
            )
            for n in range(self.partitions(topic))
        }

    def _marks(self, at: TopicPartition) -> tuple[int, int]:
        return self.consumer.get_watermark_offsets(at, timeout=self.timeout_s)

    def committed(self, group: str, topics: Sequence[str]) -> dict[tuple[str, int], int]:
        """Return the committed offsets of a group in some topics; a partition without one is absent."""
        at = [TopicPartition(topic, n) for topic in topics for n in range(self.partitions(topic))]
        consumer = self.member_of(group)
        try:
            found = self.ask(
                f"reading the offsets of {group}",
                lambda: consumer.committed(at, timeout=self.timeout_s),
                Right(OPERATOR, "group", group, "Read"),
            )
        finally:
            consumer.close()
        return {(one.topic, one.partition): one.offset for one in found if one.offset >= 0 and one.error is None}

    def noted(self, group: str, at: TopicPartition, what: str, *needed: Right) -> TopicPartition:
        """Return an offset that a group has committed, for its metadata."""
        consumer = self.member_of(group)
        try:
            (found,) = self.ask(what, lambda: consumer.committed([at], timeout=self.timeout_s), *needed)
        finally:
            consumer.close()
        if found.error is not None:
            raise self.translated(found.error, what, *needed)
        return found

    def note(self, group: str, at: TopicPartition, what: str, *needed: Right) -> None:
        """Commit an offset for a group, for its metadata."""
        consumer = self.member_of(group)
        try:
            answered = self.ask(what, lambda: consumer.commit(offsets=[at], asynchronous=False), *needed)
        finally:
            consumer.close()
        for one in answered or ():
            if one.error is not None:
                raise self.translated(one.error, what, *needed)

    def members(self, group: str) -> list[Member] | None:
        """Return a group's members; None if the broker cannot tell."""
        if self.embedded:
            return None
        try:
            described = self.ask(
                f"asking who is in the group {group}",
                lambda: self._group(group),
                Right(OPERATOR, "group", group, "Read"),
            )
        except Unanswered:
            return None
        except Stop as exc:
            if isinstance(exc.__cause__, KafkaException) and exc.__cause__.args[0].name() == "GROUP_ID_NOT_FOUND":
                return []
            raise
        return [
            Member(
                one.client_id,
                one.host.lstrip("/"),
                one.member_id,
                tuple(sorted((tp.topic, tp.partition) for tp in one.assignment.topic_partitions)),
            )
            for one in described.members
        ]

    def may(self, operation: str, groups: str) -> bool:
        """Return whether we may do something with a group of this name (``prefix*``: with those that begin so)."""
        group = groups.removesuffix("*") + ("app" if groups.endswith("*") else "")
        try:
            described = self.ask(f"asking for our rights on the group {group}", lambda: self._group(group))
        except Unanswered:
            return True
        except Stop as exc:
            error = exc.__cause__.args[0] if isinstance(exc.__cause__, KafkaException) else None
            if error is None or error.code() not in (KafkaError.GROUP_AUTHORIZATION_FAILED, _NO_GROUP):
                raise
            return bool(error.code() == _NO_GROUP)
        known = described.authorized_operations
        return known is None or operation in {_camel(one.name) for one in known}

    def _group(self, group: str) -> Any:
        return self.admin.describe_consumer_groups(
            [group], include_authorized_operations=True, request_timeout=self.timeout_s
        )[group].result()

    def _described(self, topic: str) -> Any:
        return self.admin.describe_topics(
            TopicCollection([topic]), include_authorized_operations=True, request_timeout=self.timeout_s
        )[topic].result()

    def operations(self, topics: Sequence[str]) -> dict[str, set[str]] | None:
        """Return what we may do with each of these topics; None if the broker cannot tell."""
        if self.embedded or not topics:
            return None
        try:
            described = {
                name: self.ask(
                    f"asking for our rights on {name}",
                    lambda name=name: self._described(name),  # type: ignore[misc]
                    Right(OPERATOR, "topic", name, "Describe"),
                )
                for name in topics
            }
        except Unanswered:
            return None
        return {
            name: {_camel(operation.name) for operation in one.authorized_operations}
            for name, one in described.items()
            if one.authorized_operations is not None
        }
