"""Who may do what in Kafka: the least rights of each role, and the commands that grant them. Pure data.

A producer of ours is idempotent, and needs no right of the cluster for it: since Kafka 3.0, whoever may
write some topic may. A worker reads the log where it must see what its view does not show yet; it joins
no group for that. Only an operator has transactions: to requeue dead letters, none twice.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final, NamedTuple

from celery_kafka_backend import topics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from celery_kafka_backend.settings import Settings

CLIENT: Final = "client"
"""Sends tasks, and reads the view."""
WORKER: Final = "worker"
PROCESSOR: Final = "processor"
"""`pipeline run`."""
OPERATOR: Final = "operator"
"""Types the other commands."""
ROLES: Final = (CLIENT, WORKER, PROCESSOR, OPERATOR)


class Right(NamedTuple):
    """One access right that a role needs.

    Attributes:
        role: One of `ROLES`.
        resource: ``topic``, ``group`` or ``transactional-id``.
        name: The resource's name; one that ends with ``*`` is a prefix.
        operation: Kafka's name of what may be done.
    """

    role: str
    resource: str
    name: str
    operation: str

    def __str__(self) -> str:
        return f"{self.operation} on {self.resource} {self.name}"


def rights(prefix: str) -> list[Right]:
    """Return the least rights of each role."""
    log, chord, dead = topics.task_events(prefix), topics.chords(prefix), topics.dead_letters(prefix)
    stats, changelog = topics.task_stats(prefix), topics.insight_changelog(prefix)
    groups = f"{prefix}.*"
    needed = [
        (CLIENT, "topic", log, "Write Describe"),
        (CLIENT, "topic", chord, "Write Describe"),
        (WORKER, "topic", log, "Write Read Describe"),
        (WORKER, "topic", chord, "Write Describe"),
        # Whose log it is: asked when a worker starts.
        (WORKER, "group", f"{prefix}.app", "Describe"),
        # The chord processor publishes bodies, and a chord's failure is its body's FAILURE: it writes the log, too.
        (PROCESSOR, "topic", log, "Read Write Describe"),
        (PROCESSOR, "topic", chord, "Read Write Describe"),
        (PROCESSOR, "topic", dead, "Write Describe"),
        (PROCESSOR, "topic", stats, "Read Write Describe"),
        (PROCESSOR, "topic", changelog, "Read Write Describe"),
        (PROCESSOR, "group", groups, "Read"),
        *((OPERATOR, "topic", topic, "Read Describe DescribeConfigs") for topic in (log, chord, dead)),
        # `pipeline init` looks whether they are as they should be.
        *((OPERATOR, "topic", topic, "Describe DescribeConfigs") for topic in (stats, changelog)),
        (OPERATOR, "topic", chord, "Write"),  # `pipeline chord --fire|--fail|--resend`
        # `pipeline dead-letters requeue|drop`
        (OPERATOR, "topic", log, "Write"),
        (OPERATOR, "topic", dead, "Write"),
        (OPERATOR, "transactional-id", topics.operators(prefix), "Write Describe"),
        (OPERATOR, "group", groups, "Read"),
    ]
    return [Right(role, kind, name, each) for role, kind, name, operations in needed for each in operations.split()]


def of_role(prefix: str, role: str) -> list[Right]:
    """Return what one role needs."""
    return [right for right in rights(prefix) if right.role == role]


def commands(prefix: str, servers: str) -> dict[str, list[str]]:
    """Return for each role the commands that give it its rights."""
    return {role: grants(of_role(prefix, role), servers, f"User:celery-{role}") for role in ROLES}


def grants(needed: Iterable[Right], servers: str, principal: str) -> list[str]:
    """Return the commands that give a principal some rights, one per resource."""
    resources: dict[tuple[str, str], list[str]] = {}
    for right in needed:
        resources.setdefault((right.resource, right.name), []).append(right.operation)
    found = []
    for (resource, name), operations in resources.items():
        parts = ["kafka-acls.sh", "--bootstrap-server", servers, "--add", "--allow-principal", principal]
        for operation in operations:
            parts += ["--operation", operation]
        parts += [f"--{resource}", name.removesuffix("*")]
        if name.endswith("*"):
            parts += ["--resource-pattern-type", "prefixed"]
        found.append(shlex.join(parts))
    return found


def principal(settings: Settings) -> str:
    """Return who Kafka takes us for, "" where only Kafka knows (a token, a certificate)."""
    mechanism = str(settings.client.get("sasl.mechanism") or settings.client.get("sasl.mechanisms") or "")
    user = settings.client.get("sasl.username")
    return f"User:{user}" if user and (mechanism == "PLAIN" or mechanism.startswith("SCRAM")) else ""


def lacking(settings: Settings, needed: Iterable[Right]) -> tuple[str, str]:
    """Return what is to be said where rights are missing: the problem, and the remedy with its commands."""
    needed = list(needed)
    who = principal(settings)
    listed = ", ".join(map(str, needed))
    rows = grants(needed, settings.bootstrap_servers, who or "User:…")
    problem = f"{who or 'our principal'} lacks {listed}"
    return problem, "\n".join(["an admin grants it (`pipeline init --print` lists all) with", *rows])
