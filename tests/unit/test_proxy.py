"""The tests' own proxy, in front of an echo: a fault that it does not cause would let a fault test pass for nothing."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.patience import PATIENCE_S
from tests.services.ports import HOST
from tests.services.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

SILENCE_S = 0.2


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := self.request.recv(65_536):
                self.request.sendall(piece)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    server = socketserver.ThreadingTCPServer((HOST, 0), Echo)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    made = Proxy(server.server_address[1])
    yield made
    made.close()
    server.shutdown()
    server.server_close()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), timeout=PATIENCE_S)


def echoed(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(text)
    return received(connection, len(text))


def received(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := connection.recv(65_536)):
        data += piece
    return data


def is_silent(connection: socket.socket) -> bool:
    connection.settimeout(SILENCE_S)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(PATIENCE_S)
    return False


def test_it_forwards_both_ways_more_than_fits_in_a_buffer(proxy: Proxy) -> None:
    text = bytes(range(256)) * 20_000
    with connect(proxy) as connection:
        threading.Thread(target=connection.sendall, args=(text,), daemon=True).start()
        assert received(connection, len(text)) == text


def test_a_cut_breaks_what_is_open_and_what_comes_until_it_is_healed(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert echoed(connection, b"a") == b"a"
        proxy.cut()
        with pytest.raises(ConnectionError):
            assert echoed(connection, b"b"), "closed with a goodbye, not broken"
    with pytest.raises(ConnectionError), connect(proxy) as connection:
        assert echoed(connection, b"c"), "closed with a goodbye, not broken"
    proxy.heal()
    with connect(proxy) as connection:
        assert echoed(connection, b"d") == b"d"


def test_a_freeze_is_silence_that_loses_nothing(proxy: Proxy) -> None:
    with connect(proxy) as old:
        assert echoed(old, b"a") == b"a"
        proxy.freeze()
        old.sendall(b"b")
        with connect(proxy) as new:
            new.sendall(b"c")
            assert is_silent(old)
            assert is_silent(new)
            proxy.heal()
            assert received(old, 1) == b"b"
            assert received(new, 1) == b"c"


def test_slow_holds_every_piece_back_each_way(proxy: Proxy) -> None:
    proxy.slow(0.15)
    with connect(proxy) as connection:
        started = time.monotonic()
        assert echoed(connection, b"a") == b"a"
        assert time.monotonic() - started >= 0.3
        proxy.heal()
        assert echoed(connection, b"b") == b"b"


def test_a_dead_server_is_told_to_its_clients(proxy: Proxy) -> None:
    dead = Proxy(proxy.target)
    dead.target = 1  # nobody listens there
    try:
        with pytest.raises(ConnectionError), connect(dead) as connection:
            assert echoed(connection, b"a"), "closed with a goodbye, not broken"
    finally:
        dead.close()
