"""Documents of Celery's, put together again from parts that are encoded already; none of them is decoded.

For stores that keep the parts in fields of their own. Unpickling is for who trusts the store.
"""

from __future__ import annotations

import bz2
import json
import lzma
import pickle
import re
import zlib
from typing import TYPE_CHECKING, Any, Final

import msgspec

from celery_kafka_backend.documents import JSON, MSGPACK, PICKLE, YAML, Loaded

if TYPE_CHECKING:
    from collections.abc import Callable

_UNPRINTABLE: Final = re.compile("[\x7f-\x84\x86-\x9f\ufffe\uffff]")


def _as_yaml(value: Any) -> bytes:
    """JSON is YAML, but for characters that YAML wants escaped, and pairs of escapes that it does not put together."""
    text = json.dumps(value, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


# -- compressed values ---------------------------------------------------------------------------

COMPRESSED: Final = b"\0celery-compressed\0"
"""How a compressed value of Celery's begins; the content type of the compression and a NUL follow."""

_DECOMPRESS: Final[dict[bytes, Callable[[bytes], bytes]]] = {
    b"application/x-gzip": zlib.decompress,
    b"application/x-bz2": bz2.decompress,
    b"application/x-lzma": lzma.decompress,
}


def uncompressed(value: bytes) -> bytes | None:
    """Return what Celery may have compressed as it was; None: not by what Python brings along."""
    if not value.startswith(COMPRESSED):
        return value
    content_type, _, body = value.removeprefix(COMPRESSED).partition(b"\0")
    try:
        return _DECOMPRESS[content_type](body)
    except (LookupError, ValueError, OSError, zlib.error, lzma.LZMAError):
        return None


# -- one value -----------------------------------------------------------------------------------

ENCODERS: Final[dict[str, Callable[[Any], bytes | None]]] = {
    JSON: lambda value: json.dumps(value).encode(),
    PICKLE: pickle.dumps,
    MSGPACK: msgspec.msgpack.encode,
    YAML: _as_yaml,
}
"""By content type; a serializer of somebody's own is not there."""


# -- whole documents: values of ours as they are, and theirs, encoded ------------------------------


def _json_splice(plain: dict[str, Any], parts: dict[str, bytes | None]) -> bytes:
    return msgspec.json.encode({**plain, **{name: msgspec.Raw(part or b"null") for name, part in parts.items()}})


def _msgpack_splice(plain: dict[str, Any], parts: dict[str, bytes | None]) -> bytes:
    return msgspec.msgpack.encode({**plain, **{name: msgspec.Raw(part or b"\xc0") for name, part in parts.items()}})


def _pickle_splice(plain: dict[str, Any], parts: dict[str, bytes | None]) -> bytes:
    return pickle.dumps({**plain, **{name: part and Loaded(part) for name, part in parts.items()}})


def _yaml_splice(plain: dict[str, Any], parts: dict[str, bytes | None]) -> bytes | None:
    lines = [f"{name}: {_as_yaml(value).decode()}" for name, value in plain.items()]
    for name, part in parts.items():
        try:
            text = (part or b"null").decode()
        except UnicodeDecodeError:
            return None
        lines.append(f"{name}:")
        lines += [f"  {line}" if line else "" for line in text.removesuffix("...\n").removesuffix("\n").split("\n")]
    return "\n".join([*lines, ""]).encode()


_SPLICES: Final[dict[str, Callable[[dict[str, Any], dict[str, bytes | None]], bytes | None]]] = {
    "json": _json_splice,
    "pickle": _pickle_splice,
    "msgpack": _msgpack_splice,
    "yaml": _yaml_splice,
}


def spliced(serializer: str, plain: dict[str, Any], parts: dict[str, bytes | None]) -> bytes | None:
    """Return the document of values of ours and encoded ones of theirs; None: not by this serializer."""
    splice = _SPLICES.get(serializer)
    return None if splice is None else splice(plain, parts)
