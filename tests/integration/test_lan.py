"""The LAN's faults are what they are called: each cuts what it says, nothing else, and can be mended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.integration.cluster import eventually
from tests.integration.lan import Lan, lan, why_not

REASON = why_not()
pytestmark = [pytest.mark.namespaces, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

# A host that sends its number to all hosts, and prints whom it has heard in the last 200 ms whenever it is asked.
HOST = """
import socket, sys, time
me, count = int(sys.argv[1]), int(sys.argv[2])
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.bind((f"10.99.0.{me}", 999))
for line in sys.stdin:
    heard = set()
    begun = time.monotonic()
    while time.monotonic() < begun + 0.2:
        for other in range(1, count + 1):
            try:
                own.sendto(b"%d" % me, (f"10.99.0.{other}", 999))
            except OSError:
                pass
        own.settimeout(0.01)
        try:
            while True:
                data = own.recv(10)
                if time.monotonic() > begun + 0.1:
                    heard.add(int(data))
        except OSError:
            pass
    print(*sorted(heard - {me}), flush=True)
"""
EVERYBODY = {1: {2, 3}, 2: {1, 3}, 3: {1, 2}}


class Hosts:
    """A process on each host."""

    def __init__(self, network: Lan) -> None:
        self._processes = [
            subprocess.Popen(
                [*network.prefix(number), sys.executable, "-c", HOST, str(number), "3"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for number in EVERYBODY
        ]  # fmt: skip

    def heard(self) -> dict[int, set[int]]:
        """Who hears whom just now."""
        for process in self._processes:
            assert process.stdin is not None
            print("?", file=process.stdin, flush=True)
        answers = {}
        for number, process in zip(EVERYBODY, self._processes, strict=True):
            assert process.stdout is not None
            answers[number] = {int(word) for word in process.stdout.readline().split()}
        return answers

    def close(self) -> None:
        for process in self._processes:
            process.communicate()


@pytest.fixture(scope="module")
def network() -> Iterator[Lan]:
    with lan(3) as made:
        yield made


@pytest.fixture(scope="module")
def all_hosts(network: Lan) -> Iterator[Hosts]:
    made = Hosts(network)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def hosts(all_hosts: Hosts, network: Lan) -> Iterator[Hosts]:
    eventually(lambda: all_hosts.heard() == EVERYBODY)
    yield all_hosts
    network.heal()


def test_a_cut_host_hears_nobody_and_is_not_heard(hosts: Hosts, network: Lan) -> None:
    network.cut(2)
    eventually(lambda: hosts.heard() == {1: {3}, 2: set(), 3: {1}})
    network.mend(2)
    eventually(lambda: hosts.heard() == EVERYBODY)


def test_one_direction_of_one_pair_is_cut(hosts: Hosts, network: Lan) -> None:
    network.cut_one_way(1, 2)
    eventually(lambda: hosts.heard() == {1: {2, 3}, 2: {3}, 3: {1, 2}})
    network.heal()
    eventually(lambda: hosts.heard() == EVERYBODY)


def test_groups_hear_only_their_own(hosts: Hosts, network: Lan) -> None:
    network.divide([1, 2], [3])
    eventually(lambda: hosts.heard() == {1: {2}, 2: {1}, 3: set()})
    network.divide([1], [2], [3])
    eventually(lambda: hosts.heard() == {1: set(), 2: set(), 3: set()})
    network.heal()
    eventually(lambda: hosts.heard() == EVERYBODY)


def test_a_flapping_link_comes_and_goes(hosts: Hosts, network: Lan) -> None:
    with network.flapping(1, period_s=2.0):
        for _ in range(2):
            eventually(lambda: hosts.heard() == {1: set(), 2: {3}, 3: {2}})
            eventually(lambda: hosts.heard() == EVERYBODY)
    eventually(lambda: hosts.heard() == EVERYBODY)
