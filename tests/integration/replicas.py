"""Clusters of several schedulers: on loopback, or each daemon on a host of a LAN of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.cluster import LOOPBACK, Cluster, Daemon, eventually, free_port
from tests.integration.conftest import HANDLERS
from tests.integration.history import History, Report
from tests.integration.lan import Lan

WORKER_ID = 100  # Workers have the ids above it, schedulers 1, 2, 3 …

# Tests are about what happens, not about how long somebody who watches would wait for it.
QUICK = {"TASKD_SCHEDULER_HAND_OVER_AFTER_S": "0", "TASKD_SCHEDULER_EMPTY_WAIT_S": "2"}


class Replicas(Cluster):
    """Schedulers 1, 2, … with these as node ids, workers 1, 2, …, and what their clients know."""

    def __init__(self, directory: Path, lan: Lan | None = None) -> None:
        super().__init__(directory)
        self.history = History(directory)
        self.schedulers: list[Daemon] = []
        self.workers: list[Daemon] = []
        self._lan = lan
        self._join: list[str] = []

    def build(self, schedulers: int, workers: int, env: dict[str, str] | None = None) -> Replicas:
        """Start them all, and wait until scheduler 1 leads, its standbys are in sync, and all workers are there.

        On a LAN, hosts 1, 2, … are the schedulers, then come the workers; they find each other by mDNS, as users' do.
        """
        self.env = {**QUICK, **HANDLERS, **(env or {})}
        if self._lan is None:
            ports = [free_port() for _ in range(schedulers)]
            self._join = [f"127.0.0.1:{port}" for port in ports]
            self.env |= {**LOOPBACK, "TASKD_NETWORK_MDNS": "false"}
        for number in range(1, schedulers + 1):
            self.add_scheduler(number)
        for number in range(1, workers + 1):
            self.add_worker(number, host=schedulers + number)
        self.schedulers[0].start()  # It makes the key.
        for daemon in self.daemons[1:]:
            daemon.start(wait=False)
        for daemon in self.daemons[1:]:
            daemon.wait_ready()
        self.wait_until_whole()
        return self

    def add_scheduler(self, number: int, name: str = "", host: int = 0) -> Daemon:
        """A scheduler that is not started yet; `name` and `host` where it is not the only one of that number."""
        while self._join and not name and len(self._join) < number:  # One that comes later: it dials the others.
            self._join.append(f"127.0.0.1:{free_port()}")
        others = [address for index, address in enumerate(self._join, 1) if index != number or name]
        options = [option for address in others for option in ("--join", address)]
        if self._join and not name:
            options += ["--listen", self._join[number - 1]]
        made = self._add(name or f"scheduler{number}", "scheduler", number, host or number, *options)
        if not name:
            self.schedulers.append(made)
        return made

    def add_worker(self, number: int, host: int) -> Daemon:
        """A worker that is not started yet."""
        options = [option for address in self._join for option in ("--join", address)]
        self.workers.append(self._add(f"worker{number}", "worker", WORKER_ID + number, host, *options))
        return self.workers[-1]

    def _add(self, name: str, role: str, node_id: int, host: int, *options: str) -> Daemon:
        prefix = self._lan.prefix(host) if self._lan is not None else ()
        return self.add(name, role, "--node-id", str(node_id), *options, prefix=prefix)

    def drop(self, daemon: Daemon) -> None:
        """A daemon that is no part of the cluster any more, ended where it has not."""
        if daemon.process is not None:
            daemon.kill()
        self.daemons.remove(daemon)

    @property
    def addresses(self) -> list[str]:
        """Where the schedulers listen, HOST:PORT, on loopback."""
        return self._join

    @property
    def live(self) -> list[Daemon]:
        """The daemons whose processes run."""
        return [daemon for daemon in self.daemons if daemon.process is not None]

    @property
    def stores(self) -> list[Path]:
        """The databases of all schedulers."""
        return [store_of(daemon) for daemon in self.schedulers]

    def wait_leader(self, number: int, *seen_by: Daemon) -> None:
        """Wait until these daemons, or else all that run, follow that scheduler."""
        nodes = seen_by or tuple(self.live)
        eventually(lambda: all(leader_at(node) == number for node in nodes))

    def wait_in_sync(self, *numbers: int) -> None:
        """Wait until the standbys of these numbers are in sync with the leader that they follow."""
        for number in numbers:
            standby = self.schedulers[number - 1]
            eventually(lambda standby=standby, number=number: replication(standby, number) == "in_sync")

    def wait_until_whole(self) -> None:
        """Wait until scheduler 1 leads, all others are in sync with it, and it has all workers."""
        self.wait_leader(1)
        self.wait_in_sync(*range(2, len(self.schedulers) + 1))
        leader = self.schedulers[0]
        eventually(lambda: leader.ok("GET", "/v1/cluster")["workers"] >= len(self.workers))

    def settle(self, timeout_s: float = 60) -> Report:
        """Wait until every task has ended, alike in all stores; nothing may be lost, doubled, or different."""
        report = self.history.settle(self.stores, timeout_s)
        print(report.figures)
        assert not report.faults, (report.faults, report.figures)
        return report


def store_of(daemon: Daemon) -> Path:
    """A scheduler's database."""
    return daemon.home / "scheduler" / "taskd.db"


def wipe(daemon: Daemon) -> None:
    """What a new disk is like. The daemon must have ended; its process that writes may just be about to."""
    assert daemon.process is None
    old = daemon.home / daemon.role
    old.rename(Path(tempfile.mkdtemp(prefix="old-", dir=daemon.home)) / daemon.role)


def leader_at(node: Daemon) -> int | None:
    """Whom a node follows."""
    try:
        leader: int | None = node.ok("GET", "/v1/cluster?own=1")["leader"]
    except OSError:
        return None  # It is only just starting.
    return leader


def replication(leader: Daemon, standby: int) -> str | None:
    """How far a scheduler's copy is, as the leader says: leading, in_sync, catching_up, away."""
    views = leader.ok("GET", "/v1/cluster")["replicas"]
    word: str | None = next((view["replication"] for view in views if view["node_id"] == standby), None)
    return word


def long_command(pids: Path, release: Path) -> str:
    """Shell that notes its process in a file, and goes on until another file is there."""
    return f"echo $$ >> {pids}; until [ -e {release} ]; do sleep 0.05; done"


@contextmanager
def replicas(
    directory: Path, schedulers: int, workers: int, lan: Lan | None = None, env: dict[str, str] | None = None
) -> Iterator[Replicas]:
    """A cluster that works, ended again."""
    made = Replicas(directory, lan)
    try:
        yield made.build(schedulers, workers, env)
    finally:
        made.close()
