"""``python -m tests.faults``: hurt everything for a while, by a seed, and check that nothing was lost.

Exit code 1 if anything was; the folder with journals and logs is then kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import checker, nemesis
from tests.faults.world import World

SHOWN = 10
"""Violations per check that are printed; all are in the folder."""


def main() -> int:
    """Run the seeds, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first round (default: 1)")
    parser.add_argument("--rounds", type=int, default=1, help="how many seeds, from that one on (default: 1)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a round (default: 60)")
    parser.add_argument("--backend", choices=("kafka", "redis"), default="kafka", help="redis: Celery's own")
    parser.add_argument("--no-spool", dest="spool", action="store_false", help="workers keep nothing on their disks")
    parser.add_argument(
        "--pool", default="prefork", help="of the workers; only prefork's children can be hurt (default: prefork)"
    )
    parser.add_argument("--plan", action="store_true", help="print the schedule and stop")
    parser.add_argument("--keep", action="store_true", help="keep journals and logs in any case")
    parser.add_argument("--folder", type=Path, help="where to put them (default: a temporary folder)")
    arguments = parser.parse_args()
    if arguments.plan:
        for fault in nemesis.plan(arguments.seed, arguments.seconds, arguments.backend):
            print(fault)
        return 0
    bad = 0
    for seed in range(arguments.seed, arguments.seed + arguments.rounds):
        bad += not one_round(seed, arguments)
    print(f"{arguments.rounds - bad} of {arguments.rounds} rounds without a violation")
    return 1 if bad else 0


def one_round(seed: int, arguments: argparse.Namespace) -> bool:
    """Run one seed; return whether nothing was wrong."""
    parent = arguments.folder
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"faults-{arguments.backend}-{seed}-", dir=parent))
    faults = nemesis.plan(seed, arguments.seconds, arguments.backend)
    print(
        f"seed {seed}: {len(faults)} faults in {arguments.seconds:g} s on {arguments.backend}, {arguments.pool}; {folder}",
        flush=True,
    )
    started = time.monotonic()
    world = World(arguments.backend, folder, seed, arguments.seconds, spool=arguments.spool, pool=arguments.pool)
    with contextlib.closing(world):
        world.start()
        found = nemesis.run(world, faults, say=lambda text: print(text, flush=True))
    violations = checker.check(found)
    (folder / "violations.json").write_text(json.dumps([violation._asdict() for violation in violations], indent=1))
    by_check: dict[str, list[checker.Violation]] = {}
    for violation in violations:
        by_check.setdefault(violation.check, []).append(violation)
    for check, found_by_it in by_check.items():
        for violation in found_by_it[:SHOWN]:
            print(f"VIOLATION [{check}] {violation.subject}: {violation.text}")
        print(f"VIOLATIONS [{check}]: {len(found_by_it)}")
    print("; ".join(f"{name} {figure}" for name, figure in checker.figures(found).items()))
    verdict = f"{len(violations)} violations" if violations else "nothing lost"
    print(f"seed {seed}: {verdict}, {time.monotonic() - started:.0f} s", flush=True)
    if not violations and not arguments.keep:
        shutil.rmtree(folder)
    return not violations


if __name__ == "__main__":
    sys.exit(main())
