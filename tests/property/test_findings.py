"""What `findings` says of random fleets, against what really happened there: lives are made up, and each one's fault is known."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import events, topics
from celery_kafka_backend.events import CHILD, CLIENT, PARENT, Event
from celery_kafka_backend.findings import Clocks, Tasks
from tests.examples import tried_on

NOON = 1_750_000_000_000
NOW, BOUND, GONE = 120, 60, 10
"""Minutes: as of when, and for how long a task and a worker may be silent."""
RESTART, SILENT, DEAD = 90, 80, 30
"""When w2 is restarted, w3 falls silent, and the queue `dead` is no longer read."""
PARTITIONS = 5
CLEAR = [at for at in range(NOW - 1) if all(abs(NOW - at - limit) > 3 for limit in (GONE, BOUND, BOUND + 30))]
"""When lives begin: never so that a bound is a matter of seconds."""


class World:
    """A fleet of three workers, of which one is restarted and one dies; minute by minute each runs a task.

    Attributes:
        log: What was recorded, each event with the minute at which Kafka got it.
        faults: What is wrong: a kind of finding for each task.
        skews: By host: by how many seconds its clock is ahead.
    """

    def __init__(self, chance: random.Random, skews: dict[str, float]) -> None:
        self.chance = chance
        self.skews = skews
        self.log: list[tuple[Event, float]] = []
        self.faults: set[tuple[str, str]] = set()
        for minute in range(NOW):
            for worker in ("w1", *["w2"] * (minute != RESTART), *["w3"] * (minute < SILENT)):
                queues = ["busy", *["dead"] * (minute < DEAD)]
                for queue in queues:
                    self.ends(f"beat {worker} {queue} {minute}", minute + 0.01, worker, queue)

    def say(self, kind: str, task: str, minute: float, worker: str = "", queue: str = "busy", **more: Any) -> None:
        """Record an event."""
        role = CLIENT if not worker else PARENT if kind in (events.RECEIVED, events.WORKER_LOST) else CHILD
        host = f"host-{worker or 'client'}"
        if kind == events.SUCCESS:
            more["doc"] = msgspec.Raw(json.dumps({"status": "SUCCESS", "result": more.pop("result", 1)}).encode())
        at = int(NOON + minute * 60_000)
        pid = {True: 1, False: 2}[worker != "w2" or minute < RESTART] if role == PARENT else 77
        event = Event(
            id=f"{task}/{len(self.log)}", kind=kind, task=task, at=int(at + self.skews.get(host, 0) * 1000), hlc=at, role=role,
            worker=worker or None, host=host, pid=pid, queue=queue, run=20_000_000, name="t", **more,
        )  # fmt: skip
        self.log.append((event, minute + self.chance.uniform(0.00001, 0.0005)))

    def begins(self, task: str, minute: float, worker: str, queue: str = "busy", **more: Any) -> None:
        """Record that a task was sent, received and started."""
        self.say(events.SENT, task, minute, queue=queue)
        sent = {"sent_at": int(NOON + minute * 60_000), **more}
        self.say(events.RECEIVED, task, minute + 0.001, worker, queue, **sent)
        self.say(events.STARTED, task, minute + 0.002, worker, queue, **sent)

    def ends(self, task: str, minute: float, worker: str, queue: str = "busy") -> None:
        """Record a whole life."""
        self.begins(task, minute, worker, queue)
        self.say(events.SUCCESS, task, minute + 0.003, worker, queue)

    # -- lives, and what is wrong with them --------------------------------------------------

    def never_ended(self, task: str, minute: float) -> None:
        worker = self.chance.choice(("w1", "w2", "w3"))
        if worker == "w3":
            minute = min(minute, SILENT - 1)
        self.begins(task, minute, worker)
        lost = (worker == "w2" and minute < RESTART) or worker == "w3"
        if lost and NOW - minute > GONE:
            self.faults.add(("worker-gone", task))
        elif NOW - minute > BOUND:
            self.faults.add(("unfinished", task))

    def never_received(self, task: str, minute: float) -> None:
        queue = self.chance.choice(("busy", "dead"))
        self.say(events.SENT, task, minute, queue=queue)
        if NOW - minute > BOUND:
            self.faults.add(("purged" if queue == "busy" or minute < DEAD - 3 else "unfinished", task))

    def waits(self, task: str, minute: float) -> None:
        again = minute + self.chance.choice((1, 30, 200))
        due = int(NOON + again * 60_000)
        if self.chance.random() < 0.5:
            self.say(events.SENT, task, minute, queue="other", eta=due)
        else:
            self.begins(task, minute, "w1")
            self.say(events.RETRY, task, minute + 0.01, "w1", due=due)
        if NOW - again > BOUND:
            self.faults.add(("unfinished", task))

    def succeeded_twice(self, task: str, minute: float) -> None:
        self.begins(task, minute, "w1")
        self.say(events.SUCCESS, task, minute + 0.1, "w1", result=1)
        other = self.chance.choice((1, 2))
        self.say(events.SUCCESS, task, minute + 0.2, "w2", result=other)
        if other == 2:
            self.faults.add(("two-results", task))

    def spoke_after_its_end(self, task: str, minute: float) -> None:
        end = self.chance.choice((events.SUCCESS, events.FAILURE, events.REVOKED))
        self.begins(task, minute, "w1")
        self.say(end, task, minute + 0.1, "w1")
        self.say(events.STARTED, task, minute + 0.2, "w2")
        if end != events.SUCCESS and self.chance.random() < 0.5:
            self.say(events.SUCCESS, task, minute + 0.3, "w2")  # it was redelivered, and that is its end
        else:
            self.faults.add(("late-state", task))

    def was_redelivered(self, task: str, minute: float) -> None:
        minute = min(minute, SILENT - 2)
        self.begins(task, minute, "w3")
        self.say(events.RECEIVED, task, minute + 0.5, "w1", redelivered=True)
        if self.chance.random() < 0.5:
            self.say(events.STARTED, task, minute + 0.6, "w1", redelivered=True)
            self.say(events.SUCCESS, task, minute + 0.7, "w1")
        elif NOW - minute > BOUND:
            self.faults.add(("unfinished", task))

    def ended_otherwise(self, task: str, minute: float) -> None:
        kind = self.chance.choice(
            (events.FAILURE, events.WORKER_LOST, events.REVOKED, events.EXPIRED, events.FORGOTTEN)
        )
        if self.chance.random() < 0.5:
            self.begins(task, minute, "w2")
        self.say(kind, task, minute + 0.1, "w2")

    def lives(self, count: int) -> None:
        """Make up so many."""
        kinds = (
            self.never_ended, self.never_received, self.waits, self.succeeded_twice, self.spoke_after_its_end,
            self.was_redelivered, self.ended_otherwise,
        )  # fmt: skip
        for number in range(count):
            self.chance.choice(kinds)(f"task-{number}", self.chance.choice(CLEAR) + self.chance.random())


@tried_on(60)
@given(
    st.integers(0, 2**32), st.dictionaries(st.sampled_from(["host-w1", "host-w2", "host-client"]), st.floats(-90, 90))
)
def test_findings_are_what_was_wrong_and_nothing_else(seed, skews):
    chance = random.Random(seed)
    skews = {
        host: skew for host, skew in skews.items() if not 1.9 < abs(skew) < 2.1
    }  # the bound itself is a matter of ms
    world = World(chance, skews)
    world.lives(40)
    partitions = defaultdict(list)
    for event, written in world.log:
        partitions[topics.partition_of(event.task, PARTITIONS)].append((event, written))
    tasks, clocks, found = Tasks(), Clocks(), []
    for number in chance.sample(range(PARTITIONS), PARTITIONS):
        records = [*partitions[number], *chance.choices(partitions[number], k=20)]  # some are there twice
        chance.shuffle(records)
        for event, written in records:
            tasks.take(event)
            clocks.take(event, int(NOON + written * 60_000))
        found += tasks.settle()
    at = NOON + NOW * 60_000
    found += tasks.findings(at, BOUND * 60_000, GONE * 60_000)
    assert {(one.kind, one.task) for one in found} == world.faults
    assert len(found) == len(world.faults)
    wrong = {host for host, skew in skews.items() if abs(skew) >= 2}
    assert {one.host for one in clocks.findings()} == wrong
