"""librdkafka's options in Faust's words. Knows only what the two share; anything else is refused, not left out."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any, Final

from faust import SASLCredentials, SSLCredentials

from celery_kafka_backend.errors import SettingsError
from celery_kafka_backend.settings import SETTING

if TYPE_CHECKING:
    from celery_kafka_backend.settings import Settings

_UNDERSTOOD: Final = {
    "security.protocol", "sasl.mechanism", "sasl.mechanisms", "sasl.username", "sasl.password",
    "ssl.ca.location", "ssl.certificate.location", "ssl.key.location", "ssl.key.password",
    "ssl.endpoint.identification.algorithm",
}  # fmt: skip
_SECURITY: Final = ("sasl.", "ssl.", "security.", "oauth")
_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


def client_options(settings: Settings) -> dict[str, Any]:
    """Return what tells a Faust app where Kafka is, and who we are.

    Options that say how fast or how patiently are left to Faust; one that says who we are must be understood.

    Raises:
        SettingsError: It is not.
    """
    client = settings.client
    for name in client:
        if name.startswith(_SECURITY) and name not in _UNDERSTOOD:
            raise SettingsError(
                f"{SETTING}['client'][{name!r}]",
                "Faust has no such option",
                f"for insight: {', '.join(sorted(_UNDERSTOOD))}",
            )
    broker = ";".join(f"kafka://{server.strip()}" for server in settings.bootstrap_servers.split(","))
    credentials = _credentials(client)
    return {"broker": broker} if credentials is None else {"broker": broker, "broker_credentials": credentials}


def _credentials(client: dict[str, Any]) -> Any:
    protocol = str(client.get("security.protocol", "plaintext")).upper()
    context = _context(client) if protocol.endswith("SSL") else None
    if not protocol.startswith("SASL"):
        return None if context is None else SSLCredentials(context)
    mechanism = client.get("sasl.mechanism") or client.get("sasl.mechanisms") or "GSSAPI"
    if mechanism not in _MECHANISMS:
        raise SettingsError(
            f"{SETTING}['client']['sasl.mechanism']",
            f"insight cannot use {mechanism}",
            f"one of {', '.join(_MECHANISMS)}",
        )
    return SASLCredentials(
        username=client.get("sasl.username"),
        password=client.get("sasl.password"),
        mechanism=mechanism,
        ssl_context=context,
    )


def _context(client: dict[str, Any]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=client.get("ssl.ca.location"))
        if certificate := client.get("ssl.certificate.location"):
            context.load_cert_chain(certificate, client.get("ssl.key.location"), client.get("ssl.key.password"))
    except (OSError, ssl.SSLError) as exc:
        raise SettingsError(
            f"{SETTING}['client']", f"a certificate or key cannot be read: {exc}", "correct ssl.*"
        ) from exc
    if client.get("ssl.endpoint.identification.algorithm") == "none":
        context.check_hostname = False
    return context
