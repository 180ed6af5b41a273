"""The journal loses no line but the one that a kill comes upon."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from tests.faults import journal

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_two_threads_that_begin_it_at_once_both_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = journal.Journal(tmp_path, "role")
    opened = os.open

    def open_while_another_notes(*args: Any) -> int:
        monkeypatch.undo()
        other = threading.Thread(target=noted.note, args=("other",))
        other.start()
        other.join()
        return opened(*args)

    monkeypatch.setattr(os, "open", open_while_another_notes)
    noted.note("first")
    assert sorted(line["what"] for line in journal.read(tmp_path, "role")) == ["first", "other"]
