"""What a replay leaves out: the view at some moment is the one that was kept live, however the log is cut into batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import events
from celery_kafka_backend.changes import Change, Logged, beats, history_expiry, merge_sides
from celery_kafka_backend.events import Event
from celery_kafka_backend.processors.bygone import Bygone
from celery_kafka_backend.processors.fold import fold
from tests.examples import tried_on

if TYPE_CHECKING:
    from collections.abc import Iterable

NOW = 50

_told = st.tuples(
    st.sampled_from(["t", "u"]),
    st.integers(0, 5),  # key
    st.integers(1, 40),  # when it came
    st.none() | st.integers(1, 60),  # how long it lives
    st.none() | st.integers(1, 5),  # sent at
    st.sampled_from([events.STATE, events.GROUP_SAVED]),
)


@st.composite
def logs(draw: st.DrawFn) -> list[tuple[Logged, int]]:
    found = sorted(draw(st.lists(_told, min_size=1, max_size=10)), key=lambda each: each[2])
    return [
        (
            Logged(
                Event(
                    id=f"e{number}", kind=kind, task=task, key=key, at=at, hlc=at, sent_at=sent,
                    expires_at=None if life is None else at + life,
                ),
                b"%d" % number,
            ),
            at,
        )
        for number, (task, key, at, life, sent, kind) in enumerate(found)
    ]  # fmt: skip


class Live:
    """A view that was written when each event came, and is looked at now."""

    def __init__(self, history_retention_ms: int | None = None) -> None:
        self.found: dict[tuple[str, str], tuple[int, Event | None, Any]] = {}
        self.history: dict[str, int] = {}
        self._kept = history_retention_ms

    def write(self, change: Change, at: int) -> None:
        self.history |= {event.id: history_expiry(event, self._kept) for event, _ in change.history}
        if change.only_history:
            return
        place = (change.subject, change.id)
        expires, winner, side = self.found.get(place, (0, None, None))
        known = place in self.found and not 0 < expires <= at
        if not known:
            winner = side = None
        if change.winner is not None and (winner is None or beats(change.winner, winner)):
            winner = change.winner
        if change.side is not None:
            side = change.side if side is None else merge_sides(side, change.side)
        until = (
            change.expires_at
            if not known
            else (max(expires, change.expires_at) if expires and change.expires_at else 0)
        )
        self.found[place] = (until, winner, side)

    def shown(self) -> dict[tuple[str, str], Any]:
        """Key, event id and whether it is shown, and the side record, of what is not over."""
        return {
            place: (winner and (winner.key, winner.id, not 0 < (winner.expires_at or 0) <= NOW), side)
            for place, (expires, winner, side) in self.found.items()
            if not 0 < expires <= NOW
        }

    def remembered(self) -> dict[str, int]:
        """What is in the history, and until when."""
        return {each: until for each, until in self.history.items() if not 0 < until <= NOW}


@given(st.data(), logs(), st.none() | st.sampled_from([0, 5, 20, 45]))
@tried_on(300)
def test_a_replay_shows_and_remembers_what_a_live_view_does(
    data: st.DataObject, log: list[tuple[Logged, int]], kept: int | None
):
    """With a history of whatever retention, which changes nothing of what is shown."""
    live, copy, plain = Live(kept), Live(kept), Live()
    for logged, at in log:
        for change in fold([logged]):
            live.write(change, at)
            plain.write(change, at)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(log)), max_size=5)))
    bygone = Bygone(history_retention_ms=kept)
    for start, end in zip([0, *cuts], [*cuts, len(log)], strict=True):
        _settle(bygone, copy, log[start:end], log[end][1] if end < len(log) else 10**9)
    bygone.close()
    assert copy.shown() == live.shown() == plain.shown()
    assert copy.remembered() == live.remembered()


def _settle(bygone: Bygone, copy: Live, batch: list[tuple[Logged, int]], horizon: int) -> None:
    """As `replay` does: what is over is told only to a view in which something of it still lives."""
    changes, over, past = bygone.settle([each for each, _ in batch], lambda: ([at for _, at in batch], horizon), NOW)
    living = copy.shown()
    late = [life.change() for life in over if life.subject in living]
    for told in (late, past, changes):
        assert len({(change.subject, change.id) for change in told}) == len(told)
        for change in told:
            copy.write(change, NOW)


def _event(task: str, key: int, at: int, expires_at: int) -> Logged:
    made = Event(id=f"{task}{at}", kind=events.STATE, task=task, key=key, at=at, hlc=at, expires_at=expires_at)
    return Logged(made, b"")


def _settled(*batches: Iterable[tuple[Logged, int]]) -> Live:
    bygone, copy = Bygone(), Live()
    for batch in batches:
        _settle(bygone, copy, list(batch), 0)
    return copy


def test_a_late_start_in_another_batch_does_not_show_over_an_expired_success():
    success, late = _event("t", 9, at=10, expires_at=40), _event("t", 3, at=30, expires_at=60)
    ((shown, _),) = _settled([(success, 10)], [(late, 30)]).shown().values()
    assert shown == (9, "t10", False)


def test_a_second_success_shows_when_the_first_was_over_already():
    first, second = _event("t", 9, at=5, expires_at=10), _event("t", 8, at=30, expires_at=60)
    ((shown, _),) = _settled([(first, 5), (second, 30)]).shown().values()
    assert shown == (8, "t30", True)


def test_what_expired_is_told_to_a_view_in_which_the_task_never_ends():
    sent, success, late = _event("t", 0, at=1, expires_at=0), _event("t", 9, at=2, expires_at=5), _event("t", 3, 7, 0)
    ((shown, _),) = _settled([(sent, 1)], [(success, 2), (late, 7)]).shown().values()
    assert shown == (9, "t2", False)


def test_what_is_out_of_date_is_not_kept():
    bygone = Bygone()
    gone = [(_event(f"t{n}", 1, at=1, expires_at=2), 1) for n in range(10)]
    changes, over, past = bygone.settle([each for each, _ in gone], lambda: ([1] * 10, 2), NOW)
    assert (changes, len(over), past) == ([], 10, [])
    later = bygone.settle([_event("t1", 0, at=30, expires_at=60)], lambda: ([30], 30), NOW)[0]
    assert later[0].side is not None
    assert later[0].side.seen == 30
    bygone.close()
