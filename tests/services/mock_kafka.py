"""librdkafka's mock broker in this process, where a new consumer group starts at once.

`celery_kafka_backend.embedded.EmbeddedKafka` is the same broker as users have it. It waits 3 s for more members of
each new group, which Python's binding cannot change; in tests, whose groups mostly have one member, that was half of
their time. This one is made by librdkafka's own C functions. It keeps nothing either.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

from confluent_kafka import KafkaError, cimpl

from tests.services.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterator

FIRST_JOIN_MS = 50
PRODUCER = 0  # the kind of handle; a mock cluster takes either
PRODUCE = 0  # the request, in Kafka's protocol
BROKER = 1


class MockBroker(NamedTuple):
    """A broker that does as it is told."""

    library: ctypes.CDLL
    cluster: ctypes.c_void_p
    address: str

    def answer_after(self, ms: int) -> None:
        """Let every answer take so long from now on."""
        self.library.rd_kafka_mock_broker_set_rtt(self.cluster, BROKER, ms)

    def refuse_records(self) -> None:
        """Answer the next request that brings records as a broker that does not lead their partition (yet)."""
        error = ctypes.c_int(KafkaError.NOT_LEADER_FOR_PARTITION)
        push = self.library.rd_kafka_mock_push_request_errors
        push(self.cluster, ctypes.c_int16(PRODUCE), ctypes.c_size_t(1), error)


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Run one broker; yields its address.

    Raises:
        ServiceError: librdkafka made none.
    """
    with broker() as one:
        yield one.address


@contextlib.contextmanager
def broker() -> Iterator[MockBroker]:
    """Run one broker that can be told what to answer.

    Raises:
        ServiceError: librdkafka made none.
    """
    # The binding's module is linked with librdkafka, wherever its wheel keeps that.
    library = ctypes.CDLL(cimpl.__file__)
    handle = _call(library.rd_kafka_new, PRODUCER, _quiet(library), None, ctypes.c_size_t(0))
    try:
        cluster = _call(library.rd_kafka_mock_cluster_new, handle, 1)
        try:
            library.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, ctypes.c_int32(FIRST_JOIN_MS))
            address = library.rd_kafka_mock_cluster_bootstraps
            address.restype = ctypes.c_char_p
            yield MockBroker(library, cluster, address(cluster).decode())
        finally:
            library.rd_kafka_mock_cluster_destroy(cluster)
    finally:
        library.rd_kafka_destroy(handle)


def _quiet(library: ctypes.CDLL) -> ctypes.c_void_p:
    """Return a configuration whose handle logs errors only."""
    conf = _call(library.rd_kafka_conf_new)
    library.rd_kafka_conf_set(conf, b"log_level", b"3", None, ctypes.c_size_t(0))
    return conf


def _call(function: Any, *arguments: Any) -> ctypes.c_void_p:
    """Call what returns a pointer."""
    function.restype = ctypes.c_void_p
    found = function(*arguments)
    if not found:
        raise ServiceError(f"{function.__name__} of librdkafka failed")
    return ctypes.c_void_p(found)
