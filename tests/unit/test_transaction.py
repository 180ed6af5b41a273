"""How an operator's transaction ends, whatever Kafka answers."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from celery_kafka_backend.cli.transaction import commit, is_shut_out, undo

AGAIN = KafkaException(KafkaError(KafkaError._TIMED_OUT, "the coordinator is slow", retriable=True))
REFUSED = KafkaException(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED, "no"))
FENCED = KafkaException(KafkaError(KafkaError.PRODUCER_FENCED, "a newer one has begun", fatal=True))


class Answers:
    """A producer whose Kafka answers as told, then well."""

    def __init__(self, *answers: KafkaException) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.answers:
            raise self.answers.pop(0)

    def commit_transaction(self, timeout_s: float) -> None:
        self._ask("commit")

    def abort_transaction(self, timeout_s: float) -> None:
        self._ask("abort")


def test_a_commit_is_asked_for_again_while_kafka_says_so() -> None:
    """Its outcome is not known then: whoever gave up would do again what is done."""
    producer: Any = Answers(AGAIN, AGAIN)
    commit(producer, 60)
    assert producer.asked == ["commit"] * 3


@pytest.mark.parametrize(("answer", "timeout_s"), [(REFUSED, 60), (FENCED, 60), (AGAIN, -1)])
def test_a_commit_that_is_refused_or_too_late_says_so(answer: KafkaException, timeout_s: float) -> None:
    """Not for ever."""
    with pytest.raises(KafkaException) as said:
        commit(Answers(answer), timeout_s)  # type: ignore[arg-type]
    assert said.value is answer


def test_what_failed_is_undone_and_says_why() -> None:
    """The first complaint is the reason, if aborting goes well."""
    producer: Any = Answers()
    assert undo(producer, 60, REFUSED) is REFUSED.args[0]
    assert producer.asked == ["abort"]


def test_who_was_shut_out_learns_it_from_the_abort() -> None:
    """A record that could not be delivered does not tell."""
    producer: Any = Answers(FENCED)
    assert is_shut_out(undo(producer, 60, REFUSED))


def test_a_fatal_error_inside_a_delivery_report_is_found() -> None:
    """confluent-kafka wraps it."""
    wrapped = SystemError("returned a result with an exception set")
    wrapped.__cause__ = FENCED
    assert is_shut_out(undo(Answers(), 60, wrapped))  # type: ignore[arg-type]


def test_any_other_system_error_is_raised() -> None:
    """It is nobody's answer."""
    with pytest.raises(SystemError):
        undo(Answers(), 60, SystemError("bad internal call"))  # type: ignore[arg-type]
