"""Tasks that travel through files: a worker finds whole messages only."""

from __future__ import annotations

from queue import Empty
from types import SimpleNamespace

import pytest
from kombu import Connection

from celery_kafka_backend.embedded_transport import Transport


@pytest.fixture
def channel(tmp_path):
    options = {"data_folder_in": str(tmp_path), "data_folder_out": str(tmp_path), "control_folder": str(tmp_path / "c")}
    with Connection("filesystem://", transport=Transport, transport_options=options) as connection:
        yield connection.channel()


def test_nobody_finds_a_message_before_it_is_whole(channel, monkeypatch):
    seen = []

    def named(unfinished, whole):
        with pytest.raises(Empty):
            channel._get("celery")
        seen.append(whole)
        unfinished.rename(whole)

    monkeypatch.setattr("celery_kafka_backend.embedded_transport.os", SimpleNamespace(replace=named))
    for number in range(3):
        channel._put("celery", {"number": number})
        assert channel._get("celery") == {"number": number}
    assert len(seen) == 3


def test_messages_are_found_in_the_order_in_which_they_were_sent(channel):
    for number in range(20):
        channel._put("celery", {"number": number})
    assert [channel._get("celery")["number"] for _ in range(20)] == list(range(20))
