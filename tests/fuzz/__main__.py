"""Fuzzing on the command line: `python -m tests.fuzz --count 1000000 --seed 1`. Prints the seed first; a seed plays the
same way every time."""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import sys
import time
from collections.abc import Iterable
from random import Random

from tests.fuzz.mutate import Mutator
from tests.fuzz.targets import Tally, play_session, play_world

SESSION_FRAMES, WORLD_FRAMES = 60, 300
HANG_S = 60.0  # One run takes milliseconds; whatever takes so long hangs.


def play(seed: int) -> Tally:
    """One run, of the kind that its seed says."""
    tally = Tally()
    random = Random(seed)
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        if seed % 25:
            for _ in range(10):
                play_session(Mutator(random), tally, SESSION_FRAMES)
        else:
            play_world(random, tally, WORLD_FRAMES, with_scheduler=seed % 50 == 0)
    except BaseException:
        print(f"seed {seed} fails: python -m tests.fuzz --seed {seed} --count 1", file=sys.stderr, flush=True)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    return tally


def run(seed: int, count: int, jobs: int = 1) -> Tally:
    """Runs from a seed on, until so many frames were fed."""
    if jobs == 1:
        return _gather(map(play, range(seed, seed + count)), count)
    with multiprocessing.Pool(jobs) as pool:
        return _gather(pool.imap_unordered(play, range(seed, seed + count), chunksize=4), count)


def _gather(tallies: Iterable[Tally], count: int) -> Tally:
    total = Tally()
    for tally in tallies:
        total.frames += tally.frames
        total.refused += tally.refused
        for name, taken in tally.taken.items():
            total.taken[name] = total.taken.get(name, 0) + taken
        if total.frames >= count:
            break
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=50_000, help="frames")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    begun = time.perf_counter()
    tally = run(arguments.seed, arguments.count, arguments.jobs)
    seconds = time.perf_counter() - begun
    print(f"{tally.frames} frames in {seconds:.0f} s, {tally.frames / seconds:.0f} a second; 0 crashes, 0 hangs")
    print(f"{tally.refused} refused; taken: {', '.join(f'{name} {n}' for name, n in sorted(tally.taken.items()))}")


if __name__ == "__main__":
    main()
