"""What a test does about a server that is not there: skip, or fail where ``REQUIRE_SERVICES`` names it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from tests.services.errors import ServiceError


def absent(name: str, error: ServiceError) -> NoReturn:
    """Skip the test that asked for a server, or fail it."""
    required = os.environ.get("REQUIRE_SERVICES", "").split(",")
    if "all" in required or name in required:
        pytest.fail(f"{name} is required (REQUIRE_SERVICES): {error}", pytrace=False)
    pytest.skip(f"{name}: {error}")
