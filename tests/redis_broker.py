"""How a Redis broker is to behave under workers that are killed."""

from __future__ import annotations

from typing import Any, Final

RESTORES_SOON: Final[dict[str, Any]] = {
    "polling_interval": 0.02,
    "visibility_timeout": 15,
    "unacked_restore_interval": 3,
    "unacked_restore_throttle": 1,
    "unacked_mutex_expire": 10,
}
"""``broker_transport_options`` by which what a killed worker held comes back soon; by default that takes an hour."""
