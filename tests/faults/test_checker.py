"""The checker against lies about a small healthy run; the short form in `test_short` tells them about a real one, too."""

from __future__ import annotations

import pytest

from tests.faults.checker import (
    CHECKS,
    Chord,
    Evidence,
    Execution,
    Get,
    LogEvent,
    Sending,
    Shown,
    check,
)
from tests.faults.mutations import MUTATIONS
from tests.faults.schedule import TARGETS, schedule


def log_of(task: str, value: str, key: int, partition: int, state: str = "SUCCESS") -> list[LogEvent]:
    kinds = (("sent", None, "", 0), ("started", "STARTED", "{}", key - 2), (state.lower(), state, value, key))
    return [
        LogEvent(f"{task}-{kind}", task, kind, shown, text, number, partition, 10 * partition + place)
        for place, (kind, shown, text, number) in enumerate(kinds)
    ]


@pytest.fixture
def healthy() -> Evidence:
    """Two single tasks, one that failed, one whose result is ignored, and a chord of two."""
    ends = {"a": "va", "b": "vb", "m": "vm", "n": "vn", "body": "vbody"}
    log = [event for number, (task, value) in enumerate(ends.items()) for event in log_of(task, value, 10, number)]
    log += log_of("f", "Failed: x", 10, 6, "FAILURE")
    shown = {task: Shown("SUCCESS", value, 10) for task, value in ends.items()} | {
        "f": Shown("FAILURE", "Failed: x", 10)
    }
    executions = [
        Execution(task, "SUCCESS", value, ignored=False, stored=True, survived=True) for task, value in ends.items()
    ]
    executions.append(Execution("f", "FAILURE", "Failed: x", ignored=False, stored=True, survived=True))
    executions.append(Execution("q", "SUCCESS", "vq", ignored=True, stored=True, survived=True))
    return Evidence(
        executions=tuple(executions),
        began=dict.fromkeys([*ends, "f", "q"], 1),
        bodies={"body": ((1, 2),)},
        sendings=(Sending("value", ("a",), 0.1, 0.0, ""), Sending("chord", ("m", "n", "body"), 0.1, 0.0, "")),
        gets=(
            Get(("a",), 1.0, 0.1, 0.0, "value", ("va",), ""),
            Get(("b",), 1.0, 1.1, 0.0, "timeout", (), ""),
            # Frozen for most of it.
            Get(("body",), 1.0, 30.0, 29.0, "value", ("vbody",), ""),
        ),
        chords=(Chord("body", ("m", "n"), (1, 2), applied=True), Chord("never", ("x", "y"), (1, 2), applied=True)),
        view=shown,
        seen={task: (Shown("STARTED", "{}", 8), one) for task, one in shown.items()},
        log=tuple(log),
        history={task: frozenset(event.id for event in log if event.task == task) for task in shown},
        letters=frozenset(),
        exits=(("worker-1", 0, 1.0),),
        stuck=(),
        calm=True,
    )


def test_a_healthy_run_is_believed(healthy: Evidence) -> None:
    assert check(healthy) == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_lie_is_noticed(healthy: Evidence, name: str) -> None:
    mutation = MUTATIONS[name]
    assert mutation.check in {violation.check for violation in check(mutation.tell(healthy))}


def test_every_check_has_a_lie_that_it_must_notice() -> None:
    assert {mutation.check for mutation in MUTATIONS.values()} == set(CHECKS)


def test_what_a_kill_took_before_it_was_stored_is_no_loss(healthy: Evidence) -> None:
    killed = Execution("k", "SUCCESS", "vk", ignored=False, stored=False, survived=False)
    assert check(healthy._replace(executions=(*healthy.executions, killed))) == []


def test_a_dead_letter_is_a_place(healthy: Evidence) -> None:
    assert healthy.log
    event = next(event for event in healthy.log if not event.key)
    gone = healthy._replace(history={**healthy.history, event.task: healthy.history[event.task] - {event.id}})
    assert check(gone)
    assert check(gone._replace(letters=frozenset({(event.partition, event.offset)}))) == []


def test_a_body_that_a_killed_worker_had_just_taken_is_no_loss_of_ours(healthy: Evidence) -> None:
    lost = MUTATIONS["body_not_sent"].tell(healthy)
    lost = lost._replace(log=tuple(event._replace(at=100.0) for event in lost.log or ()))
    unsent = lost._replace(log=tuple(event for event in lost.log or () if event.kind != "sent"), deaths=(100.5,))
    assert {one.check for one in check(lost._replace(deaths=(50.0, 150.0)))} >= {"chords fire"}
    assert {one.check for one in check(unsent)} >= {"chords fire"}
    assert not {one.check for one in check(lost._replace(deaths=(100.5,)))} & {"chords fire"}


def test_a_seed_is_a_schedule_that_can_be_repeated() -> None:
    for targets in TARGETS.values():
        made = schedule(7, 90.0, targets)
        assert made == schedule(7, 90.0, targets)
        assert made != schedule(8, 90.0, targets)
        assert all(fault.at_s + fault.for_s <= 90.1 for fault in made)
        assert {fault.target for fault in made} <= {target.strip() for target in targets}
