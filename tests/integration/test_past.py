"""Reading a range of the log: all of it, or an error."""

from __future__ import annotations

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from celery_kafka_backend import past
from celery_kafka_backend.errors import NotAcknowledged

pytestmark = pytest.mark.kafka

PARTITIONS = 3


@pytest.fixture
def topic(kafka, topic_prefix):
    """A topic of which each partition holds 20 records, ends with the mark of a transaction's end, and so reaches offset 21."""
    name = f"{topic_prefix}.past"
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.create_topics([NewTopic(name, PARTITIONS, 1)])[name].result()
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": topic_prefix})
    producer.init_transactions(60)
    producer.begin_transaction()
    for n in range(20 * PARTITIONS):
        producer.produce(name, str(n), partition=n % PARTITIONS)
    producer.commit_transaction(60)
    return name


@pytest.fixture
def consumer(kafka):
    options = {"bootstrap.servers": kafka.bootstrap, "group.id": "past", "enable.partition.eof": True}
    made = Consumer({**options, "enable.auto.commit": False, "auto.offset.reset": "earliest"})
    yield made
    made.close()


def test_a_range_is_read_to_its_end_where_every_partition_ends_with_the_mark_of_a_transaction(topic, consumer):
    spans = {(topic, n): (5, 21) for n in range(PARTITIONS)}
    found, reached = [], {}
    for messages, moved in past.batches(consumer, spans, count=7):
        found += [(message.partition(), message.offset()) for message in messages]
        reached.update(moved)
    assert sorted(found) == [(n, offset) for n in range(PARTITIONS) for offset in range(5, 20)]
    assert reached == dict.fromkeys(spans, 21)


def test_nothing_beyond_a_range_is_given(topic, consumer):
    spans = {(topic, 0): (0, 10), (topic, 1): (3, 3), (topic, 2): (0, 1)}
    found = [(m.partition(), m.offset()) for messages, _ in past.batches(consumer, spans) for m in messages]
    assert sorted(found) == [*((0, n) for n in range(10)), (2, 0)]


def test_what_kafka_does_not_give_is_an_error_and_not_the_end(topic, consumer):
    found = past.batches(consumer, {(topic, 0): (0, 30), (topic, 1): (0, 20)}, silence_s=2)
    with pytest.raises(NotAcknowledged, match=rf"although there is more: .*{topic}/0@"):
        list(found)
