"""What the chord processor's tests and their processes share: an app, a chord's records, the queue of bodies."""

from __future__ import annotations

import base64
import json
import socket
import time
from pathlib import Path
from uuid import uuid4

from celery import Celery
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from kombu.utils.encoding import ensure_bytes

from celery_kafka_backend import chord_records as records
from celery_kafka_backend import kafka, settings, topics
from celery_kafka_backend.producer import headers
from tests.integration.kafka_topics import create, must_arrive
from tests.patience import PATIENCE_S


def make_settings(servers, prefix, **more):
    given = {
        "topic_prefix": prefix,
        "replication_factor": 1,
        "min_insync_replicas": 1,
        "partitions": 4,
        "chord_partitions": 4,
        **more,
    }
    return settings.parse(f"kafka://{servers}/?view=sqlite:///unused", given)


def make_app(folder):
    """An app whose broker is a folder, so that every process sees the same queue; results go to files."""
    queue, results = Path(folder, "queue"), Path(folder, "results")
    queue.mkdir(exist_ok=True)
    results.mkdir(exist_ok=True)
    app = Celery("proj", broker="filesystem://", backend=f"file://{results}", set_as_current=False)
    app.conf.update(
        broker_transport_options={
            "data_folder_in": str(queue),
            "data_folder_out": str(queue),
            "control_folder": str(queue),
        },
        broker_connection_retry_on_startup=False,
        task_publish_retry=False,
    )

    @app.task(name="proj.xsum", shared=False)
    def xsum(numbers, more=0):
        return sum(numbers) + more

    @app.task(name="proj.note", shared=False)
    def note(task_id):
        return task_id

    return app


def sent_bodies(folder):
    """Return every message in the queue, decoded; the queue keeps them."""
    found = []
    for file in sorted(Path(folder, "queue").glob("*.msg")):
        try:
            message = json.loads(file.read_text())
        except ValueError:  # being written
            continue
        args, kwargs, embed = json.loads(base64.b64decode(message["body"]))
        found.append({"headers": message["headers"], "args": args, "kwargs": kwargs, "embed": embed})
    return found


def create_topics(config):
    """Create what `init` would; the embedded broker has no controller, and needs none."""
    wanted = [NewTopic(t.name, t.partitions, t.replication, config=t.config) for t in topics.wanted(config)]
    create(AdminClient({"bootstrap.servers": config.bootstrap_servers}), *wanted)


class ChordsTopic:
    """The fleet's side: appends records, and looks at the topic."""

    def __init__(self, config):
        self.config = config
        self.topic = topics.chords(config.topic_prefix)
        self.producer = Producer({**kafka.producer_config(config), "on_delivery": must_arrive})
        found = self.producer.list_topics(self.topic, timeout=PATIENCE_S).topics[self.topic]
        self.partitions = len(found.partitions) or 4

    def append(self, *appended):
        for record in appended:
            key, value = records.encode(record)
            partition = topics.chord_partition(record.group, self.partitions)
            self.producer.produce(self.topic, value, key, partition=partition)
        assert self.producer.flush(PATIENCE_S) == 0

    def append_raw(self, group, key, value):
        self.producer.produce(self.topic, value, key, partition=topics.chord_partition(group, self.partitions))
        assert self.producer.flush(PATIENCE_S) == 0

    def left(self, group):
        """Return the records of a group as compaction would leave them."""
        live = {}
        for key, value in read_all(self.config, self.topic, topics.chord_partition(group, self.partitions)):
            if records.parse_key(key).group == group:
                live.pop(key, None)
                if value is not None and value != b"rubbish":
                    live[key] = records.decode(key, value)
        return list(live.values())

    def history(self, group):
        for key, value in read_all(self.config, self.topic, topics.chord_partition(group, self.partitions)):
            if value is not None and records.parse_key(key).group == group:
                yield records.decode(key, value)


def read_all(config, topic, partition):
    """Return every key and value of a partition."""
    consumer = Consumer(kafka.consumer_config(config, None))
    try:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=PATIENCE_S)
        consumer.assign([TopicPartition(topic, partition, low)])
        found, at, deadline = [], low, time.monotonic() + PATIENCE_S
        while at < high and time.monotonic() < deadline:
            message = consumer.poll(0.1)
            if message is not None and message.error() is None:
                at = message.offset() + 1
                found.append((message.key(), message.value()))
        assert at >= high, f"read up to {at} of {high} records"
        return found
    finally:
        consumer.close()


class Chord:
    """The records of one chord, made as a worker's backend makes them."""

    def __init__(self, app, callback, size=3, *, group=None, generation=None, **declared):
        self.app = app
        self.group = group or f"g-{uuid4()}"
        self.generation = generation or 1_790_000_000_000
        self.body_id = str(uuid4())
        self.size = size
        callback = callback.clone()
        callback.freeze(self.body_id)
        callback.options[headers.GENERATION] = self.generation
        self.here = {"group": self.group, "generation": self.generation}
        self.declared = records.Declared(
            **self.here,
            body=json.dumps(callback).encode(),
            body_task_id=self.body_id,
            body_name=callback.task,
            immutable=bool(callback.immutable),
            at=1,
            host=socket.gethostname(),
            **declared,
        )
        self.sized = records.Sized(**self.here, size=size)

    def part(self, number, value=None, *, state="SUCCESS", event=None, key=1, **more):
        backend = self.app.backend
        content_type, encoding, payload = backend._encode(backend.encode_result(value, state))
        return records.Part(
            **self.here,
            task=f"t{number}-{self.group}",
            index=number,
            id=event or f"e{number}",
            key=key,
            state=state,
            result=ensure_bytes(payload),
            content_type=content_type,
            content_encoding=encoding,
            exception="" if state == "SUCCESS" else repr(value),
            root=f"root-{self.group}",
            parent="parent",
            **more,
        )

    def parts(self):
        return [self.part(n, n * 10) for n in range(self.size)]
