"""Runs a command of `celery pipeline` in this process, and says how long it took and how much memory it ever had."""

from __future__ import annotations

import json
import resource
import sys
import time

from celery import Celery
from celery.bin.base import CLIContext

from celery_kafka_backend.cli import pipeline
from celery_kafka_backend.cli.exits import Exit


def main() -> None:
    given = json.loads(sys.argv[1])
    app = Celery("bench", broker="memory://", backend=given["backend"], set_as_current=False)
    began = time.monotonic()
    code = pipeline.main(given["words"], obj=CLIContext(app, no_color=True, workdir=None), standalone_mode=False)
    spent = time.monotonic() - began
    if code not in (Exit.OK, Exit.NOT_FOUND):
        sys.exit(f"ended with {code}")
    print(json.dumps({"seconds": spent, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
