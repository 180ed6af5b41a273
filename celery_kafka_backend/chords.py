"""How the backend begins chords and sends their parts; who decides is `processors.chords`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import states
from celery.result import GroupResult
from celery.utils.functional import _regen
from kombu.exceptions import OperationalError
from kombu.serialization import dumps
from kombu.utils.encoding import ensure_bytes

from celery_kafka_backend import chord_records, older
from celery_kafka_backend.errors import PublishError, TooLarge
from celery_kafka_backend.producer import headers as names
from celery_kafka_backend.producer.members import members
from celery_kafka_backend.producer.recorder import (
    current_request,
    field,
    held_ids,
    plain,
)
from celery_kafka_backend.producer.stubs import is_declared, without_bodies
from celery_kafka_backend.settings import MOST_S
from celery_kafka_backend.stock_chords import StockChords
from celery_kafka_backend.writes import encode_error

if TYPE_CHECKING:
    from celery_kafka_backend.producer.recorder import Identity


class Chords(StockChords):
    """The chords' part of `backend.KafkaBackend`."""

    # -- chords ------------------------------------------------------------------------------

    def apply_chord(self, header_result_args: tuple[Any, ...], body: Any, **options: Any) -> None:
        """Declare a chord; acknowledged before any header task is sent.

        Raises:
            OperationalError: Kafka did not acknowledge it within ``publish_timeout_s``.
            ValueError: Its option ``chord_deadline_s`` is no time.
        """
        if self.settings.chords == "view":
            self._apply_stock_chord(header_result_args, body, **options)
            return
        self.ensure_chords_allowed()
        older.name_body(body)
        group_id = header_result_args[0]
        request = current_request()
        clock = self.recorder.clock
        # A chord frozen inside this message is declared again, as the same one, by a redelivery.
        held = request is not None and body.id in held_ids(request)
        generation = (field(request, names.HLC) if held else None) or clock.tick()
        body.options[names.GENERATION] = generation
        deadline_s = self._deadline_s(body)
        self.recorder.generations.keep(group_id, generation)
        content_type, content_encoding, encoded = dumps(
            without_bodies(dict(body)), serializer=self.app.conf.task_serializer
        )
        delivery_info = field(request, "delivery_info") or {}
        at = clock.wall_ms()
        record = chord_records.Declared(
            group=group_id,
            generation=generation,
            body=ensure_bytes(encoded),
            content_type=content_type,
            content_encoding=content_encoding,
            body_task_id=body.id,
            body_name=body.task or "",
            immutable=bool(body.immutable),
            root=field(request, "root_id"),
            parent=field(request, "id"),
            priority=delivery_info.get("priority"),
            stamps=_stamps(request),
            group_result=self._shape(header_result_args[1]),
            deadline=int(at + deadline_s * 1000) if deadline_s else None,
            at=at,
            host=self.recorder.host,
            pid=self.recorder.pid,
        )
        if self.settings.chord_key:
            record = chord_records.sign(record, self.settings.chord_key)
        self._declare(record, "declaring")

    def _deadline_s(self, body: Any) -> float:
        """Return after how many seconds a chord fails, 0 for never; its option is not for the body's message."""
        given = body.options.pop(names.DEADLINE, None)
        if given is None:
            return self.settings.chord_deadline_s
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < MOST_S:
            raise ValueError(f"{names.DEADLINE}={given!r}: give seconds, or 0 for no deadline")
        return float(given)

    def _shape(self, results: Any) -> bytes | None:
        """Return how the header is nested, encoded as the body is; None if it is flat.

        A generator is not unrolled to find out: Celery does not either, and its results come out flat.
        """
        if isinstance(results, _regen) or not any(isinstance(one, GroupResult) for one in results):
            return None
        shape = _nesting(self.app.GroupResult(None, results))
        return bytes(ensure_bytes(dumps(shape, serializer=self.app.conf.task_serializer)[2]))

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Say how many parts a chord has; acknowledged before its last header task is sent.

        Raises:
            OperationalError: As `apply_chord`.
        """
        generation = self.recorder.generations.get(group_id)
        if generation is None:
            request = current_request()
            generation = _generation(field(request, "chord")) if field(request, "group") == group_id else None
        if generation is None:
            self._set_stock_chord_size(group_id, chord_size)
            return
        at = self.recorder.clock.wall_ms()
        self._declare(chord_records.Sized(group=group_id, generation=generation, size=chord_size, at=at), "sizing")

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Let a chord wait for one more task; acknowledged before that is sent.

        Raises:
            OperationalError: As `apply_chord`.
        """
        request = current_request()
        generation = _generation(field(request, "chord")) or self.recorder.generations.get(chord_id)
        if generation is None:
            self._add_to_stock_chord(chord_id, result)
            return
        record = chord_records.Extended(
            group=chord_id,
            generation=generation,
            task=result.id,
            by=field(request, "id"),
            at=self.recorder.clock.wall_ms(),
        )
        self._declare(record, "extending")

    def _declare(self, record: chord_records.Record, doing: str) -> None:
        try:
            encoded = self.recorder.chord_record(record.group, *chord_records.encode(record))
            self.recorder.courier.carry(encoded, f"{doing} chord {record.group}", self.settings.publish_timeout_s)
        except TooLarge as exc:
            raise encode_error(exc) from exc
        except PublishError as exc:
            raise OperationalError(
                f"{doing} chord {record.group} in Kafka at {self.settings.bootstrap_servers}: {exc}"
            ) from exc

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_: Any) -> None:
        """Send a member's outcome, unless `_ending` has already done so."""
        task_id = field(request, "id")
        if self._here.parted == task_id:
            return
        # Of a failed chain, or a chord's body failed by the chord processor: any canvas, none of which ever ran.
        for member in members(request):
            if not is_declared(field(member, "chord")):
                self._count_stock_part(member, state, result)
                continue
            self._send_part(member, state, result, self._identity(member.id, state, member), stored=True)

    def _send_part(self, request: Any, state: str, result: Any, who: Identity, stored: bool) -> None:
        group_id, task_id, chord = field(request, "group"), field(request, "id"), field(request, "chord")
        generation = _generation(chord)
        if not group_id or not task_id or generation is None:
            return
        succeeded = state == states.SUCCESS
        # Also if nobody gets it: a result that cannot be encoded is a failure, and no part has said otherwise.
        content_type, content_encoding, encoded = self._encode(self.encode_result(result, state))
        payload = bytes(ensure_bytes(encoded))
        if succeeded and chord.get("immutable"):
            content_type, content_encoding, payload = "", "", b""
        record = chord_records.Part(
            group=group_id,
            generation=generation,
            task=task_id,
            index=field(request, "group_index"),
            id=who.id,
            key=who.key,
            state=state,
            result=payload,
            content_type=content_type,
            content_encoding=content_encoding or "",
            ignored=succeeded and not stored,
            exception="" if succeeded else repr(result)[: chord_records.EXCEPTION_LIMIT],
            root=field(request, "root_id"),
            parent=field(request, "parent_id"),
            priority=(field(request, "delivery_info") or {}).get("priority"),
            stamps=_stamps(request),
            at=who.wall,
            worker=field(request, "hostname") or "",
            told=tuple(field(request, "told") or ()),
        )
        try:
            encoded_part = self.recorder.chord_record(group_id, *chord_records.encode(record))
        except TooLarge as exc:
            raise encode_error(exc) from exc
        self._store(encoded_part, f"part of chord {group_id} by {task_id}", task_id, state, request)


def _generation(chord: Any) -> int | None:
    found = (chord.get("options") or {}).get(names.GENERATION) if isinstance(chord, dict) else None
    return found if isinstance(found, int) else None


def _nesting(result: Any) -> list[Any]:
    """Return a result as ``as_tuple()`` does, without its parents: a chain would repeat them in every member."""
    children = [_nesting(child) for child in result.results] if isinstance(result, GroupResult) else None
    return [[result.id, None], children]


def _stamps(request: Any) -> dict[str, Any] | None:
    stamped = field(request, "stamped_headers")
    if not stamped:
        return None
    stamps = field(request, "stamps") or {}
    return {"stamped_headers": list(stamped), **{one: plain(stamps.get(one)) for one in stamped}}
