"""What librdkafka complains about, in the user's words."""

from __future__ import annotations

import time

import pytest
from confluent_kafka import KafkaError, KafkaException

from celery_kafka_backend.complaints import CREDENTIALS, NETWORK, Complaints, NoToken
from celery_kafka_backend.settings import parse

URL = "kafka://b:9092/?view=redis://r/0"


def hearing(**client):
    return Complaints(parse(URL, {"client": client}))


def without_token(config):
    """As the driver does: it calls back, drops what that raises, and gives up."""
    try:
        config["oauth_cb"]("")
    except Exception:  # noqa: BLE001 - as the driver
        raise KafkaException(KafkaError(KafkaError.SASL_AUTHENTICATION_FAILED, "OAuth token not set")) from None


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (lambda _: ("t", time.time() - 60), "ValueError: its token expired 60 s ago"),
        (lambda _: "a token alone", "must return (token, expiry"),
        (lambda _: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_callable_that_gives_no_token_is_named_with_its_reason(gives, words):
    complaints = hearing(**{"sasl.mechanism": "OAUTHBEARER"})
    with pytest.raises(NoToken, match="oauth_cb") as raised:
        complaints.handle(without_token, {"oauth_cb": gives})
    assert words in str(raised.value)


def test_an_older_driver_that_asks_for_a_token_in_poll_alone_has_one_before_it_is_used():
    class Old:
        def __init__(self, config):
            self.config, self.token = config, None

        def poll(self, _timeout):
            self.token = self.config["oauth_cb"]("")

    expiry = time.time() + 60
    made = hearing(**{"sasl.mechanism": "OAUTHBEARER"}).handle(Old, {"oauth_cb": lambda _: ("t", expiry)})
    assert made.token == ("t", expiry)


def test_one_thing_is_said_once_whatever_the_words(caplog):
    complaints = hearing(**{"sasl.mechanism": "PLAIN", "sasl.username": "u", "sasl.password": "hunter2"})
    for text in ("ssl://b/1: no (after 3ms in state AUTH_REQ)", "ssl://b/1: no (after 4ms in state AUTH_REQ)"):
        complaints(KafkaError(KafkaError._AUTHENTICATION, text))
    assert len(caplog.records) == 1
    assert complaints.kind == CREDENTIALS
    assert complaints.latest == (
        "Kafka at b:9092 does not let us in: no; correct kafka_backend_settings['client']['sasl.username'] = 'u' or "
        "['sasl.password']"
    )


def test_what_is_no_complaint_about_a_connection_explains_nothing():
    complaints = hearing()
    complaints(KafkaError(KafkaError._ALL_BROKERS_DOWN, "1/1 brokers are down"))
    assert (complaints.kind, complaints.latest) == ("", "")
    complaints(KafkaError(KafkaError._RESOLVE, "b: Failed to resolve 'b:9092'"))
    assert complaints.kind == NETWORK


@pytest.mark.parametrize(
    ("why", "kind"),
    [
        ("Broker: Request not valid in current SASL state: broker's supported mechanisms:", NETWORK),
        ("Local: Broker transport failure: broker's supported mechanisms: (n/a)", NETWORK),
        ("Broker: Unsupported SASL mechanism: broker's supported mechanisms: PLAIN", CREDENTIALS),
    ],
)
def test_a_renewal_that_met_another_is_no_wrong_mechanism(why, kind):
    complaints = hearing(**{"sasl.mechanism": "OAUTHBEARER"})
    complaints(KafkaError(KafkaError._AUTHENTICATION, f"SASL OAUTHBEARER mechanism handshake failed: {why}"))
    assert complaints.kind == kind


def test_a_users_own_error_cb_hears_as_well():
    heard = []
    complaints = hearing(error_cb=heard.append)
    error = KafkaError(KafkaError._TRANSPORT, "Connection refused")
    complaints(error)
    assert heard == [error]
