"""The fold and the side record: the same view from any order, duplication and batching."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import events
from celery_kafka_backend.changes import GROUP, Logged, Side, beats, merge_sides, side_of, side_of_all
from celery_kafka_backend.events import Event
from celery_kafka_backend.processors.fold import fold
from tests.examples import tried_on

if TYPE_CHECKING:
    from collections.abc import Sequence

small = st.integers(0, 5)
maybe = st.none() | st.integers(1, 5)

sides = st.builds(
    Side,
    run=small,
    seen=small,
    sent=small,
    received=small,
    started=small,
    attempts=small,
    workers=st.frozensets(st.sampled_from("abc")).map(lambda names: tuple(sorted(names))),
    expires_at=small,
)

_facts = st.builds(
    Event,
    id=st.just(""),
    kind=st.sampled_from(sorted(events.KINDS | {"a kind of the future"})),
    task=st.sampled_from(["t", "u"]),
    key=small,
    at=small,
    hlc=small,
    run=maybe,
    attempt=small,
    worker=st.none() | st.sampled_from("abc"),
    sent_at=maybe,
    received_at=maybe,
    started_at=maybe,
    expires_at=maybe,
)


@st.composite
def logs(draw: st.DrawFn) -> list[Logged]:
    """Events with ids of their own: an id is never reused for another event."""
    facts = draw(st.lists(_facts, min_size=1, max_size=8))
    named = [event_with(fact, id=f"e{i}") for i, fact in enumerate(facts)]
    return [Logged(event, event.id.encode()) for event in named]


def event_with(event: Event, **changes: Any) -> Event:
    return Event(**{name: getattr(event, name) for name in event.__struct_fields__} | changes)


class View:
    """What a store with guarded writes holds."""

    def __init__(self) -> None:
        self.winners: dict[tuple[str, str], Event] = {}
        self.sides: dict[str, Side] = {}
        self.history: dict[tuple[str, str], set[str]] = {}

    def apply(self, batch: Sequence[Logged]) -> None:
        for change in fold(batch):
            name = (change.subject, change.id)
            held = self.winners.get(name)
            if change.winner is not None and (held is None or beats(change.winner, held)):
                self.winners[name] = change.winner
            if change.side is not None:
                old = self.sides.get(change.id)
                self.sides[change.id] = merge_sides(old, change.side) if old else change.side
            self.history.setdefault(name, set()).update(one.event.id for one in change.history)

    def dump(self) -> tuple[Any, ...]:
        return ({name: event.id for name, event in self.winners.items()}, self.sides, self.history)


@given(st.data(), logs())
@tried_on(200)
def test_the_view_does_not_depend_on_order_duplication_or_batching(data: st.DataObject, log: list[Logged]):
    """Any permutation of the log with any duplicates, cut anywhere, gives the view of one batch."""
    once = View()
    once.apply(log)
    again = data.draw(st.lists(st.sampled_from(log), max_size=6))
    mixed = data.draw(st.permutations(log + again))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(mixed)), max_size=5)))
    view = View()
    for start, end in zip([0, *cuts], [*cuts, len(mixed)], strict=True):
        view.apply(mixed[start:end])
    assert view.dump() == once.dump()


@given(logs())
@tried_on(50)
def test_a_replay_of_everything_changes_nothing(log: list[Logged]):
    """The same log three times over."""
    view = View()
    view.apply(log)
    before = view.dump()
    view.apply(log[::-1])
    view.apply(log + log)
    assert view.dump() == before


@given(logs())
@tried_on()
def test_a_change_holds_what_its_batch_said(log: list[Logged]):
    """One change per subject; nothing without a key wins; a group has no side record; the order read is kept."""
    changes = fold(log)
    assert len({(change.subject, change.id) for change in changes}) == len(changes)
    assert sum(len(change.history) for change in changes) == len(log)
    for change in changes:
        mine = [
            one
            for one in log
            if one.event.task == change.id and (one.event.kind in events.GROUP_KINDS) == (change.subject == GROUP)
        ]
        assert change.history == mine
        keyed = [one.event for one in mine if one.event.key]
        expected = max(keyed, key=lambda event: (event.key, event.id), default=None)
        assert change.winner is expected
        assert (change.side is None) == (change.subject == GROUP)
        if expected is None or expected.kind in events.TOMBSTONES:
            assert change.document is None


def test_an_empty_batch_changes_nothing():
    """The materializer folds empty batches too."""
    assert fold([]) == []


@tried_on()
@given(sides, sides, sides)
def test_merging_side_records_is_commutative_associative_and_idempotent(a: Side, b: Side, c: Side):
    """So any order, duplication and batching gives one record."""
    assert merge_sides(a, b) == merge_sides(b, a)
    assert merge_sides(merge_sides(a, b), c) == merge_sides(a, merge_sides(b, c))
    assert merge_sides(a, a) == a
    assert merge_sides(merge_sides(a, b), b) == merge_sides(a, b)


@tried_on()
@given(logs())
def test_the_side_of_a_story_is_that_of_its_events_merged(log: list[Logged]):
    assert side_of_all(log) == reduce(merge_sides, (side_of(event) for event, _ in log))


@tried_on()
@given(sides, sides)
def test_never_is_later_than_any_time_to_expire(a: Side, b: Side):
    """For ``expires_at`` 0 is "never" and stays; for the other times 0 is "unknown" and gives way."""
    merged = merge_sides(a, b)
    if 0 in (a.expires_at, b.expires_at):
        assert merged.expires_at == 0
    else:
        assert merged.expires_at == max(a.expires_at, b.expires_at)
    for name in ("sent", "received", "started"):
        known = [getattr(side, name) for side in (a, b) if getattr(side, name)]
        assert getattr(merged, name) == min(known, default=0)


def test_a_guessed_revoke_names_no_worker():
    """On a broadcast revoke every worker of the fleet writes one, and none of them had the task."""
    said = Event(id="e", kind=events.REVOKED, task="t", at=1, hlc=1, worker="celery@a")
    assert side_of(said).workers == ()
    assert side_of(event_with(said, received_at=1)).workers == ("celery@a",)
    assert side_of(event_with(said, kind=events.STARTED)).workers == ("celery@a",)
