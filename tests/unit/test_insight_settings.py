"""What `--insight` refuses, and librdkafka's options in Faust's words."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
import trustme

from celery_kafka_backend.cli import run
from celery_kafka_backend.errors import SettingsError
from celery_kafka_backend.processors.faust_client import client_options
from celery_kafka_backend.settings import Settings, parse


def settings(url: str = "kafka://b1:1,b2:2/?view=redis://r/0", **given: Any) -> Settings:
    return parse(url, given)


def test_insight_needs_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    """Statistics that are told, a view that can hold them, and the extra."""
    assert run.insight_view(settings()) == "redis://r/0"
    with pytest.raises(SettingsError, match=r"\['insight'\].*nothing is told"):
        run.insight_view(settings(insight=False))
    with pytest.raises(SettingsError, match="none of mongodb://m/d can hold insight"):
        run.insight_view(settings("kafka://b/?view=mongodb://m/d"))

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SettingsError, match=r"pip install 'celery-kafka-backend\[insight\]'"):
        run.insight_view(settings())


def test_without_security_there_are_only_addresses():
    """What says how fast or how patiently is Faust's own business."""
    assert client_options(settings(client={"socket.timeout.ms": 9_000})) == {"broker": "kafka://b1:1;kafka://b2:2"}


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_a_login_is_handed_on(mechanism: str):
    client = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": mechanism,
        "sasl.username": "u",
        "sasl.password": "p",
    }
    found = client_options(settings(client=client))["broker_credentials"]
    assert (found.username, found.password, found.mechanism.value) == ("u", "p", mechanism)
    assert found.protocol.value == "SASL_PLAINTEXT"


def test_an_authority_and_a_certificate_are_handed_on(tmp_path: Any):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    ours = authority.issue_cert("client")
    ours.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    ours.private_key_pem.write_to_path(tmp_path / "key.pem")
    client = {
        "security.protocol": "ssl", "ssl.ca.location": str(tmp_path / "ca.pem"),
        "ssl.certificate.location": str(tmp_path / "cert.pem"), "ssl.key.location": str(tmp_path / "key.pem"),
        "ssl.endpoint.identification.algorithm": "none",
    }  # fmt: skip
    found = client_options(settings(client=client))["broker_credentials"]
    assert found.protocol.value == "SSL"
    assert found.context.cert_store_stats()["x509_ca"] == 1
    assert not found.context.check_hostname


@pytest.mark.parametrize(
    ("client", "says"),
    [
        ({"sasl.kerberos.keytab": "k"}, "no such option"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}, "cannot use OAUTHBEARER"),
        ({"security.protocol": "SASL_SSL"}, "cannot use GSSAPI"),
        ({"security.protocol": "SSL", "ssl.ca.location": "/no/such/file"}, "cannot be read"),
    ],
)
def test_what_faust_cannot_do_is_refused_by_name(client: dict[str, str], says: str):
    with pytest.raises(SettingsError, match=says) as caught:
        client_options(settings(client=client))
    assert caught.value.remedy
