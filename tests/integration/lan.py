"""A LAN on one machine: hosts are network namespaces with one interface each, on bridges in a namespace of its own.

Its faults need nothing but `ip`: neither filters nor shapers of packets are in every kernel. A cable is pulled at the
switch; a LAN is divided by moving cables to another bridge, which nobody's interface notices; and one direction between
two hosts is cut by having the sender believe in a wrong hardware address.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

NOBODY = "02:00:00:00:00:01"  # A hardware address that no interface has.

_numbers = itertools.count(1)


def why_not() -> str | None:
    """Why this machine does not permit it, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program `ip` (package iproute2) is missing"
    probe = f"taskd-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    try:
        veth = ["ip", "-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "two"]
        bridge = ["ip", "-n", probe, "link", "add", "three", "type", "bridge"]
        for command in (veth, bridge):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                return f"veth or bridge interfaces are not permitted: {result.stderr.strip()}"
    finally:
        _ip("netns", "del", probe)
    return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Lan:
    """Hosts numbered from 1, with addresses 10.99.0.N. No IPv6: then one direction is cut with one address."""

    def __init__(self, count: int) -> None:
        self._prefix = f"tk{os.getpid()}-{next(_numbers)}"
        self._switch = f"{self._prefix}-sw"
        self._count = count
        self._bridges = 0
        self._one_way: list[tuple[int, int]] = []

    def host(self, number: int) -> str:
        """The name of a host's namespace."""
        return f"{self._prefix}-{number}"

    def prefix(self, number: int) -> tuple[str, ...]:
        """What to put before a command to run it on a host."""
        return ("ip", "netns", "exec", self.host(number))

    def up(self) -> None:
        """Build it."""
        _ip("netns", "add", self._switch)
        bridge = self._bridge(0)
        for number in range(1, self._count + 1):
            host, port = self.host(number), f"p{number}"
            _ip("netns", "add", host)
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", self._switch, "link", "set", port, "master", bridge, "up")
            _ip("-n", host, "link", "set", "eth0", "addrgenmode", "none")
            _ip("-n", host, "addr", "add", f"10.99.0.{number}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")

    def _bridge(self, index: int) -> str:
        """The name of one of the bridges, made where it is new."""
        name = f"br{index}"
        if index >= self._bridges:
            # Snooping would hold multicast back until somebody asks for it, and nobody here does.
            _ip("-n", self._switch, "link", "add", name, "type", "bridge", "mcast_snooping", "0")
            _ip("-n", self._switch, "link", "set", name, "up")
            self._bridges = index + 1
        return name

    def cut(self, number: int) -> None:
        """Pull a host's cable."""
        _ip("-n", self._switch, "link", "set", f"p{number}", "down")

    def mend(self, number: int) -> None:
        """Put it back."""
        _ip("-n", self._switch, "link", "set", f"p{number}", "up")

    @contextmanager
    def flapping(self, number: int, period_s: float = 1.0) -> Iterator[None]:
        """A host's cable is pulled and put back again and again, and is in place at the end."""
        is_over = threading.Event()

        def flap() -> None:
            while not is_over.is_set():
                self.cut(number)
                is_over.wait(period_s / 2)
                self.mend(number)
                is_over.wait(period_s / 2)

        thread = threading.Thread(target=flap)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def cut_one_way(self, sender: int, receiver: int) -> None:
        """What `sender` sends to `receiver` gets lost, in silence; the other direction works."""
        self._one_way.append((sender, receiver))
        _ip(
            "-n", self.host(sender), "neigh", "replace", f"10.99.0.{receiver}", "lladdr", NOBODY,
            "nud", "permanent", "dev", "eth0",
        )  # fmt: skip

    def divide(self, *groups: Collection[int]) -> None:
        """Only hosts of one group hear each other; those in no group are with the first."""
        for index, group in enumerate(groups):
            bridge = self._bridge(index)
            for number in group:
                _ip("-n", self._switch, "link", "set", f"p{number}", "master", bridge)

    def heal(self) -> None:
        """Everybody hears everybody again: cables, directions, bridges."""
        for sender, receiver in self._one_way:
            _ip("-n", self.host(sender), "neigh", "del", f"10.99.0.{receiver}", "dev", "eth0")
        self._one_way.clear()
        for number in range(1, self._count + 1):
            _ip("-n", self._switch, "link", "set", f"p{number}", "master", "br0", "up")

    def down(self) -> None:
        """Take it away; processes in it must have ended."""
        for name in [self._switch, *(self.host(number) for number in range(1, self._count + 1))]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextmanager
def lan(count: int) -> Iterator[Lan]:
    """A LAN for the length of a test."""
    made = Lan(count)
    try:
        made.up()
        yield made
    finally:
        made.down()
