"""The short form: half a minute of faults on everything, and then lies about that very run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import redis

from tests.faults import evidence, nemesis
from tests.faults.checker import check, figures
from tests.faults.mutations import MUTATIONS, _stored
from tests.faults.schedule import Fault
from tests.faults.watcher import PREFIX
from tests.faults.world import World
from tests.services.errors import ServiceError
from tests.services.required import absent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.checker import Evidence

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

SECONDS = 20.0
# Each part once, rather than by a seed: what is hit at all is no matter of luck here.
FAULTS = (
    Fault(1.0, "materializer", "kill", 0.0, 0),
    Fault(2.0, "broker-1", "kill", 6.0, 0),
    Fault(3.0, "child", "kill", 0.0, 1),
    Fault(4.5, "redis", "freeze", 2.0, 0),
    Fault(6.0, "chords", "kill", 0.0, 0),
    Fault(7.5, "redis", "kill", 0.5, 0),
    Fault(9.0, "worker-1", "kill", 1.0, 0),
    Fault(10.0, "brokers", "freeze", 3.0, 0),
    Fault(11.0, "client-1", "kill", 0.5, 0),
    Fault(13.5, "redis", "cut", 1.0, 0),
    Fault(14.0, "supervisor", "kill", 1.0, 0),
    Fault(15.0, "broker-2", "slow", 3.0, 300),
    Fault(16.0, "worker-2", "freeze", 2.0, 0),
    Fault(17.0, "broker-3", "cut", 2.0, 0),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World("kafka", tmp_path_factory.mktemp("faults"), seed=1, seconds=SECONDS)
    with contextlib.closing(made):
        try:
            made.start()
        except ServiceError as error:
            absent("kafka3", error)
        yield made


@pytest.fixture(scope="module")
def found(world: World) -> Evidence:
    return nemesis.run(world, FAULTS)


def test_nothing_is_lost(found: Evidence) -> None:
    assert check(found) == []
    # Or there was nothing to lose.
    there = figures(found)
    assert there["acknowledged"] > 20, there
    assert there["bodies run"] > 0, there
    assert there["changes seen"] > 20, there


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_lie_about_this_run_is_noticed(found: Evidence, name: str) -> None:
    mutation = MUTATIONS[name]
    assert mutation.check in {violation.check for violation in check(mutation.tell(found))}


def test_a_result_that_is_deleted_from_the_store_itself_is_missed(world: World, found: Evidence) -> None:
    task = _stored(found).task
    redis.Redis(host="127.0.0.1", port=world.view.port).delete(f"{PREFIX}{task}")
    again = evidence.collect(world, exits=[], stuck=[], calm=False)
    assert [(violation.check, violation.subject) for violation in check(again)] == [
        ("acknowledged", task),
        ("nothing falls out", task),
    ]
