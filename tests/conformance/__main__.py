"""``python -m tests.conformance``: run Celery's integration tests on one stand or more, and compare.

Exit code 1 if a test fails that is not listed in ``exceptions.txt``, if one is skipped that is not listed in
``skipped.txt``, or if the suite does not collect what its version has.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conformance import suite
from tests.conformance.stand import PEER, STANDS, Stand, standing
from tests.conformance.tally import Tally
from tests.services import native
from tests.services.errors import ServiceError

FILE_TIMEOUT_S = 2400
TIMED_OUT = -1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("stands", nargs="*", metavar="stand", help=f"from {', '.join(STANDS)}; all if none")
    parser.add_argument("--runs", type=int, default=1, help="how often in a row")
    parser.add_argument("--files", nargs="*", default=[], help="these test files only")
    parser.add_argument("-k", dest="expression", default="", help="pytest's")
    parser.add_argument("--logs", type=Path, help="a folder for reports and logs; by default they are thrown away")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.stands if name not in STANDS]
    if unknown:
        parser.error(f"no such stand: {', '.join(unknown)}; there are {', '.join(STANDS)}")
    whole = not arguments.files and not arguments.expression
    verdicts = []
    try:
        for name in arguments.stands or STANDS:
            for number in range(1, arguments.runs + 1):
                with _folder(arguments.logs, f"{name}-{number}") as folder:
                    tally = _run(name, folder, arguments)
                verdicts.append(tally.verdict(ours=name != PEER, whole=whole))
                print(f"{name}, run {number} of {arguments.runs}: {tally.summary()}", flush=True)
                print("".join(f"  {line}\n" for line in tally.raced() + verdicts[-1]), end="", flush=True)
    except ServiceError as error:
        print(error, file=sys.stderr)
        return 1
    return int(any(verdicts))


@contextlib.contextmanager
def _folder(logs: Path | None, name: str):
    with tempfile.TemporaryDirectory(prefix="ckb-conformance-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        if logs is not None:
            folder = logs.absolute() / name
            if folder.exists():
                raise ServiceError(f"{folder} is there already: --logs wants a new folder")
            folder.mkdir(parents=True)
        yield folder


def _run(name: str, folder: Path, arguments: argparse.Namespace) -> Tally:
    tally = Tally()
    with standing(name, folder) as stand:
        for file in arguments.files or suite.files(stand.folder):
            started = time.monotonic()
            report = folder / f"{file}.jsonl"
            code = _pytest(stand, file, report, folder / f"{file}.log", arguments.expression)
            one = tally.read(report, file, code)
            print(f"{name}: {file}: {one} ({time.monotonic() - started:.0f} s)", flush=True)
    return tally


def _pytest(stand: Stand, file: str, report: Path, log: Path, expression: str) -> int:
    plugins = ["-p", "celery.contrib.pytest", "-p", "tests.conformance.plugin"]
    command = [sys.executable, "-m", "pytest", *plugins, "-p", "no:cacheprovider", "-rA", "--tb=short"]
    if expression:
        command += ["-k", expression]
    with log.open("wb") as output:
        process = native.popen(
            [*command, str(suite.FOLDER / file)],
            output=output,
            env={**stand.environment, "CONFORMANCE_REPORT": str(report)},
            cwd=stand.folder,
        )
    try:
        return process.wait(FILE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        native.end(process)


if __name__ == "__main__":
    sys.exit(main())
