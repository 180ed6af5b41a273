"""The write side of a worker: one producer handle per process, and Celery's signals turned into events."""
