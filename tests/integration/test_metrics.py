"""What a real worker and a real `pipeline run` show: figures that agree with the log, and health that means something."""

from __future__ import annotations

import os
import re
import secrets
import signal
import time
import urllib.error
import urllib.request
from collections import Counter

import pytest
from celery import chord
from confluent_kafka import Consumer, Producer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from celery_kafka_backend import codec, events, topics
from tests.integration.conftest import Fleet
from tests.integration.kafka_topics import must_arrive
from tests.patience import PATIENCE_S, until
from tests.services import kafka as kafka_service
from tests.services import ports
from tests.services import redis as redis_service
from tests.services.proxy import Proxy

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

HEALTH_S = 8.0
CHILD_TASKS = 5


class Watched:
    """A fleet with a Kafka behind a proxy and a view of its own, which may be frozen, and its two endpoints."""

    def __init__(self, fleet, proxy, view, worker_port, pipeline_port):
        self.fleet, self.proxy, self.view = fleet, proxy, view
        self.kafka = f"127.0.0.1:{proxy.port}"
        self.worker = f"http://127.0.0.1:{worker_port}"
        self.pipeline = f"http://127.0.0.1:{pipeline_port}"
        self.settings = fleet.app.app.backend.settings

    def processor(self) -> int:
        """The pid of the materializer that was started last."""
        return int(re.findall(r"redis-\w+/1: started, pid (\d+)", self.fleet.log("pipeline"))[-1])


@pytest.fixture(scope="module")
def watched(redis_server, tmp_path_factory):
    proxies = []

    def advertise(port):
        proxies.append(Proxy(port))
        return proxies[0].port

    cluster, view = kafka_service.start(advertise=advertise), redis_service.start()
    worker_port, pipeline_port = ports.free(2)
    fleet = Fleet(
        f"127.0.0.1:{proxies[0].port}",
        redis_server.clean_database(),
        view.url,
        tmp_path_factory.mktemp("metrics"),
        {
            "spool": str(tmp_path_factory.mktemp("spool")),
            "spool_after_s": 5,
            "metrics_port": worker_port,
            "health_timeout_s": HEALTH_S,
            "topic_prefix": f"m{secrets.token_hex(4)}",
        },
        {},
    )
    try:
        fleet.init()
        fleet.start("pipeline", "pipeline", "run", "--metrics-port", str(pipeline_port), ready="assigned")
        fleet.worker(f"--max-tasks-per-child={CHILD_TASKS}")
        made = Watched(fleet, proxies[0], view, worker_port, pipeline_port)
        until(lambda: get(f"{made.pipeline}/readyz") == (200, "ok\n"))
        yield made
    finally:
        fleet.stop()
        view.stop()
        cluster.stop()
        proxies[0].close()


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(url):
    """Return {(name, label value …): value}, labels in the order of their names."""
    status, text = get(f"{url}/metrics")
    assert status == 200
    return {
        (
            sample.name.removeprefix("celery_kafka_"),
            *(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(found, name):
    return sum(value for (one, *_), value in found.items() if one == name)


def records(watched, topic):
    """Return every record of a topic, as (key, value)."""
    consumer = Consumer({"bootstrap.servers": watched.kafka, "group.id": "test", "enable.auto.commit": False})
    try:
        found, missing = [], 0
        for partition in consumer.list_topics(topic, timeout=PATIENCE_S).topics[topic].partitions:
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=PATIENCE_S)
            missing += high - low
            consumer.incremental_assign([TopicPartition(topic, partition, low)])
        while missing:
            (message,) = consumer.consume(1, 20)
            assert message.error() is None
            found.append((message.key(), message.value()))
            missing -= 1
        return found
    finally:
        consumer.close()


def test_the_figures_agree_with_the_log_however_many_children_there_were(watched):
    tasks = watched.fleet.app
    sent = [tasks.add.delay(i, i) for i in range(6 * CHILD_TASKS)]
    assert [one.get(timeout=PATIENCE_S) for one in sent] == [2 * i for i in range(6 * CHILD_TASKS)]
    assert chord([tasks.add.s(i, i) for i in range(4)])(tasks.total.s()).get(timeout=PATIENCE_S) == 12
    last = len(sent) + 4 + 1
    log = until(
        lambda: len(found := records(watched, topics.task_events(watched.settings.topic_prefix))) == 4 * last and found
    )
    roles = Counter(codec.decode(value).role for _, value in log)
    assert roles == {events.CLIENT: last, events.PARENT: last, events.CHILD: 2 * last}

    def settled():
        found = scrape(watched.pipeline)
        return found if total(found, "view_events_total") == 4 * last and not total(found, "view_lag_records") else None

    found = until(settled)
    # The view has read what is in both topics, tombstones too.
    chords = records(watched, topics.chords(watched.settings.topic_prefix))
    until(lambda: total(scrape(watched.pipeline), "view_batch_records_sum") >= len(log) + len(chords))
    assert total(found, "view_batch_records_count") <= total(found, "view_write_seconds_count")
    assert total(found, "view_dead_letters_total") == 0
    assert total(found, "view_lag_seconds") == 0
    assert found["chords_decided_total",] == found["chords_fired_total", "sent"] == 1
    assert found["chords_body_delay_seconds_count",] == 1
    until(lambda: scrape(watched.pipeline)["chords_open",] == 0)
    assert found["processor_up", "chords"] == 1

    worker = until(
        lambda: (now := scrape(watched.worker))["publish_queue_records",] == 0 and now["worker_processes",] <= 3 and now
    )
    parts = 4
    assert worker["publish_seconds_count",] == roles[events.PARENT] + roles[events.CHILD] + parts
    assert total(worker, "publish_errors_total") == worker["publish_dropped_total",] == 0
    children = set(re.findall(r"ForkPoolWorker-(\d+)", watched.fleet.log("worker")))
    assert len(children) >= last // CHILD_TASKS, "or nothing is said of recycled ones"


def test_what_nobody_can_read_is_counted_as_a_dead_letter(watched):
    producer = Producer({"bootstrap.servers": watched.kafka, "on_delivery": must_arrive})
    producer.produce(topics.task_events(watched.settings.topic_prefix), value=b"rubbish", key=b"k")
    assert producer.flush(PATIENCE_S) == 0
    until(lambda: total(scrape(watched.pipeline), "view_dead_letters_total") == 1)


def test_a_port_in_use_ends_the_second_with_the_name_of_the_setting(watched):
    port = watched.pipeline.rpartition(":")[2]
    for arguments, named in (
        (["worker", "-n", "second@%h", "-c", "1"], "kafka_backend_settings['metrics_port']"),
        (["pipeline", "run", "--metrics-port", port], "--metrics-port"),
        (["pipeline", "run", "--metrics-port", "0", "--metrics-address", "nowhere.invalid"], "--metrics-address"),
    ):
        done = watched.fleet.run(*arguments)
        said = done.stdout + done.stderr
        assert done.returncode == 3, said
        assert named in said


def test_a_killed_processor_is_counted_on_and_its_counters_do_not_go_back(watched):
    before = scrape(watched.pipeline)
    os.kill(watched.processor(), signal.SIGKILL)
    until(
        lambda: total(scrape(watched.pipeline), "processor_starts_total") == total(before, "processor_starts_total") + 1
    )
    assert total(scrape(watched.pipeline), "view_events_total") >= total(before, "view_events_total")
    until(lambda: get(f"{watched.pipeline}/readyz")[0] == 200)
    assert watched.fleet.app.add.delay(1, 1).get(timeout=PATIENCE_S) == 2
    until(lambda: total(scrape(watched.pipeline), "view_events_total") >= total(before, "view_events_total") + 4)


def test_a_frozen_view_makes_it_unready_and_not_unhealthy(watched):
    watched.view.freeze()
    try:
        result = watched.fleet.app.app.tasks["fleet_app.add"].apply_async((2, 2))
        found = until(
            lambda: (said := get(f"{watched.pipeline}/readyz"))[0] == 503 and "has not answered" in said[1] and said
        )
        assert f"redis://127.0.0.1:{watched.view.port}" in found[1]
        until(lambda: "waited" in get(f"{watched.pipeline}/readyz")[1])
        time.sleep(HEALTH_S)  # the bound must pass for the next line to mean anything
        assert get(f"{watched.pipeline}/healthz") == (200, "ok\n")
    finally:
        watched.view.thaw()
    until(lambda: get(f"{watched.pipeline}/readyz")[0] == 200)
    assert result.get(timeout=PATIENCE_S) == 4


def test_a_frozen_processor_is_unhealthy_within_its_bound_and_again_well(watched):
    pid = watched.processor()
    assert get(f"{watched.pipeline}/healthz")[0] == 200
    os.kill(pid, signal.SIGSTOP)
    try:
        _, why = until(lambda: (said := get(f"{watched.pipeline}/healthz"))[0] == 503 and said)
        assert re.fullmatch(r"redis-\w+/1: its loop has not turned for \d+ s\n", why)
        assert why.rpartition(" for ")[0] in get(f"{watched.pipeline}/readyz")[1]
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: get(f"{watched.pipeline}/healthz")[0] == get(f"{watched.pipeline}/readyz")[0] == 200)


def test_a_worker_that_cannot_reach_kafka_is_unready_and_says_why_and_its_spool_is_seen(watched):
    assert total(scrape(watched.worker), "spool_records") == 0
    assert get(f"{watched.worker}/readyz") == (200, "ok\n")
    watched.proxy.cut()
    try:
        watched.fleet.app.nap.delay(0)
        _, why = until(lambda: (said := get(f"{watched.worker}/readyz"))[0] == 503 and "waiting" in said[1] and said)
        assert watched.kafka in why
        assert get(f"{watched.worker}/healthz") == (200, "ok\n")
        found = until(lambda: (now := scrape(watched.worker))["spool_records",] and now)
        assert found["spool_oldest_seconds",] > 0
        assert 0 < found["spool_bytes",] < found["spool_limit_bytes",]
    finally:
        watched.proxy.heal()
    until(lambda: get(f"{watched.worker}/readyz")[0] == 200)
    until(lambda: scrape(watched.worker)["spool_records",] == 0)
