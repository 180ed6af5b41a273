"""Carries a schedule out, heals everything, waits until all is at rest, and asks everything to end."""

from __future__ import annotations

import heapq
import time
from itertools import count
from typing import TYPE_CHECKING

import redis

from tests.faults import evidence, schedule
from tests.faults.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.faults.checker import Evidence
    from tests.faults.schedule import Fault
    from tests.faults.world import World

TICK_S = 0.05
KEEP_S = 0.3
REST_S = 150.0
"""From the last heal to rest: redeliveries come after 15 s, and again if they are lost in a frozen worker's hands."""
QUIET_S = 5.0
"""A spool that is being drained shows itself within two or three."""
DISTURBS_CHORDS = frozenset({"brokers", "broker-1", "broker-2", "broker-3", "chords", "supervisor"})


def run(world: World, faults: Sequence[Fault], say: Callable[[str], None] = print) -> Evidence:
    """Return the evidence of a run."""
    journal = Journal(world.journal, "nemesis")
    world.start_clients()
    strike(world, faults, journal, say)
    healed_at = time.monotonic()
    stuck = rest(world)
    say(f"at rest {time.monotonic() - healed_at:.0f} s after the last heal; asking everything to end")
    exits = []
    # Processors last: what the workers say at their end is to be folded too.
    for names in (("watcher", "worker-1", "worker-2"), ("pipeline",)):
        services = [world.services[name] for name in names if name in world.services]
        asked = [(service, service.ask_to_end()) for service in services]
        exits += [service.ended(at) for service, at in asked]
        if world.backend == "kafka" and "pipeline" not in names:
            stuck += folded(world)
    say("ended: " + ", ".join(f"{name} with {code} after {took_s:.1f} s" for name, code, took_s in exits))
    disturbed = any(fault.target in DISTURBS_CHORDS for fault in faults)
    return evidence.collect(world, exits=exits, stuck=stuck, calm=not disturbed)


def strike(world: World, faults: Sequence[Fault], journal: Journal, say: Callable[[str], None]) -> None:
    """Carry the schedule out; when this returns, everything is healed."""
    numbers = count()
    todo: list[tuple[float, int, Fault | None, Callable[[], None] | None]] = []
    for fault in faults:
        heapq.heappush(todo, (fault.at_s, next(numbers), fault, None))
    started = kept = time.monotonic()
    while todo:
        now = time.monotonic()
        if now - kept > KEEP_S:
            kept = now
            world.keep()
        if todo[0][0] > now - started:
            time.sleep(TICK_S)
            continue
        at_s, _, due, heal = heapq.heappop(todo)
        if due is not None:
            heal = world.hurt(due)
            say(f"{due}{'' if heal else '  (nobody there)'}")
            journal.note("fault", target=due.target, verb=due.verb, for_s=due.for_s, hit=heal is not None)
            if heal is not None:
                heapq.heappush(todo, (at_s + due.for_s, next(numbers), None, heal))
        elif heal is not None:
            heal()
    journal.note("healed")


def rest(world: World) -> list[str]:
    """Wait until nothing moves any more; return what did not come to rest."""
    if world.backend == "kafka":
        world.cluster.wait()
    deadline = time.monotonic() + max(REST_S, world.seconds)
    queue = redis.Redis(host="127.0.0.1", port=world.queue.port)
    clients = [service for service in world.services.values() if service.name.startswith("client")]
    before: object = None
    since = time.monotonic()
    while time.monotonic() < deadline:
        world.keep()
        waiting = (
            [client.name for client in clients if not client.is_done],
            queue.llen("celery"),
            queue.hlen("unacked"),
            _behind(world),
        )
        now = (waiting, _size(world))
        if now != before:
            before, since = now, time.monotonic()
        elif waiting == ([], 0, 0, {}) and time.monotonic() - since > QUIET_S:
            return []
        time.sleep(0.3)
    return [f"after {REST_S:g} s there are still: clients, queued, unacknowledged, behind = {waiting}"]


def folded(world: World) -> list[str]:
    """Wait until the view has all of the log; return what is missing."""
    deadline = time.monotonic() + REST_S
    while behind := _behind(world):
        if time.monotonic() > deadline:
            return [f"the view is behind by {behind}"]
        time.sleep(0.3)
    return []


def _behind(world: World) -> dict[tuple[str, int], int]:
    if world.backend != "kafka":
        return {}
    there = evidence.positions(redis.Redis(host="127.0.0.1", port=world.view.port))
    return {at: end - there.get(at, 0) for at, end in _ends(world).items() if there.get(at, 0) < end}


def _ends(world: World) -> dict[tuple[str, int], int]:
    return evidence.ends(world.bootstrap, evidence.EVENTS) | evidence.ends(world.bootstrap, evidence.CHORDS)


def _size(world: World) -> object:
    """Something that changes while anything is appended or written.

    Not our view's number of keys: what a client registered there vanishes by itself for a minute after it has gone.
    """
    if world.backend != "kafka":
        return redis.Redis(host="127.0.0.1", port=world.view.port).dbsize()
    return _ends(world)


def plan(seed: int, seconds: float, backend: str, longest_s: float | None = None) -> list[Fault]:
    """Return the schedule of a run."""
    longest = {verb: min(most, longest_s or most) for verb, most in schedule.LONGEST_S.items()}
    return schedule.schedule(seed, seconds, schedule.TARGETS[backend], longest)
