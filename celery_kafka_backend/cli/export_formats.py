"""How exported events are written: each format a function of a stream of events and a file."""

from __future__ import annotations

from datetime import datetime, timezone
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import msgspec

from celery_kafka_backend import codec
from celery_kafka_backend.cli.exits import Exit, Stop
from celery_kafka_backend.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from celery_kafka_backend.changes import Logged
    from celery_kafka_backend.events import Event

ROWS: Final = 10_000
"""Per row group of a Parquet file: what is in memory at once."""

_encode = msgspec.json.Encoder().encode


def jsonl(found: Iterable[Logged], stream: BinaryIO, _source: str) -> None:
    """Write each event as it was recorded (docs/wire-format.md), one per line."""
    for _, value in found:
        stream.write(codec.one_line(value))
        stream.write(b"\n")


class CloudEvent(msgspec.Struct):
    """CloudEvents 1.0 in structured mode, JSON.

    Attributes:
        specversion: Of CloudEvents.
        id: The event's; with ``source`` unique.
        source: The log: ``/celery/<topic prefix>``.
        type: ``celery.task.<kind>``.
        subject: Id of the task, or of the group.
        time: When its process said so, RFC 3339, UTC.
        datacontenttype: ``application/json``.
        partitionkey: The task's id (the extension "Partitioning").
        data: The event as it was recorded.
    """

    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: str
    datacontenttype: str
    partitionkey: str
    data: msgspec.Raw


def cloudevents(found: Iterable[Logged], stream: BinaryIO, source: str) -> None:
    """Write each event in an envelope, one per line."""
    for event, value in found:
        at = datetime.fromtimestamp(event.at / 1000, timezone.utc).isoformat(timespec="milliseconds")
        made = CloudEvent(
            "1.0", event.id, f"/celery/{source}", f"celery.task.{event.kind}", event.task, at.replace("+00:00", "Z"),
            "application/json", event.task, msgspec.Raw(codec.one_line(value)),
        )  # fmt: skip
        stream.write(_encode(made))
        stream.write(b"\n")


_TEXT: Final = (
    "task", "id", "kind", "state", "name", "role", "host", "worker", "queue", "exchange", "routing_key", "parent", "root",
    "group", "chord", "beat", "exception", "message", "by", "date_done",
)  # fmt: skip
_NUMBERS: Final = ("key", "run", "pid", "attempt", "priority", "index", "signum")
_TIMES: Final = ("at", "hlc", "expires_at", "eta", "message_expires", "sent_at", "received_at", "started_at", "due")
_FLAGS: Final = ("redelivered", "terminated", "requeue", "ignored")


def parquet(found: Iterable[Logged], stream: BinaryIO, _source: str) -> None:
    """Write a column per field, times as timestamps, arguments and result as JSON, and the record itself as ``event``.

    Raises:
        Stop: pyarrow is not installed.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        from pyarrow import parquet as pq  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        raise Stop(
            Exit.CONFIGURATION,
            f"Parquet needs the package {exc.name!r}, which is not installed",
            "pip install 'celery-kafka-backend[parquet]'; or use --format jsonl",
        ) from exc
    schema = pa.schema(
        [
            *((name, pa.string()) for name in _TEXT),
            *((name, pa.int64()) for name in _NUMBERS),
            *((name, pa.timestamp("ms", "UTC")) for name in _TIMES),
            *((name, pa.bool_()) for name in _FLAGS),
            ("runtime_s", pa.float64()),
            *((name, pa.string()) for name in ("args", "kwargs", "result", "event")),
        ]
    )
    source = iter(found)
    with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        while rows := [_row(event, value) for event, value in islice(source, ROWS)]:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _row(event: Event, value: bytes) -> dict[str, Any]:
    plain = {name: getattr(event, name) for name in (*_TEXT, *_NUMBERS, *_TIMES, *_FLAGS, "runtime_s")}
    return {
        **plain, "args": _json(event.args), "kwargs": _json(event.kwargs), "result": _result(event), "event": value.decode()
    }  # fmt: skip


def _json(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else _encode(value).decode()


def _result(event: Event) -> str | None:
    if not event.doc:
        return None
    try:
        return bytes(codec.native_parts(bytes(event.doc)).result).decode() or None
    except CodecError:
        return None


WRITERS: Final[dict[str, Callable[[Iterable[Logged], BinaryIO, str], None]]] = {
    "jsonl": jsonl,
    "cloudevents": cloudevents,
    "parquet": parquet,
}
