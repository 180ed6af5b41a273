"""The servers that there are, by the name of their fixture."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tests.services import cassandra, elasticsearch, kafka, mongodb, postgresql, redis
from tests.services.errors import Missing, ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable


class Server(Protocol):
    """What every started server can do."""

    def stop(self) -> None:
        """End it and throw its data away."""


class Service(NamedTuple):
    """How to come by one server."""

    missing: Callable[[], list[Missing]]
    install: Callable[[], None]
    start: Callable[[], Server]
    address: Callable[..., str]

    def started(self) -> Server:
        """Start it, after a look whether that can work: "no Java" tells more than a failed command.

        Raises:
            ServiceError: Something is missing, or it did not start.
        """
        missing = self.missing()
        if missing:
            raise ServiceError("; ".join(map(str, missing)))
        return self.start()


SERVICES = {
    "cassandra": Service(cassandra.missing, cassandra.install, cassandra.start, lambda server: server.address),
    "elasticsearch": Service(
        elasticsearch.missing, elasticsearch.install, elasticsearch.start, lambda server: server.url
    ),
    "kafka": Service(kafka.missing, kafka.install, kafka.start, lambda cluster: cluster.bootstrap),
    "kafka3": Service(
        kafka.missing, kafka.install, functools.partial(kafka.start, 3), lambda cluster: cluster.bootstrap
    ),
    "mongodb": Service(mongodb.missing, mongodb.install, mongodb.start, lambda server: server.url),
    "postgresql": Service(postgresql.missing, postgresql.install, postgresql.start, lambda server: server.url),
    "redis": Service(redis.missing, redis.install, redis.start, lambda server: server.url),
}
