"""What a user's ``oauth_cb`` looks like; it notes who asked, so that a test can see it asked again."""

from __future__ import annotations

import os
from pathlib import Path

from tests.integration.locked_kafka import token

LIFETIME_S = 4.0


def _token(role):
    with Path(os.environ["FLEET_TOKENS"]).open("a") as noted:
        noted.write(f"{role} {os.getpid()}\n")
    return token(f"celery-{role}", LIFETIME_S)


def client(_config):
    return _token("client")


def worker(_config):
    return _token("worker")


def processor(_config):
    return _token("processor")


def operator(_config):
    return _token("operator")


def broken(_config):
    raise RuntimeError("the identity provider is away")
