"""A Kafka that asks who you are and what you may do: for tests of credentials, certificates and rights.

Its listeners:

* ``open``: an admin's, without a question asked;
* ``locked``: a password, in the clear;
* ``secure``: TLS, then PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER;
* ``mutual``: TLS with a client's certificate.

Every principal of `USERS` has a password, SCRAM credentials and a certificate; a token may name anybody.
"""

from __future__ import annotations

import base64
import functools
import json
import shutil
import time
from typing import TYPE_CHECKING, Any

import trustme
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives import serialization

from tests.services import docker, kafka, ports, scratch
from tests.services.errors import ServiceError
from tests.services.kafka_wire import live_brokers
from tests.services.native import Process

if TYPE_CHECKING:
    from pathlib import Path

USER, PASSWORD = "celery-processor", "hunter2-sasl"
KEY_PASSWORD = "k3y-passw0rd"
ROLES = ("client", "worker", "processor", "operator")
USERS = tuple(f"celery-{role}" for role in ROLES)
SCRAM = {"SCRAM-SHA-256": ScramMechanism.SCRAM_SHA_256, "SCRAM-SHA-512": ScramMechanism.SCRAM_SHA_512}
REAUTHENTICATE_MS = 3_000
"""A connection with a token is cut after so long unless the client shows a new one."""
LOGIN = "org.apache.kafka.common.security"
PLAIN = f"{LOGIN}.plain.PlainLoginModule required " + " ".join(f'user_{user}="{PASSWORD}"' for user in USERS) + ";"


class LockedKafka:
    """A running one."""

    def __init__(self, node: Process, listeners: dict[str, int], folder: Path) -> None:
        self._addresses = {name: f"{ports.HOST}:{port}" for name, port in listeners.items()}
        self.open = self._addresses["open"]
        self.locked = self._addresses["locked"]
        self.secure = self._addresses["secure"]
        self.mutual = self._addresses["mutual"]
        self.folder = folder
        self._node = node

    def client(self, password: str = PASSWORD) -> dict[str, str]:
        """Options of librdkafka for the locked listener."""
        return {
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": "PLAIN",
            "sasl.username": USER,
            "sasl.password": password,
        }

    def tls(self, user: str, mechanism: str = "SCRAM-SHA-512", password: str = PASSWORD) -> dict[str, str]:
        """… for the secure listener, with a password."""
        return {
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self.folder / "ca.pem"),
            "sasl.mechanism": mechanism,
            "sasl.username": user,
            "sasl.password": password,
        }

    def oauth(self, callback: str) -> dict[str, str]:
        """… for the secure listener, with a token."""
        return {
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self.folder / "ca.pem"),
            "sasl.mechanism": "OAUTHBEARER",
            "oauth_cb": callback,
        }

    def certificate(self, user: str) -> dict[str, str]:
        """… for the mutual listener."""
        return {
            "security.protocol": "SSL",
            "ssl.ca.location": str(self.folder / "ca.pem"),
            "ssl.certificate.location": str(self.folder / f"{user}.pem"),
            "ssl.key.location": str(self.folder / f"{user}.pem"),
        }

    def encrypted(self, user: str, password: str = KEY_PASSWORD) -> dict[str, str]:
        """… with a private key that has a password."""
        key = str(self.folder / f"{user}-encrypted.pem")
        return {**self.certificate(user), "ssl.key.location": key, "ssl.key.password": password}

    def admin(self) -> AdminClient:
        """Somebody who may do everything."""
        return AdminClient({"bootstrap.servers": self.open})

    def grant(self, user: str, resource: str, name: str, operation: str) -> None:
        """Give a right; a name that ends with ``*`` is a prefix."""
        admin = self.admin()  # what it promises ends with it
        for future in admin.create_acls([AclBinding(*_rule(user, resource, name, operation))]).values():
            future.result(10)

    def revoke(self, user: str, resource: str, name: str, operation: str) -> None:
        """Take it away again."""
        admin = self.admin()
        for future in admin.delete_acls([AclBindingFilter(*_rule(user, resource, name, operation))]).values():
            assert future.result(10)

    def stop(self) -> None:
        """End it and throw its data away."""
        self._node.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _rule(user: str, resource: str, name: str, operation: str) -> tuple[Any, ...]:
    pattern = ResourcePatternType.PREFIXED if name.endswith("*") else ResourcePatternType.LITERAL
    what = ResourceType[resource.upper().replace("-", "_")], name.removesuffix("*"), pattern
    return (*what, f"User:{user}", "*", AclOperation[_constant(operation)], AclPermissionType.ALLOW)


def _constant(operation: str) -> str:
    """``DescribeConfigs`` as the driver spells it."""
    return "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in operation).removeprefix("_")


def token(subject: str, lifetime_s: float) -> tuple[str, float]:
    """An unsigned token, which the broker of the tests believes, and when it expires."""

    def part(content: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()

    now = time.time()
    claims = {"sub": subject, "iat": now, "exp": now + lifetime_s}
    return f"{part({'alg': 'none'})}.{part(claims)}.", now + lifetime_s


def start() -> LockedKafka:
    """Start one.

    Raises:
        ServiceError: It did not start, or Kafka runs in containers, whose files this cannot write.
    """
    if docker.chosen():
        raise ServiceError("a locked Kafka is only started natively")
    libs = kafka.jars()
    folder = scratch.folder("kafka-locked")
    names = ("open", "locked", "secure", "mutual")
    *numbers, controller = ports.free(len(names) + 1)
    listeners = dict(zip(names, numbers, strict=True))
    _write_certificates(folder)
    config = kafka._write_properties(
        folder / "1", 1, (listeners["open"], listeners["open"], controller), f"1@{ports.HOST}:{controller}", 1
    )
    with config.open("a") as properties:
        properties.writelines(f"{key}={value}\n" for key, value in _properties(folder, listeners, controller).items())
    java = ["java", kafka.HEAP[1], *kafka.JVM, "-cp", f"{libs}/*"]
    kafka._format(java, [config])
    node = Process(
        name="locked Kafka",
        port=listeners["open"],
        command=[*java, "kafka.Kafka", str(config)],
        log=config.with_name("broker.log"),
        ready=functools.partial(lambda at: 1 in live_brokers(at), listeners["open"]),
        start_timeout_s=kafka.START_TIMEOUT_S,
    )
    node.launch()
    server = LockedKafka(node, listeners, folder)
    try:
        node.wait()
        _add_scram(server)
    except BaseException:
        node.stop()
        raise
    return server


def _properties(folder: Path, listeners: dict[str, int], controller: int) -> dict[str, str]:
    addresses = {name.upper(): port for name, port in listeners.items()} | {"CONTROLLER": controller}
    secure = "listener.name.secure"
    urls = ",".join(f"{name}://{ports.HOST}:{port}" for name, port in addresses.items())
    return {
        "listeners": urls,
        "advertised.listeners": urls,
        "listener.security.protocol.map": "OPEN:PLAINTEXT,LOCKED:SASL_PLAINTEXT,SECURE:SASL_SSL,MUTUAL:SSL,"
        "CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "OPEN",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "listener.name.locked.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.locked.plain.sasl.jaas.config": PLAIN,
        f"{secure}.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
        f"{secure}.plain.sasl.jaas.config": PLAIN,
        f"{secure}.scram-sha-256.sasl.jaas.config": f"{LOGIN}.scram.ScramLoginModule required;",
        f"{secure}.scram-sha-512.sasl.jaas.config": f"{LOGIN}.scram.ScramLoginModule required;",
        f"{secure}.oauthbearer.sasl.jaas.config": f"{LOGIN}.oauthbearer.OAuthBearerLoginModule required "
        'unsecuredLoginStringClaim_sub="broker";',
        f"{secure}.oauthbearer.connections.max.reauth.ms": str(REAUTHENTICATE_MS),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(folder / "broker.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(folder / "ca.pem"),
        "listener.name.mutual.ssl.client.auth": "required",
        "ssl.principal.mapping.rules": "RULE:^.*CN=([^,]+).*$/$1/,DEFAULT",
    }


def _write_certificates(folder: Path) -> None:
    """One authority for all, and another one that nobody knows (``other-ca.pem``)."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other-ca.pem")
    for name in ("broker", *USERS):
        issued = authority.issue_cert(ports.HOST, common_name=name)
        key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), password=None)
        pkcs8 = key.private_bytes(  # Java reads no other
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{name}.pem").write_bytes(pkcs8 + b"".join(one.bytes() for one in issued.cert_chain_pems))
        locked = serialization.BestAvailableEncryption(KEY_PASSWORD.encode())
        (folder / f"{name}-encrypted.pem").write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
        )


def _add_scram(server: LockedKafka) -> None:
    admin = server.admin()
    for mechanism in SCRAM.values():  # Kafka refuses two of one user in one request
        wanted = [
            UserScramCredentialUpsertion(user, ScramCredentialInfo(mechanism, 4096), PASSWORD.encode())
            for user in USERS
        ]
        for future in admin.alter_user_scram_credentials(wanted).values():
            future.result(20)
