"""Folding the log into MongoDB: see `stores`."""

from __future__ import annotations

from functools import partial

from benchmarks import stores

run = partial(stores.fold_into, "mongodb")
