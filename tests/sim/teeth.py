"""How soon each planted bug is caught: the table in docs/protocol.md, and the test that each still is."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter

from msgspec import Struct

from tests.sim.known import KNOWN
from tests.sim.plants import PLANTS, planted
from tests.sim.run import Result, run

FIRST_SEED = 50_000  # Far from the seeds that everybody plays.
CAUGHT_ENOUGH = 8  # So often that the rate is known well enough.


class Bite(Struct):
    """What became of one plant."""

    name: str
    seeds: int
    caught: int
    first: int  # after how many seeds, 0: never
    invariants: list[str]

    @property
    def row(self) -> str:
        """A line of the table."""
        words = " ".join((PLANTS[self.name].__doc__ or "").split())
        share = f"{100 * self.caught / self.seeds:.1f} %"
        return f"| {self.name} | {words} | {share} | {self.first or 'never'} | {', '.join(self.invariants)} |"


def bite(work: tuple[str, int]) -> Bite:
    """Play seeds with a bug in the core until it was caught so often."""
    name, seeds_max = work
    caught: Counter[str] = Counter()
    first = count = 0
    with planted(name):
        while count < seeds_max and caught.total() < CAUGHT_ENOUGH:
            result = run(FIRST_SEED + count)
            count += 1
            if result.invariant:
                caught[result.invariant] += 1
                first = first or count
    return Bite(name, count, caught.total(), first, [invariant for invariant, _ in caught.most_common()])


def catch(name: str, seeds_max: int = 5000) -> Result | None:
    """The first run that notices a planted bug; where it was noticed last is looked at first. None: no run does."""
    with planted(name):
        for seed in (KNOWN.get(name, FIRST_SEED), *range(FIRST_SEED, FIRST_SEED + seeds_max)):
            result = run(seed)
            if result.invariant:
                return result
    return None


def print_table(seeds_max: int, jobs: int) -> int:
    """All plants, as a table in Markdown. Returns the exit status: 1 where one was not caught."""
    begun = time.monotonic()
    print("| planted bug | what it breaks | caught in | first after | by invariant |")
    print("|---|---|---|---|---|")
    missed = []
    with multiprocessing.get_context("fork").Pool(max(1, jobs)) as pool:
        for found in pool.imap(bite, [(name, seeds_max) for name in PLANTS], chunksize=1):
            print(found.row, flush=True)
            if not found.caught:
                missed.append(found.name)
    print(f"{len(PLANTS)} plants, {len(missed)} not caught: {', '.join(missed)}; {time.monotonic() - begun:.0f} s")
    return 1 if missed else 0
