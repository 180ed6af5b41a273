"""``python -m tests.canvas``: random canvas programs on Celery's Redis backend and on ours, every answer compared.

Exit code 1 if an answer differs. Programs that Celery's Redis backend leaves without an answer need one here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.canvas import answers
from tests.canvas.programs import Author
from tests.canvas.stand import Stand


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.canvas", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first program (default: 1)")
    parser.add_argument("--programs", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--batch", type=int, default=25, help="how many at once (default: 25)")
    parser.add_argument(
        "--kills", action="store_true", help="SIGKILL children of workers, and processors, all the time"
    )
    parser.add_argument("--conf", type=json.loads, default={}, help="of Celery, as JSON; for both")
    parser.add_argument("--show", action="store_true", help="print the programs and stop")
    parser.add_argument("--folder", type=Path, help="where to put journals and logs (default: a temporary folder)")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.programs)
    if arguments.show:
        for seed in seeds:
            print(json.dumps(Author(seed, kills=arguments.kills).program(), indent=1))
        return 0
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="canvas-"))
    folder.mkdir(parents=True, exist_ok=True)
    differing = 0
    with (
        Stand("redis", folder, arguments.conf, kills=False) as peer,
        Stand("kafka", folder, arguments.conf, kills=arguments.kills) as ours,
    ):
        for start in range(0, len(seeds), arguments.batch):
            batch = seeds[start : start + arguments.batch]
            programs = {seed: Author(seed, kills=arguments.kills).program() for seed in batch}
            expected = peer.run(programs)
            found = ours.run(programs, expected)
            (folder / f"answers-{start}.json").write_text(json.dumps([expected, found], indent=1))
            for seed in batch:
                for line in answers.differences(expected[seed], found[seed], kills=arguments.kills):
                    differing += 1
                    print(f"program {seed} ({programs[seed]['how']}): {line}", flush=True)
            print(f"{start + len(batch)} programs, {differing} differences; {ours.said()}", flush=True)
    if not differing and not arguments.folder:
        shutil.rmtree(folder)
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
