"""`make bench`: what taskd does on this machine, durable and over TLS, beside what the machine itself can do.

Starts one scheduler and two workers as real processes on loopback, with their defaults: every acceptance and every
result is on the disk before anyone hears of it. Prints a table; `--json FILE` writes the figures.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from bench import ceilings
from bench.ceilings import median, percentile
from tests.integration.cluster import Cluster, UnixConnection, cluster

BATCH = 1000
HANDLERS = {"TASKD_WORKER_HANDLERS": "bench_handlers", "TASKD_WORKER_HANDLER_PATH": str(Path(__file__).parent)}


class Client:
    """One kept connection to a daemon's socket, as lean as can be, so that the daemons are what is measured."""

    def __init__(self, path: Path) -> None:
        self._connection: http.client.HTTPConnection = UnixConnection(path, 120)

    def post(self, path: str, body: bytes) -> bytes:
        self._connection.request("POST", path, body)
        response = self._connection.getresponse()
        raw = response.read()
        assert response.status == 200, raw
        return raw

    def lines(self, path: str, body: bytes) -> int:
        """The number of lines of a streamed answer, read to its end."""
        self._connection.request("POST", path, body)
        response = self._connection.getresponse()
        assert response.status == 200, response.read()
        count = 0
        while chunk := response.read1(1 << 20):
            count += chunk.count(b"\n")
        return count

    def close(self) -> None:
        self._connection.close()


def batch_of(task: dict[str, Any], count: int) -> bytes:
    return json.dumps([task] * count).encode()


def throughput(made: Cluster, task: dict[str, Any], count: int) -> float:
    """Tasks per second, from the first submission until every result is known to the client."""
    client = Client(made.head.socket)
    ids: list[str] = []
    body = batch_of(task, BATCH)
    begun = time.perf_counter()
    for _ in range(count // BATCH):
        ids += json.loads(client.post("/v1/tasks", body))["ids"]
    known = client.lines("/v1/tasks/wait", json.dumps({"ids": ids, "timeout": 600, "stream": True}).encode())
    seconds = time.perf_counter() - begun
    client.close()
    assert known >= count, (known, count)
    return count / seconds


def submissions(made: Cluster, count: int) -> float:
    """Durable submissions per second in bulk, of tasks that no worker runs yet; they are cancelled afterwards."""
    client = Client(made.head.socket)
    body = batch_of({"type": "noop", "params": {}, "delay": 3600, "queue": "later"}, BATCH)
    begun = time.perf_counter()
    for _ in range(count // BATCH):
        client.post("/v1/tasks", body)
    seconds = time.perf_counter() - begun
    client.post("/v1/tasks/cancel", json.dumps({"queues": ["later"]}).encode())
    client.close()
    return count / seconds


def latencies(made: Cluster, task: dict[str, Any], count: int = 300) -> list[float]:
    """Seconds from submission to result of single tasks, one after the other, on one connection."""
    client = Client(made.head.socket)
    body = json.dumps(task).encode()
    samples = []
    for _ in range(count):
        begun = time.perf_counter()
        answer = client.post("/v1/tasks?wait=30", body)
        samples.append(time.perf_counter() - begun)
        assert b'"succeeded"' in answer, answer
    client.close()
    return samples


def cpu_s(made: Cluster) -> float:
    """Seconds of CPU that the scheduler's process has used."""
    assert made.head.process is not None
    fields = Path(f"/proc/{made.head.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(directory: Path, scale: float) -> dict[str, float]:
    """All figures of one run."""
    figures: dict[str, float] = {}
    syncs = ceilings.fdatasync_s(directory)
    figures["fdatasync p50 ms"] = median(syncs) * 1e3
    figures["fdatasync p99 ms"] = percentile(syncs, 99) * 1e3
    figures["fork+exec of true /s"] = ceilings.spawns_per_s()
    echoes = uvloop.run(ceilings.tls_echo_s())
    figures["TLS echo p50 ms"] = median(echoes) * 1e3

    count = max(BATCH, int(30_000 * scale) // BATCH * BATCH)
    with cluster(directory / "handlers", 2, env={**HANDLERS, "TASKD_WORKER_SLOTS": "1"}) as made:
        throughput(made, {"type": "noop", "params": {}}, BATCH * 2)  # Warm.
        used = cpu_s(made)
        figures["no-op handler tasks /s"] = throughput(made, {"type": "noop", "params": {}}, count)
        figures["scheduler CPU µs per task"] = (cpu_s(made) - used) / count * 1e6
        figures["bulk submissions /s"] = submissions(made, count)
        samples = latencies(made, {"type": "noop", "params": {}})
        figures["round trip p50 ms"] = median(samples) * 1e3
        figures["round trip p99 ms"] = percentile(samples, 99) * 1e3
    commands = max(BATCH, int(4_000 * scale) // BATCH * BATCH)
    with cluster(directory / "commands", 1, env={"TASKD_WORKER_SLOTS": "4"}) as made:
        throughput(made, {"argv": ["/bin/true"]}, BATCH)
        figures["command tasks (true) /s"] = throughput(made, {"argv": ["/bin/true"]}, commands)
    figures["commands / fork+exec"] = figures["command tasks (true) /s"] / ceilings.spawns_per_s()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="fewer or more tasks (default 1)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--directory", type=Path, help="where the daemons keep their state (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="taskd-bench-", dir=options.directory) as directory:
        figures = measure(Path(directory), options.scale)
    table = Table(title=f"taskd on {os.cpu_count()} CPUs, Python {platform.python_version()}, fsync and TLS on")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.0f}" if value >= 100 else f"{value:,.2f}")
    Console(file=sys.stdout).print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
