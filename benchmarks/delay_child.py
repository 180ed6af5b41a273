"""``delay()`` again and again, on a memory broker, with a Kafka that is not there or without any recording."""

from __future__ import annotations

import json
import logging
import sys
import time

from celery import Celery


def main() -> None:
    given = json.loads(sys.argv[1])
    logging.disable(logging.CRITICAL)
    app = Celery("bench-delay", broker="memory://", backend=given["backend"], set_as_current=False)

    @app.task(name="bench.add")
    def add(x: int, y: int) -> None: ...

    app.backend  # noqa: B018 - makes the backend, which connects the signals
    for number in range(200):
        add.delay(number, 1)
    found = []
    for number in range(given["calls"]):
        # At a rate that a busy client has: a tight loop would measure how fast a queue that nobody empties fills up.
        time.sleep(0.0005)
        began = time.perf_counter()
        add.delay(number, 1)
        found.append(time.perf_counter() - began)
    print(json.dumps({"latencies_s": found}), flush=True)


if __name__ == "__main__":
    main()
