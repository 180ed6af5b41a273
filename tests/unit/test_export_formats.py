"""How exported events are written."""

from __future__ import annotations

import io
import json

import pytest

from celery_kafka_backend import codec
from celery_kafka_backend.cli.export_formats import cloudevents, jsonl


@pytest.mark.parametrize("write", [jsonl, cloudevents])
def test_an_event_that_somebody_recorded_on_several_lines_is_one_line(write):
    recorded = {"v": 1, "id": "e1", "kind": "success", "task": "t", "at": 1, "hlc": 1, "doc": {"result": [1, "a\nb"]}}
    value = json.dumps(recorded, indent=2).replace("\n", "\r\n").encode()
    stream = io.BytesIO()
    write([(codec.decode(value), value)] * 2, stream, "celery")
    lines = [json.loads(line) for line in stream.getvalue().decode().split("\n")[:-1]]
    assert [line.get("data", line) for line in lines] == [recorded] * 2
