"""``celery -A proj pipeline …``: what an operator, an auditor and a migrator type.

One module per command; this one only names them, because Celery imports it with every one of its own commands. That is
how `celery report`, which makes no backend, comes to keep our secrets.
"""

from __future__ import annotations

from typing import Final

import click

from celery_kafka_backend.cli.command import Group
from celery_kafka_backend.reports import keep_secrets

_COMMANDS: Final = (
    "run",
    "init",
    "status",
    "top",
    "doctor",
    "history",
    "search",
    "export",
    "findings",
    "chord",
    "forget",
    "dead-letters",
    "rerun",
    "import",
    "replay",
    "verify",
    "cutover",
    "shadow",
    "size",
    "spool",
    "claims",
)


def _module(name: str) -> str:
    return f"{__name__}.{'import_stock' if name == 'import' else name.replace('-', '_')}"  # `import` names no module


keep_secrets()


@click.group(cls=Group, lazy={name: _module(name) for name in _COMMANDS})
def pipeline() -> None:
    r"""Run and look after the result pipeline: Kafka, its processors and their views.

    \b
    The two that everybody needs:
      celery -A proj pipeline init            create the topics
      celery -A proj pipeline run             fold events into the views, fire chords
    \b
    Then:
      celery -A proj pipeline status          who folds, and how far behind
      celery -A proj pipeline top             rates, failures, waiting and run times, live
      celery -A proj pipeline doctor          one verdict on everything
      celery -A proj pipeline history ID      what happened to a task, its workflow, its group; now or then
      celery -A proj pipeline search          which tasks failed, were slow, were tried again …
      celery -A proj pipeline findings        lost tasks, contradictions, stuck chords
      celery -A proj pipeline chord GROUP_ID  what a chord waits for, and how to end or repair it
      celery -A proj pipeline dead-letters    what could not be folded: list, show, requeue, drop

    Every option has an environment variable, CELERY_PIPELINE_<COMMAND>_<OPTION>, which its help names. Global
    options of Celery (-A, --workdir, --result-backend …) stand before "pipeline".
    """
