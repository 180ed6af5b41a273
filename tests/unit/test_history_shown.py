"""What `pipeline history --group --as-of` says of a chord, by the records of its topic."""

from __future__ import annotations

import pytest

from celery_kafka_backend import chord_records as records
from celery_kafka_backend.chord_records import SUCCESS, Choice, Declared, Extended, Fired, Part, Sized
from celery_kafka_backend.cli.history_shown import chord_then

HERE = {"group": "g", "generation": 7}


class Message:
    """A record of the chords' topic."""

    def __init__(self, key, value, written, offset):
        self.key, self.value, self.offset = (lambda: key), (lambda: value), (lambda: offset)
        self.timestamp = lambda: (0, written)


def part(task, at):
    return Part(**HERE, task=task, index=0, id=f"e-{task}", key=1, state=SUCCESS, result=b"1", at=at)


DECIDED = records.Decided(
    **HERE, owner="o", outcome=SUCCESS, parts=(Choice("a", 0, "e-a", 2), Choice("b", 0, "e-b", 4)), size=2, body_task_id="body",
    body_run=1, last=0, at=3_000,
)  # fmt: skip
LIFE = (
    Declared(**HERE, body=b"{}", body_task_id="body", body_name="total", at=1_000),
    Sized(**HERE, size=1, at=1_100),
    part("a", 1_500),
    Extended(**HERE, task="b", index=1, at=2_000),
    part("b", 2_500),
    DECIDED,
    Fired(**HERE, owner="o", outcome=SUCCESS, body_task_id="body", at=3_100),
)


def told(as_of, life=LIFE, tombstones=False, compacted=()):
    """Tell of a chord whose records were written when they were made; its tombstones come at 4000."""
    found = [(*records.encode(one), one.at) for one in life if type(one) not in compacted]
    if tombstones:
        gone = [records.encode(one)[0] for one in life if isinstance(one, (Sized, Part, Extended))]
        found += [(key, None, 4_000) for key in gone]
    return chord_then("g", as_of, [Message(*one, n) for n, one in enumerate(found)])


@pytest.mark.parametrize("tombstones", [False, True])
def test_a_chord_has_the_size_that_it_had_then(tombstones):
    assert told(999, tombstones=tombstones) == ""
    assert "waiting for its members (an unknown" not in told(1_050, tombstones=tombstones) or not tombstones
    assert "waiting for its members (1)" in told(1_999, tombstones=tombstones)
    assert "waiting for its members (2)" in told(2_999, tombstones=tombstones)
    assert told(3_050, tombstones=tombstones).startswith("chord: decided")
    assert told(3_100, tombstones=tombstones).startswith("chord: fired")
    assert told(None, tombstones=tombstones).startswith("chord: fired")


def test_a_chord_whose_size_nobody_knows_any_more_has_the_one_that_it_ended_with():
    assert "waiting for its members (2 in the end)" in told(1_999, compacted=(Sized, Part, Extended))
    assert "waiting for its members (an unknown number)" in told(None, life=LIFE[:1])
