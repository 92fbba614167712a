"""What somebody on the LAN can announce, in any form: each row is heard as said here, and the next honest announcement
still is."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import pytest_asyncio

from taskd.net import discovery as discovery_module
from taskd.net.discovery import ADDRESSES_PER_NAME_MAX, SERVICE, Discovery
from taskd.protocol.messages import NodeInfo

on_one_loop = pytest.mark.asyncio(loop_scope="module")

CLUSTER = "00000000000a77ac"
WE = NodeInfo(77, "we", ("worker",), b"w" * 16, 4711, "1.0")
WAIT_S = 20.0
NOTHING: list[tuple[int, int]] = []
_numbers = itertools.count(1)


def name(text: str) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in text.encode("latin-1").split(b".") if label) + b"\0"


def record(owner: bytes, kind: int, data: bytes, ttl: int = 120) -> bytes:
    return owner + struct.pack("!HHIH", kind, 0x8001 if kind != 12 else 1, ttl, len(data)) + data


def packet(*records: bytes, count: int | None = None) -> bytes:
    return struct.pack("!6H", 0, 0x8400, 0, len(records) if count is None else count, 0, 0) + b"".join(records)


def announcement(
    label: str = "",
    node_id: str = "5",
    *,
    cluster: str | None = CLUSTER,
    port: int = 7710,
    addresses: Sequence[str] = ("10.0.0.5",),
    ttl: int = 120,
    more: bytes = b"",
    boot: str = "1",
) -> bytes:
    label = label or f"{next(_numbers):032x}"
    owner, host = bytes([len(label)]) + label.encode("latin-1") + name(SERVICE), name(f"h{next(_numbers)}.local")
    words = [f"id={node_id}", f"boot={boot}"] + ([f"cluster={cluster}"] if cluster is not None else [])
    text = b"".join(bytes([len(word)]) + word.encode() for word in words) + more
    return packet(
        record(name(SERVICE), 12, owner, ttl), record(owner, 33, struct.pack("!3H", 0, 0, port) + host, ttl),
        record(owner, 16, text, ttl), *(record(host, 1, socket.inet_aton(address), ttl) for address in addresses),
    )  # fmt: skip


class Listener:
    """Stands in for the mesh: what it is told, in order."""

    port, hosts = 7710, ("127.0.0.1",)

    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self.removed: list[str] = []

    def add_hint(self, node_id: int, addresses: Sequence[str], name: str) -> None:
        self.told.put_nowait((node_id, len(addresses)))

    def remove_hint(self, node_id: int, name: str) -> None:
        self.removed.append(name)

    def add_twin(self, addresses: Sequence[str]) -> None:
        self.told.put_nowait((-1, len(addresses)))


class Lan:
    """One node that listens, and whoever sends."""

    def __init__(self) -> None:
        self.mesh = Listener()
        self.lines: list[str] = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))

    def send(self, *packets: bytes) -> None:
        for data in packets:
            self.socket.sendto(data, ("224.0.0.251", 5353))

    async def heard(self, *packets: bytes) -> list[tuple[int, int]]:
        """What is heard of these packets, by the time that an honest announcement after them is."""
        self.send(*packets)
        marker = 1_000_000 + next(_numbers)
        found: list[tuple[int, int]] = []
        while True:
            self.send(announcement(node_id=str(marker)))  # Under another name each time: one is told once.
            try:
                async with asyncio.timeout(2.0):
                    while (told := await self.mesh.told.get())[0] != marker:
                        found.append(told)
                    return [it for it in found if it[0] < 1_000_000]
            except TimeoutError:
                continue  # Sent before anybody listened, or among too many.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lan() -> AsyncIterator[Lan]:
    """One for all rows: it takes a second or two until anybody listens."""
    made = Lan()
    discovery = Discovery(
        WE, lambda: (CLUSTER,), made.mesh, ("127.0.0.1",), lambda level, text, **fields: made.lines.append(text)
    )
    task = asyncio.create_task(discovery.run())
    async with asyncio.timeout(WAIT_S):
        await made.heard()
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    made.socket.close()


LABEL, OWN = "ab" * 16, WE.store_id.hex()
QUESTION = struct.pack("!6H", 0, 0, 1, 0, 0, 0) + name(SERVICE) + b"\0\x0c\0\1"
LOOP = packet(record(b"\xc0\x0c", 12, b"\xc0\x0c"))
ATTACKS: dict[str, tuple[Callable[[], Sequence[bytes]], list[tuple[int, int]]]] = {
    "a scheduler, to compare": (lambda: [announcement()], [(5, 1)]),
    "another cluster": (lambda: [announcement(cluster="f" * 16)], NOTHING),
    "no cluster": (lambda: [announcement(cluster=None)], NOTHING),
    "many clusters": (lambda: [announcement(cluster=",".join(["x"] * 50))], NOTHING),
    "ours among many, as while keys are replaced": (lambda: [announcement(cluster=f"{'f' * 16},{CLUSTER}")], [(5, 1)]),
    "no id": (lambda: [announcement(node_id="")], NOTHING),
    "an id of words": (lambda: [announcement(node_id="five")], NOTHING),
    "an id below all": (lambda: [announcement(node_id="-5")], NOTHING),
    "the id 0": (lambda: [announcement(node_id="0")], NOTHING),
    "an id that is too great": (lambda: [announcement(node_id=str(1 << 63))], NOTHING),
    "an id of two hundred digits": (lambda: [announcement(node_id="9" * 200)], NOTHING),
    "a name of words": (lambda: [announcement("somebody")], NOTHING),
    "a name that is too short": (lambda: [announcement("a" * 31)], NOTHING),
    "a name of control characters": (lambda: [announcement("\x1b[2J\n\x00" + "a" * 26)], NOTHING),
    "a name of 63 bytes": (lambda: [announcement("a" * 63)], NOTHING),
    "our id under another name": (lambda: [announcement(node_id="77")], [(-1, 1)]),
    "our name from another process": (lambda: [announcement(OWN, "77")], [(-1, 1)]),
    "our name from this process": (lambda: [announcement(OWN, "77", boot="4711")], NOTHING),
    "no port": (lambda: [announcement(port=0)], NOTHING),
    "an address that is none": (lambda: [announcement(addresses=["0.0.0.0"])], NOTHING),
    "a group as address": (lambda: [announcement(addresses=["224.0.0.251"])], NOTHING),
    "everybody as address": (lambda: [announcement(addresses=["255.255.255.255"])], NOTHING),
    "forty addresses": (
        lambda: [announcement(addresses=[f"10.0.1.{number}" for number in range(40)])], [(5, ADDRESSES_PER_NAME_MAX)],
    ),
    "words without end": (lambda: [announcement(more=b"\xff" + b"x" * 255 + b"\x05abc")], [(5, 1)]),
    "words that say the id twice": (lambda: [announcement(more=b"\x04id=9")], [(5, 1)]),
    "a goodbye of nobody": (lambda: [announcement(ttl=0)], NOTHING),
    "a packet of nothing": (lambda: [b""], NOTHING),
    "half a header": (lambda: [b"\x00" * 7], NOTHING),
    "half a packet": (lambda: [announcement()[:60]], NOTHING),
    "a name that points at itself": (lambda: [LOOP] * 50, NOTHING),
    "more records than there are": (lambda: [packet(count=65535)], NOTHING),
    "noise": (lambda: [bytes((index * 7919 + n) % 256 for index in range(1400)) for n in range(50)], NOTHING),
    "two hundred questions": (lambda: [QUESTION] * 200, NOTHING),
}  # fmt: skip


@on_one_loop
@pytest.mark.parametrize(("attack", "expected"), ATTACKS.values(), ids=ATTACKS)
async def test_what_is_announced_is_heard_as_it_should(
    lan: Lan, attack: Callable[[], Sequence[bytes]], expected: list[tuple[int, int]]
) -> None:
    async with asyncio.timeout(WAIT_S):
        assert list(dict.fromkeys(await lan.heard(*attack()))) == expected
    assert lan.lines == []


@on_one_loop
async def test_a_name_that_moves_to_another_node_takes_its_hint_back(lan: Lan) -> None:
    async with asyncio.timeout(WAIT_S):
        assert await lan.heard(announcement(LABEL, "5")) == [(5, 1)]
        assert (6, 1) in await lan.heard(announcement(LABEL, "6"))
    assert lan.mesh.removed == [LABEL]


@on_one_loop
async def test_a_flood_of_announcements_is_listened_to_for_a_moment_only(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one: nobody listens any more afterwards."""
    monkeypatch.setattr(discovery_module, "HEARD_PER_S_MAX", 30)
    text = "mDNS does not work; schedulers named by join are dialled"
    async with asyncio.timeout(WAIT_S):
        while text not in lan.lines:
            lan.send(*[announcement(node_id=str(number + 10)) for number in range(50)])
            await asyncio.sleep(0.05)


def test_the_table_is_long_enough() -> None:
    assert len(ATTACKS) >= 25
