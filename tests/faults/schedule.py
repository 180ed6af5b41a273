"""Which fault hits whom, when and for how long: a function of the seed."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

KILL, FREEZE, CUT, SLOW, BEHEAD = "kill", "freeze", "cut", "slow", "behead"
"""SIGKILL and a restart later · SIGSTOP · the network resets · it delays · SIGKILL to a worker's main process alone."""

LONGEST_S = {KILL: 10.0, FREEZE: 30.0, CUT: 15.0, SLOW: 20.0, BEHEAD: 5.0}
SHORTEST_S = {KILL: 0.2, FREEZE: 1.0, CUT: 0.3, SLOW: 2.0, BEHEAD: 0.2}
MEAN_GAP_S = 1.7

_SERVER = (KILL, FREEZE, CUT, SLOW)
_OURS: dict[str, tuple[str, ...]] = {
    "redis": _SERVER,
    "worker-1": (KILL, FREEZE, BEHEAD),
    "worker-2": (KILL, FREEZE, BEHEAD),
    "child": (KILL, KILL, FREEZE),
    "client-1": (KILL, FREEZE),
}
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "redis": _OURS | {"redis ": _SERVER, "redis  ": _SERVER},
    "kafka": _OURS
    | {
        "broker-1": _SERVER,
        "broker-2": _SERVER,
        "broker-3": _SERVER,
        "brokers": _SERVER,
        "materializer": (KILL, FREEZE),
        "chords": (KILL, FREEZE),
        "supervisor": (KILL, FREEZE),
    },
}
"""By backend: whom a fault can hit, and how. A name with spaces is the same target, hit more often."""


class Fault(NamedTuple):
    """One blow.

    Attributes:
        at_s: When, seconds after the start.
        target: Whom.
        verb: How.
        for_s: How long until it is healed.
        number: Chooses among several (children), and scales a delay.
    """

    at_s: float
    target: str
    verb: str
    for_s: float
    number: int

    def __str__(self) -> str:
        return f"{self.at_s:6.1f} s  {self.verb:6} {self.target:13} for {self.for_s:4.1f} s"


def schedule(
    seed: int, seconds: float, targets: Mapping[str, tuple[str, ...]], longest: Mapping[str, float] = LONGEST_S
) -> list[Fault]:
    """Return the faults of a run, each healed when it ends; no target is hit while it is hurt.

    Args:
        seed: Equal seeds give equal schedules.
        seconds: Length of the run.
        targets: As in `TARGETS`.
        longest: By verb: how long at most.
    """
    chance = random.Random(seed)
    faults: list[Fault] = []
    hurt_until: dict[str, float] = {}
    now = 1.0
    while now < seconds - SHORTEST_S[KILL]:
        target = chance.choice(sorted(targets))
        verb = chance.choice(targets[target])
        target = target.strip()
        lowest, highest = math.log(SHORTEST_S[verb]), math.log(max(longest[verb], SHORTEST_S[verb]))
        for_s = math.exp(chance.uniform(lowest, highest))
        number = chance.randrange(1_000)
        if all(hurt_until.get(other, 0.0) < now for other in _same(target)):
            for_s = round(min(for_s, seconds - now), 1)
            faults.append(Fault(round(now, 1), target, verb, for_s, number))
            hurt_until[target] = now + for_s + 0.5
            now += chance.expovariate(1 / MEAN_GAP_S)
        now += 0.2
    return faults


def _same(target: str) -> tuple[str, ...]:
    """Targets that must be well for this one to be hit."""
    if target == "brokers":
        return ("brokers", "broker-1", "broker-2", "broker-3")
    if target.startswith("broker-"):
        return (target, "brokers")
    if target in ("worker-1", "worker-2", "child"):
        return (target, "child") if target != "child" else ("worker-1", "worker-2", "child")
    return (target,)
