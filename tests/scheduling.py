"""Which tests run in one process of pytest-xdist's. Every process starts its own servers when its tests ask for them.

`--dist loadfile` keeps a file together. The files that need the large stores are kept together too: they would start
each of these stores once per process, which costs 40 s of CPU and 1.3 GB, and saves nothing.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadFileScheduling

LARGE_STORES = (
    "tests/contract/",
    *(f"tests/integration/test_{name}.py" for name in ("cassandra", "elasticsearch", "refused", "two_views")),
)
"""They ask for Elasticsearch or Cassandra."""


class ByServers(LoadFileScheduling):
    """Work in units of a file, or of all files with the large stores."""

    def _split_scope(self, nodeid: str) -> str:
        return "large stores" if nodeid.startswith(LARGE_STORES) else str(super()._split_scope(nodeid))


def chosen(config: Any, log: Any) -> ByServers | None:
    """Return it in the place of `--dist loadfile`, as ``pytest_xdist_make_scheduler`` wants it."""
    return ByServers(config, log) if config.getoption("dist") == "loadfile" else None
