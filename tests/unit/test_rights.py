"""Who may do what: the least that works, and how it is granted."""

from __future__ import annotations

from pathlib import Path

from celery_kafka_backend.rights import ROLES, Right, commands, lacking, rights
from celery_kafka_backend.settings import parse


def test_the_rights_are_the_least_that_work():
    """A client cannot read the log; only a processor reads chords for work; only an operator has transactions."""
    found = set(rights("celery"))
    assert len(found) == len(rights("celery"))
    log, chords, dead = "celery.task-events", "celery.chords", "celery.dead-letters"

    def roles(name: str, operation: str) -> set[str]:
        return {right.role for right in found if (right.name, right.operation) == (name, operation)}

    assert roles(log, "Write") == {"client", "worker", "processor", "operator"}
    assert roles(log, "Read") == {"worker", "processor", "operator"}
    assert roles(chords, "Read") == {"processor", "operator"}
    assert roles(chords, "Write") == {"client", "worker", "processor", "operator"}
    assert {(r.role, r.resource) for r in found if (r.name, r.operation) == (dead, "Write")} == {
        ("processor", "topic"), ("operator", "topic"), ("operator", "transactional-id"),
    }  # fmt: skip
    groups = {(right.role, right.operation) for right in found if right.resource == "group"}
    assert groups == {("processor", "Read"), ("operator", "Read"), ("worker", "Describe")}
    described = {(r.role, r.name) for r in found if r.operation == "Describe" and r.resource == "topic"}
    assert {(r.role, r.name) for r in found if r.resource == "topic"} == described


def test_the_printed_commands_grant_exactly_the_rights_of_every_role():
    found = commands("x", "b:9092")
    assert set(found) == set(ROLES)
    granted = set()
    for role, lines in found.items():
        for line in lines:
            words = line.split()
            assert words[:6] == [
                "kafka-acls.sh", "--bootstrap-server", "b:9092", "--add", "--allow-principal", f"User:celery-{role}",
            ]  # fmt: skip
            operations = [words[n + 1] for n, word in enumerate(words) if word == "--operation"]
            (resource,) = (one for one in ("topic", "group", "transactional-id") if f"--{one}" in words)
            name = words[words.index(f"--{resource}") + 1] + "*" * (
                words[-2:] == ["--resource-pattern-type", "prefixed"]
            )
            granted |= {Right(role, resource, name, operation) for operation in operations}
    assert granted == set(rights("x"))


def test_the_documented_commands_are_the_printed_ones():
    documented = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    block = documented.partition("```sh\n")[2].partition("```")[0]
    printed = "\n".join(f"\n# {role}\n" + "\n".join(lines) for role, lines in commands("celery", "kafka:9092").items())
    assert block.strip() == printed.strip()


def test_what_is_lacking_names_principal_topic_operation_and_command():
    client = {"sasl.mechanism": "SCRAM-SHA-512", "sasl.username": "alice", "sasl.password": "hunter2"}
    settings = parse("kafka://b:9092/?view=redis://r/0", {"client": client})
    problem, remedy = lacking(settings, [Right("worker", "topic", "celery.task-events", "Write")])
    assert problem == "User:alice lacks Write on topic celery.task-events"
    assert remedy.endswith(
        "kafka-acls.sh --bootstrap-server b:9092 --add --allow-principal User:alice --operation Write "
        "--topic celery.task-events"
    )
    assert "hunter2" not in problem + remedy


def test_where_only_kafka_knows_the_principal_the_command_leaves_it_out():
    settings = parse("kafka://b:9092/?view=redis://r/0", {"client": {"sasl.mechanism": "OAUTHBEARER"}})
    problem, remedy = lacking(settings, [Right("worker", "topic", "celery.chords", "Write")])
    assert problem == "our principal lacks Write on topic celery.chords"
    assert "User:…" in remedy
