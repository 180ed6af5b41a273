"""Free ports on the loopback interface."""

from __future__ import annotations

import random
import socket

HOST = "127.0.0.1"
# Below the range from which the kernel takes ports for outgoing connections (32768 up): while a broker is dead,
# a client's own reconnect could otherwise be given the broker's port, and the restart would fail.
FIRST, LAST = 20_000, 32_000


def free(count: int) -> list[int]:
    """``count`` different ports that nobody listens on. Random, so that two runs hardly ever agree."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(FIRST, LAST), LAST - FIRST):
        if len(found) == count:
            break
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            found.append(port)
    return found
