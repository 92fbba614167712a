"""One run: a world drawn from a seed, a phase in which everything goes wrong, then healing, and the verdict."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections import Counter
from collections.abc import Callable
from random import Random

from msgspec import Struct

from taskd.core.settings import SchedulerSettings
from tests.sim.faults import FAULTS, strike
from tests.sim.referee import Violation
from tests.sim.verdict import check_end, unfinished
from tests.sim.world import World

HEALING_S = 60.0  # Without that any task is decided, while there is something left to do.
POISONED_S = 300.0  # The same where tasks take workers down: of those that do so at once, thirty have to.
RESUMED_S = 26.0  # By then all drained workers are in use again.
HAND_OVER_S = 800.0  # A leader that came and went often waits up to ten minutes before it takes over again.
IDLE_S = 15.0
IDLE_STEPS_MAX = 60  # A second and machine: an idle cluster rests.


class Unplayable(Exception):
    """A script waits in vain for what it wants to meet: it does not fit the core any more."""


class Result(Struct):
    """What one run came to."""

    seed: int
    invariant: str  # that was broken; empty: none
    text: str
    faults: dict[str, int]
    simulated_s: float
    cpu_s: float
    nodes: int
    tasks: int
    steps: int
    story: str = ""
    digest: str = ""


def run(seed: int, *, is_traced: bool = False) -> Result:
    """Play one seed. Never raises: whatever goes wrong is in the result."""
    world = draw_world(seed, is_traced=is_traced)
    return play_out(world, lambda: world.engine.run_until(world.calm_from_s))


def play_out(world: World, misfortune: Callable[[], None]) -> Result:
    """Let everything go wrong that is to go wrong in a world, heal it, and judge. Raises Unplayable alone: of a script
    that does not get where it wants to."""
    begun = time.process_time()
    is_traced = world.is_traced
    invariant = text = ""
    try:
        misfortune()
        _heal_and_judge(world)
    except Unplayable:
        raise
    except Violation as violation:
        invariant, text = violation.invariant, str(violation)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        invariant = "core"
        text = f"{type(error).__name__}: {error} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
        if is_traced:
            world.lines.append(traceback.format_exc())
    return Result(
        world.seed, invariant, text, dict(world.faults), world.engine.now, time.process_time() - begun,
        len(world.hosts), len(world.clients.ids), world.engine.steps,
        world.story() if is_traced and invariant else "",
        hashlib.sha256("\n".join(world.lines).encode()).hexdigest() if is_traced else "",
    )  # fmt: skip


def _heal_and_judge(world: World) -> None:
    world.heal()
    started = progressed = world.engine.now
    decided, problem = 0, "?"
    while problem or world.engine.now < started + RESUMED_S:
        world.engine.run_until(world.engine.now + 1.0)
        problem = unfinished(world)
        now = world.engine.now
        if (count := len(world.referee.told)) > decided:
            decided, progressed = count, now
        is_about_who_leads = problem.startswith("9") and "leads, and not" in problem and "nobody" not in problem
        if is_about_who_leads:
            progressed = now  # The change of leaders that is waited for brings work of its own.
        since = started if is_about_who_leads else progressed
        # What a clock that was ahead has put off comes that much later.
        patience_s = (POISONED_S if world.poison else HEALING_S) + world.clock_error_s
        if problem and now - since > (HAND_OVER_S if is_about_who_leads else patience_s):
            raise Violation(problem.split()[0], f"{now - started:.0f} s after healing {problem.split(maxsplit=1)[1]}")
    check_end(world)
    _check_idle(world)


def _check_idle(world: World) -> None:
    if world.plays_bytes:
        return  # Heartbeats are played.
    steps = world.engine.steps
    world.engine.run_until(world.engine.now + IDLE_S)
    per_s = (world.engine.steps - steps) / IDLE_S / len(world.hosts)
    if per_s > IDLE_STEPS_MAX:
        raise Violation("11", f"an idle machine does {per_s:.0f} things a second")
    if (problem := unfinished(world)) and not problem.startswith("11"):  # It may just be purging.
        raise Violation(problem.split()[0], f"after all was quiet {problem.split(maxsplit=1)[1]}")


# -- Drawing -----------------------------------------------------------------------------------------------------------


def draw_world(seed: int, *, is_traced: bool = False) -> World:
    """A world, its machines about to start, its clients and faults on their way."""
    world = World(seed, is_traced=is_traced)
    random = world.engine.random
    world.plays_bytes = random.random() < 0.05
    world.page = random.choice((3, 20, 500))
    world.work_s = random.choice((0.05, 0.3, 1.0, 2.5))
    world.poison = random.choice((0.0, 0.0, 0.2))
    world.way_s = random.choice(((0.0002, 0.0002), (0.001, 0.002), (0.005, 0.02)))
    kept_s = random.choice((3.0, 15.0)) if random.random() < 0.3 else 7 * 86_400.0
    settings = SchedulerSettings(
        worker_grace_s=random.choice((1.0, 5.0)),
        restart_grace_s=random.choice((3.0, 10.0)),
        prefetch_s=random.choice((0.0, 0.05, 1.0)),
        prefetch_max=random.choice((0, 3, 512)),
        crash_limit=random.choice((2, 3)),
        queued_max=10_000_000,
        min_replicas=1 if random.random() < 0.1 else 0,
        standby_grace_s=random.choice((0.5, 2.5)),
        hand_over_after_s=random.choice((0.5, 2.0, 10.0)),
        empty_wait_s=random.choice((1.0, 10.0)),
        window=random.choice((1, 2, 5, 8192)),
        finished_age_max_s=kept_s,
    )
    _draw_hosts(world, settings)
    length_s = random.uniform(12.0, 35.0)
    world.calm_from_s = length_s
    # Who asks again after that has its tasks run anew.
    _draw_clients(world, length_s, min(25.0, 0.6 * kept_s))
    _draw_faults(world, length_s)
    return world


def _draw_hosts(world: World, settings: SchedulerSettings) -> None:
    random = world.engine.random
    scheduler_count = random.choices((1, 2, 3, 4), (1, 3, 5, 1))[0]
    worker_count = random.randint(1, 4)
    is_skewed = random.random() < 0.3
    ids = list(range(1, scheduler_count + 1))
    random.shuffle(ids)
    both = random.random() < 0.25
    for number, node_id in enumerate(ids):
        is_worker = both and (number == 0 or random.random() < 0.5)
        roles = ("scheduler", "worker") if is_worker else ("scheduler",)
        world.add(node_id, *roles, settings=settings, slots=random.randint(1, 3))
    for number in range(worker_count):
        world.add(11 + number, "worker", slots=random.randint(1, 3))
    for host in world.hosts:
        if is_skewed:
            host.skew_s = random.uniform(-3.0, 3.0)
            world.clock_error_s = 3.0
        # The founder first; of the others some are added while the cluster works.
        delay_s = (
            0.0 if host.index == 0 else random.choice((0.0, 0.5, 0.5, random.uniform(1.0, 12.0))) * random.random()
        )
        world.engine.at(delay_s, host.start)
    if is_skewed:
        world.count_fault("skew")


def _draw_clients(world: World, length_s: float, patience_s: float) -> None:
    random = world.engine.random
    clients = world.clients
    for _ in range(random.choice((5, 15, 30))):
        world.engine.at(random.uniform(0.3, length_s), clients.submit, random.choice((1, 1, 2, 6)), patience_s)
    for _ in range(random.choice((0, 2, 6))):
        world.engine.at(random.uniform(2.0, length_s), _cancel_some, world)
    for _ in range(random.choice((0, 0, 1, 2))):
        world.engine.at(random.uniform(2.0, length_s), _drain_one, world)


def _cancel_some(world: World) -> None:
    random, ids = world.engine.random, world.clients.ids
    if ids:
        world.clients.cancel([random.choice(ids[-10:]) for _ in range(random.choice((1, 3)))])


def _drain_one(world: World) -> None:
    workers = [host for host in world.members if host.is_worker]
    host = world.engine.random.choice(workers)
    world.clients.drain(host.node_id, "upkeep")


def _draw_faults(world: World, length_s: float) -> None:
    """A few kinds a run, so that each is met alone and in all company."""
    random = world.engine.random
    count = random.choice((0, 2, 4, 8, 12))
    kinds = random.sample(list(FAULTS), random.choice((2, 4, 8)))
    weights = [FAULTS[kind][1] for kind in kinds]
    for kind in random.choices(kinds, weights, k=count):
        world.engine.at(random.uniform(1.0, length_s), strike, world, kind)


def fault_table(results: list[Result]) -> list[tuple[str, int, int]]:
    """By kind of fault: in how many runs it struck, and how often in all."""
    runs: Counter[str] = Counter()
    strikes: Counter[str] = Counter()
    for result in results:
        runs.update(result.faults.keys())
        strikes.update(result.faults)
    return [(kind, runs[kind], strikes[kind]) for kind in sorted([*FAULTS, "poison", "skew"])]


def shuffled_seeds(count: int, first: int = 0) -> list[int]:
    """The seeds of a campaign, in an order that spreads long runs over its workers."""
    seeds = list(range(first, first + count))
    Random(count).shuffle(seeds)
    return seeds
