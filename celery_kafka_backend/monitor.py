"""One port for Prometheus and for whoever starts and stops processes: /metrics, /healthz, /readyz.

Whoever serves it is a `Source`: what it shows and what is wrong. Here is only how that is said.
``prometheus_client`` (extra ``metrics``) is imported when an `Endpoint` is made, not before.

/metrics   text format or OpenMetrics, as asked for
/healthz   200, or 503 and what is wrong: somebody should restart this
/readyz    200, or 503 and what is wrong: it cannot do its work now
"""

from __future__ import annotations

import errno
import os
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from celery_kafka_backend import threads
from celery_kafka_backend.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from celery_kafka_backend.metrics import Metric

REQUEST_S: Final = 10.0
"""Longest silence within a request."""


class Series(NamedTuple):
    """One series of a metric at this moment.

    Attributes:
        metric: Which.
        labels: Values of its labels.
        numbers: One; of a histogram the count in each bucket, then the sum.
    """

    metric: Metric
    labels: tuple[str, ...]
    numbers: Sequence[float]


class Source(Protocol):
    """What an endpoint shows. Called from its threads."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """Which metrics there are, also those without a series now."""

    def series(self) -> Iterable[Series]:
        """Return every series."""

    def unhealthy(self) -> list[str]:
        """Return why this should be restarted; [] if it need not."""

    def unready(self) -> list[str]:
        """Return why it cannot do its work now; [] if it can."""


class Endpoint:
    """Listens from the moment it is made; answers from `start` on.

    Args:
        source: What to show.
        address: Where to listen.
        port: Likewise; 0: any that is free.
        names: How the user calls these two, for errors.

    Raises:
        SettingsError: The address or port cannot be had, or the extra is not installed.
    """

    def __init__(self, source: Source, address: str, port: int, names: tuple[str, str]) -> None:
        self._encode = _encoder(source, names[1])
        self._source = source
        self._server = _listen(address, port, names, self._answer)
        # A child that kept it open would keep the port from this process's successor.
        os.register_at_fork(after_in_child=self._server.socket.close)

    @property
    def url(self) -> str:
        """Where it is."""
        host, port = map(str, self._server.server_address[:2])
        return f"http://[{host}]:{port}" if self._server.address_family == socket.AF_INET6 else f"http://{host}:{port}"

    def start(self) -> None:
        """Answer, in threads of their own."""
        threads.start(self._server.serve_forever, "celery-kafka-metrics")

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        if path == "/metrics":
            content_type, text = self._encode(accept)
            return HTTPStatus.OK, content_type, text
        look = {"/healthz": self._source.unhealthy, "/readyz": self._source.unready}.get(path)
        if look is None:
            return HTTPStatus.NOT_FOUND, _PLAIN, b"there are /metrics, /healthz and /readyz\n"
        wrong = look()
        status = HTTPStatus.SERVICE_UNAVAILABLE if wrong else HTTPStatus.OK
        return status, _PLAIN, ("\n".join(wrong or ["ok"]) + "\n").encode()


_PLAIN: Final = "text/plain; charset=utf-8"


def _listen(
    address: str, port: int, names: tuple[str, str], answer: Callable[[str, str], tuple[HTTPStatus, str, bytes]]
) -> ThreadingTCPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_S

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            status, content_type, body = answer(path, self.headers.get("Accept", ""))
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - http.server's own naming

        def log_message(self, *_: object) -> None:
            """Say nothing: probes come every few seconds."""

    # Not http.server's own: it asks the resolver for this host's name first, which may take seconds.
    class Server(ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        allow_reuse_address = True

        def handle_error(self, *_: object) -> None:
            """Say nothing of a scraper that hangs up."""

    try:
        family, _, _, _, at = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        Server.address_family = family
        return Server((str(at[0]), port), Handler)
    except socket.gaierror as exc:
        raise SettingsError(
            names[0], f"{address!r} is no address: {exc.strerror}", "127.0.0.1, or 0.0.0.0 for every interface"
        ) from exc
    except OSError as exc:
        if exc.errno == errno.EADDRNOTAVAIL:
            raise SettingsError(
                names[0], f"{address!r} is no address of this machine", "127.0.0.1, or 0.0.0.0 for every interface"
            ) from exc
        raise SettingsError(
            names[1],
            f"cannot listen on port {port} of {address}: {exc.strerror}",
            "give every worker and `pipeline run` on one machine a port of its own (0: any that is free)",
        ) from exc


def _encoder(source: Source, name: str) -> Callable[[str], tuple[str, bytes]]:
    try:
        from prometheus_client import CollectorRegistry  # noqa: PLC0415 - an extra
        from prometheus_client.exposition import choose_encoder  # noqa: PLC0415
    except ImportError as exc:
        raise SettingsError(
            name, "needs the package prometheus_client, which is not installed",
            "pip install 'celery-kafka-backend[metrics]'",
        ) from exc  # fmt: skip
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(source))

    def encode(accept: str) -> tuple[str, bytes]:
        encoder, content_type = choose_encoder(accept)
        return content_type, encoder(registry)

    return encode


class _Collector:
    """A source as prometheus_client wants it."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Any]:
        from prometheus_client import core  # noqa: PLC0415 - an extra

        families: dict[str, Any] = {}
        for metric in self._source.metrics:
            make = {
                "counter": core.CounterMetricFamily,
                "gauge": core.GaugeMetricFamily,
                "histogram": core.HistogramMetricFamily,
            }[metric.kind]
            families[metric.name] = make(metric.name, metric.help, labels=metric.labels)
        for metric, labels, numbers in self._source.series():
            if metric.kind == "histogram":
                families[metric.name].add_metric(labels, *_cumulated(metric.buckets, numbers))
            else:
                families[metric.name].add_metric(labels, numbers[0])
        yield from families.values()


def _cumulated(bounds: Sequence[float], numbers: Sequence[float]) -> tuple[list[tuple[str, float]], float]:
    """Return (bound, count up to there) of each bucket, and the sum."""
    total = 0.0
    buckets = []
    for bound, count in zip([*map(str, bounds), "+Inf"], numbers, strict=False):
        total += count
        buckets.append((bound, total))
    return buckets, numbers[-1]
