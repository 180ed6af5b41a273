"""An insight processor that says how long it took for so many partials, and ends; for ever if it is 0.

Seconds run from its first partial to the write of the view after the last one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from benchmarks.fold_child import _cpu_s
from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.processors import insight
from celery_kafka_backend.sinks.contract import StoreOptions


class _Timed(insight.Insight):
    wanted = 0
    seen = 0
    began = 0.0
    cpu_s = 0.0

    def count(self, value: bytes | None, written_s: float, partition: int) -> None:
        if not self.seen:
            self.began, self.cpu_s = time.monotonic(), _cpu_s()
        self.seen += 1
        super().count(value, written_s, partition)

    async def keep(self) -> None:
        at_end = self.wanted and self.seen >= self.wanted
        await super().keep()
        if at_end:
            report = {"partials": self.seen, "seconds": time.monotonic() - self.began, "cpu_s": _cpu_s() - self.cpu_s}
            print("\n" + json.dumps(report), flush=True)  # Faust has just shown the cursor
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    given: dict[str, Any] = json.loads(sys.argv[1])
    settings = settings_module.parse(given["backend"], given["overrides"])
    _Timed.wanted = given["partials"]
    insight.Insight = _Timed  # type: ignore[misc]
    insight.run(settings, settings.views[0], StoreOptions(namespace=settings.topic_prefix))


if __name__ == "__main__":
    main()
