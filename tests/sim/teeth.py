"""How soon each planted bug is caught: the table in docs/protocol.md."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter

from msgspec import Struct

from tests.sim.plants import PLANTS, planted
from tests.sim.run import run

FIRST_SEED = 50_000  # Far from the seeds that everybody plays.
CAUGHT_ENOUGH = 20  # So often that the rate is known well.


class Bite(Struct):
    """What became of one plant."""

    name: str
    seeds: int
    caught: int
    first: int  # after how many seeds, 0: never
    invariants: list[str]


def bite(name: str, seeds_max: int, caught_max: int = CAUGHT_ENOUGH) -> Bite:
    """Play seeds with a bug in the core until it was caught so often."""
    caught: Counter[str] = Counter()
    first = count = 0
    with planted(name):
        while count < seeds_max and caught.total() < caught_max:
            result = run(FIRST_SEED + count)
            count += 1
            if result.invariant:
                caught[result.invariant] += 1
                first = first or count
    return Bite(name, count, caught.total(), first, [invariant for invariant, _ in caught.most_common()])


def print_table(seeds_max: int, jobs: int) -> int:
    """All plants, as a table in Markdown. Returns the exit status: 1 where one was not caught."""
    begun = time.monotonic()
    work = [(name, seeds_max) for name in PLANTS]
    with multiprocessing.get_context("fork").Pool(max(1, jobs)) as pool:
        bites = pool.starmap(bite, work, chunksize=1)
    print("| planted bug | what it breaks | seeds | caught | of the runs | first | by invariant |")
    print("|---|---|---|---|---|---|---|")
    for it in bites:
        words = " ".join((PLANTS[it.name].__doc__ or "").split())
        share = f"{100 * it.caught / it.seeds:.1f} %"
        by = ", ".join(it.invariants)
        print(f"| {it.name} | {words} | {it.seeds} | {it.caught} | {share} | {it.first or 'never'} | {by} |")
    missed = [it.name for it in bites if not it.caught]
    print(f"{len(bites)} plants, {len(missed)} not caught: {', '.join(missed)}; {time.monotonic() - begun:.0f} s")
    return 1 if missed else 0
