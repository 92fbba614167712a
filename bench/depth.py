"""`make bench-depth`: what a long queue costs: memory, the rate at which it is worked off, and the time of a restart.

One scheduler with its defaults, fsync and TLS on. For each depth so many no-op tasks are queued while no worker is
there; then the scheduler's memory is read, it is killed and started again, and two workers come and work while a
client keeps the queue as long as it was.
Prints a table beside what the machine can do, writes the figures as JSON, and a plot of rate and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.ceilings import median, sqlite_rows_per_s
from bench.client import Client, batch_of
from bench.run import HANDLERS, NOOP
from tests.integration.cluster import LOOPBACK, Cluster, Daemon, eventually, free_port

RESULTS = Path(__file__).parent / "results" / "depth.json"
PLOT = RESULTS.with_suffix(".svg")
BATCH = 2000
WARM_S = 1.5
WORKED_S = 5.0
POLL_S = 0.005
ROUNDS = 3  # The median counts.
ONE_ROUND_FROM = 5_000_000
DEPTHS = (10_000, 100_000, 1_000_000, 5_000_000)
SHARE = "% of the rate at the shortest"
TIMEOUT_S = 600.0
console = Console(file=sys.stdout)
Figures = dict[str, float]


def rss_bytes(daemon: Daemon) -> int:
    """Resident memory of a daemon's own process, without that of its children."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


def unfinished(head: Daemon) -> int:
    counts: dict[str, int] = head.ok("GET", "/v1/cluster")["tasks"]
    return sum(counts.values())


def leads(head: Daemon) -> bool:
    try:
        view: dict[str, Any] = head.ok("GET", "/v1/cluster?own=1")
    except OSError:
        return False
    return bool(view["leader"])


def fill(head: Daemon, count: int) -> float:
    """Queue so many tasks; returns how many a second."""
    client = Client(head.socket)
    body = batch_of(NOOP, BATCH)
    begun = time.perf_counter()
    for _ in range(count // BATCH):
        client.post("/v1/tasks", body)
    client.close()
    return count / (time.perf_counter() - begun)


def worked_off_per_s(head: Daemon, depth: int, seconds: float) -> float:
    """Tasks per second that end while others keep coming, so that the queue stays as long."""
    client = Client(head.socket)
    body = batch_of(NOOP, BATCH)
    coming = 0
    before = left = unfinished(head)
    begun = time.perf_counter()
    while time.perf_counter() < begun + seconds:
        if left + BATCH <= depth:
            client.post("/v1/tasks", body)
            coming += BATCH
        else:
            time.sleep(POLL_S)
        left = unfinished(head)
    took_s = time.perf_counter() - begun
    client.close()
    return (before + coming - left) / took_s


def measure(directory: Path, depth: int) -> Figures:
    """All figures of one depth."""
    directory.mkdir(parents=True)
    rows_per_s = sqlite_rows_per_s(directory)
    made = Cluster(directory)
    try:
        return {"rows into SQLite /s": rows_per_s, **_measure(made, depth)}
    finally:
        made.close()


def _measure(made: Cluster, depth: int) -> Figures:
    port = free_port()
    made.env = {**LOOPBACK, "TASKD_NETWORK_MDNS": "false", **HANDLERS, "TASKD_WORKER_SLOTS": "1"}
    head = made.add("scheduler", "scheduler", "--node-id", "1", "--listen", f"127.0.0.1:{port}")
    head.start()
    fill(head, BATCH)
    empty = rss_bytes(head)
    rate = fill(head, depth - BATCH)
    full = rss_bytes(head)
    head.kill()
    begun = time.perf_counter()
    head.start(wait=False)
    eventually(lambda: leads(head), TIMEOUT_S)
    restart_s = time.perf_counter() - begun
    restarted = rss_bytes(head)
    assert unfinished(head) == depth
    for number in (2, 3):
        made.add(f"worker{number}", "worker", "--join", f"127.0.0.1:{port}").start(wait=False)
    made.wait_for_workers(2)
    worked_off_per_s(head, depth, WARM_S)
    return {
        "submissions /s": rate,
        "RSS MiB, queued": full / 2**20,
        "RSS MiB, after a restart": restarted / 2**20,
        "bytes per queued task": (full - empty) / depth,
        "restart to leading s": restart_s,
        "worked off /s": worked_off_per_s(head, depth, WORKED_S),
        "RSS MiB, working": rss_bytes(head) / 2**20,
    }


def plot(figures: dict[int, Figures], path: Path) -> None:
    """Rate and memory over depth."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - nothing else needs it

    path.parent.mkdir(parents=True, exist_ok=True)
    depths = list(figures)
    _, rate = plt.subplots(figsize=(7, 4))
    rate.plot(depths, [figures[depth]["worked off /s"] for depth in depths], "o-", label="worked off /s")
    rate.set(xscale="log", xlabel="tasks queued", ylabel="tasks /s", ylim=(0, None))
    memory = rate.twinx()
    memory.plot(depths, [figures[depth]["RSS MiB, queued"] for depth in depths], "s--", color="C1", label="RSS MiB")
    memory.set(ylabel="RSS MiB of the scheduler", ylim=(0, None))
    rate.figure.legend(loc="lower right")
    rate.figure.tight_layout()
    rate.figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="*", default=DEPTHS, help=f"tasks queued (default {DEPTHS})")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"of each (default {ROUNDS}; one from {ONE_ROUND_FROM:,} on)"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"the file for the figures (default {RESULTS})")
    parser.add_argument("--plot", type=Path, default=PLOT, help=f"a file for a plot: PNG or SVG (default {PLOT})")
    parser.add_argument("--directory", type=Path, help="where the daemons keep their state (default: a temporary one)")
    options = parser.parse_args()
    figures: dict[int, Figures] = {}
    for depth in options.depths:
        with tempfile.TemporaryDirectory(prefix="taskd-bench-", dir=options.directory) as directory:
            count = options.rounds if depth < ONE_ROUND_FROM else 1
            rounds = [measure(Path(directory) / str(number), depth) for number in range(count)]
        figures[depth] = {name: median([found[name] for found in rounds]) for name in rounds[0]}
        shortest = next(iter(figures.values()))
        figures[depth][SHARE] = 100 * figures[depth]["worked off /s"] / shortest["worked off /s"]
        print(f"{depth:,} queued: {figures[depth]['worked off /s']:,.0f} /s", file=sys.stderr)
    table = Table(title=f"Long queues on {os.cpu_count()} CPUs, Python {platform.python_version()}")
    table.add_column("queued")
    for depth in figures:
        table.add_column(f"{depth:,}", justify="right")
    for name in next(iter(figures.values())):
        values = (found[name] for found in figures.values())
        table.add_row(name, *(f"{value:,.0f}" if value >= 100 else f"{value:,.2f}" for value in values))
    console.print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=2) + "\n")
    plot(figures, options.plot)


if __name__ == "__main__":
    main()
