"""A web application that sends tasks and reads their results; one was sent already before the server forked."""

from __future__ import annotations

import json
import os

import fleet_app

BEFORE_THE_FORK = fleet_app.add.delay(20, 22)


def application(environ, start_response):
    """``/run``: send a task and return its result; ``/send``: only send; ``/before``: read the one from the master."""
    path = environ["PATH_INFO"]
    if path == "/run":
        result = fleet_app.add.delay(1, 2)
        said = {"id": result.id, "result": result.get(timeout=180)}
    elif path == "/send":
        said = {"id": fleet_app.add.delay(1, 2).id}
    else:
        said = {"id": BEFORE_THE_FORK.id, "result": BEFORE_THE_FORK.get(timeout=180)}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"pid": os.getpid(), **said}).encode()]
