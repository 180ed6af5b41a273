"""The chord processor as `pipeline run` starts it, without the supervisor: until SIGTERM."""

from __future__ import annotations

from celery_kafka_backend.processors.hosting import decide_chords

if __name__ == "__main__":
    decide_chords("warning", "benchmarks.celery_app")
