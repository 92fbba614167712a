"""`make bench-flood`: what a flood of strangers at the leader's peer port does to those who work.

A leader, its standby and a worker; a client submits one task after the other, first in peace and then while other
processes, each from an address of its own, open connections as fast as they can: some say nothing, some talk nonsense,
some begin TLS and stop, some show a certificate of another cluster. They share the CPUs with the cluster, at the
lowest priority, so that what is measured is what the leader has to do about them and not that they are there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import uvloop

from bench import figures
from bench.ceilings import median, percentile
from bench.depth import rss_bytes
from bench.figures import Figure
from bench.run import HANDLERS, NOOP, cpu_s, lag_ms
from taskd.net import security
from taskd.net.connection import BANNER
from taskd.protocol.messages import NodeInfo
from tests.integration.load import Load
from tests.integration.replicas import Replicas, replicas

ATTACKERS = 3
AT_ONCE = 64  # Connections of each attacker.
PATIENCE_S = 3.0
PAUSE_S = 0.005
LOWEST = 19
REQUESTS_MIN = 500


async def attack(host: str, port: int, source: str, seconds: float) -> Counter[str]:
    """Open connections until the time is up; how many of each kind ended how."""
    node = NodeInfo(66, "stranger", ("scheduler",), bytes(16), 1, "flood")
    context = security.Credentials(security.SchedulerKey.generate(), node).client
    end = time.monotonic() + seconds
    done: Counter[str] = Counter()

    async def one(kind: str) -> None:
        reader, writer = await asyncio.open_connection(host, port, local_addr=(source, 0))
        try:
            if kind == "nonsense":
                writer.write(os.urandom(512))
            elif kind == "half a handshake":
                await reader.readexactly(len(BANNER))
                outgoing = ssl.MemoryBIO()
                half = context.wrap_bio(ssl.MemoryBIO(), outgoing)
                with contextlib.suppress(ssl.SSLWantReadError):
                    half.do_handshake()
                writer.write(outgoing.read())
            elif kind == "another cluster":
                await reader.readexactly(len(BANNER))
                await writer.start_tls(context)
            while await reader.read(1 << 16):
                pass
        finally:
            writer.close()

    async def work(number: int) -> None:
        kinds = ("silent", "nonsense", "half a handshake", "another cluster")
        while time.monotonic() < end:
            number += 1
            kind = kinds[number % len(kinds)]
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await one(kind)
                done[f"{kind}: closed"] += 1
            except TimeoutError:
                done[f"{kind}: left open"] += 1
            except (OSError, asyncio.IncompleteReadError):
                done[f"{kind}: refused"] += 1

    async with asyncio.TaskGroup() as group:
        for number in range(AT_ONCE):
            group.create_task(work(number))
    return done


def submissions_s(made: Replicas, seconds: float) -> list[float]:
    """Seconds of each submission of one client, for so long and at least some hundred times."""
    with Load(made.history, made.schedulers[0], lambda: NOOP, pause_s=PAUSE_S) as load:
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(load.answers) < REQUESTS_MIN:
            time.sleep(0.1)
    return [answered - asked for asked, answered in load.answers]


def flood(directory: Path, seconds: float) -> tuple[list[Figure], list[str]]:
    """Figures, and what must not have happened."""
    with replicas(directory, 2, 1, env=HANDLERS) as made:
        leader = made.schedulers[0]
        port = made.addresses[0].rpartition(":")[2]
        submissions_s(made, 2)
        peace = submissions_s(made, max(10.0, seconds / 3))
        used, begun = cpu_s(leader), time.monotonic()
        command = [sys.executable, "-m", "bench.flood", "--attack", port, "--seconds", str(seconds)]
        attackers = [
            subprocess.Popen(
                [*command, "--source", f"127.0.1.{number + 1}"], stdout=subprocess.PIPE, text=True,
            )
            for number in range(ATTACKERS)
        ]  # fmt: skip
        flooded = submissions_s(made, seconds)
        cpu_share = (cpu_s(leader) - used) / (time.monotonic() - begun)
        attempts = sum(int(attacker.communicate()[0].split()[-1]) for attacker in attackers)
        view = leader.ok("GET", "/v1/cluster")
        lost = sum(
            daemon.log.read_text().count(word)
            for daemon in made.daemons
            for word in ("worker lost", "durability is local")
        )
        wrong = [f"{made.history.errors()[:3]}"] if made.history.errors() else []
        if view["term"] != 1 or view["leader"] != 1:
            wrong.append(f"the leader changed: {view['leader']} {view['term']}")
        if lost:
            wrong.append(f"{lost} times a peer was taken for dead")
        found = [
            Figure("connections of strangers", attempts / seconds, "a second"),
            Figure("submission in peace, p50", median(peace) * 1e3, "ms"),
            Figure("submission in peace, p99", percentile(peace, 99) * 1e3, "ms"),
            Figure("submission in the flood, p50", median(flooded) * 1e3, "ms"),
            Figure("submission in the flood, p99", percentile(flooded, 99) * 1e3, "ms"),
            Figure("  times that in peace", percentile(flooded, 99) / percentile(peace, 99), "", 3.0, "at most"),
            Figure("leader's CPU in the flood", 100 * cpu_share, "% of one"),
            Figure("leader's event loop late, p99 at most", lag_ms(leader), "ms"),
            Figure("leader's memory", rss_bytes(leader) / 2**20, "MiB"),
            Figure("peers taken for dead", lost, ""),
        ]
    return found, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.flood", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the flood lasts (default 60)")
    parser.add_argument("--json", type=Path, default=figures.RESULTS / "flood.json", help="the file for the figures")
    parser.add_argument("--attack", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        os.nice(LOWEST)
        done = uvloop.run(attack("127.0.0.1", options.attack, options.source, options.seconds))
        print(dict(done), file=sys.stderr)
        print(sum(done.values()))
        return 0
    with tempfile.TemporaryDirectory(prefix="taskd-flood-") as directory:
        found, wrong = flood(Path(directory), options.seconds)
    figures.show("A flood of strangers", found)
    figures.keep(found, options.json)
    for text in wrong:
        print(f"WRONG: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
