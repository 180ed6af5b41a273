"""The headers that a task's message carries for us. Ours hold integers."""

from __future__ import annotations

from typing import Final

RUN: Final = "ckb_run"
"""The run that the message belongs to (see `order.run_at`); one given explicitly is kept."""
HLC: Final = "ckb_hlc"
"""The publisher's hybrid logical clock, ms since 1970."""
SENT_AT: Final = "ckb_sent_at"
"""The publisher's wall clock, ms since 1970."""
GENERATION: Final = "ckb_generation"
"""In a chord body's options, never in a message: the chord's generation."""
DEADLINE: Final = "chord_deadline_s"
"""Likewise, before it is declared: after how many seconds the chord fails; the user's to give."""
RECEIVED_AT: Final = "ckb_received_at"
"""The parent's wall clock when it got the message, ms since 1970; added by the worker."""
RECEIVED_HLC: Final = "ckb_received_hlc"
"""A reading of the parent's clock after it got the message, so that the child's events are later; added by the worker."""
TASK: Final = "ckb_task"
"""The id that the other headers were made for: a task that forwards its headers to another does not pass its run on."""
STARTED_AT: Final = "ckb_started_at"
"""The child's wall clock when this attempt started; only on the request, never in a message."""
BEAT: Final = "periodic_task_name"
"""The schedule's entry that sent it. Schedules in a database put a property of this name beside the headers."""
