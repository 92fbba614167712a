"""Nodes on the loopback interface for the tests of the mesh: real sockets, real TLS, and a record of what is told."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from taskd.core.events import PeerDown, PeerUp, Received
from taskd.net.mesh import Mesh
from taskd.net.security import Key, SchedulerKey
from taskd.protocol.messages import Message, NodeInfo, Role

WAIT_S = 20.0  # Never reached, unless something is broken.
KEY = SchedulerKey(bytes(range(32)))
OTHER_KEY = SchedulerKey(bytes(range(1, 33)))


class Node:
    """One node's mesh, and what it tells."""

    def __init__(
        self,
        node_id: int,
        *roles: Role,
        key: Key = KEY,
        cluster: str = "home",
        join: Iterable[Node] = (),
        store_id: bytes = b"",
        boot: int = 0,
        port: int = 0,
        heartbeat_s: float = 0.1,
        peer_timeout_s: float = 2.0,
    ) -> None:
        self.info = NodeInfo(
            node_id, f"node{node_id}", roles, store_id or secrets.token_bytes(16), boot or secrets.randbits(62), "1.0"
        )
        self.events: list[PeerUp | PeerDown | Received] = []
        self.calls: list[tuple[int, Message]] = []
        self.lines: list[tuple[str, str, dict[str, Any]]] = []
        self._changed = asyncio.Event()
        self.mesh = Mesh(
            node=self.info,
            cluster=cluster,
            key=key,
            listen=(f"127.0.0.1:{port}",),
            join=[other.address for other in join],
            heartbeat_s=heartbeat_s,
            peer_timeout_s=peer_timeout_s,
            redial_max_s=0.2,
            random=Random(7),
            on_event=self._on_event,
            on_call=self._on_call,
            log=self._log,
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.mesh.port}"

    @property
    def peers(self) -> set[int]:
        return {peer.node.node_id for peer in self.mesh.peers()}

    @property
    def received(self) -> list[Message]:
        return [message for event in self.events if isinstance(event, Received) for message in event.messages]

    def ups(self) -> list[PeerUp]:
        return [event for event in self.events if isinstance(event, PeerUp)]

    def downs(self) -> list[PeerDown]:
        return [event for event in self.events if isinstance(event, PeerDown)]

    def refusals(self) -> list[str]:
        """The reasons in the log, in order."""
        return [fields["reason"] for _, text, fields in self.lines if text == "peer refused"]

    async def until(self, is_so: Callable[[], Any]) -> None:
        """Wait until what the mesh told makes it so."""
        async with asyncio.timeout(WAIT_S):
            while not is_so():
                self._changed.clear()
                await self._changed.wait()

    async def until_peers(self, *node_ids: int) -> None:
        await self.until(lambda: self.peers == set(node_ids))

    def _on_event(self, event: PeerUp | PeerDown | Received) -> None:
        self.events.append(event)
        self._changed.set()

    def _on_call(self, node_id: int, message: Message) -> None:
        self.calls.append((node_id, message))
        self._changed.set()

    def _log(self, level: str, text: str, **fields: Any) -> None:
        self.lines.append((level, text, fields))
        self._changed.set()


class Peers:
    """Starts nodes, and stops them in the end."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []

    async def start(self, node_id: int, *roles: Role, **options: Any) -> Node:
        node = Node(node_id, *roles, **options)
        await node.mesh.start()
        self._nodes.append(node)
        return node

    async def stop(self, node: Node, reason: str = "stopping") -> None:
        self._nodes.remove(node)
        await node.mesh.stop(reason)

    async def close(self) -> None:
        for node in self._nodes:
            await node.mesh.stop("the test is over")


async def until(is_so: Callable[[], Any]) -> None:
    """Wait until something is so that nobody tells."""
    async with asyncio.timeout(WAIT_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
