"""The one question that we ask a broker without a client library: which brokers do you see?

An open port is not yet a broker that works, and logs differ between a process and a container, so we send a Metadata
request (version 4: the layout is in Kafka's protocol guide, "Metadata API").
"""

from __future__ import annotations

import socket
import struct

from tests.services.ports import HOST

METADATA, VERSION, CORRELATION_ID, NO_TOPICS, NO_AUTO_CREATE = 3, 4, 1, 0, False
TIMEOUT_S = 10.0
REQUEST = struct.pack(">hhihi?", METADATA, VERSION, CORRELATION_ID, -1, NO_TOPICS, NO_AUTO_CREATE)


def live_brokers(port: int) -> set[int]:
    """The ids of the live brokers that the broker on ``port`` knows; empty while it does not answer."""
    try:
        with socket.create_connection((HOST, port), timeout=TIMEOUT_S) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.sendall(struct.pack(">i", len(REQUEST)) + REQUEST)
            with connection.makefile("rb") as stream:
                (size,) = struct.unpack(">i", stream.read(4))
                return _broker_ids(stream.read(size))
    except (OSError, struct.error):
        return set()


def _broker_ids(response: bytes) -> set[int]:
    ids = set()
    count, at = struct.unpack_from(">i", response, 8)[0], 12  # after the correlation id and the throttle time
    for _ in range(count):
        broker_id, host_size = struct.unpack_from(">ih", response, at)
        at += 6 + host_size + 4  # the port
        (rack_size,) = struct.unpack_from(">h", response, at)
        at += 2 + max(rack_size, 0)  # -1 is "no rack"
        ids.add(broker_id)
    return ids
