"""The body of a materializer's process with everything that `pipeline run` gives it: ``python -m … BOOTSTRAP PREFIX VIEW``."""

from __future__ import annotations

import logging
import sys

from celery_kafka_backend.processors.materializer import materialize
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.integration.materializing import settings

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    bootstrap, prefix, view = sys.argv[1:]
    materialize(settings(bootstrap, prefix, view), view, StoreOptions(namespace=prefix))
