"""kombu's filesystem transport for `embedded`, with messages that appear whole.

kombu opens a message's file under its final name and writes afterwards; a worker that looks in between takes an empty
file, and ends with a JSONDecodeError (celery/kombu#1551). Here the file gets its name once it is written.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from kombu.exceptions import ChannelError
from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """As kombu's, but for writing."""

    def _put(self, queue: str, payload: Any, **_: Any) -> None:  # type: ignore[override]  # named as in kombu's
        folder = Path(self.data_folder_out)
        # Readers take the first by name, of those that end in the queue's name and ".msg".
        name = f"{time.monotonic_ns():020d}_{uuid4()}.{queue}.msg"
        unfinished = folder / f"{uuid4()}.part"  # kombu before 5.7 would take it if it held the queue's name
        try:
            unfinished.write_text(dumps(payload), encoding="utf-8")
            os.replace(unfinished, folder / name)  # noqa: PTH105 - what makes it atomic, by its own name
        except OSError as exc:
            raise ChannelError(f"Cannot add file {name!r} to directory {folder}") from exc


class Transport(filesystem.Transport):
    """For ``broker_transport``."""

    Channel = Channel
