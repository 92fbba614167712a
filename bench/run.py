"""`make bench-run`: what taskd does on this machine, durable and over TLS, beside what the machine itself can do.

Daemons are real processes on loopback with their defaults: every acceptance and every result is on the disk before
anyone hears of it. Prints a table and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from bench import ceilings, client, figures
from bench.ceilings import median, percentile
from bench.figures import Figure
from tests.integration.cluster import Cluster, Daemon, cluster
from tests.integration.replicas import Replicas

HANDLERS = {"TASKD_WORKER_HANDLERS": "bench_handlers", "TASKD_WORKER_HANDLER_PATH": str(Path(__file__).parent)}
NOOP: client.Task = {"type": "noop", "params": {}}
TRUE: client.Task = {"argv": ["/bin/true"]}
WARM = 5_000
AT_ONCE = 64  # Connections of many clients with one task each.
LOAD = 0.5
SHELL_RUNS = 20
ROUNDS = 5  # Of commands; their median counts.


def cpu_s(daemon: Daemon) -> float:
    """Seconds of CPU that a daemon's own process has used."""
    assert daemon.process is not None
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lag_ms(daemon: Daemon) -> float:
    """What 99 % of the samples of the event loop's lateness do not exceed, as far as its histogram tells."""
    _, text = daemon.ask("GET", "/metrics")
    counts = {}
    for line in text.splitlines():
        if line.startswith("taskd_event_loop_lag_seconds_bucket"):
            bound = line.partition('le="')[2].partition('"')[0]
            counts[float(bound)] = float(line.rpartition(" ")[2])
    total = max(counts.values())
    return min(bound for bound, count in counts.items() if count >= 0.99 * total) * 1e3


def spread(name: str, samples: list[float], ceiling: list[float], ceiling_name: str) -> Iterator[Figure]:
    """Percentiles in milliseconds, each beside that of the ceiling's samples."""
    for percent in (50, 99, 99.9):
        value, beside = percentile(samples, percent) * 1e3, percentile(ceiling, percent) * 1e3
        yield Figure(f"{name}, p{percent:g}", value, "ms", beside, f"{ceiling_name} p{percent:g}")


@contextmanager
def with_standby(directory: Path) -> Iterator[Cluster]:
    """A leader, a standby in sync, and two workers."""
    made = Replicas(directory)
    try:
        yield made.build(2, 2, {**HANDLERS, "TASKD_WORKER_SLOTS": "1"})
    finally:
        made.close()


def rates(directory: Path, scale: float) -> Iterator[Figure]:
    """How many tasks get through."""
    count = max(client.BATCH, int(60_000 * scale))
    rows_per_s = ceilings.sqlite_rows_per_s(directory)
    ceiling = rows_per_s, "rows into SQLite"
    with cluster(directory / "one", 1, env={**HANDLERS, "TASKD_WORKER_SLOTS": "2"}) as made:
        client.throughput(made.head, NOOP, WARM)
        rate = client.throughput(made.head, NOOP, count)
        yield Figure("durable no-ops, one worker", rate, "/s", *ceiling)
    with cluster(directory / "two", 2, env={**HANDLERS, "TASKD_WORKER_SLOTS": "1"}) as made:
        client.throughput(made.head, NOOP, WARM)
        used = cpu_s(made.head)
        alone = client.throughput(made.head, NOOP, count)
        yield Figure("durable no-ops, two workers", alone, "/s", *ceiling)
        yield Figure("  CPU of the leader for each", (cpu_s(made.head) - used) / count * 1e6, "µs")
        yield Figure("  event loop late, p99 at most", lag_ms(made.head), "ms")
        yield Figure("durable submissions in bulk", client.submissions(made.head, 2 * count), "/s", *ceiling)
    with with_standby(directory / "standby") as made:
        client.throughput(made.head, NOOP, WARM)
        rate = client.throughput(made.head, NOOP, count)
        yield Figure("two workers and a standby", rate, "/s", alone, "without it")


def latencies(directory: Path, scale: float) -> Iterator[Figure]:
    """How long one task takes, alone and at half of what many clients with one task each can get through."""
    syncs = ceilings.fdatasync_s(directory)
    echoes = uvloop.run(ceilings.tls_echo_s())
    with cluster(directory / "latency", 2, env={**HANDLERS, "TASKD_WORKER_SLOTS": "1"}) as made:
        client.throughput(made.head, NOOP, WARM)
        samples = client.latencies_s(made.head, NOOP, max(100, int(3_000 * scale)))
        yield from spread("one task after the other", samples, syncs, "fdatasync")
        most = uvloop.run(client.closed_loop_per_s(made.head, NOOP, AT_ONCE, 5 * min(scale, 1)))
        yield Figure(f"one task a request, {AT_ONCE} clients", most, "/s")
        count = max(500, int(15_000 * scale))
        samples = uvloop.run(client.open_loop_s(made.head, NOOP, LOAD * most, 4 * AT_ONCE, count))
        yield from spread(f"at {LOAD:.0%} of that, open loop", samples, echoes, "TLS echo")


def commands(directory: Path, scale: float) -> Iterator[Figure]:
    """Commands that do nothing, beside processes that do nothing, in turn: what the machine can do changes by the
    second."""
    count = max(client.BATCH, int(4_000 * scale))
    rates, spawns = [], [ceilings.spawns_per_s()]
    with cluster(directory / "commands", 1, env={"TASKD_WORKER_SLOTS": "4"}) as made:
        client.throughput(made.head, TRUE, client.BATCH)
        for _ in range(ROUNDS):
            rates.append(client.throughput(made.head, TRUE, count))
            spawns.append(ceilings.spawns_per_s())
    yield Figure("commands (true)", median(rates), "/s", median(spawns), "fork+exec of true")


def shell(directory: Path, scale: float) -> Iterator[Figure]:
    """`taskd submit` as typed, beside Python that does nothing."""
    taskd = str(Path(sys.executable).with_name("taskd"))
    with cluster(directory / "shell", 1) as made:
        line = [taskd, "submit", "--socket", str(made.head.socket), "--", "true"]
        submit = wall_ms(line)
    bare = wall_ms([sys.executable, "-c", "pass"])
    yield Figure(f"taskd submit, median of {SHELL_RUNS}", submit, "ms", bare, "python -c pass")


def wall_ms(command: list[str]) -> float:
    """The median of some runs."""
    samples = []
    for _ in range(SHELL_RUNS):
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        samples.append(time.perf_counter() - begun)
    return median(samples) * 1e3


PARTS = {"rates": rates, "latencies": latencies, "commands": commands, "shell": shell}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="fewer or more tasks (default 1)")
    parser.add_argument("--json", type=Path, default=figures.RESULTS / "run.json", help="the file for the figures")
    parser.add_argument("--directory", type=Path, help="where the daemons keep their state (default: a temporary one)")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="taskd-bench-", dir=options.directory) as directory:
        for name in options.parts or PARTS:
            for figure in PARTS[name](Path(directory), options.scale):
                found.append(figure)
                print(f"{figure.name}: {figures.text(figure.value)} {figure.unit}", file=sys.stderr)
    figures.show("taskd, fsync and TLS on", found)
    figures.keep(found, options.json)


if __name__ == "__main__":
    main()
