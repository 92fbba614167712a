"""`make bench-takeover`: what a change of leaders costs those who submit, and what a standby costs.

Real daemons on this machine, with fsync and TLS, under load all the time. Leaders are killed, cut off from the LAN (in
network namespaces, where those are permitted), and asked back by a scheduler with a lower id; an empty standby catches
up; and throughput is measured with a standby and without, in one cluster. Afterwards the stores are read, and compared
with what clients were told and what ran. Prints a table and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from uuid import UUID

from rich.console import Console
from rich.table import Table

from bench.ceilings import median, percentile
from bench.client import BATCH, throughput
from taskd.store.schema import open_reader
from tests.integration.cluster import Daemon, eventually
from tests.integration.lan import lan, why_not
from tests.integration.load import Load
from tests.integration.replicas import Replicas, leader_at, replicas, replication

RESULTS = Path(__file__).parent / "results" / "takeover.json"
HANDLERS = {
    "TASKD_WORKER_HANDLERS": "handlers_for_tests,bench_handlers",
    "TASKD_WORKER_HANDLER_PATH": f"{Path(__file__).parent.parent / 'tests' / 'integration'},{Path(__file__).parent}",
}
NEVER_BACK = {**HANDLERS, "TASKD_SCHEDULER_HAND_OVER_AFTER_S": "3600"}  # Whoever took over keeps leading.
# By default 10; less than the 3 s in which everybody has dialled a scheduler that is back would measure redialling.
SOON_BACK = {**HANDLERS, "TASKD_SCHEDULER_HAND_OVER_AFTER_S": "4"}
NOOP = {"type": "noop", "params": {}}
WARM_REQUESTS = 20
FILL_TASKS = 50_000  # At once: the ids of one wait are at most 100,000.
COST_ROUNDS = 3
TIMEOUT_S = 120.0
console = Console(file=sys.stdout)
Figures = dict[str, float]


# -- Load --------------------------------------------------------------------------------------------------------------


@contextmanager
def under_load(made: Replicas) -> Iterator[Load]:
    """Clients of both workers: one that measures, with small requests, and two that give the cluster work to do, a part
    of it long enough to be running when something happens. About 500 tasks a second."""
    history = made.history
    first, second = made.workers
    with (
        Load(history, second, tasks_per_request=20, pause_s=0.05),
        Load(history, second, lambda: history.handler(0.2), pause_s=0.1),
        Load(history, first, pause_s=0.005) as probe,
    ):
        yield probe


def verdict(made: Replicas, name: str) -> Figures:
    """What the stores say of all that was submitted."""
    report = made.history.settle(made.stores, TIMEOUT_S)
    errors = made.history.errors()
    for kind, examples in report.faults.items():
        console.print(f"[red]{name}: {kind}: {examples}")
    if errors:
        console.print(f"[red]{name}: {len(errors)} client errors, such as {errors[0]}")
    return {
        f"{name}: tasks answered": report.answered,
        f"{name}: lost": len(report.lost),
        f"{name}: results not one, or not equal": len(report.unequal) + len(report.doubled) + len(report.unfinished),
        f"{name}: second runs": report.second_runs,
        f"{name}: one attempt run twice": len(report.restarted),
        f"{name}: client errors": len(errors),
    }


def spread(name: str, seconds: list[float], units_per_s: float = 1) -> Figures:
    """p50, p99 and maximum of some durations, in seconds or what else there are so many of in one."""
    unit = {1: "s", 1e3: "ms"}[units_per_s]
    return {
        f"{name} p50 {unit}": median(seconds) * units_per_s,
        f"{name} p99 {unit}": percentile(seconds, 99) * units_per_s,
        f"{name} max {unit}": max(seconds) * units_per_s,
    }


def number_of(made: Replicas, daemon: Daemon) -> int:
    return made.schedulers.index(daemon) + 1


# -- Leaders that fail -------------------------------------------------------------------------------------------------


def failures(
    made: Replicas, count: int, strike: Callable[[Daemon], None], mend: Callable[[Daemon], None], what: str
) -> list[float]:
    """Whoever leads is struck, again and again. Seconds from each blow to the first answer of a submission made after
    it, through a worker; each time the other one leads from then on, and the struck one becomes its standby."""
    outages = []
    with under_load(made) as probe:
        for round_number in range(1, count + 1):
            probe.wait_for(WARM_REQUESTS, TIMEOUT_S)
            leader, other = made.schedulers
            if leader_at(made.workers[0]) == 2:
                leader, other = other, leader
            at = time.monotonic()
            strike(leader)
            outages.append(probe.first_answer_after(at, TIMEOUT_S) - at)
            made.wait_leader(number_of(made, other), other, *made.workers)
            mend(leader)
            eventually(lambda: replication(other, number_of(made, leader)) == "in_sync", TIMEOUT_S)  # noqa: B023
            console.print(f"{what} {round_number}/{count}: {outages[-1]:.3f} s", style="dim")
    return outages


def kills(directory: Path, count: int) -> Figures:
    """kill -9 of the leader."""
    with replicas(directory, 2, 2, env=NEVER_BACK) as made:
        outages = failures(made, count, Daemon.kill, Daemon.start, "kill")
        return {**spread("leader killed, answered again:", outages), **verdict(made, "kills")}


def cuts(directory: Path, count: int) -> Figures:
    """The cable of the leader's host is pulled."""
    reason = why_not()
    if reason is not None:
        console.print(f"links are not cut: {reason}")
        return {}
    with lan(4) as network, replicas(directory, 2, 2, network, NEVER_BACK) as made:
        outages = failures(
            made,
            count,
            lambda leader: network.cut(number_of(made, leader)),
            lambda leader: network.mend(number_of(made, leader)),
            "cut",
        )
        return {**spread("leader cut off, answered again:", outages), **verdict(made, "cuts")}


# -- Leaders that change as planned ------------------------------------------------------------------------------------


def hand_overs(directory: Path, count: int) -> Figures:
    """A leader stops in good order, comes back, and leads again by its lower id. The stall of a change is the longest
    time that a submission took meanwhile."""
    stops, returns = [], []
    with replicas(directory, 2, 2, env=SOON_BACK) as made:
        first = made.schedulers[0]
        with under_load(made) as probe:
            for round_number in range(1, count + 1):
                probe.wait_for(WARM_REQUESTS, TIMEOUT_S)
                begun = len(probe.answers)
                first.stop()
                made.wait_leader(2)
                probe.wait_for(WARM_REQUESTS, TIMEOUT_S)
                stops.append(longest(probe.answers[begun:]))
                first.start(wait=False)
                first.wait_ready()
                begun = len(probe.answers)
                made.wait_leader(1)
                made.wait_in_sync(2)
                probe.wait_for(WARM_REQUESTS, TIMEOUT_S)
                returns.append(longest(probe.answers[begun:]))
                said = f"hand-over {round_number}/{count}: stop {stops[-1]:.3f} s, return {returns[-1]:.3f} s"
                console.print(said, style="dim")
        return {
            **spread("lower id returns, stall of submissions:", returns),
            **spread("leader stops, stall of submissions:", stops),
            **verdict(made, "hand-overs"),
        }


def longest(answers: list[tuple[float, float]]) -> float:
    return max(answered - asked for asked, answered in answers)


# -- A standby that catches up, and what a standby costs ---------------------------------------------------------------


def catch_up(directory: Path, tasks: int) -> Figures:
    """An empty standby joins a leader that has many tasks and goes on taking more, one request after the other."""
    with replicas(directory, 1, 1, env=NEVER_BACK) as made:
        leader, history = made.schedulers[0], made.history
        for _ in range(tasks // FILL_TASKS):
            throughput(made.head, NOOP, FILL_TASKS)
        standby = made.add_scheduler(2)
        with Load(history, made.workers[0], pause_s=0.002) as probe:
            alone = sample(probe)
            started_at, first = time.monotonic(), len(probe.answers)
            standby.start(wait=False)
            eventually(lambda: replication(leader, 2) in ("catching_up", "in_sync"), TIMEOUT_S)
            begun_at, begun = time.monotonic(), len(probe.answers)
            eventually(lambda: replication(leader, 2) == "in_sync", TIMEOUT_S)
            ended_at, ended = time.monotonic(), len(probe.answers)
            in_sync = sample(probe)
        copies = settled_rows(made)
        during = latencies(probe.answers[begun:ended])
        return {
            "catch-up: tasks": tasks,
            "catch-up: seconds": ended_at - begun_at,
            "catch-up: seconds, start of the process included": ended_at - started_at,
            "catch-up: rows /s": tasks / (ended_at - begun_at),
            **spread("submission, leader alone:", alone, 1e3),
            **spread("submission, a standby starts and catches up:", latencies(probe.answers[first:ended]), 1e3),
            **spread("submission, a standby catches up:", during, 1e3),
            **spread("submission, standby in sync:", in_sync, 1e3),
            "catch-up: p99 / p99 with it in sync": percentile(during, 99) / percentile(in_sync, 99),
            "catch-up: p99 / p99 of the leader alone": percentile(during, 99) / percentile(alone, 99),
            "catch-up: tasks that differ": len(copies[0] ^ copies[1]),
            "catch-up: lost": len({*history.ids} - {task_id for task_id, *_ in copies[1]}),
            "catch-up: client errors": len(history.errors()),
        }


def sample(probe: Load, requests: int = 1000) -> list[float]:
    """Seconds of some submissions from now on."""
    begun = len(probe.answers)
    probe.wait_for(requests, TIMEOUT_S)
    return latencies(probe.answers[begun:])


def latencies(answers: list[tuple[float, float]]) -> list[float]:
    return [answered - asked for asked, answered in answers]


def settled_rows(made: Replicas) -> list[set[tuple[object, ...]]]:
    """What the databases hold once they hold the same."""
    with suppress(AssertionError):  # The figures tell.
        eventually(lambda: len({frozenset(rows_of(path)) for path in made.stores}) == 1)
    return [rows_of(path) for path in made.stores]


def rows_of(path: Path) -> set[tuple[object, ...]]:
    """Each task of a database: its id, state, and the commit of its last change."""
    with closing(open_reader(path)) as connection:
        rows = connection.execute("SELECT id, state, epoch, node_id, boot, lsn FROM tasks")
        return {(str(UUID(bytes=task_id)), *rest) for task_id, *rest in rows}


def standby_cost(directory: Path, tasks: int) -> Figures:
    """Throughput of one cluster with its standby and without it, in turns."""
    replicated, local = [], []
    with replicas(directory, 2, 2, env={**NEVER_BACK, "TASKD_WORKER_SLOTS": "1"}) as made:
        leader, standby = made.schedulers
        throughput(made.head, NOOP, BATCH * 2)  # Warm.
        for _ in range(COST_ROUNDS):
            replicated.append(throughput(made.head, NOOP, tasks))
            standby.kill()
            eventually(lambda: leader.ok("GET", "/v1/cluster")["durability"] == "local")
            throughput(made.head, NOOP, BATCH)  # Answered when the leader no longer waits for the standby to come back.
            local.append(throughput(made.head, NOOP, tasks))
            standby.start()
            eventually(lambda: replication(leader, 2) == "in_sync", TIMEOUT_S)
    return {
        "no-op tasks /s, one scheduler": median(local),
        "no-op tasks /s, with one standby": median(replicated),
        "with / without standby": median(replicated) / median(local),
    }


# -- All of it ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of the leader's process (default 50; 0: none)")
    parser.add_argument("--cuts", type=int, default=20, help="of the leader's link (default 20; 0: none)")
    parser.add_argument("--returns", type=int, default=20, help="planned hand-overs, there and back (default 20)")
    parser.add_argument("--catch-up", type=int, default=200_000, metavar="TASKS", help="(default 200,000; 0: none)")
    parser.add_argument("--throughput", type=int, default=20_000, metavar="TASKS", help="a turn (default 20,000)")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"the file for the figures (default {RESULTS})")
    parser.add_argument("--directory", type=Path, help="where the daemons keep their state (default: a temporary one)")
    options = parser.parse_args()
    parts: list[tuple[Callable[[Path, int], Figures], int]] = [
        (kills, options.kills),
        (cuts, options.cuts),
        (hand_overs, options.returns),
        (catch_up, options.catch_up),
        (standby_cost, options.throughput),
    ]
    figures: Figures = {}
    for part, amount in parts:
        if amount:
            with tempfile.TemporaryDirectory(prefix="taskd-bench-", dir=options.directory) as directory:
                figures |= part(Path(directory), amount)
    table = Table(title=f"Changes of leaders on {os.cpu_count()} CPUs, Python {platform.python_version()}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(
            name, f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 100 else f"{value:,.3f}"
        )
    console.print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
