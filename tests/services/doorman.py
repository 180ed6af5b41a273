"""An HTTP proxy in front of a server, which answers some requests itself: as a server with users, or one that is full.

What breaks connections is `tests.services.proxy`'s. What only an answer can do is here, with TLS if need be.
"""

from __future__ import annotations

import http.client
import http.server
import json
import ssl
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.services import ports

TIMEOUT_S = 30.0
HOP = frozenset({"connection", "transfer-encoding", "content-length"})


class Seen(NamedTuple):
    """A request that came; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]


class Doorman:
    """Stands before ``target``, a port of this machine, from its making to `close`."""

    def __init__(self, target: int, *, tls: bool = False) -> None:
        self.target = target
        self.seen: list[Seen] = []
        self.limit: int | None = None
        """Answers 413 to larger bodies."""
        self.product = "Elasticsearch"
        """What it says that it is in its own answers."""
        self.delay_s = 0.0
        """Waits so long before it answers."""
        self._answer: tuple[int, bytes, str] | None = None
        (self.port,) = ports.free(1)
        self._server = _Server((ports.HOST, self.port), _handler(self))
        self._server.daemon_threads = True
        self._folder = tempfile.TemporaryDirectory()
        self.authority = str(Path(self._folder.name) / "ca.pem")
        if tls:
            self._server.socket = self._context().wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, name=f"doorman-{self.port}", daemon=True)
        self._thread.start()

    def url(self, url: str) -> str:
        """The same URL, by way of us."""
        return url.replace(f"{ports.HOST}:{self.target}", f"{ports.HOST}:{self.port}")

    def answers(self, status: int, body: object, *, only: str = "") -> None:
        """Answer so from now on, if the path has ``only`` in it."""
        self._answer = status, json.dumps(body).encode(), only

    def lets_through(self) -> None:
        """Undo ``answers``."""
        self._answer = None

    def own_answer(self, path: str, size: int) -> tuple[int, bytes] | None:
        """What to say in the server's place."""
        if self.limit is not None and size > self.limit:
            return 413, b"{}"
        if self._answer is not None and self._answer[2] in path:
            return self._answer[:2]
        return None

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._folder.cleanup()

    def _context(self) -> ssl.SSLContext:
        import trustme  # noqa: PLC0415 - most doors have no lock

        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.authority)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(ports.HOST).configure_cert(context)
        return context


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes before its answer is no fault of ours.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(doorman: Doorman) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = TIMEOUT_S

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            doorman.seen.append(Seen(self.command, self.path, headers))
            time.sleep(doorman.delay_s)
            own = doorman.own_answer(self.path, len(body))
            if own is not None:
                kind = "application/vnd.elasticsearch+json;compatible-with=8"
                self._reply(own[0], {"content-type": kind, "x-elastic-product": doorman.product}, own[1])
                return
            there = http.client.HTTPConnection(ports.HOST, doorman.target, timeout=TIMEOUT_S)
            try:
                there.request(self.command, self.path, body, headers)
                answer = there.getresponse()
                self._reply(answer.status, dict(answer.getheaders()), answer.read())
            finally:
                there.close()

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve  # noqa: N815 - the library's names

        def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            pass

    return Handler
