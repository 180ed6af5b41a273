"""Folding the log into Elasticsearch: see `stores`."""

from __future__ import annotations

from functools import partial

from benchmarks import stores

run = partial(stores.fold_into, "elasticsearch")
