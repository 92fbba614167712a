"""`make bench-depth`: what a long queue costs: memory, the rate at which it is worked off, and the time of a restart.

One scheduler with its defaults, fsync and TLS on. For each depth so many no-op tasks are queued while no worker is
there; then the scheduler's memory is read, it is killed and started again, and two workers come and work while a
client keeps the queue as long as it was: in turn with a scheduler beside it that has the shortest queue, as what the
machine can do changes by the second.
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
from contextlib import closing, nullcontext
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
WARM_S = 1.0
WORKED_S = 3.0
POLL_S = 0.005
TURNS = 7  # The median counts.
DEPTHS = (10_000, 100_000, 1_000_000, 5_000_000)
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


class Queue:
    """A scheduler with so many tasks queued, and two workers, which work when they are told to."""

    def __init__(self, directory: Path, depth: int) -> None:
        directory.mkdir(parents=True)
        self.depth = depth
        self.figures: Figures = {"rows into SQLite /s": sqlite_rows_per_s(directory)}
        self._made = Cluster(directory)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        port = free_port()
        made = self._made
        made.env = {**LOOPBACK, "TASKD_NETWORK_MDNS": "false", **HANDLERS, "TASKD_WORKER_SLOTS": "1"}
        self.head = head = made.add("scheduler", "scheduler", "--node-id", "1", "--listen", f"127.0.0.1:{port}")
        head.start()
        fill(head, BATCH)
        empty = rss_bytes(head)
        self.figures["submissions /s"] = fill(head, self.depth - BATCH)
        full = rss_bytes(head)
        head.kill()
        begun = time.perf_counter()
        head.start(wait=False)
        eventually(lambda: leads(head), TIMEOUT_S)
        self.figures |= {
            "restart to leading s": time.perf_counter() - begun,
            "RSS MiB, queued": full / 2**20,
            "RSS MiB, after a restart": rss_bytes(head) / 2**20,
            "bytes per queued task": (full - empty) / self.depth,
        }
        assert unfinished(head) == self.depth
        for number in (2, 3):
            made.add(f"worker{number}", "worker", "--join", f"127.0.0.1:{port}").start(wait=False)
        made.wait_for_workers(2)
        self._tell_workers("drain")

    def _tell_workers(self, what: str) -> None:
        for node in self.head.ok("GET", "/v1/nodes")["nodes"]:
            if "worker" in node["roles"]:
                self.head.ok("POST", f"/v1/nodes/{node['node_id']}/{what}")

    def worked_off_per_s(self) -> float:
        """How many tasks a second end while the workers may work."""
        self._tell_workers("resume")
        worked_off_per_s(self.head, self.depth, WARM_S)
        rate = worked_off_per_s(self.head, self.depth, WORKED_S)
        self._tell_workers("drain")
        return rate

    def close(self) -> None:
        self._made.close()


def compare(queue: Queue, shortest: Queue, turns: int) -> Figures:
    """All figures of one queue; of the shortest itself too."""
    rates: list[tuple[float, float]] = []
    for _ in range(turns):
        beside = shortest.worked_off_per_s()
        rates.append((queue.worked_off_per_s() if queue is not shortest else beside, beside))
    return {
        **queue.figures,
        "worked off /s": median([rate for rate, _ in rates]),
        "% of the shortest, in turn": median([100 * rate / beside for rate, beside in rates]),
        "RSS MiB, working": rss_bytes(queue.head) / 2**20,
    }


def plot(figures: dict[int, Figures], path: Path) -> None:
    """Rate and memory over depth."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - nothing else needs it

    path.parent.mkdir(parents=True, exist_ok=True)
    depths = sorted(figures)
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
    parser.add_argument("--turns", type=int, default=TURNS, help=f"of each (default {TURNS})")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"the file for the figures (default {RESULTS})")
    parser.add_argument("--plot", type=Path, default=PLOT, help=f"a file for a plot: PNG or SVG (default {PLOT})")
    parser.add_argument("--directory", type=Path, help="where the daemons keep their state (default: a temporary one)")
    options = parser.parse_args()
    figures: dict[int, Figures] = {}
    with (
        tempfile.TemporaryDirectory(prefix="taskd-bench-", dir=options.directory) as directory,
        closing(Queue(Path(directory) / "shortest", min(options.depths))) as shortest,
    ):
        for depth in options.depths:
            is_shortest = depth == shortest.depth
            with nullcontext(shortest) if is_shortest else closing(Queue(Path(directory) / str(depth), depth)) as queue:
                figures[depth] = compare(queue, shortest, options.turns)
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
