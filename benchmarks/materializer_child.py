"""A materializer as `pipeline run` starts it, without the supervisor: until SIGTERM."""

from __future__ import annotations

import json
import logging
import sys

from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.processors.materializer import materialize
from celery_kafka_backend.sinks.contract import StoreOptions


def main() -> None:
    given = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.WARNING)
    settings = settings_module.parse(given["backend"], given["overrides"])
    materialize(settings, settings.views[0], StoreOptions(namespace=settings.topic_prefix))


if __name__ == "__main__":
    main()
