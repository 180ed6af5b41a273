"""From a decision to what Celery does with it: the body's message, or its failure and errbacks.

Everything here needs the user's app (serializers, routing, errbacks). It knows nothing of Kafka, and
waits for nothing: what may succeed later is a `TRANSIENT` error, and the caller's to try again.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from celery import states
from celery._state import _task_stack
from celery.app.task import Context
from celery.canvas import Signature, maybe_signature
from celery.exceptions import BackendStoreError, ChordError
from celery.utils.functional import maybe_list
from kombu.exceptions import OperationalError
from kombu.serialization import loads, prepare_accept_content

from celery_kafka_backend.chord_records import FAILURE, SUCCESS, Decided, Declared, Part
from celery_kafka_backend.errors import PipelineError, PublishError
from celery_kafka_backend.producer import headers
from celery_kafka_backend.producer.members import errbacks, fingerprint, last_tasks
from celery_kafka_backend.producer.recorder import workflow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from celery import Celery

logger = logging.getLogger(__name__)

TRANSIENT: Final = (OperationalError, OSError, BackendStoreError, PublishError)
"""The broker or Kafka is away: the same call again may succeed. (Not every transport of kombu
translates what the operating system says.)"""


NO_RUN: Final = 0
"""No run is so early: what is stored under it counts less than all that is said of a real one."""


class BadBody(PipelineError):  # noqa: N818 - named as in `errors`
    """Raised when what was declared as a chord's body is none that this app can read."""


def carry_out(app: Celery, declared: Declared, decided: Decided, parts: Sequence[Part | None]) -> str:
    """Send the body with the members' results, or fail it; return the outcome.

    Args:
        app: The user's app.
        declared: The chord's declaration.
        decided: The decision.
        parts: Its members in the order in which the body gets them, None where the part is of no
            use: all but the last one and the failed one, if the body takes no results or fails.

    Raises:
        TRANSIENT: Nothing, or not everything of a group body, was sent.
    """
    last = parts[decided.last] if parts else None
    try:
        callback = signature(app, declared)
    except BadBody as exc:
        logger.exception("Chord %r: cannot read its body", declared.group)
        return _fail(app, _stand_in(app, declared), decided, _chord_error(str(exc), exc.__cause__))
    with _within(app, declared, last):
        try:
            args = () if declared.immutable and decided.outcome == SUCCESS else (join(app, declared, decided, parts),)
        except ChordError as exc:
            return _fail(app, callback, decided, exc, _told(decided, parts))
        except Exception as exc:
            logger.exception("Chord %r: cannot join its results", declared.group)
            return _fail(app, callback, decided, _chord_error(f"Join error: {exc!r}", exc))
        try:
            _mark(callback, decided.body_run)
            callback.apply_async(args)
        except TRANSIENT:
            raise
        except Exception as exc:
            # As Celery: a route, a queue, an argument that no message can hold. Never better later.
            logger.exception("Chord %r: cannot send its callback", declared.group)
            return _fail(app, callback, decided, _chord_error(f"Callback error: {exc!r}", exc))
    return SUCCESS


def _told(decided: Decided, parts: Sequence[Part | None]) -> Sequence[str]:
    failed = next((part for part in parts if part is not None and part.task == decided.failed), None)
    return failed.told if failed is not None else ()


def give_up(app: Celery, declared: Declared, decided: Decided, why: str) -> str:
    """Fail a body whose results are lost, or too much; return the outcome."""
    with _within(app, declared, None):
        try:
            callback = signature(app, declared)
        except BadBody:
            callback = _stand_in(app, declared)
        return _fail(app, callback, decided, ChordError(f"Join error: {why}"))


def refuse(app: Celery, declared: Declared, why: str) -> None:
    """Store that a body will not be sent, below everything that a run of it ever says.

    So a forged declaration fails nobody's task, and a chord whose secret was only wrong for a while shows what it does.
    """
    with _of_run(app.backend, _stand_in(app, declared), NO_RUN):
        app.backend.store_result(declared.body_task_id, ChordError(f"Chord {declared.group}: {why}"), states.FAILURE)


def _stand_in(app: Celery, declared: Declared) -> Signature:
    """Return a signature for a body that cannot be read: its id and name. Its errbacks nobody knows."""
    return Signature(declared.body_name or "?", app=app, options={"task_id": declared.body_task_id})


def signature(app: Celery, declared: Declared) -> Signature:
    """Return the body as it was declared, ready to be applied.

    Raises:
        BadBody: It cannot be decoded, or is no signature.
    """
    try:
        decoded = loads(
            declared.body,
            declared.content_type,
            declared.content_encoding,
            accept=prepare_accept_content(app.conf.accept_content),
        )
        callback = maybe_signature(decoded, app=app)
    except Exception as exc:
        raise BadBody(f"the body of the chord cannot be read: {exc!r}") from exc
    if not isinstance(callback, Signature):
        raise BadBody(f"the body of the chord is no signature, but a {type(decoded).__name__}")
    callback.options.pop(headers.GENERATION, None)
    callback.options.setdefault("task_id", declared.body_task_id)
    return callback


def first_ids(callback: Signature) -> list[str]:
    """Return the ids of the messages that applying a body sends first; empty if nobody can know.

    A chain's own id is its last task's, a group's is no task's at all.
    """
    ids: list[Any] = [(task.get("options") or {}).get("task_id") for task in _first_tasks(callback)]
    return ids if all(ids) else []


def _first_tasks(callback: Any) -> list[Any]:
    """Return the tasks, none of them a canvas, whose messages applying a body sends first."""
    kind = callback.get("subtask_type")
    kwargs = callback.get("kwargs") or {}
    inside: Any
    if kind == "chain":
        inside = list(kwargs.get("tasks") or ())[:1]
    elif kind == "group":
        inside = kwargs.get("tasks")
    elif kind == "chord":
        header = kwargs.get("header")
        inside = [header] if isinstance(header, dict) else header
    else:
        return [callback]
    return [first for one in inside for first in _first_tasks(one)] if isinstance(inside, (list, tuple)) else []


# -- results -----------------------------------------------------------------------------------


def join(app: Celery, declared: Declared, decided: Decided, parts: Sequence[Part | None]) -> list[Any]:
    """Return the members' results as the body's argument.

    Raises:
        ChordError: The chord failed; says so of its first failed member, as Celery does, or of what ended it.
    """
    backend = app.backend
    if decided.outcome == FAILURE and decided.why:
        raise ChordError(f"Chord {declared.group} was {decided.why}")
    if decided.outcome == FAILURE:
        failed = next(part for part in parts if part is not None and part.task == decided.failed and not part.succeeded)
        cause = _exception(backend, failed)
        what = repr(cause) if cause is not None else failed.exception or failed.state
        raise _chord_error(f"Dependency {failed.task} raised {what}", cause)
    present = [part for part in parts if part is not None]
    if declared.group_result is None:
        return [_value(backend, part) for part in present]
    shape = loads(
        declared.group_result,
        declared.content_type,
        declared.content_encoding,
        accept=prepare_accept_content(app.conf.accept_content),
    )
    values = {part.task: _value(backend, part) for part in present}
    nested = _nested(_pruned(shape, values) if decided.why else shape, values)
    return nested if isinstance(nested, list) else [nested]


def _nested(shape: Any, values: dict[str, Any]) -> Any:
    """Put values into the shape of a ``GroupResult.as_tuple()``: groups inside the header stay lists."""
    children = shape[1]
    if children is None:
        return values[_id_of(shape)]
    return [_nested(child, values) for child in children]


def _pruned(shape: Any, values: dict[str, Any]) -> Any:
    """Return the shape without the members of which there is no result."""
    head, children = shape
    if children is None:
        return shape
    there = [child for child in children if child[1] is not None or _id_of(child) in values]
    return [head, [_pruned(child, values) for child in there]]


def _id_of(leaf: Any) -> str:
    head = leaf[0]
    return str(head[0] if isinstance(head, (list, tuple)) else head)


def _value(backend: Any, part: Part) -> Any:
    return _decoded(backend, part) if part.result else None


def _exception(backend: Any, part: Part) -> BaseException | None:
    try:
        found = backend.exception_to_python(_decoded(backend, part)) if part.result else None
    except Exception:
        logger.warning("cannot decode the exception of task %s", part.task, exc_info=True)
        return None
    return found if isinstance(found, BaseException) else None


def _decoded(backend: Any, part: Part) -> Any:
    return loads(
        part.result,
        part.content_type or backend.content_type,
        part.content_encoding or backend.content_encoding,
        accept=backend.accept,
    )


def _chord_error(message: str, cause: BaseException | None) -> ChordError:
    error = ChordError(message)
    if isinstance(cause, Exception):
        error.__cause__ = cause
    return error


# -- sending -----------------------------------------------------------------------------------


def _mark(callback: Signature, run: int) -> None:
    """Say which run a body belongs to, beside the headers of its own that each of its tasks may have."""
    for task in _first_tasks(callback):
        options = task.setdefault("options", {})
        options["headers"] = {**(options.get("headers") or {}), headers.RUN: run}


@contextmanager
def _within(app: Celery, declared: Declared, last: Part | None) -> Iterator[None]:
    """Pretend to be the member that completed the chord: with Celery's other backends it sends the body.

    So the body, whatever canvas it is, inherits root, parent and priority by Celery's own rules.
    """
    if last is not None:
        who = {"id": last.task, "root_id": last.root, "parent_id": last.parent}
        priority, stamps = last.priority, last.stamps
    else:
        who = {"id": declared.parent, "root_id": declared.root, "parent_id": None}
        priority, stamps = declared.priority, declared.stamps
    if not who["id"]:
        yield
        return
    stamps = dict(stamps or {})
    task = app.tasks["celery.accumulate"]
    task.push_request(
        **who,
        delivery_info={"priority": priority},
        stamped_headers=stamps.pop("stamped_headers", None),
        stamps=stamps,
        children=[],
        called_directly=False,
    )
    _task_stack.push(task)
    try:
        yield
    finally:
        _task_stack.pop()
        task.pop_request()


def _fail(app: Celery, callback: Signature, decided: Decided, error: ChordError, told: Sequence[str] = ()) -> str:
    """Do what Celery does for a failed chord: errbacks, body FAILURE, the rest of its chain."""
    backend = app.backend
    ended = innermost(callback)
    with _of_run(backend, ended, decided.body_run):
        _tell_outer(app, ended, error, told)
        _without(ended, set(told))
        try:
            raise error
        except ChordError as exc:
            backend.chord_error_from_stack(ended, exc)
    return FAILURE


@contextmanager
def _of_run(backend: Any, callback: Signature, run: int) -> Iterator[None]:
    """Let what is stored for a body belong to its run, name and workflow: it was never sent, so that no request says so."""
    recorder = getattr(backend, "recorder", None)
    if recorder is None:
        yield
        return
    known = {"name": callback.task, **workflow()}
    with ExitStack() as hinted:
        for task_id in {callback.id, *(task["options"].get("task_id") for task in last_tasks(callback))}:
            hinted.enter_context(recorder.hinting(task_id, run, known if task_id == callback.id else {}))
        yield


def innermost(callback: Signature) -> Signature:
    """Return whose end a body's end is: the body of a chord, for a chord; with what hears of both.

    Celery stores the failure of such a body under the id of its header, where nobody looks.
    """
    while callback.get("subtask_type") == "chord" and callback.body is not None:
        outer, callback = callback.options, callback.body
        for errback in maybe_list(outer.get("link_error")) or ():
            callback.append_to_list_option("link_error", errback)
        if outer.get("chain"):
            callback.options.setdefault("chain", outer["chain"])
    return callback


def _tell_outer(app: Celery, callback: Signature, error: ChordError, told: Sequence[str]) -> None:
    """Send the parts of a body that is a member of another chord. Celery forgets them, and that chord hangs."""
    heard = sorted({*told, *map(fingerprint, errbacks(callback))})
    for task in last_tasks(callback):
        options = task.get("options") or {}
        if options.get("chord") and options.get("group_id"):
            member = Context(options, id=options.get("task_id"), group=options["group_id"], told=heard)
            app.backend.on_chord_part_return(member, "FAILURE", error)


def _without(callback: Any, told: set[str]) -> None:
    """Take away the errbacks that have heard of it: ``chord.link_error`` adds one to every chord in the header, too."""
    options = callback.get("options") or {}
    if told and options.get("link_error"):
        options["link_error"] = [one for one in maybe_list(options["link_error"]) if fingerprint(one) not in told]
    if callback.get("subtask_type") == "group":
        for task in callback["kwargs"]["tasks"]:
            _without(task, told)
