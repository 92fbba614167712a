"""Discovery: which addresses count, and two instances of mDNS that find each other without leaving the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ifaddr
import pytest

from taskd.net import discovery as discovery_module
from taskd.net.discovery import Discovery, lan_addresses
from taskd.protocol.messages import NodeInfo
from tests.net.peers import WAIT_S

HEAD = NodeInfo(1, "head", ("scheduler",), b"h" * 16, 11, "1.0")
HAND = NodeInfo(2, "hand", ("worker",), b"w" * 16, 22, "1.0")


def adapter(name: str, *ips: str | tuple[str, int, int]) -> ifaddr.Adapter:
    return ifaddr.Adapter(name, name, [ifaddr.IP(ip, 24, name) for ip in ips])


LOOPBACK = adapter("lo", "127.0.0.1", ("::1", 0, 0))
ETHERNET = adapter("eth0", "192.168.1.5", ("fe80::5", 0, 2), ("2001:db8::5", 0, 0))
WIRELESS = adapter("wlp3s0", "192.168.1.9")
DOCKER = adapter("docker0", "172.17.0.1")
VIRTUAL = [
    DOCKER,
    adapter("veth12ab", "10.9.0.1"),
    adapter("br-0f3c", "172.18.0.1"),
    adapter("virbr0", "192.168.122.1"),
]


@pytest.mark.parametrize(
    ("wanted", "adapters", "addresses"),
    [
        ((), [LOOPBACK, ETHERNET, WIRELESS], ["192.168.1.5", "192.168.1.9", "2001:db8::5"]),
        ((), [LOOPBACK, ETHERNET, *VIRTUAL], ["192.168.1.5", "2001:db8::5"]),
        ((), [LOOPBACK, *VIRTUAL], ["127.0.0.1", "::1"]),
        ((), [LOOPBACK], ["127.0.0.1", "::1"]),
        ((), [], []),
        (("docker0",), [LOOPBACK, ETHERNET, DOCKER], ["172.17.0.1"]),
        (("192.168.1.9", "lo"), [LOOPBACK, ETHERNET, WIRELESS], ["127.0.0.1", "192.168.1.9", "::1"]),
        (("eth7",), [LOOPBACK, ETHERNET], []),
    ],
    ids=["real ones", "no bridges", "bridges only", "alone", "nothing", "by name", "by address", "not there"],
)
def test_which_addresses_are_used(wanted: Sequence[str], adapters: list[ifaddr.Adapter], addresses: list[str]) -> None:
    assert lan_addresses(wanted, adapters) == addresses


class Listener:
    """Stands in for the mesh: it hears of hints."""

    def __init__(self, port: int = 7710, hosts: tuple[str, ...] = ("127.0.0.1",)) -> None:
        self.port = port
        self.hosts = hosts
        self.hints: asyncio.Queue[tuple[int, list[str]]] = asyncio.Queue()
        self.removed: asyncio.Queue[int] = asyncio.Queue()

    def add_hint(self, node_id: int, addresses: Sequence[str], name: str) -> None:
        self.hints.put_nowait((node_id, list(addresses)))

    def remove_hint(self, node_id: int, name: str) -> None:
        self.removed.put_nowait(node_id)


class Log:
    """What was logged."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[tuple[str, str, dict[str, Any]]] = asyncio.Queue()

    def __call__(self, level: str, text: str, **fields: Any) -> None:
        self.lines.put_nowait((level, text, fields))


@asynccontextmanager
async def discovering(node: NodeInfo, mesh: Listener, fingerprint: str, log: Log) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(Discovery(node, lambda: (fingerprint,), mesh, ("127.0.0.1",), log).run())
    try:
        yield task
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_worker_hears_of_a_scheduler_and_of_its_leaving() -> None:
    fingerprint = "0123456789abcdef"
    heard, unheard, log = Listener(), Listener(), Log()
    async with asyncio.timeout(WAIT_S), discovering(HAND, heard, fingerprint, log):
        async with discovering(HEAD, Listener(7711), fingerprint, log):
            assert await heard.hints.get() == (1, ["127.0.0.1:7711"])
            # One of another cluster hears the same record and passes it over; it is there when the second one is told.
            async with (
                discovering(HAND, unheard, "f" * 16, log),
                discovering(HAND, again := Listener(), fingerprint, log),
            ):
                assert await again.hints.get() == (1, ["127.0.0.1:7711"])
        assert await heard.removed.get() == 1
    assert unheard.hints.empty()
    assert log.lines.empty()


async def test_a_restart_on_another_port_is_told() -> None:
    fingerprint = "00000000000000aa"
    heard, log = Listener(), Log()
    async with asyncio.timeout(WAIT_S), discovering(HAND, heard, fingerprint, log):
        async with discovering(HEAD, Listener(7711), fingerprint, log):
            assert await heard.hints.get() == (1, ["127.0.0.1:7711"])
        assert await heard.removed.get() == 1
        async with discovering(HEAD, Listener(7712), fingerprint, log):
            assert await heard.hints.get() == (1, ["127.0.0.1:7712"])


async def test_no_failure_is_fatal_and_each_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery_module, "RESCAN_S", 0.001)
    tries = 0

    class Broken:
        def __init__(self, **_: Any) -> None:
            nonlocal tries
            tries += 1
            if tries < 5:
                raise OSError(19, "No such device")
            monkeypatch.undo()
            raise OSError(98, "Address already in use")

    monkeypatch.setattr(discovery_module, "AsyncZeroconf", Broken)
    log = Log()
    async with asyncio.timeout(WAIT_S), discovering(HEAD, Listener(), "f" * 16, log):
        first, second, third = [await log.lines.get() for _ in range(3)]
    assert [text for _, text, _ in (first, second)] == ["mDNS does not work; schedulers named by join are dialled"] * 2
    assert "No such device" in first[2]["reason"]
    assert "Address already in use" in second[2]["reason"]
    assert third[1] == "mDNS works again"


async def test_a_machine_without_network_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery_module, "lan_addresses", lambda _: [])
    log = Log()
    async with asyncio.timeout(WAIT_S), discovering(HEAD, Listener(), "f" * 16, log):
        level, _, fields = await log.lines.get()
    assert level == "warning"
    assert fields["reason"] == "no network interface has an address"
