"""A whole fleet on a Kafka with TLS, logins and rights; and what each of its people is told who lacks something."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from celery import chord, group
from celery.exceptions import TimeoutError as GetTimeout
from confluent_kafka import Consumer, KafkaError, TopicPartition
from kombu.exceptions import OperationalError

from celery_kafka_backend import codec, rights, topics
from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.dealing import Dealing, Reading
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.complaints import Complaints, NoToken
from celery_kafka_backend.errors import NotAcknowledged, PublishError, Refused, SettingsError
from celery_kafka_backend.events import Event
from celery_kafka_backend.kafka import consumer_config
from celery_kafka_backend.letters import REQUEUE, REQUEUED
from celery_kafka_backend.processors.deadletters import DeadLetters
from celery_kafka_backend.producer.publisher import Publisher, Record
from celery_kafka_backend.settings import parse
from tests.integration import kafka_topics
from tests.integration.conftest import Fleet
from tests.integration.locked_kafka import PASSWORD
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

ROLE_OF = {"worker": rights.WORKER, "pipeline": rights.PROCESSOR}
TOKENS = "tests.integration.fleet_tokens"


class SecuredFleet(Fleet):
    """A fleet in which everybody has credentials of their own, and the rights that `init --print` prints."""

    def __init__(self, server, listener, credentials, redis_server, folder):
        super().__init__(listener, redis_server.clean_database(), redis_server.clean_database(), folder, {}, {})
        self.environment["FLEET_TOKENS"] = str(folder / "tokens")
        self.environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[2])
        Path(self.environment["FLEET_TOKENS"]).touch()
        self.prefix = json.loads(self.environment["FLEET_SETTINGS"])["topic_prefix"]
        self.server = server
        self.credentials = credentials
        self._act_as(rights.CLIENT)
        os.environ["FLEET_TOKENS"] = self.environment["FLEET_TOKENS"]

    def _act_as(self, role):
        settings = json.loads(self.environment["FLEET_SETTINGS"])
        self.environment["FLEET_SETTINGS"] = json.dumps({**settings, "client": self.credentials[role]})

    def start(self, name, *arguments, ready):
        self._act_as(ROLE_OF[name])
        super().start(name, *arguments, ready=ready)
        self._act_as(rights.CLIENT)

    def init(self):
        """Create the topics, as an admin; give everybody their rights."""
        secured = dict(self.environment)
        self.environment["FLEET_BACKEND"] = f"kafka://{self.server.open}/?view={self.view}"
        settings = json.loads(self.environment["FLEET_SETTINGS"])
        self.environment["FLEET_SETTINGS"] = json.dumps({**settings, "client": {}})
        super().init()
        self.environment.update(secured)
        for right in rights.rights(self.prefix):
            self.server.grant(f"celery-{right.role}", right.resource, right.name, right.operation)


def passwords(server):
    mechanisms = {"client": "PLAIN", "worker": "SCRAM-SHA-256", "processor": "SCRAM-SHA-512"}
    return server.secure, {role: server.tls(f"celery-{role}", one) for role, one in mechanisms.items()}


def certificates(server):
    return server.mutual, {role: server.certificate(f"celery-{role}") for role in rights.ROLES}


def tokens(server):
    return server.secure, {role: server.oauth(f"{TOKENS}.{role}") for role in rights.ROLES}


def works(fleet):
    app = fleet.app
    assert app.add.delay(1, 2).get(timeout=PATIENCE_S) == 3
    assert chord(group(app.add.s(i, i) for i in range(5)), app.total.s()).delay().get(timeout=PATIENCE_S) == 20
    with pytest.raises(ValueError, match="no"):
        app.fail.delay().get(timeout=PATIENCE_S)


@pytest.fixture
def secured(locked, redis_server, tmp_path):
    made = []

    def start(how):
        fleet = SecuredFleet(locked, *how(locked), redis_server, tmp_path)
        made.append(fleet)
        fleet.serve()
        return fleet

    yield start
    for fleet in made:
        fleet.app.app.backend.recorder.publisher.close()
        fleet.stop()


@pytest.mark.parametrize("how", [passwords, certificates])
def test_a_fleet_works_with_the_rights_that_init_prints(secured, how):
    fleet = secured(how)
    works(fleet)
    for name in ("worker", "pipeline"):
        assert PASSWORD not in fleet.log(name)
        assert "authorization failed" not in fleet.log(name).lower()


def test_a_fleet_with_tokens_renews_them_in_every_process(secured):
    fleet = secured(tokens)
    works(fleet)

    def asked():
        return Counter(Path(fleet.environment["FLEET_TOKENS"]).read_text().splitlines())

    # A token lives for 4 s, a connection for 3. The worker's parent and its two children; the view's process with its
    # two consumers, the chord processor; and this client.
    deadline = time.monotonic() + PATIENCE_S
    while True:
        renewed = Counter(line.split()[0] for line, times in asked().items() if times >= 4)
        if renewed["worker"] >= 3 and renewed["processor"] >= 2 and renewed["client"] >= 1:
            break
        assert time.monotonic() < deadline, asked()
        time.sleep(0.2)
    works(fleet)
    # A token of 4 s may expire under way on a busy machine, and be complained of; what counts is that all goes on.
    said = fleet.log("worker") + fleet.log("pipeline")
    assert "eyJ" not in said  # how a token begins: none is ever shown


def test_a_workers_principal_reads_the_log_without_a_group(locked, redis_url, topic_prefix):
    """What a read barrier needs: assign(), no membership, no commit."""
    settings = settled(locked, redis_url, topic_prefix, locked.tls("celery-worker"))
    publisher = Publisher(settings)
    log = topics.task_events(settings.topic_prefix)
    stored = publisher.publish(Record(log, b"k", b"v"))
    stored.wait(PATIENCE_S)
    consumer = Complaints(settings).handle(Consumer, consumer_config(settings, None))
    try:
        consumer.assign([TopicPartition(log, stored.partition, 0)])
        deadline = time.monotonic() + PATIENCE_S
        found, refused = [], set()
        while not found and time.monotonic() < deadline:
            message = consumer.poll(0.2)
            if message is not None and message.error() is None:
                found.append(message.value())
            elif message is not None:
                refused.add(message.error().code())
    finally:
        consumer.close()
        publisher.close()
    assert found == [b"v"]
    assert refused <= {KafkaError.GROUP_AUTHORIZATION_FAILED}


# -- who lacks what ----------------------------------------------------------------------------


def settled(server, view, prefix, client, *, listener=None, grant=True, **more):
    """Settings for topics that exist, with the rights of every role."""
    small = {"replication_factor": 1, "min_insync_replicas": 1, "partitions": 1, "chord_partitions": 1}
    settings = parse(
        f"kafka://{listener or server.secure}/?view={view}", {"topic_prefix": prefix, "client": client, **small, **more}
    )
    if grant:
        create(server, settings)
        for right in rights.rights(prefix):
            server.grant(f"celery-{right.role}", right.resource, right.name, right.operation)
    return settings


def create(server, settings):
    from confluent_kafka.admin import NewTopic  # noqa: PLC0415

    kafka_topics.create(server.admin(), *(NewTopic(one.name, one.partitions, 1) for one in topics.wanted(settings)))


@pytest.mark.parametrize("role", ["worker", "client"])
def test_a_missing_right_to_write_is_named_and_given_later_it_is_enough(locked, redis_url, topic_prefix, role):
    """Also after an idempotent producer's fatal error, which is what Kafka makes of no right to write at all."""
    settings = settled(
        locked, redis_url, topic_prefix, locked.certificate(f"celery-{role}"), listener=locked.mutual, grant=False
    )
    create(locked, settings)
    log = topics.task_events(settings.topic_prefix)
    locked.grant(f"celery-{role}", "topic", log, "Describe")
    publisher = Publisher(settings)
    try:
        with pytest.raises(PublishError) as raised:
            publisher.publish(Record(log, b"k", b"v")).wait(PATIENCE_S)
        said = str(raised.value)
        assert isinstance(raised.value, Refused), said
        assert f"our principal lacks Write on topic {log}" in said
        assert f"--operation Write --topic {log}" in said
        locked.grant(f"celery-{role}", "topic", log, "Write")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                publisher.publish(Record(log, b"k", b"v")).wait(PATIENCE_S)
                break
            except Refused:  # rights take a moment to reach the broker
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        publisher.close()


@pytest.mark.parametrize("role", rights.ROLES)
def test_doctors_eyes_see_what_each_role_lacks(locked, redis_url, topic_prefix, role):
    from celery_kafka_backend.cli.run import check_rights  # noqa: PLC0415

    user = f"celery-{role}"
    settings = settled(locked, redis_url, topic_prefix, locked.tls(user), grant=False)
    create(locked, settings)
    needed = rights.of_role(topic_prefix, role)
    for right in needed:
        if right.operation == "Describe" and right.resource == "topic":
            locked.grant(user, right.resource, right.name, right.operation)
    broker = Broker(settings, 10)
    try:
        with pytest.raises(Stop) as stopped:
            check_rights(broker, role, insight=True)
        assert stopped.value.code is Exit.RIGHTS_MISSING
        # Kafka cannot be asked about a transactional id: whoever uses it is told.
        needed = [right for right in needed if right.resource != "transactional-id"]
        lacking = [right for right in needed if (right.operation, right.resource) != ("Describe", "topic")]
        for right in lacking:
            assert f"{right.operation} on {right.resource} {right.name}" in str(stopped.value)
            assert f"User:{user} lacks" in str(stopped.value)
        assert [line for line in str(stopped.value).splitlines() if line.startswith("kafka-acls.sh")] == rights.grants(
            lacking, settings.bootstrap_servers, f"User:{user}"
        )
        for right in needed:
            locked.grant(user, right.resource, right.name, right.operation)
        check_rights(broker, role, insight=True)
    finally:
        broker.close()


def test_a_client_is_told_before_any_header_task_of_a_chord_is_sent(locked, redis_server, tmp_path):
    fleet = SecuredFleet(locked, *passwords(locked), redis_server, tmp_path)
    chords = topics.chords(fleet.prefix)
    try:
        fleet.init()
        locked.revoke("celery-client", "topic", chords, "Write")
        app = fleet.app
        with pytest.raises(OperationalError) as raised:
            chord(group(app.add.s(i, i) for i in range(2)), app.total.s()).delay()
        assert f"User:celery-client lacks Write on topic {chords}" in str(raised.value)
    finally:
        fleet.app.app.backend.recorder.publisher.close()
        fleet.stop()


def test_a_workers_log_says_which_right_its_results_lack(secured, locked):
    fleet = secured(passwords)
    log = topics.task_events(fleet.prefix)
    locked.revoke("celery-worker", "topic", log, "Write")
    result = fleet.app.add.delay(1, 2)
    fleet.until("worker", f"User:celery-worker lacks Write on topic {log}")
    assert "kafka-acls.sh" in fleet.log("worker")
    with pytest.raises(GetTimeout):
        result.get(timeout=1)


# -- wrong credentials -------------------------------------------------------------------------


def wrong(server, **changes):
    return {**server.tls("celery-worker"), **changes}


CASES = {
    "password": (lambda s: wrong(s, **{"sasl.password": "wr0ng-s3cret"}), "secure", ["['sasl.username'] = 'celery-worker'"]),
    "mechanism": (
        lambda s: wrong(s, **{"security.protocol": "SASL_PLAINTEXT"}), "locked", ["['sasl.mechanism'] = 'SCRAM-SHA-512'"]
    ),
    "authority": (
        lambda s: wrong(s, **{"ssl.ca.location": str(s.folder / "other-ca.pem")}), "secure",
        ["certificate verify failed", "['ssl.ca.location']", "other-ca.pem"],
    ),
    "TLS on a listener without": (wrong, "open", ["['security.protocol'] = 'SASL_SSL'"]),
    "no certificate": (
        lambda s: {k: v for k, v in s.certificate("celery-worker").items() if "key" not in k and "certificate" not in k},
        "mutual", ["['ssl.certificate.location']"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_credentials_are_said_once_in_bounded_time_with_the_setting(
    locked, redis_url, topic_prefix, caplog, case
):
    client, listener, words = CASES[case]
    settings = settled(locked, redis_url, topic_prefix, client(locked), listener=getattr(locked, listener), grant=False)
    broker = Broker(settings, 2)
    with pytest.raises(Stop) as stopped:
        _ = broker.metadata
    assert stopped.value.code is Exit.RIGHTS_MISSING
    publisher = Publisher(settings)
    with caplog.at_level(logging.INFO), pytest.raises(NotAcknowledged) as raised:
        publisher.publish(Record("t", b"k", b"v")).wait(2)
    publisher.close()
    for text in (str(stopped.value), str(raised.value)):
        assert "kafka_backend_settings['client']" in text
        for word in words:
            assert word in text
    # Publishers of other modules may complain of their own servers, which are gone.
    said = [one.getMessage() for one in caplog.records if one.name == "celery_kafka_backend.complaints"]
    complaints = [text for text in said if settings.bootstrap_servers in text]
    assert len(complaints) == len(set(complaints)) == 1
    for text in (*(one.getMessage() for one in caplog.records), str(stopped.value), str(raised.value)):
        assert "wr0ng-s3cret" not in text
        assert PASSWORD not in text


def test_a_private_key_with_a_password_opens_with_it(locked, redis_url, topic_prefix):
    client = locked.encrypted("celery-worker")
    settings = settled(locked, redis_url, topic_prefix, client, listener=locked.mutual)
    publisher = Publisher(settings)
    publisher.publish(Record(topics.task_events(topic_prefix), b"k", b"v"), wait_s=PATIENCE_S).wait(PATIENCE_S)
    publisher.close()


def test_a_private_key_s_wrong_password_is_said_with_the_setting_and_not_shown(locked, redis_url, topic_prefix):
    client = locked.encrypted("celery-worker", "wr0ng-s3cret")
    settings = settled(locked, redis_url, topic_prefix, client, listener=locked.mutual, grant=False)
    with pytest.raises(SettingsError, match=r"\['client'\]\['ssl\.key") as raised:
        Publisher(settings).open()
    assert "wr0ng-s3cret" not in str(raised.value)


def test_a_callable_that_gives_no_token_is_named_with_its_reason(locked, redis_url, topic_prefix):
    settings = settled(locked, redis_url, topic_prefix, locked.oauth(f"{TOKENS}.broken"), grant=False)
    publisher = Publisher(settings)
    begun = time.monotonic()
    with pytest.raises(NoToken) as raised:
        publisher.publish(Record("t", b"k", b"v"))
    assert f"['oauth_cb'] = '{TOKENS}.broken'" in str(raised.value)
    assert "the identity provider is away" in str(raised.value)
    waited = time.monotonic() - begun
    assert publisher.cast(Record("t", b"k", b"v"))  # and nobody else waits as long: it goes when there is a token
    assert publisher.waiting() == 1
    assert time.monotonic() - begun < 1.5 * waited


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ssl.ca.location": "/no/such/ca.pem"}, ["['ssl.ca.location']: '/no/such/ca.pem'"]),
        ({"ssl.key.location": "/no/such.key"}, ["['ssl.key.location']: '/no/such.key'"]),
        ({"sasl.mechanism": "NTLM"}, ["['sasl.mechanism']: 'NTLM'"]),
        ({"security.protocol": "TLS"}, ["['security.protocol']: 'TLS'"]),
        ({"no.such.option": "s3cret-value"}, ["['no.such.option']"]),
        ({"oauth_cb": "os.path"}, ["['oauth_cb'] = 'os.path': it is no callable"]),
    ],
)
def test_an_option_that_cannot_work_is_a_settings_error(locked, redis_url, topic_prefix, options, words):
    settings = settled(locked, redis_url, topic_prefix, wrong(locked, **options), grant=False)
    with pytest.raises(SettingsError) as raised:
        Publisher(settings).open()
    for word in words:
        assert word in str(raised.value)
    assert PASSWORD not in str(raised.value)


def test_an_operator_requeues_dead_letters_with_the_rights_that_init_prints(locked, redis_url, topic_prefix):
    """And is told which one is missing, with the command that grants it."""
    settings = settled(locked, redis_url, topic_prefix, locked.tls("celery-operator"))
    log = topics.task_events(topic_prefix)
    at = time.time_ns() // 1_000_000
    value = codec.encode(Event(id="e", kind="received", task="t", at=at, hlc=at))
    sender = DeadLetters({"bootstrap.servers": locked.open}, topics.dead_letters(topic_prefix))
    sender.put(log, 0, 7, b"t", value, [("e", b"received")], "no room")
    sender.flush(20)
    broker = Broker(settings, 20)
    try:
        reading = Reading(broker)
        reading.go_on()
        dealing = Dealing(broker, "ann", "disk added")
        dealing.begin()
        assert list(dealing.requeue(dealing.sort(reading.cases, REQUEUE))) == [1]
        assert [str(one.record) for one in dealing.done] == [f"{log}/0@7"]
        Dealing(broker, "bob", "to see all that was done").begin()
        reading.go_on()
        assert [case.state for case in reading.cases] == [REQUEUED]
        name = topics.operators(topic_prefix)
        locked.revoke("celery-operator", "transactional-id", name, "Write")
        deadline = time.monotonic() + PATIENCE_S
        while (error := refused_to_begin(broker)) is None:  # what is taken away takes a moment to reach the broker
            assert time.monotonic() < deadline
        assert error.code is Exit.RIGHTS_MISSING
        assert f"--operation Write --operation Describe --transactional-id {name}" in str(error)
    finally:
        broker.close()


def refused_to_begin(broker):
    try:
        Dealing(broker, "ann", "again").begin()
    except Stop as error:
        return error
    return None
