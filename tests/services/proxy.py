"""A TCP proxy in front of one server of this machine, to cut it off, to fall silent, or to be slow, and to heal.

Killing and freezing the server itself is `tests.services.node`'s. What only a network can do is here: connections that
break while both ends live, a host that swallows everything, bytes that come late.

A broker behind a proxy must advertise the proxy's port, or its clients go round it: `tests.services.kafka.start` takes
``advertise``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING, TypeVar

from tests.services import ports

if TYPE_CHECKING:
    from collections.abc import Coroutine

PIECE_BYTES = 65_536
CLOSE_TIMEOUT_S = 10.0
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST, as a host that is gone, not with a goodbye

_Result = TypeVar("_Result")


class Proxy:
    """Forwards ``port`` to ``target``, a port of this machine, from its making to `close`.

    The verbs may be called from any thread, in any order; each returns once it holds. `cut`, `freeze` and `slow`
    exclude one another: the last one counts.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        (self.port,) = ports.free(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        self._pairs: set[asyncio.Task[None]] = set()
        self._is_cut = False
        self._delay_s = 0.0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server = self._do(asyncio.start_server(self._accept, ports.HOST, self.port))

    def cut(self) -> None:
        """Reset every connection, and every new one, until `heal`. Bytes under way are lost."""
        self._do(self._become(is_cut=True))

    def freeze(self) -> None:
        """Forward nothing until `heal`, and lose nothing: connections stay open, new ones are taken and left alone."""
        self._do(self._become(is_frozen=True))

    def slow(self, delay_s: float) -> None:
        """Hold every piece (at most 64 KiB) back for so long, in both directions, until `heal`."""
        self._do(self._become(delay_s=delay_s))

    def heal(self) -> None:
        """Undo all of it. What was reset stays so: clients connect again."""
        self._do(self._become())

    def close(self) -> None:
        """Cut, and stop listening. Once."""
        self._do(self._become(is_cut=True))
        self._do(self._stop_listening())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._loop.close()

    # -- in the loop -----------------------------------------------------------------------------

    def _do(self, work: Coroutine[None, None, _Result]) -> _Result:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(CLOSE_TIMEOUT_S)
        except concurrent.futures.TimeoutError:
            raise TimeoutError(f"the proxy on port {self.port} is stuck") from None

    async def _become(self, *, is_cut: bool = False, is_frozen: bool = False, delay_s: float = 0.0) -> None:
        self._is_cut, self._delay_s = is_cut, delay_s
        if is_frozen:
            self._flowing.clear()
        else:
            self._flowing.set()
        if is_cut:
            broken = list(self._pairs)
            for pair in broken:
                pair.cancel()
            await asyncio.gather(*broken, return_exceptions=True)

    async def _stop_listening(self) -> None:
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            _reset(writer)
            return
        pair = asyncio.current_task()
        assert pair is not None
        self._pairs.add(pair)
        try:
            await self._join(reader, writer)
        except asyncio.CancelledError:  # cut: whoever cancels has no use for the news
            pass
        finally:
            self._pairs.discard(pair)
            _reset(writer)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        try:
            up_reader, up_writer = await asyncio.open_connection(ports.HOST, self.target)
        except OSError:  # dead, as its clients are now told
            return
        pumps = [
            asyncio.ensure_future(self._pump(reader, up_writer)),
            asyncio.ensure_future(self._pump(up_reader, writer)),
        ]
        try:
            # Either end's goodbye, or break, is passed on to the other.
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            _reset(up_writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(PIECE_BYTES):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                await self._flowing.wait()
                writer.write(piece)
                await writer.drain()
            # Everything that came before the goodbye goes out before ours.
            writer.close()
            await writer.wait_closed()


def _reset(writer: asyncio.StreamWriter) -> None:
    if not writer.is_closing():
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
