"""A Redis with a replica, and a sentinel that makes the replica the primary when the first one is gone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tests.services import ports, redis, scratch
from tests.services.native import Process
from tests.services.server import OneServer

if TYPE_CHECKING:
    from tests.services.redis import RedisServer

MASTER = "ckb"
DOWN_AFTER_MS = 1_000

CONFIG = """\
port {port}
bind {host}
dir {folder}
sentinel monitor {master} {host} {primary} 1
sentinel down-after-milliseconds {master} {down_after_ms}
sentinel failover-timeout {master} 3000
"""


class Sentinel(OneServer):
    """A running sentinel, and the two servers that it watches."""

    primary: RedisServer
    replica: RedisServer

    @property
    def url(self) -> str:
        """As Celery writes it; the second sentinel of the two is always away."""
        return f"sentinel://{ports.HOST}:1/0;sentinel://{ports.HOST}:{self.port}/0"

    def stop(self) -> None:
        """End all three."""
        super().stop()
        self.primary.stop()
        self.replica.stop()


def start() -> Sentinel:
    """Start the three.

    Raises:
        ServiceError: One could not be installed, or did not start.
    """
    primary = redis.start()
    replica = redis.start(replicaof=f"{ports.HOST} {primary.port}", repl_diskless_sync_delay="0")
    folder = scratch.folder("sentinel")
    (port,) = ports.free(1)
    config = folder / "sentinel.conf"  # the sentinel writes to it
    config.write_text(
        CONFIG.format(
            port=port, host=ports.HOST, folder=folder, master=MASTER, primary=primary.port, down_after_ms=DOWN_AFTER_MS
        )
    )
    node = Process(
        name="Sentinel",
        port=port,
        command=[str(redis.executable()), str(config), "--sentinel"],
        log=folder / "sentinel.log",
        ready=functools.partial(redis.answers, port),
        start_timeout_s=redis.START_TIMEOUT_S,
    )
    made = Sentinel(node, folder)
    made.primary, made.replica = primary, replica
    node.launch()
    node.wait()
    return made
