"""How soon each planted bug is caught: the table in docs/protocol.md, and the test that each still is.

Common ones are caught in drawn worlds, in one of fifty or more. The rare ones have worlds of their own, which lead to
what they need: coincidences.py.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter

from msgspec import Struct

from tests.sim.coincidences import COINCIDENCES, play_script
from tests.sim.plants import PLANTS, planted
from tests.sim.run import Result, run

FIRST_SEED = 50_000  # Far from the seeds that everybody plays.
COMMON_SEEDS = 300  # In so many a common one is caught; one that is not is rare, and needs a script.
CAUGHT_ENOUGH = 8  # So often that the rate is known well enough.


class Bite(Struct):
    """What became of one plant."""

    name: str
    seeds: int
    caught: int
    first: int  # after how many seeds, 0: never
    invariants: list[str]
    is_scripted: bool = False

    @property
    def row(self) -> str:
        """A line of the table."""
        words = " ".join((PLANTS[self.name].__doc__ or "").split())
        first = "its own world" if self.is_scripted else str(self.first or "never")
        return f"| `{self.name}` | {words} | {first} | {', '.join(self.invariants)} |"


def bite(work: tuple[str, int]) -> Bite:
    """Play seeds with a bug in the core until it was caught so often."""
    name, seeds_max = work
    if name in COINCIDENCES:
        with planted(name):
            result = play_script(name)
        is_caught = bool(result.invariant)
        return Bite(name, 1, int(is_caught), int(is_caught), [result.invariant] * is_caught, is_scripted=True)
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


def catch(name: str, seeds_max: int = COMMON_SEEDS) -> Result | None:
    """The first drawn world that notices a planted bug. None: none does."""
    with planted(name):
        for seed in range(FIRST_SEED, FIRST_SEED + seeds_max):
            result = run(seed)
            if result.invariant:
                return result
    return None


def print_table(seeds_max: int, jobs: int) -> int:
    """All plants, as a table in Markdown. Returns the exit status: 1 where one was not caught."""
    begun = time.monotonic()
    print("| planted bug | what it breaks | noticed after | by invariant |")
    print("|---|---|---|---|")
    missed = []
    with multiprocessing.get_context("fork").Pool(max(1, jobs)) as pool:
        for found in pool.imap(bite, [(name, seeds_max) for name in PLANTS], chunksize=1):
            print(found.row, flush=True)
            if not found.caught:
                missed.append(found.name)
    print(f"{len(PLANTS)} plants, {len(missed)} not caught: {', '.join(missed)}; {time.monotonic() - begun:.0f} s")
    return 1 if missed else 0
