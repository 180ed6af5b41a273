"""The publisher under gevent and eventlet: whatever waits for Kafka, every other greenlet runs on."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from tests.patience import PATIENCE_S

PATCH = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}
TICKING = """
    import json
    import threading
    import time

    from celery_kafka_backend import settings
    from celery_kafka_backend.errors import PublishError
    from celery_kafka_backend.producer.publisher import Publisher, Record

    publisher = Publisher(settings.parse("kafka://127.0.0.1:9/?view=memory://"))

    def answered(wait):
        try:
            wait()
        except PublishError as exc:
            return type(exc).__name__
        return "fine"

    def ticks_during(wait):
        "Count how often this greenlet ran while another one waited for a Kafka that is not there."
        said = []
        waiting = threading.Thread(target=lambda: said.append(answered(wait)))
        waiting.start()
        ticks = 0
        while not said:
            time.sleep(0.01)
            ticks += 1
        return said[0], ticks

    delivery = publisher.publish(Record("t", b"k", b"v"))
    print(json.dumps({
        "partitions": ticks_during(lambda: publisher.partitions("t", 1.0)),
        "wait": ticks_during(lambda: delivery.wait(1.0)),
        "flush": ticks_during(lambda: publisher.flush(1.0)),
        "warm_up": ticks_during(lambda: (publisher.warm_up(), [t.join() for t in threading.enumerate() if "warm" in t.name])),
    }), flush=True)
"""


@pytest.fixture(scope="module")
def running():
    """Both at once: they spend their time waiting."""
    made = {
        library: subprocess.Popen(
            [sys.executable, "-c", f"{patch}\n{textwrap.dedent(TICKING)}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for library, patch in PATCH.items()
    }
    yield made
    for process in made.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("library", sorted(PATCH))
def test_what_waits_for_kafka_stops_no_greenlet(running, library):
    said, complaints = running[library].communicate(timeout=PATIENCE_S)
    assert running[library].returncode == 0, complaints
    found = json.loads(said)
    assert {name: outcome for name, (outcome, _) in found.items()} == {
        "partitions": "NotAcknowledged",
        "wait": "NotAcknowledged",
        "flush": "fine",
        "warm_up": "fine",
    }
    # Blocked, it would run once or twice; free, about a hundred times a second.
    assert all(ticks > 10 for _, ticks in found.values()), found
