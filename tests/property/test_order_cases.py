"""Real Celery sequences, in any order of arrival, each event twice, in any batches: what the document shows.

Each case is written as hosts that publish and execute, with the rules of the producer side applied by
`Host`: the run and the HLC travel in the message's headers, a run that is absurdly far ahead counts as
unknown, an HLC that is absurdly far ahead is ignored. Each event is named for what it would show.

One row of the contract is not here, as it is decided in the write: a document of the stock backend counts as key 0, but
its SUCCESS stays. Every sink has it as a case.
"""

# ruff: noqa: N802 - a case's name is its fact, in Celery's spelling

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple

import pytest

from celery_kafka_backend import events
from celery_kafka_backend.changes import TASK, Logged, Side, beats, merge_sides
from celery_kafka_backend.events import Event
from celery_kafka_backend.order import (
    EPOCH_MS,
    UNIT_MS,
    Clock,
    Rank,
    forget_key,
    order_key,
    run_at,
    run_of_key,
    run_start_ms,
    trusted_run,
)
from celery_kafka_backend.processors.fold import fold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

SECOND = 1_000
MINUTE = 60 * SECOND
DAY = 86_400 * SECOND
START = run_start_ms(run_at(1_795_000_000_000))
"""The beginning of a run's unit, so that "within one unit" can be written down."""
IN_2099 = 4_070_908_800_000 - START


class Message(NamedTuple):
    """The headers of a task's message; both None without our package at the publisher."""

    run: int | None
    hlc: int | None


@dataclass
class Fleet:
    """True time, and everything that was said about the one task of a case."""

    now: int = START
    said: list[Event] = field(default_factory=list)

    def host(self, skew_ms: int = 0) -> Host:
        return Host(self, skew_ms)

    def after(self, ms: int) -> None:
        self.now += ms

    def shown(self) -> View:
        """Return the view of everything said so far, as a client finds it."""
        view = View()
        view.apply(map(logged, self.said))
        return view


class Host:
    """One process, its wall clock and its HLC."""

    def __init__(self, fleet: Fleet, skew_ms: int) -> None:
        self.fleet = fleet
        self.clock = Clock(lambda: fleet.now + skew_ms)
        self.floor = 0

    def publish(self, inherit: int | None = None) -> Message:
        """Publish the task: a new run by the wall clock (at least `floor`), unless one is inherited."""
        run = inherit if inherit is not None else max(run_at(self.clock.wall_ms()), self.floor)
        return Message(run, self.clock.tick())

    def hlc(self, message: Message) -> int:
        """Take an HLC reading that is behind the message's."""
        self.clock.observe(message.hlc)
        return self.clock.tick()

    def says(
        self, label: str, rank: Rank, message: Message | None, kind: str = events.STATE, hlc: int | None = None
    ) -> Event:
        """Say something about the task, as an execution of ``message`` or, with None, without any request."""
        run = trusted_run(message.run, self.clock.wall_ms()) if message else None
        hlc = (self.hlc(message) if message else self.clock.tick()) if hlc is None else hlc
        return self._say(label, kind, run, hlc, order_key(rank, hlc, run))

    def says_from_view(self, label: str, rank: Rank) -> Event:
        """Say something without a request, with run and HLC taken from the view."""
        known = self.fleet.shown()
        run = trusted_run(known.side.run or None, self.clock.wall_ms())
        return self.says(label, rank, Message(run, known.side.seen))

    def forgets(self) -> Event:
        """Forget the task, in the run that the view shows; republish it later than that."""
        shown = self.fleet.shown().winner
        run = run_of_key(shown.key) if shown else None
        self.floor = (run or 0) + 1
        self.clock.observe(run_start_ms(self.floor))
        return self._say("forgotten", events.FORGOTTEN, run, self.clock.tick(), forget_key(run))

    def started(self, message: Message, label: str = "STARTED") -> Event:
        return self.says(label, Rank.UNREADY, message, events.STARTED)

    def failed(self, message: Message | None, label: str = "FAILURE") -> Event:
        return self.says(label, Rank.FAILED, message, events.FAILURE)

    def succeeded(self, message: Message, label: str = "SUCCESS") -> Event:
        return self.says(label, Rank.SUCCEEDED, message, events.SUCCESS)

    def _say(self, label: str, kind: str, run: int | None, hlc: int, key: int) -> Event:
        event = Event(id=label, kind=kind, task="t", at=self.clock.wall_ms(), hlc=hlc, run=run, key=key)
        self.fleet.said.append(event)
        return event


def logged(event: Event) -> Logged:
    return Logged(event, event.id.encode())


class View:
    """The reference: what a store holds about one task."""

    def __init__(self) -> None:
        self.winner: Event | None = None
        self.side = Side()
        self.history: set[str] = set()
        self.empty = True

    def apply(self, batch: Iterable[Logged]) -> None:
        for change in fold(batch):
            assert change.subject == TASK
            if change.winner is not None and (self.winner is None or beats(change.winner, self.winner)):
                self.winner = change.winner
            assert change.side is not None
            self.side = change.side if self.empty else merge_sides(self.side, change.side)
            self.empty = False
            self.history |= {one.event.id for one in change.history}

    def shows(self) -> str | None:
        if self.winner is None or self.winner.kind in events.TOMBSTONES:
            return None
        return self.winner.id


def arrivals(said: Sequence[Event]) -> Iterator[list[Logged]]:
    """Every order in which the events can arrive, each of them twice."""
    if len(said) <= 3:
        for order in {tuple(order) for order in permutations([*range(len(said))] * 2)}:
            yield [logged(said[i]) for i in order]
        return
    for first in permutations(said):  # more of them: every first arrival, the second ones in three orders
        for again in (first, first[::-1], said):
            yield [logged(event) for event in (*first, *again)]


CASES: dict[str, Callable[[Fleet], str | None]] = {}


def case(function: Callable[[Fleet], str | None]) -> Callable[[Fleet], str | None]:
    CASES[function.__name__] = function
    return function


@case
def retry_and_the_next_attempt_starts_before_RETRY_is_stored(fleet: Fleet) -> str | None:
    """Producer rule: RETRY's HLC is taken before the successor is published, and the run is inherited."""
    first = fleet.host()
    message = fleet.host().publish()
    fleet.after(100)
    taken = first.hlc(message)
    successor = first.publish(inherit=message.run)
    fleet.host(-500).started(successor)
    first.says("RETRY", Rank.UNREADY, message, events.RETRY, hlc=taken)
    return "STARTED"


@case
def a_redelivery_runs_twice_and_both_succeed(fleet: Fleet) -> str | None:
    message = fleet.host().publish()
    fleet.after(10)
    fleet.host().succeeded(message, "SUCCESS r+10")
    fleet.after(2)
    fleet.host().succeeded(message, "SUCCESS r+12")
    return "SUCCESS r+10"


@case
def the_first_attempts_late_duplicate_succeeds_and_then_the_retry_chain(fleet: Fleet) -> str | None:
    """The attempt is data, not key: the first success by HLC stays. The retry inherits the run."""
    message = fleet.host().publish()
    worker = fleet.host()
    worker.says("RETRY", Rank.UNREADY, message, events.RETRY)
    again = worker.publish(inherit=message.run)
    fleet.after(SECOND)
    fleet.host().succeeded(message, "SUCCESS of attempt 0")
    fleet.after(30 * SECOND)
    fleet.host().succeeded(again, "SUCCESS of attempt 1")
    return "SUCCESS of attempt 0"


@case
def republished_after_a_failure_and_fails_again(fleet: Fleet) -> str | None:
    """Published by the user, not inherited: a new run."""
    client = fleet.host()
    fleet.host().failed(client.publish())
    fleet.after(UNIT_MS)
    fleet.host().failed(client.publish(), "FAILURE of the later run")
    return "FAILURE of the later run"


@case
def republished_after_a_failure_and_only_started(fleet: Fleet) -> str | None:
    """In a later unit even STARTED of the later run is shown."""
    client = fleet.host()
    fleet.host().failed(client.publish())
    fleet.after(UNIT_MS)
    fleet.host().started(client.publish())
    return "STARTED"


@case
def republished_within_the_unit_of_a_failure_and_fails_again(fleet: Fleet) -> str | None:
    client = fleet.host()
    fleet.host().failed(client.publish())
    fleet.after(UNIT_MS - 1)
    fleet.host().failed(client.publish(), "the second FAILURE")
    return "the second FAILURE"


@case
def republished_within_the_unit_of_a_failure_and_succeeds(fleet: Fleet) -> str | None:
    client = fleet.host()
    fleet.host().failed(client.publish())
    fleet.after(UNIT_MS - 1)
    fleet.host().succeeded(client.publish())
    return "SUCCESS"


@case
def republished_within_the_unit_of_a_failure_and_only_started(fleet: Fleet) -> str | None:
    """A documented limit: within one unit STARTED and RETRY stay hidden behind the old FAILURE."""
    client = fleet.host()
    fleet.host().failed(client.publish())
    fleet.after(UNIT_MS - 1)
    again = client.publish()
    worker = fleet.host()
    worker.started(again)
    worker.says("RETRY", Rank.UNREADY, again, events.RETRY)
    return "FAILURE"


@case
def republished_a_week_after_a_success(fleet: Fleet) -> str | None:
    client = fleet.host()
    fleet.host().succeeded(client.publish())
    fleet.after(7 * DAY)
    again = client.publish()
    fleet.host().started(again)
    fleet.host().succeeded(again, "SUCCESS of the later run")
    return "SUCCESS of the later run"


@case
def duplicated_by_the_brokers_publish_retry(fleet: Fleet) -> str | None:
    """The same headers, so the same run, however late the second one runs."""
    message = fleet.host().publish()
    fleet.host().succeeded(message, "the first")
    fleet.after(90 * SECOND)
    fleet.host().succeeded(message, "the second")
    return "the first"


@case
def published_twice_by_the_user_in_one_unit(fleet: Fleet) -> str | None:
    client = fleet.host()
    first, second = client.publish(), client.publish()
    fleet.after(MINUTE)
    fleet.host().succeeded(second, "the first to succeed")
    fleet.after(SECOND)
    fleet.host().succeeded(first, "the second to succeed")
    return "the first to succeed"


@case
def published_twice_by_the_user_in_two_units(fleet: Fleet) -> str | None:
    """The later run wins, even though it succeeds first."""
    client = fleet.host()
    first = client.publish()
    fleet.after(UNIT_MS)
    second = client.publish()
    fleet.host().succeeded(second, "of the second run")
    fleet.after(SECOND)
    fleet.host().succeeded(first, "of the first run")
    return "of the second run"


@case
def a_chains_first_task_runs_twice_and_sends_its_successor_twice(fleet: Fleet) -> str | None:
    """Producer rule: a successor whose id the parent's message already holds inherits the run."""
    chain = fleet.host().publish()
    one, two = fleet.host(), fleet.host()
    one.hlc(chain)
    first = one.publish(inherit=chain.run)
    fleet.host().succeeded(first)
    fleet.after(20 * SECOND)
    two.hlc(chain)
    second = two.publish(inherit=chain.run)
    late = fleet.host()
    late.started(second)
    late.succeeded(second, "the successor's second SUCCESS")
    return "SUCCESS"


@case
def a_chord_body_is_sent_twice(fleet: Fleet) -> str | None:
    """Producer rule: the body takes the run in ``decided``, whoever sends it and whenever."""
    decided_run = run_at(fleet.now)
    first = fleet.host().publish(inherit=decided_run)
    fleet.host().succeeded(first, "the first")
    fleet.after(5 * MINUTE)
    second = fleet.host().publish(inherit=decided_run)
    worker = fleet.host()
    worker.started(second)
    worker.succeeded(second, "the second")
    return "the first"


@case
def replaced_after_retries(fleet: Fleet) -> str | None:
    """Producer rule: `replace` drops the headers, so the run is inherited explicitly. Attempts start at 0 again."""
    message = fleet.host().publish()
    worker = fleet.host()
    worker.says("RETRY", Rank.UNREADY, message, events.RETRY)
    fleet.after(10 * SECOND)
    retried = worker.publish(inherit=message.run)
    original = fleet.host()
    original.started(retried, "STARTED of the original")
    replacement = original.publish(inherit=retried.run)
    fleet.host(-SECOND).started(replacement, "STARTED of the replacement")
    return "STARTED of the replacement"


@case
def replaced_after_retries_and_the_replacement_fails(fleet: Fleet) -> str | None:
    replaced_after_retries(fleet)
    worker = fleet.host()
    worker.failed(Message(fleet.said[-1].run, fleet.said[-1].hlc), "FAILURE of the replacement")
    return "FAILURE of the replacement"


@case
def abort_without_a_request(fleet: Fleet) -> str | None:
    """Producer rule: run and HLC come from the view. ABORTED is no ready state of Celery's: class 0."""
    message = fleet.host().publish()
    fleet.host().says("PROGRESS", Rank.UNREADY, message)
    fleet.host().says_from_view("ABORTED", Rank.UNREADY)
    return "ABORTED"


@case
def abort_from_a_clock_a_second_behind(fleet: Fleet) -> str | None:
    """Producer rule: the HLC, too, comes from the view, so that the aborter's clock does not matter."""
    message = fleet.host().publish()
    fleet.host().says("PROGRESS", Rank.UNREADY, message)
    fleet.host(-SECOND).says_from_view("ABORTED", Rank.UNREADY)
    return "ABORTED"


@case
def a_cancelled_attempt_stores_RETRY_and_is_redelivered(fleet: Fleet) -> str | None:
    """Both carry the same headers: nothing but the clocks says that STARTED is later, a skew of more hides it."""
    message = fleet.host().publish()
    fleet.host().says("RETRY", Rank.UNREADY, message, events.RETRY)
    fleet.after(SECOND)
    fleet.host(-900).started(message)
    return "STARTED"


@case
def every_worker_guesses_REVOKED_and_the_task_fails_for_real(fleet: Fleet) -> str | None:
    """Producer rule: without a request the run comes from the view; the class is that of a guess."""
    message = fleet.host().publish()
    worker = fleet.host()
    worker.started(message)
    fleet.after(SECOND)
    fleet.host(5 * MINUTE).says_from_view("REVOKED", Rank.GUESSED_REVOKED)
    worker.failed(message)
    return "FAILURE"


@case
def a_guess_in_an_unknown_run_and_the_task_starts(fleet: Fleet) -> str | None:
    """The view knew nothing yet: the guess is of an unknown run, below every claim of the real one."""
    message = fleet.host().publish()
    fleet.host(5 * MINUTE).says("REVOKED", Rank.GUESSED_REVOKED, None, events.REVOKED)
    fleet.host().started(message)
    return "STARTED"


@case
def a_guess_in_the_known_run_hides_STARTED_but_nothing_ready(fleet: Fleet) -> str | None:
    """Class 1 is above class 0: the revoke is what a client sees until the execution ends."""
    message = fleet.host().publish()
    worker = fleet.host()
    worker.started(message)
    fleet.host().says_from_view("REVOKED", Rank.GUESSED_REVOKED)
    worker.started(message, "STARTED again")
    return "REVOKED"


@case
def revoked_while_waiting_for_a_retry(fleet: Fleet) -> str | None:
    message = fleet.host().publish()
    worker = fleet.host()
    taken = worker.hlc(message)
    again = worker.publish(inherit=message.run)
    worker.says("RETRY", Rank.UNREADY, message, events.RETRY, hlc=taken)
    fleet.host(-5 * MINUTE).says("REVOKED", Rank.FAILED, again, events.REVOKED)
    return "REVOKED"


@case
def the_child_is_lost_while_its_SUCCESS_is_in_flight(fleet: Fleet) -> str | None:
    message = fleet.host().publish()
    fleet.host().succeeded(message)
    fleet.after(SECOND)
    fleet.host().says("FAILURE", Rank.FAILED, message, events.WORKER_LOST)
    return "SUCCESS"


@case
def a_failed_chain_guesses_FAILURE_for_a_task_that_runs(fleet: Fleet) -> str | None:
    """`_fail_chain` has no request of the later task and the view none: an unknown run."""
    message = fleet.host().publish()
    fleet.after(SECOND)
    fleet.host().failed(None)
    fleet.host(-5 * MINUTE).started(message)
    return "STARTED"


@case
def forgotten_and_then_a_late_duplicate_arrives(fleet: Fleet) -> str | None:
    message = fleet.host().publish()
    fleet.host().succeeded(message)
    fleet.host(-MINUTE).forgets()
    fleet.after(DAY)
    fleet.host().failed(message)
    return None


@case
def forgotten_and_then_its_duplicate_succeeds(fleet: Fleet) -> str | None:
    """Forget is above every success of its run, also one by a clock that is behind."""
    message = fleet.host().publish()
    fleet.host().succeeded(message)
    fleet.host().forgets()
    fleet.host(-5 * MINUTE).succeeded(message, "the duplicate's SUCCESS")
    return None


@case
def forgotten_and_then_run_again(fleet: Fleet) -> str | None:
    client = fleet.host()
    fleet.host().succeeded(client.publish())
    fleet.host().forgets()
    fleet.after(UNIT_MS)
    fleet.host().started(client.publish())
    return "STARTED"


@case
def forgotten_and_run_again_at_once_by_one_process(fleet: Fleet) -> str | None:
    """Producer rule: a process that forgot an id publishes it next with at least that run + 1."""
    client = fleet.host()
    fleet.host().succeeded(client.publish())
    client.forgets()
    again = client.publish()
    assert again.run == run_at(fleet.now) + 1
    assert again.hlc is not None
    assert again.hlc > run_start_ms(again.run)
    fleet.host().started(again)
    return "STARTED"


@case
def forgotten_and_run_again_at_once_by_another_process(fleet: Fleet) -> str | None:
    """A documented limit: in the unit of the first publish it stays hidden."""
    client = fleet.host()
    fleet.host().succeeded(client.publish())
    client.forgets()
    fleet.host().started(fleet.host().publish())
    return None


@case
def an_expired_duplicate_while_the_first_one_runs(fleet: Fleet) -> str | None:
    message = fleet.host().publish()
    worker = fleet.host()
    worker.started(message)
    fleet.after(SECOND)
    fleet.host().says("REVOKED", Rank.FAILED, message, events.EXPIRED)
    worker.succeeded(message)
    return "SUCCESS"


@case
def a_host_five_minutes_ahead(fleet: Fleet) -> str | None:
    """The class decides before the clock does."""
    message = fleet.host().publish()
    fleet.host(5 * MINUTE).started(message)
    fleet.host().succeeded(message)
    return "SUCCESS"


@case
def a_host_minutes_ahead_hides_the_unready_states_of_a_redelivered_task(fleet: Fleet) -> str | None:
    """A documented limit, for as long as its skew."""
    message = fleet.host().publish()
    fleet.host(5 * MINUTE).started(message, "STARTED ahead")
    fleet.after(4 * MINUTE)
    fleet.host().started(message)
    return "STARTED ahead"


@case
def a_worker_at_2099(fleet: Fleet) -> str | None:
    """Its wall clock trusts the run; its HLC is ignored by whoever reads it, and class comes before time."""
    message = fleet.host().publish()
    mad, sane = fleet.host(IN_2099), fleet.host()
    mad.started(message, "STARTED in 2099")
    retry = mad.publish(inherit=message.run)
    sane.started(retry)
    assert sane.clock.tick() < fleet.now + SECOND
    sane.succeeded(retry)
    return "SUCCESS"


@case
def a_worker_at_2099_succeeds_too(fleet: Fleet) -> str | None:
    """Of two successes the right clock's is the first, in every order."""
    message = fleet.host().publish()
    fleet.host(IN_2099).succeeded(message, "SUCCESS in 2099")
    fleet.after(MINUTE)
    fleet.host().succeeded(message)
    return "SUCCESS"


@case
def a_publisher_at_2099_and_then_a_normal_run(fleet: Fleet) -> str | None:
    """Its run is over ten minutes ahead of the reader's wall clock, so it counts as unknown."""
    mad = fleet.host(IN_2099).publish()
    worker = fleet.host()
    worker.started(mad, "STARTED of 2099")
    worker.succeeded(mad, "SUCCESS of 2099")
    fleet.host().started(fleet.host().publish())
    return "STARTED"


@case
def a_publisher_at_1970_and_then_a_normal_run(fleet: Fleet) -> str | None:
    """Its run is the first there is: above every unknown run, below every later one."""
    early = fleet.host(-START).publish()
    fleet.host().failed(None, "a guess in an unknown run")
    fleet.host().succeeded(early, "SUCCESS of 1970")
    fleet.host().started(fleet.host().publish())
    return "STARTED"


@case
def a_publisher_at_1970_and_a_guess(fleet: Fleet) -> str | None:
    early = fleet.host(-START).publish()
    fleet.host().failed(None, "a guess in an unknown run")
    fleet.host().started(early)
    return "STARTED"


NO_HEADERS = Message(None, None)


@case
def a_message_without_our_headers(fleet: Fleet) -> str | None:
    worker = fleet.host()
    worker.started(NO_HEADERS)
    worker.says("RETRY", Rank.UNREADY, NO_HEADERS, events.RETRY)
    worker.failed(NO_HEADERS)
    return "FAILURE"


@case
def a_message_without_our_headers_retries(fleet: Fleet) -> str | None:
    """The retry's message has the HLC, for it is published by a worker; the run stays unknown."""
    worker = fleet.host()
    taken = worker.clock.tick()
    again = Message(None, worker.clock.tick())
    worker.says("RETRY", Rank.UNREADY, NO_HEADERS, events.RETRY, hlc=taken)
    fleet.host(-SECOND).started(again)
    return "STARTED"


@case
def a_message_without_our_headers_succeeds_twice(fleet: Fleet) -> str | None:
    worker = fleet.host()
    worker.started(NO_HEADERS)
    worker.succeeded(NO_HEADERS, "the first")
    fleet.after(SECOND)
    fleet.host().succeeded(NO_HEADERS, "the second")
    return "the first"


@case
def a_message_without_our_headers_is_forgotten(fleet: Fleet) -> str | None:
    fleet.host().succeeded(NO_HEADERS)
    fleet.host().forgets()
    fleet.after(DAY)
    fleet.host().succeeded(NO_HEADERS, "a late duplicate")
    return None


@case
def a_run_older_than_99_days(fleet: Fleet) -> str | None:
    """By then t counts in steps of 256 ms; the late SUCCESS still beats everything but success and forget."""
    message = fleet.host().publish()
    worker = fleet.host()
    worker.started(message)
    fleet.after(100 * DAY)
    worker.says("RETRY", Rank.UNREADY, message, events.RETRY)
    worker.succeeded(message)
    return "SUCCESS"


@case
def two_successes_99_days_after_the_publish(fleet: Fleet) -> str | None:
    message = fleet.host().publish()
    fleet.after(100 * DAY)
    fleet.host().succeeded(message, "the first")
    fleet.after(256)
    fleet.host().succeeded(message, "the second")
    return "the first"


@case
def ignore_result(fleet: Fleet) -> str | None:
    """Its events have no key: they stand in the history and on the side, and no document shows them."""
    for kind in (events.SENT, events.STARTED, events.SUCCESS):
        fleet.said.append(Event(id=kind, kind=kind, task="t", at=fleet.now, hlc=fleet.now, run=5_000, ignored=True))
    return None


@case
def sent_received_and_rejected_never_touch_the_document(fleet: Fleet) -> str | None:
    for kind in (events.SENT, events.RECEIVED, events.REJECTED):
        fleet.said.append(Event(id=kind, kind=kind, task="t", at=fleet.now, hlc=fleet.now + DAY))
    fleet.host().started(fleet.host().publish())
    return "STARTED"


@pytest.mark.parametrize("name", CASES)
def test_the_document_shows_what_the_contract_says(name: str):
    """For every order of arrival, every event twice, and batches of one, two, three and all."""
    fleet = Fleet()
    expected = CASES[name](fleet)
    reference = fleet.shown()
    assert reference.shows() == expected
    for sequence in arrivals(fleet.said):
        for size in (1, 2, 3, len(sequence)):
            view = View()
            for at in range(0, len(sequence), size):
                view.apply(sequence[at : at + size])
            assert (view.shows(), view.side, view.history) == (expected, reference.side, reference.history)


def test_every_event_of_one_process_has_a_key_of_its_own():
    """What one process says never ties, so the event's id never has to decide between its own events."""
    fleet = Fleet()
    message = fleet.host().publish()
    worker = fleet.host()
    keys = [worker.started(message).key for _ in range(100)]
    assert keys == sorted(set(keys))


def test_a_tie_between_processes_is_decided_by_the_event_id():
    """Equal keys happen across processes: the greater id stays, in every order."""
    run = run_at(START)
    a, b = (
        Event(
            id=name, kind=events.FAILURE, task="t", at=START, hlc=START, run=run, key=order_key(Rank.FAILED, START, run)
        )
        for name in "ab"
    )
    for order in ((a, b), (b, a)):
        view = View()
        view.apply(map(logged, order))
        assert view.shows() == "b"


def test_a_group_saved_deleted_and_saved_again():
    """A save is class 0 and a delete is forget, in their own wall clock's run; a save after it takes run + 1."""
    run = run_at(START)

    def said(name: str, kind: str, key: int) -> Event:
        return Event(id=name, kind=kind, task="g", at=START, hlc=START, key=key)

    saved = said("saved", events.GROUP_SAVED, order_key(Rank.UNREADY, START + 2, run))
    deleted = said("deleted", events.GROUP_DELETED, forget_key(run))
    again = said("again", events.GROUP_SAVED, order_key(Rank.UNREADY, START + 3, run + 1))
    for said_so_far, winner in (([saved], "saved"), ([saved, deleted], "deleted"), ([saved, deleted, again], "again")):
        for order in permutations(said_so_far):
            (change,) = fold(map(logged, order))
            assert change.winner is not None
            assert change.winner.id == winner
            assert change.side is None


def test_the_epoch_is_2020():
    """The wire holds runs: the epoch can never change."""
    assert EPOCH_MS == 1_577_836_800_000
    assert UNIT_MS == 8_000
