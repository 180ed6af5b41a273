"""An event-sourced result pipeline for Celery on Kafka.

A user's worker needs only ``result_backend = "kafka://…"``; see README.md.
"""

__version__ = "0.1.0"
