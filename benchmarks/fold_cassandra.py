"""Folding the log into Cassandra: see `stores`."""

from __future__ import annotations

from functools import partial

from benchmarks import stores

run = partial(stores.fold_into, "cassandra")
