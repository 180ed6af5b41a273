"""What a document of Celery's says, whatever serializer wrote it, and its parts, still encoded. Unpickles nothing.

A pickle is walked through by Python's own unpickler with every class and function in it replaced by an inert one: what
it names is neither imported nor called. Its result alone is a pickle that takes it out of the whole when it is loaded.
"""

from __future__ import annotations

import io
import json
import operator
import pickle
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from celery_kafka_backend.errors import Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

JSON: Final = "application/json"
PICKLE: Final = "application/x-python-serialize"
MSGPACK: Final = "application/x-msgpack"
YAML: Final = "application/x-yaml"

_raw_json = msgspec.json.Decoder(dict[str, msgspec.Raw])
_raw_msgpack = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])


class Said(NamedTuple):
    """A document that has been read.

    Attributes:
        content_type: Of what wrote it.
        fields: Its fields; what a pickle holds beside plain values is inert.
        part: Returns a field alone, encoded likewise.
    """

    content_type: str
    fields: Mapping[str, Any]
    part: Callable[[str], bytes]


def read(document: bytes) -> Said:
    """Return what a document says.

    Args:
        document: Not compressed.

    Raises:
        Unreadable: It is none, or of a serializer of somebody's own.
    """
    content_type, fields = decode(document)
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise Unreadable(f"no document of Celery's: {type(fields).__name__}, not fields with names")
    if content_type == PICKLE:
        return Said(content_type, fields, lambda name: _item(document, name))
    if content_type == MSGPACK:
        raw = _raw_msgpack.decode(document)
        return Said(content_type, fields, lambda name: bytes(raw[name]))
    try:
        raw = _raw_json.decode(document)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # YAML, NaN, half a surrogate pair
        encode = _ENCODERS[content_type]
        return Said(content_type, fields, lambda name: encode(fields[name]))
    return Said(content_type, fields, lambda name: bytes(raw[name]))


def decode(encoded: bytes) -> tuple[str, Any]:
    """Return the content type and the value of what one of Celery's serializers has encoded.

    Raises:
        Unreadable: It is of none of them.
    """
    try:
        if encoded.startswith(b"\x80") and encoded.endswith(b"."):
            return PICKLE, _Inert(io.BytesIO(encoded)).load()
        if encoded[:1] >= b"\x80":
            return MSGPACK, msgspec.msgpack.decode(encoded)
        try:
            return JSON, json.loads(encoded)
        except ValueError:
            import yaml  # noqa: PLC0415 - an extra of kombu's

            return YAML, yaml.safe_load(encoded)
    except Exception as exc:  # whatever an unpickler, or YAML, makes of rubbish
        raise Unreadable(f"in no serializer of Celery's: {type(exc).__name__}: {exc}") from exc


def _yaml(value: Any) -> bytes:
    import yaml  # noqa: PLC0415 - as above

    return bytes(yaml.safe_dump(value).encode())


_ENCODERS: Final[dict[str, Callable[[Any], bytes]]] = {JSON: lambda value: json.dumps(value).encode(), YAML: _yaml}


# -- pickles --------------------------------------------------------------------------------------


class Stub:
    """In place of an object in a pickle, whose class is a subclass named for the real one."""

    path = ""
    args: tuple[Any, ...] = ()

    def __new__(cls, *args: Any, **_: Any) -> Stub:  # noqa: PYI034 - subclasses are made as they are met
        """Take what the real one would have been made of."""
        found = super().__new__(cls)
        found.args = args
        return found

    def __init__(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def __call__(self, *args: Any, **_: Any) -> Stub:
        """Return what a bound method might, as little."""
        return Stub(*args)

    def __setstate__(self, state: Any) -> None:
        """Do nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Do nothing."""

    def append(self, value: Any) -> None:
        """Do nothing."""

    def extend(self, values: Any) -> None:
        """Do nothing."""

    def add(self, value: Any) -> None:
        """Do nothing."""


class _Inert(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        home = "builtins" if module == "exceptions" else module  # what protocol 2 calls it, for Python 2
        return type("Stub", (Stub,), {"path": f"{home}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return Stub(pid)


class Loaded:
    """A value that is pickled already: loading what holds it loads it.

    Args:
        code: The pickle.
    """

    def __init__(self, code: bytes) -> None:
        self._code = code

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self._code,)


class _Item:
    """One of its items."""

    def __init__(self, code: bytes, name: str) -> None:
        self._whole, self._name = Loaded(code), name

    def __reduce__(self) -> tuple[Callable[[Any, str], Any], tuple[Loaded, str]]:
        return operator.getitem, (self._whole, self._name)


def _item(code: bytes, name: str) -> bytes:
    return pickle.dumps(_Item(code, name), protocol=2)


# -- what is in every document --------------------------------------------------------------------


def moment(value: Any) -> int | None:
    """Return a time as documents have it (ISO 8601, or YAML's own), ms since 1970; None if it is none."""
    try:
        found = datetime.fromisoformat(value.replace("Z", "+00:00")) if isinstance(value, str) else value
    except ValueError:
        return None
    if not isinstance(found, datetime):
        return None
    return int((found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp() * 1000)


def exception(result: Any) -> tuple[str, str] | None:
    """Return class and text of the exception that a result is, as Celery's serializers write one; None if it is none."""
    if isinstance(result, Stub):
        return (result.path, " ".join(str(each) for each in result.args if isinstance(each, (str, int, float))))
    if not isinstance(result, dict) or "exc_type" not in result:
        return None
    said = result.get("exc_message")
    text = " ".join(map(str, said)) if isinstance(said, (list, tuple)) else str(said)
    module = result.get("exc_module")
    return f"{module}.{result['exc_type']}" if module else str(result["exc_type"]), text
