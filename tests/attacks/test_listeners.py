"""What is open on a machine with several interfaces: the peer port of schedulers, mDNS, and nothing else."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Daemon, eventually
from tests.integration.lan import Lan, lan, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]

LISTENING = "0A"  # As /proc/net/tcp writes it.
PEER_PORT, MDNS_PORT = 7710, 5353


@pytest.fixture
def network() -> Iterator[Lan]:
    """Two hosts, the first with a second interface."""
    with lan(2) as made:
        for command in (
            ("link", "add", "eth1", "type", "veth", "peer", "name", "eth1-end"),
            ("addr", "add", "10.98.0.1/24", "dev", "eth1"),
            ("link", "set", "eth1-end", "up"),
            ("link", "set", "eth1", "up"),
        ):
            subprocess.run(["ip", "-n", made.host(1), *command], check=True)
        yield made


def open_ports(network: Lan, number: int) -> set[tuple[str, int]]:
    """All that a host listens at: TCP ports, and UDP ports that are bound."""
    found = set()
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        text = subprocess.check_output([*network.prefix(number), "cat", f"/proc/net/{kind}"], text=True)
        for line in text.splitlines()[1:]:
            fields = line.split()
            port = int(fields[1].rpartition(":")[2], 16)
            if kind.startswith("udp") or fields[3] == LISTENING:
                found.add((kind[:3], port))
    return found


def test_a_scheduler_and_a_worker_open_no_other_port(tmp_path: Path, network: Lan) -> None:
    key = tmp_path / "key"
    scheduler = Daemon(tmp_path / "scheduler", key, "scheduler", prefix=network.prefix(1))
    worker = Daemon(tmp_path / "worker", key, "worker", prefix=network.prefix(2))
    assert open_ports(network, 1) == set()
    try:
        scheduler.start()
        worker.start()
        eventually(lambda: scheduler.ok("GET", "/v1/cluster")["workers"] == 1)
        (task_id,) = scheduler.submit({"argv": ["true"]})
        assert scheduler.wait([task_id])[task_id]["state"] == "succeeded"
        assert open_ports(network, 1) == {("tcp", PEER_PORT), ("udp", MDNS_PORT)}
        assert open_ports(network, 2) == {("udp", MDNS_PORT)}
    finally:
        for daemon in (worker, scheduler):
            if daemon.process is not None:
                daemon.stop()
    assert open_ports(network, 1) == set()
