"""Claim checks: a document too large for Kafka lies in an object store; log and view hold a reference to it.

An object is the native document, byte for byte as Celery's own backend would have stored it, whatever its
serializer and compression. It is named ``<claim_check>/<day>/<event id>``: the last day, UTC, on which
anything may ask for it (the result's expiry or the log's retention, whichever is later), or ``never``. So a
folder whose day has passed can be removed as a whole, and an event that is sent again writes the same object.

In its place stands the *stub*, a native document that is always plain JSON::

    {"status": …, "result": {"__type__": "celery-kafka-backend.claim", "__value__": {"path", "bytes", "sha256"}},
     "traceback": null, "children": […], "date_done": …, "task_id": …, "claim": {the same as in __value__}}

A stock client does not take it for the result: its JSON raises `DecodeError` ("Unsupported type") with the reference,
other serializers cannot decode JSON at all. Ours goes by ``claim``, which no task's result can forge, and
looks only below its own ``claim_check``. Objects are read when the result is asked for, not its state.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final

import msgspec
from billiard.exceptions import SoftTimeLimitExceeded

from celery_kafka_backend import threads
from celery_kafka_backend.errors import ClaimLost, NotAcknowledged, SettingsError, Unavailable
from celery_kafka_backend.events import Claim
from celery_kafka_backend.settings import SETTING, mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from celery_kafka_backend.events import Event
    from celery_kafka_backend.settings import Settings

TYPE: Final = "celery-kafka-backend.claim"
NEVER: Final = "never"
STUB_BYTES: Final = 65_536
"""No stub is larger."""
CHILDREN_BYTES: Final = 16_384
"""Of children a stub carries so much; more are in the object alone."""
READ_S: Final = 60.0
"""Bound on reading an object."""
THREAD: Final = "celery-kafka-claim"

_PATH: Final = re.compile(r"(?:\d{4}-\d{2}-\d{2}|never)/[0-9a-f]{32}")
_DAY: Final = re.compile(r"\d{4}-\d{2}-\d{2}")
_MARK: Final = TYPE.encode()


class _Stub(msgspec.Struct):
    claim: Claim | None = None


_decoder = msgspec.json.Decoder(_Stub)  # here and not at the first use, which may be of two threads: see `settings`


def stub(event: Event, claim: Claim, children: Any) -> bytes:
    """Return the document that stands for a claimed one."""
    reference = msgspec.structs.asdict(claim)
    found = {
        "status": event.state,
        "result": {"__type__": TYPE, "__value__": reference},
        "traceback": None,
        "children": children,
        "date_done": event.date_done,
        "task_id": event.task,
        "claim": reference,
    }
    encoded = json.dumps(found).encode()
    if len(encoded) > CHILDREN_BYTES:
        del found["children"]
        encoded = json.dumps(found).encode()
    return encoded


def reference(document: Any) -> Claim | None:
    """Return what a document refers to, None if it is no stub."""
    encoded = document.encode() if isinstance(document, str) else document
    if not isinstance(encoded, bytes) or len(encoded) > STUB_BYTES or _MARK not in encoded:
        return None
    try:
        return _decoder.decode(encoded).claim
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class ClaimedMeta(dict[str, Any]):
    """A stub's fields, which reads the document when somebody asks for what only that has.

    Args:
        document: The stub.
        read: Returns the document's decoded fields.
    """

    def __init__(self, document: bytes | str, read: Callable[[], dict[str, Any]]) -> None:
        super().__init__(json.loads(document))
        self._read: Callable[[], dict[str, Any]] | None = read
        self._known = {"status", "task_id", "date_done", *({"children"} & self.keys())}

    def _ask(self, key: str) -> None:
        if self._read is None or key in self._known:
            return
        for name, value in self._read().items():
            if name not in self._known:
                super().__setitem__(name, value)
        self._read = None

    def __getitem__(self, key: str) -> Any:
        self._ask(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field, as a dictionary does."""
        self._ask(key)
        return super().get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        self._known.add(key)
        super().__setitem__(key, value)


class Claims:
    """The object store of one process and all its threads; made anew after a fork.

    Args:
        settings: The user's; ``claim_check`` is not empty.

    Raises:
        SettingsError: fsspec or the store's driver is not installed, or refuses the options.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = mask(settings.claim_check)
        self._pid = 0
        self._store()

    def _store(self) -> tuple[Any, str]:
        if self._pid != os.getpid():
            self._fs, self._root = _opened(self.settings)
            self._pid = os.getpid()
        return self._fs, self._root

    def put(self, event_id: str, document: bytes, until_ms: int | None, timeout_s: float) -> Claim:
        """Store a document, again under the same name if it is sent again.

        Args:
            event_id: Names it.
            document: The native document.
            until_ms: When nothing asks for it any more, ms since 1970; None: never.
            timeout_s: Bound on the store's answer.

        Raises:
            NotAcknowledged: The store did not take it in time.
        """
        path = f"{_day(until_ms)}/{event_id}"
        fs, root = self._store()

        def write() -> None:
            folder, _, name = f"{root}/{path}".rpartition("/")
            fs.makedirs(folder, exist_ok=True)
            with fs.open(f"{folder}/{name}", "wb") as file:
                file.write(document)
                file.flush()
                if isinstance(getattr(file, "name", None), str) and hasattr(file, "fileno"):  # a local file
                    os.fsync(file.fileno())

        try:
            threads.within(timeout_s, write, THREAD)
        except SoftTimeLimitExceeded:  # the task's own, while it waited
            raise
        except Exception as exc:
            raise NotAcknowledged(
                f"the claim check store {self.url} did not take {len(document)} bytes: {_said(exc)}"
            ) from exc
        return Claim(path, len(document), hashlib.sha256(document).hexdigest())

    def get(self, claim: Claim, timeout_s: float = READ_S) -> bytes:
        """Return a document.

        Raises:
            ClaimLost: It is not there, or not what was stored.
            Unavailable: The store did not answer in time.
        """
        if not _PATH.fullmatch(claim.path):
            raise ClaimLost(f"{claim.path!r} names no object of ours")
        fs, root = self._store()
        where = f"{self.url.rstrip('/')}/{claim.path}"
        try:
            found: bytes = threads.within(timeout_s, lambda: fs.cat_file(f"{root}/{claim.path}"), THREAD)
        except SoftTimeLimitExceeded:  # as above
            raise
        except FileNotFoundError:
            raise ClaimLost(f"{where} ({claim.bytes} bytes) is not there: removed or expired") from None
        except Exception as exc:
            raise Unavailable(f"{where} ({claim.bytes} bytes) cannot be read now: {_said(exc)}") from exc
        if len(found) != claim.bytes or hashlib.sha256(found).hexdigest() != claim.sha256:
            raise ClaimLost(f"{where} is damaged: {len(found)} bytes of {claim.bytes}, or another sha256")
        return found

    def expired(self, now_ms: int) -> Iterator[tuple[str, int]]:
        """Yield the days that have passed, each with how many objects it has.

        Raises:
            Unavailable: The store cannot be read.
        """
        fs, root = self._store()
        today = _day(now_ms - 86_400_000)
        try:
            folders = fs.ls(root, detail=False) if fs.exists(root) else []
            for folder in sorted(folders):
                day = folder.rstrip("/").rpartition("/")[2]
                if _DAY.fullmatch(day) and day < today:
                    yield day, len(fs.ls(folder, detail=False))
        except Exception as exc:
            raise Unavailable(f"{self.url} cannot be read: {_said(exc)}") from exc

    def remove(self, day: str) -> None:
        """Remove a day's objects.

        Raises:
            Unavailable: The store did not.
        """
        fs, root = self._store()
        try:
            fs.rm(f"{root}/{day}", recursive=True)
        except Exception as exc:
            raise Unavailable(f"{self.url}/{day} cannot be removed: {_said(exc)}") from exc


def _opened(settings: Settings) -> tuple[Any, str]:
    name = f"{SETTING}['claim_check']"
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415 - optional, and only for who asks for it
    except ImportError:
        raise SettingsError(name, "fsspec is not installed", "pip install 'celery-kafka-backend[claimcheck]'") from None
    try:
        fs, root = url_to_fs(settings.claim_check, **settings.claim_check_options)
    except Exception as exc:
        raise SettingsError(
            name, f"{mask(settings.claim_check)!r}: {_said(exc)}", "give a URL that fsspec knows"
        ) from exc
    return fs, str(root).rstrip("/")


def _day(at_ms: int | None) -> str:
    """Return the last day, UTC, of something that is needed until ``at_ms``; clocks may differ by a day."""
    if at_ms is None:
        return NEVER
    return (datetime.fromtimestamp(at_ms / 1000, timezone.utc) + timedelta(days=1)).strftime("%Y-%m-%d")


def _said(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {mask(str(exc))[:300]}"
