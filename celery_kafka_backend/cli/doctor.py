"""``pipeline doctor``: a line per check and one verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from celery_kafka_backend.cli.broker import Broker
from celery_kafka_backend.cli.checks import FAIL, OK, SKIP, WARN, examine
from celery_kafka_backend.cli.command import Command
from celery_kafka_backend.cli.context import pipeline_of
from celery_kafka_backend.cli.exits import EXAMPLE, Exit
from celery_kafka_backend.cli.output import print_json
from celery_kafka_backend.rights import PROCESSOR, ROLES

if TYPE_CHECKING:
    from celery_kafka_backend.cli.checks import Finding

_COLOURS: Final = {OK: "green", WARN: "yellow", FAIL: "red", SKIP: None}


@click.command("doctor", cls=Command, short_help="Look at everything, give one verdict.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--strict", is_flag=True, help="Exit with 1 also if there are only warnings.")
@click.option(
    "--role", type=click.Choice(ROLES), default=PROCESSOR, help="Whose rights these credentials are to have.",
)  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0.1), default=5.0, help="Seconds that Kafka may take to answer.")
@click.pass_context
def command(ctx: click.Context, as_json: bool, strict: bool, role: str, timeout: float) -> Exit:
    r"""Look at everything, and give one verdict.

    Versions, delivery settings, Kafka, topics, rights, whose topics they are, clocks, dead letters, processors, and each
    view. Changes nothing (a view's store makes its tables if they are missing). Exits with the code of the first failure.

    \b
    Examples:
      celery -A proj pipeline doctor
      celery -A proj pipeline doctor --role worker       with a worker's credentials
      celery -A proj pipeline doctor --json | jq -r '.findings[] | select(.level != "ok") | .text'
    """
    pipeline = pipeline_of(ctx)

    def typed(finding: Finding) -> Finding:
        return finding._replace(remedy=finding.remedy.replace(EXAMPLE, pipeline.command))

    broker = Broker(pipeline.settings, timeout)
    found: list[Finding] = []
    try:
        for finding in map(typed, examine(pipeline, broker, role)):
            found.append(finding)
            if not as_json:
                _say(finding)
    finally:
        broker.close()
    failed = [finding for finding in found if finding.level == FAIL]
    warned = [finding for finding in found if finding.level == WARN]
    code = failed[0].code if failed else Exit.UNEXPECTED if warned and strict else Exit.OK
    verdict = _verdict(failed, warned)
    if as_json:
        plain = [{**finding._asdict(), "code": int(finding.code)} for finding in found]
        shown = {"verdict": verdict, "exit_code": int(code), "findings": plain}
        print_json(shown)
    else:
        click.secho(f"\n{verdict}", bold=True, fg="red" if failed else "yellow" if warned else "green")
    return code


def _say(finding: Finding) -> None:
    click.secho(f"{finding.level:<4} ", fg=_COLOURS[finding.level], nl=False)
    click.echo(f" {finding.subject:<20}  {finding.text}")
    if finding.remedy:
        click.echo(f"{'':28}-> {finding.remedy}")


def _verdict(failed: list[Finding], warned: list[Finding]) -> str:
    if failed:
        return f"Not well: {', '.join(dict.fromkeys(finding.subject for finding in failed))}."
    if warned:
        return f"Well, with {len(warned)} warning{'s' * (len(warned) != 1)}."
    return "All is well."
