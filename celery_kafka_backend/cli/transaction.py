"""How an operator's transaction ends: Kafka lets one operator at a time have one (`Broker.transactional`)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, cast

from confluent_kafka import KafkaError, KafkaException

if TYPE_CHECKING:
    from confluent_kafka import Producer

SHUT_OUT: Final = "another operator's requeue, drop or rerun began, and ended this one"

_SHUT_OUT: Final = {
    KafkaError._FENCED,  # noqa: SLF001 - confluent-kafka's name for it
    KafkaError.PRODUCER_FENCED,
    KafkaError.INVALID_PRODUCER_EPOCH,
}


def commit(producer: Producer, timeout_s: float) -> None:
    """Commit, again and again while Kafka asks for that.

    Raises:
        KafkaException: It refuses, or does not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return producer.commit_transaction(timeout_s)
        except KafkaException as exc:
            if not exc.args[0].retriable() or time.monotonic() > deadline:
                raise


def undo(producer: Producer, timeout_s: float, error: KafkaException | SystemError) -> KafkaError:
    """Abort, and return why: a record that could not be delivered does not say that we were shut out; aborting does.

    What cannot be aborted now is undone by Kafka itself, after `kafka.TRANSACTION_MS`.
    """
    why = _cause(error)
    try:
        producer.abort_transaction(timeout_s)
    except KafkaException as exc:
        if is_shut_out(exc.args[0]):
            return cast("KafkaError", exc.args[0])
    return why


def is_shut_out(error: KafkaError) -> bool:
    """Whether somebody else has begun a transaction of the same name."""
    return error.code() in _SHUT_OUT


def _cause(error: KafkaException | SystemError) -> KafkaError:
    """Return what Kafka complains of.

    confluent-kafka raises a fatal error, as that we were shut out, from within `flush`, and goes on to hand out delivery
    reports: the first Python function that is called then ends with a SystemError, whose cause is that error.
    """
    found = error if isinstance(error, KafkaException) else error.__cause__
    if not isinstance(found, KafkaException):
        raise error
    return cast("KafkaError", found.args[0])
