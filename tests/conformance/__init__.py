"""Celery's own integration tests, run against this result backend and against Celery's Redis backend.

``python -m tests.conformance`` runs them; docs/conformance.md says how, and what came out. Their source is fetched,
never committed; what stops them from running on another backend than Redis is lifted from outside (`plugin`).
"""
