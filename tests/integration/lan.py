"""A LAN on one machine: hosts are network namespaces with one interface each, on a bridge in a namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Hosts numbered from 1, with addresses 10.99.0.N."""

    def __init__(self, count: int) -> None:
        self._prefix = f"tk{os.getpid()}"
        self._switch = f"{self._prefix}-sw"
        self._count = count

    def host(self, number: int) -> str:
        """The name of a host's namespace."""
        return f"{self._prefix}-{number}"

    def prefix(self, number: int) -> tuple[str, ...]:
        """What to put before a command to run it on a host."""
        return ("ip", "netns", "exec", self.host(number))

    def up(self) -> None:
        """Build it."""
        _ip("netns", "add", self._switch)
        # Snooping would hold multicast back until somebody asks for it, and nobody here does.
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for number in range(1, self._count + 1):
            host, port = self.host(number), f"p{number}"
            _ip("netns", "add", host)
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", host, "addr", "add", f"10.99.0.{number}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")

    def cut(self, number: int) -> None:
        """Pull a host's cable."""
        _ip("-n", self._switch, "link", "set", f"p{number}", "down")

    def mend(self, number: int) -> None:
        """Put it back."""
        _ip("-n", self._switch, "link", "set", f"p{number}", "up")

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
