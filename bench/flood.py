"""`make bench-flood`: what a flood of strangers at the leader's peer port does to those who work.

A leader, its standby and a worker; a client submits one task after the other, first in peace and then while other
processes, each from an address of its own, open more connections than the leader accepts: some say nothing, some talk
nonsense, some begin TLS and stop, some show a certificate of another cluster. They share the CPUs with the cluster, at
the lowest priority; what that alone costs is shown by a flood of the port of a process that has nothing to do with it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import select
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench import figures
from bench.ceilings import median, percentile
from bench.depth import rss_bytes
from bench.figures import Figure
from bench.run import HANDLERS, NOOP, cpu_s, lag_ms
from taskd.net import security
from taskd.protocol.messages import NodeInfo
from tests.integration.load import Load
from tests.integration.replicas import Replicas, replicas

ATTACKERS = 3
AT_ONCE = 64  # Connections of each attacker.
OPENED_PER_S = 2000.0  # By each of them, at most: in all more than a node accepts.
KINDS = ("silent", "nonsense", "half a handshake", "another cluster")
PATIENCE_S = 3.0
PAUSE_S = 0.005
LOWEST = 19
IP_BIND_ADDRESS_NO_PORT = 24  # Of Linux; Python 3.11 has no name for it.
REQUESTS_MIN = 500
BYSTANDER = """
import os, socket, struct
os.nice(19)
listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
print(listener.getsockname()[1], flush=True)
while True:
    end, _ = listener.accept()
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
"""


class Stranger:
    """One connection of an attacker, and how it ended."""

    def __init__(self, kind: str, address: tuple[str, int], source: str, context: ssl.SSLContext) -> None:
        self.kind = kind
        self.began_at = time.monotonic()
        self.end = ""
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        self.socket.bind((source, 0))
        self.socket.connect_ex(address)
        self._context = context
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        self._has_spoken = False

    def go_on(self) -> None:
        """Something came, or the connection is there: read it, and answer after the manner of its kind."""
        try:
            came = self.socket.recv(1 << 16)
            if not came:
                self.end = "closed"
            elif self.kind == "another cluster" or (self.kind == "half a handshake" and not self._has_spoken):
                self._handshake(came)
            elif self.kind == "nonsense" and not self._has_spoken:
                self._send(os.urandom(512))
        except BlockingIOError:
            pass
        except OSError:
            self.end = "refused"

    def _handshake(self, came: bytes) -> None:
        if self._tls is None:  # What came is the banner.
            self._tls = self._context.wrap_bio(self._incoming, self._outgoing)
        else:
            self._incoming.write(came)
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        self._send(self._outgoing.read())

    def _send(self, text: bytes) -> None:
        self._has_spoken = True
        self.socket.send(text)


def attack(host: str, port: int, source: str, seconds: float) -> Counter[str]:
    """Open connections until the time is up; how many of each kind ended how.

    On bare sockets, for what it costs here is taken from the CPUs of those it attacks.
    """
    node = NodeInfo(66, "stranger", ("scheduler",), bytes(16), 1, "flood")
    context = security.Credentials(security.SchedulerKey.generate(), node).client
    kinds = itertools.cycle(KINDS)
    poll = select.epoll()
    at_work: dict[int, Stranger] = {}
    done: Counter[str] = Counter()
    begun = now = time.monotonic()
    opened = 0

    def end(stranger: Stranger, how: str) -> None:
        done[f"{stranger.kind}: {how}"] += 1
        del at_work[stranger.socket.fileno()]
        stranger.socket.close()

    while now < begun + seconds:
        while len(at_work) < AT_ONCE and opened < (now - begun) * OPENED_PER_S:
            opened += 1
            stranger = Stranger(next(kinds), (host, port), source, context)
            at_work[stranger.socket.fileno()] = stranger
            poll.register(stranger.socket, select.EPOLLIN | select.EPOLLRDHUP)
        for number, _ in poll.poll(1 / OPENED_PER_S * 10):
            at_work[number].go_on()
            if at_work[number].end:
                end(at_work[number], at_work[number].end)
        now = time.monotonic()
        for stranger in [each for each in at_work.values() if each.began_at < now - PATIENCE_S]:
            end(stranger, "left open")
    return done


def submissions_s(made: Replicas, seconds: float) -> list[float]:
    """Seconds of each submission of one client, for so long and at least some hundred times."""
    with Load(made.history, made.schedulers[0], lambda: NOOP, pause_s=PAUSE_S) as load:
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(load.answers) < REQUESTS_MIN:
            time.sleep(0.1)
    return [answered - asked for asked, answered in load.answers]


@contextlib.contextmanager
def bystander() -> Iterator[str]:
    """The port of a process outside the cluster that refuses whatever comes."""
    with subprocess.Popen([sys.executable, "-c", BYSTANDER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


def flooded_s(made: Replicas, port: str, seconds: float) -> tuple[list[float], int]:
    """Seconds of each submission while attackers are at that port, and how many connections they opened."""
    command = [sys.executable, "-m", "bench.flood", "--attack", port, "--seconds", str(seconds)]
    attackers = [
        subprocess.Popen([*command, "--source", f"127.0.1.{number + 1}"], stdout=subprocess.PIPE, text=True)
        for number in range(ATTACKERS)
    ]
    found = submissions_s(made, seconds)
    return found, sum(int(attacker.communicate()[0].split()[-1]) for attacker in attackers)


def flood(directory: Path, seconds: float) -> tuple[list[Figure], list[str]]:
    """Figures, and what must not have happened."""
    with replicas(directory, 2, 1, env=HANDLERS) as made:
        leader = made.schedulers[0]
        submissions_s(made, 2)
        peace = submissions_s(made, max(10.0, seconds / 3))
        with bystander() as port:
            elsewhere, _ = flooded_s(made, port, max(10.0, seconds / 3))
        used, begun = cpu_s(leader), time.monotonic()
        flooded, attempts = flooded_s(made, made.addresses[0].rpartition(":")[2], seconds)
        cpu_share = (cpu_s(leader) - used) / (time.monotonic() - begun)
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
            Figure("submission in a flood elsewhere, p99", percentile(elsewhere, 99) * 1e3, "ms"),
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
        done = attack("127.0.0.1", options.attack, options.source, options.seconds)
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
