"""Many runs, in several processes, and what they came to."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterable

from tests.sim.run import Result, fault_table, run

FAULT_SHARE_MIN = 0.01  # Of the runs of a campaign in which each kind of fault has to strike.
FAULTS_JUDGED_RUNS = 1000
BAD_SHOWN_MAX = 20


def play(seeds: Iterable[int], jobs: int = 1, *, plant: str = "", is_traced: bool = False) -> list[Result]:
    """The results of these seeds, in their order."""
    work = [(seed, plant, is_traced) for seed in seeds]
    if jobs <= 1 or len(work) < 2:
        return [_one(item) for item in work]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.map(_one, work, chunksize=max(1, min(20, len(work) // (4 * jobs))))


def _one(item: tuple[int, str, bool]) -> Result:
    seed, plant, is_traced = item
    if not plant:
        return run(seed, is_traced=is_traced)
    from tests.sim.plants import planted

    with planted(plant):
        return run(seed, is_traced=is_traced)


def print_report(results: list[Result], wall_s: float, lines: int) -> int:
    """Print what a campaign came to. Returns the exit status."""
    bad = [result for result in results if result.invariant]
    for result in bad[:BAD_SHOWN_MAX]:
        print(f"seed {result.seed}: {result.text}")
        if lines:
            print("\n".join(result.story.splitlines()[-lines:]))
    simulated_s = sum(result.simulated_s for result in results)
    cpu_s = sum(result.cpu_s for result in results) or 1e-9
    five = [result for result in results if result.nodes == 5]
    seldom = print_faults(results) if len(results) > 1 else []
    ratio = sum(result.simulated_s for result in five) / (sum(result.cpu_s for result in five) or 1e-9)
    print(
        f"{len(results)} seeds, {len(bad)} bad {dict(Counter(result.invariant for result in bad)) or ''}; "
        f"{wall_s:.1f} s, {len(results) / cpu_s:.1f} seeds a CPU second, simulated time / CPU time "
        f"{simulated_s / cpu_s:.0f} (with 5 nodes {ratio:.0f}), {sum(result.tasks for result in results)} tasks"
    )
    return 1 if bad or seldom else 0


def print_faults(results: list[Result]) -> list[str]:
    """How often each kind of fault has struck; returns those that did too seldom for a campaign of that length."""
    seldom = []
    for kind, runs, strikes in fault_table(results):
        is_seldom = runs < FAULT_SHARE_MIN * len(results) and len(results) >= FAULTS_JUDGED_RUNS
        if is_seldom:
            seldom.append(kind)
        mark = "  too seldom" if is_seldom else ""
        print(f"  {kind:20} in {100 * runs / len(results):5.1f} % of the runs, {strikes} times{mark}")
    return seldom
