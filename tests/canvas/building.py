"""From a program, which is plain data, to Celery's canvas."""

from __future__ import annotations

import functools
import json
import operator


def built(spec):
    """Return the canvas of a spec, with all that is linked to it and stamped on it."""
    made = _KINDS[spec["kind"]](spec)
    if spec.get("by json"):
        made = _app().signature(json.loads(json.dumps(made)))
    if spec.get("clone"):
        made = made.clone()
    for one in spec.get("link", ()):
        made.link(built(one))
    for one in spec.get("link_error", ()):
        made.link_error(built(one))
    if spec.get("stamps"):
        made.stamp(**spec["stamps"])
    return made


def _app():
    from tests.canvas.app import app  # noqa: PLC0415 - it imports us

    return app


def _task(spec):
    return _app().signature(
        f"tests.canvas.app.{spec['name']}",
        args=tuple(spec.get("args", ())),
        kwargs=spec["kwargs"],
        immutable=spec.get("immutable", False),
        **spec.get("options", {}),
    )


def _chain(spec):
    from celery import chain  # noqa: PLC0415 - after the app

    parts = [built(part) for part in spec["parts"]]
    return functools.reduce(operator.or_, parts) if spec["by"] == "|" else chain(*parts)


def _group(spec):
    from celery import group  # noqa: PLC0415 - after the app

    return group(_several(spec, "parts"))


def _chord(spec):
    from celery import chord  # noqa: PLC0415 - after the app

    return chord(_several(spec, "header"), built(spec["body"]))


def _several(spec, name):
    parts = (built(part) for part in spec[name])
    return parts if spec.get("generator") else list(parts)


def _many(spec):
    task = _app().tasks["tests.canvas.app.both"]
    if spec["how"] == "starmap":
        return task.starmap(spec["items"])
    chunks = task.chunks([tuple(one) for one in spec["items"]], spec["size"])
    return chunks.group() if spec["how"] == "chunks" else chunks


_KINDS = {"task": _task, "chain": _chain, "group": _group, "chord": _chord, "many": _many}
