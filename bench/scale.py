"""`make bench-scale`: one leader and many workers: what they cost when nothing happens, how fast work gets through, and
how near to the ideal many short tasks over many workers come.

The workers are bench/workers.py, in one process or a few on the same machine: what they use is not there for the
leader.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.ceilings import median, percentile
from bench.client import latencies_s, throughput
from bench.depth import rss_bytes
from bench.run import cpu_s
from tests.integration.cluster import Cluster, free_port

RESULTS = Path(__file__).parent / "results" / "scale.json"
COUNTS = (10, 100, 1000)
TASK = {"argv": ["true"]}
IDLE_S = 10.0
WARM = 5_000
FAN_OUT_WORKERS = 200
FAN_OUT_PROCESSES = 2
FAN_OUT_TASKS_S = (0.01, 0.02, 0.04)  # So that the leader's rate allows the ideal of one at least.
console = Console(file=sys.stdout)
Figures = dict[str, float]


@contextmanager
def many(directory: Path, count: int, slots: int, task_s: float, processes: int = 1) -> Iterator[Cluster]:
    """A leader with so many workers connected, in so many processes."""
    made = Cluster(directory)
    port = free_port()
    started: list[subprocess.Popen[bytes]] = []
    try:
        made.add("head", "scheduler", "--listen", f"127.0.0.1:{port}", env={"TASKD_NETWORK_MDNS": "false"}).start()
        command = [
            sys.executable, "-m", "bench.workers", "--key", str(made.key), "--join", f"127.0.0.1:{port}",
            "--count", str(count // processes), "--slots", str(slots), "--task-s", str(task_s),
        ]  # fmt: skip
        for first in range(0, count, count // processes):
            started.append(subprocess.Popen([*command, "--first", str(first)]))
        made.wait_for_workers(count)
        yield made
    finally:
        for workers in started:
            workers.kill()
            workers.wait()
        made.close()


def connected(directory: Path, count: int, tasks: int) -> Figures:
    """Figures with so many workers connected."""
    with many(directory, count, 4, 0.0) as made:
        time.sleep(2.0)  # Until everybody has registered.
        used, begun = cpu_s(made.head), time.perf_counter()
        time.sleep(IDLE_S)
        idle_share = (cpu_s(made.head) - used) / (time.perf_counter() - begun)
        throughput(made.head, TASK, WARM)
        used = cpu_s(made.head)
        rate = throughput(made.head, TASK, tasks)
        cost_s = (cpu_s(made.head) - used) / tasks
        samples = latencies_s(made.head, TASK, 200)
        return {
            "workers": count,
            "idle % of a core": 100 * idle_share,
            "tasks /s": rate,
            "scheduler CPU µs per task": cost_s * 1e6,
            "round trip p50 ms": median(samples) * 1e3,
            "round trip p99 ms": percentile(samples, 99) * 1e3,
            "scheduler RSS MiB": rss_bytes(made.head) / (1 << 20),
        }


def fan_out(directory: Path, tasks: int, task_s: float) -> Figures:
    """Short tasks over 200 workers: the time until all results are known, beside what it cannot fall below: that of
    the tasks themselves, and that for which the leader's process, which uses one processor, has to compute."""
    with many(directory, FAN_OUT_WORKERS, 1, task_s, FAN_OUT_PROCESSES) as made:
        throughput(made.head, TASK, WARM)
        used_s = cpu_s(made.head)
        seconds = tasks / throughput(made.head, TASK, tasks)
        used_s = cpu_s(made.head) - used_s
    ideal_s = tasks * task_s / FAN_OUT_WORKERS
    return {
        "tasks of so many ms": task_s * 1e3,
        "tasks": tasks,
        "s until all results are known": seconds,
        "s of the tasks themselves": ideal_s,
        "s of the leader's CPU": used_s,
        "% of the ideal": 100 * ideal_s / seconds,
        "% of what the leader's CPU allows": 100 * max(ideal_s, used_s) / seconds,
    }


def show(title: str, rows: list[Figures]) -> None:
    """A table with a column for each; the first figure is its head."""
    head, *names = rows[0]
    table = Table(title=title)
    table.add_column(head)
    for row in rows:
        table.add_column(f"{row[head]:,.0f}", justify="right")
    for name in names:
        table.add_row(name, *(f"{row[name]:,.1f}" if row[name] < 1000 else f"{row[name]:,.0f}" for row in rows))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS, help=f"workers connected (default {COUNTS})")
    parser.add_argument("--tasks", type=int, default=30_000, help="for each count (default 30,000)")
    parser.add_argument(
        "--fan-out", type=int, default=100_000, metavar="TASKS", help="of the shortest tasks (default 100,000; 0: none)"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"the file for the figures (default {RESULTS})")
    options = parser.parse_args()
    rows: list[Figures] = []
    spread: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="taskd-bench-") as directory:
        for count in options.counts:
            rows.append(connected(Path(directory) / str(count), count, options.tasks))
            print(rows[-1], file=sys.stderr)
        for task_s in FAN_OUT_TASKS_S if options.fan_out else ():
            count = round(options.fan_out * FAN_OUT_TASKS_S[0] / task_s)
            spread.append(fan_out(Path(directory) / f"fan-out-{task_s}", count, task_s))
            print(spread[-1], file=sys.stderr)
    if rows:
        show(f"taskd on {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", rows)
    if spread:
        show(f"Short tasks over {FAN_OUT_WORKERS} workers with a slot each", spread)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"connected": rows, "fan-out": spread}, indent=2) + "\n")


if __name__ == "__main__":
    main()
