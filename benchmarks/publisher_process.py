"""The alternative to a producer per process: one publisher process per worker host, fed over a unix socket.

A prototype for `process_model`, complete enough for honest figures: records with key, value and headers go in, acknowledgements with partition and offset or the error come back, and what nobody waits for is gathered as
`celery_kafka_backend.producer.publisher` does it. Left out: the chords' topic and its partitions, and sending again.

Frames: four bytes of length, then msgpack. A request is ``[number, topic, key, value, headers]``, number 0 for a
record that nobody waits for; an answer is ``[number, partition, offset, error]``.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
from confluent_kafka import Producer

from celery_kafka_backend import kafka
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.changes import Partition
from celery_kafka_backend.errors import NotAcknowledged, PublishError
from celery_kafka_backend.producer.publisher import CAST_S, Stored

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery_kafka_backend.producer.publisher import Record
    from celery_kafka_backend.settings import Settings

_LENGTH = struct.Struct("!I")
_encode = msgspec.msgpack.Encoder().encode
_request = msgspec.msgpack.Decoder(tuple[int, str, bytes, bytes, list[tuple[str, bytes]]]).decode
_answer = msgspec.msgpack.Decoder(tuple[int, int, int, str]).decode


def _frame(*fields: Any) -> bytes:
    body = _encode(fields)
    return _LENGTH.pack(len(body)) + body


def _read(connection: socket.socket) -> bytes:
    head = _exactly(connection, _LENGTH.size)
    return _exactly(connection, _LENGTH.unpack(head)[0])


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        chunk = connection.recv(size - len(found))
        if not chunk:
            raise ConnectionResetError("the other side is gone")
        found += chunk
    return bytes(found)


# -- in every process of the worker --------------------------------------------------------------


class SocketPublisher:
    """`Publisher`'s place in a recorder: the same calls, served by the publisher process."""

    def __init__(self, settings: Settings, path: str) -> None:
        self.settings = settings
        self.dropped = 0
        self.latest: Stored | None = None
        self._path = path
        self._pid = 0
        self._lock = threading.Lock()
        self._next = 0
        self._answers: dict[int, tuple[int, int, int, str]] = {}

    def _connection(self) -> socket.socket:
        if self._pid != os.getpid():
            self._lock = threading.Lock()
            self._answers = {}
            self._socket = socket.socket(socket.AF_UNIX)  # the inherited one is closed by this: nothing is lost with it
            self._socket.connect(self._path)
            self._pid = os.getpid()
        return self._socket

    def warm_up(self) -> None:
        self._connection()

    def publish(
        self, record: Record, *, wait_s: float = 0.0, then: Callable[[PublishError | None], None] | None = None  # noqa: ARG002 - as `Publisher.publish`
    ) -> SocketDelivery:  # fmt: skip
        connection = self._connection()
        with self._lock:
            self._next += 1
            connection.sendall(_frame(self._next, *record[:4]))
            return SocketDelivery(self, record.topic, self._next)

    def cast(self, record: Record) -> bool:
        connection = self._connection()
        with self._lock:
            connection.sendall(_frame(0, *record[:4]))
        return True

    def answer(self, number: int, timeout_s: float) -> tuple[int, int, int, str] | None:
        connection = self._connection()
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while number not in self._answers:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    found = _answer(_read(connection))
                except TimeoutError:
                    return None
                finally:
                    connection.settimeout(None)
                self._answers[found[0]] = found
            return self._answers.pop(number)

    def flush(self, timeout_s: float) -> int:  # noqa: ARG002 - what was sent is the publisher process's to deliver
        return 0


class SocketDelivery:
    def __init__(self, publisher: SocketPublisher, topic: str, number: int) -> None:
        self._publisher = publisher
        self._topic = topic
        self._number = number

    def wait(self, timeout_s: float) -> None:
        found = self._publisher.answer(self._number, timeout_s)
        if found is None:
            raise NotAcknowledged(f"no answer within {timeout_s:g} s")
        _, partition, offset, error = found
        if error:
            raise PublishError(error)
        self.stored = Stored(Partition(self._topic, partition), offset)


# -- the publisher process -----------------------------------------------------------------------


class Server:
    """One thread per connection reads and produces; one polls, and answers."""

    def __init__(self, settings: Settings, path: str) -> None:
        self._producer = Producer(kafka.producer_config(settings))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._lock = threading.Lock()
        self._casts: list[tuple[Any, ...]] = []

    def run(self) -> None:
        threading.Thread(target=self._poll, daemon=True).start()
        threading.Thread(target=self._gather, daemon=True).start()
        print("ready", flush=True)
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _poll(self) -> None:
        while True:
            self._producer.poll(1)

    def _gather(self) -> None:
        while True:
            time.sleep(CAST_S)
            with self._lock:
                self._send_casts()

    def _send_casts(self) -> None:
        for topic, key, value, headers in self._casts:
            self._producer.produce(topic, value, key, headers=headers)
        self._casts.clear()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while True:
                number, *record = _request(_read(connection))
                with self._lock:
                    if not number:
                        self._casts.append(tuple(record))
                        continue
                    self._send_casts()
                    self._produce(connection, number, *record)
        except ConnectionError:
            connection.close()

    def _produce(
        self, connection: socket.socket, number: int, topic: str, key: bytes, value: bytes, headers: Any
    ) -> None:
        def answered(error: Any, message: Any) -> None:
            said = str(error) if error is not None else ""
            try:
                connection.sendall(_frame(number, message.partition() or 0, message.offset() or 0, said))
            except OSError:  # the child is gone; its record is not
                return

        self._producer.produce(topic, value, key, on_delivery=answered, headers=headers)


def main() -> None:
    given = json.loads(sys.argv[1])
    Server(settings_module.parse(given["backend"], given["overrides"]), given["path"]).run()


if __name__ == "__main__":
    main()
