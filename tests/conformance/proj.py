"""Celery's test tasks as a project, so that ``celery -A tests.conformance.proj pipeline run`` can serve them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from celery import Celery

# The name of the suite's own app: one log serves one app.
app = Celery("celery.tests", broker=os.environ["TEST_BROKER"], backend=os.environ["TEST_BACKEND"])
app.conf.update(
    result_extended=True,
    accept_content=["json"],
    include=["t.integration.tasks"],
    **json.loads(Path("integration-tests-config.json").read_text()),
)
