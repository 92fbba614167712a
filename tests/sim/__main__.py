"""The simulator's command line: one seed, many seeds, a planted bug, or the table of all planted bugs."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext

from tests.sim.campaign import play, print_report


def main() -> int:
    """Returns the exit status: 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from the first on")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    parser.add_argument(
        "--trace", action="store_true", help="print everything that happens; of many seeds, of bad ones"
    )
    parser.add_argument("--lines", type=int, default=60, help="how many lines of the trace of a bad seed")
    parser.add_argument("--plant", default="", help="plant a bug; see plants.py")
    parser.add_argument("--script", default="", help="play the scripted world of this name; see coincidences.py")
    parser.add_argument("--teeth", action="store_true", help="the table of all planted bugs")
    parser.add_argument("--digest", action="store_true", help="print a hash of the whole trace")
    arguments = parser.parse_args()
    if arguments.teeth:
        from tests.sim.teeth import print_table

        return print_table(arguments.seeds if arguments.seeds > 1 else 5000, arguments.jobs)
    if arguments.script:
        return _play_script(arguments)
    print(f"seed {arguments.seed}, {arguments.seeds} of them", flush=True)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    begun = time.monotonic()
    results = play(seeds, arguments.jobs, plant=arguments.plant, is_traced=arguments.trace or arguments.digest)
    if arguments.digest:
        for result in results:
            print(result.seed, result.digest)
        return 0
    return print_report(results, time.monotonic() - begun, arguments.lines if arguments.trace else 0)


def _play_script(arguments: argparse.Namespace) -> int:
    from tests.sim.coincidences import play_script
    from tests.sim.plants import planted

    with planted(arguments.plant) if arguments.plant else nullcontext():
        result = play_script(arguments.script, arguments.seed, is_traced=arguments.trace)
    print(f"{result.story}\n{result.text or 'no promise is broken'}".lstrip())
    return 1 if result.invariant else 0


if __name__ == "__main__":
    sys.exit(main())
