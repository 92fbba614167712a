"""All connections of one node: who is dialled, who may come in, one connection a pair, and redialling for ever.

Workers dial every scheduler they hear of; of two schedulers the one with the higher node id dials. What discovery says
is a hint of addresses; who is there, the certificate says.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import Any

from msgspec import Struct

from taskd.core.events import Collided, PeerDown, PeerUp, Received
from taskd.errors import ConfigError
from taskd.net.connection import Connection, address_text, monotonic
from taskd.net.security import Credentials, Key
from taskd.protocol import messages as msg

PORT_DEFAULT = 7710
ALL_ADDRESSES = ("", "*", "::", "0.0.0.0")  # noqa: S104  # TLS with mutual certificates is the guard, not the address
HALF_OPEN_MAX = 64  # Accepted connections that have not said hello yet; strangers can hold no more.
HINTS_MAX = 1000  # Schedulers that are looked for: anybody on the LAN can announce as many as they like.
DIAL_TIMEOUT_S = 3.0
DIAL_STAGGER_S = 0.1  # Before the next address of a node is tried beside the last one.
REDIAL_MIN_S = 0.05
REDIAL_OFTEN_S = 10.0  # After a peer was lost: who restarts is back within seconds, and may have to lead soon.
REDIAL_OFTEN_MAX_S = 0.3
REFUSALS_LOGGED_S = 60.0  # One line for each address and reason in this time.
REFUSALS_KEPT = 1000

_CALLS = (msg.Request, msg.RequestPart, msg.Response, msg.ResponsePart, msg.Taken, msg.Abandon)
Log = Callable[..., None]


class PeerView(Struct, frozen=True):
    """A connected peer. Offsets: its clock less ours."""

    node: msg.NodeInfo
    address: str
    round_trip_s: float | None
    clock_offset_s: float | None
    buffered_bytes: int

    @property
    def node_name(self) -> str:
        return self.node.name


class Counters:
    """Since the start of the process."""

    def __init__(self) -> None:
        self.reconnects = 0
        self.refused = 0


class Mesh:
    """The peers of one node. Events come synchronously, in order, on the event loop."""

    def __init__(
        self,
        *,
        node: msg.NodeInfo,
        cluster: str,
        key: Key,
        listen: Sequence[str],
        join: Sequence[str],
        heartbeat_s: float,
        peer_timeout_s: float,
        redial_max_s: float,
        random: Random,
        on_event: Callable[[PeerUp | PeerDown | Received | Collided], None],
        on_call: Callable[[int, Any], None],
        log: Log,
    ) -> None:
        self.node = node
        self.cluster = cluster
        self.credentials = Credentials(key, node)
        self.heartbeat_s = heartbeat_s
        self.peer_timeout_s = peer_timeout_s
        self.counters = Counters()
        self.port = 0
        self.hosts: tuple[str, ...] = ()  # addresses that we listen on; none: all
        self._listen = listen
        self._join = join
        self._redial_max_s = redial_max_s
        self._random = random
        self._on_event = on_event
        self._on_call = on_call
        self._log = log
        self._servers: list[asyncio.Server] = []
        self._half_open: dict[Connection, None] = {}  # the oldest first
        self._open: dict[int, Connection] = {}
        self._known_boots: dict[int, int] = {}
        self._hints: dict[int, tuple[str, ...]] = {}
        self._dialers: dict[int | str, asyncio.Task[None]] = {}
        self._wake: dict[int | str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusals: dict[tuple[str, str], tuple[float, int]] = {}
        self._is_stopping = False

    # -- Life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, where we are a scheduler, and dial the addresses that were named. Raises ConfigError."""
        if "scheduler" in self.node.roles:
            await self._start_listening()
        for address in self._join:
            self._start_dialer(address)

    async def _start_listening(self) -> None:
        loop = asyncio.get_running_loop()
        for address in self._listen or ("",):
            host, port = split_address(address) if address else ("", PORT_DEFAULT)
            try:
                listener = _listener(host, port)
            except OSError as error:
                if address:
                    raise ConfigError(f"cannot listen on {address}: {error.strerror}", field="network.listen") from None
                listener = _listener(host, 0)
            if host not in ALL_ADDRESSES:
                self.hosts = (*self.hosts, host)
            self._servers.append(await loop.create_server(self._accept, sock=listener))
            self.port = self.port or listener.getsockname()[1]
            self._log("info", "listening", address=address_text(*listener.getsockname()[:2]))

    async def stop(self, reason: str) -> None:
        """Say goodbye to all peers and close everything."""
        self._is_stopping = True
        for server in self._servers:
            server.close()
        for task in (*self._dialers.values(), *self._tasks):
            task.cancel()
        await asyncio.gather(*self._dialers.values(), *self._tasks, return_exceptions=True)
        for connection in (*self._half_open, *list(self._open.values())):
            connection.goodbye(reason)
        await asyncio.sleep(0)  # Let the transports write.

    # -- Use -----------------------------------------------------------------------------------------------------------

    def send(self, node_id: int, message: msg.Message) -> bool:
        """Send to a connected peer, with everything else of this turn. False where it is not connected."""
        connection = self._open.get(node_id)
        if connection is None:
            return False
        connection.send(message)
        return True

    def disconnect(self, node_id: int, reason: str) -> None:
        """End the connection to a peer that breaks the protocol; it is dialled again like any other that was lost."""
        connection = self._open.get(node_id)
        if connection is not None:
            self._log("warning", "peer disconnected", node=node_id, reason=reason)
            connection.goodbye(reason)

    async def drained(self, node_id: int) -> None:
        """Wait until little waits to be sent to a peer."""
        connection = self._open.get(node_id)
        if connection is not None:
            await connection.drained()

    def peers(self) -> list[PeerView]:
        """Everyone connected."""
        views = []
        for connection in self._open.values():
            session = connection.session
            assert session is not None
            assert session.peer is not None
            views.append(
                PeerView(
                    session.peer, connection.address, session.round_trip_s, session.clock_offset_s,
                    connection.buffered_bytes,
                )
            )  # fmt: skip
        return views

    # -- Hints ---------------------------------------------------------------------------------------------------------

    def add_hint(self, node_id: int, addresses: Sequence[str]) -> None:
        """A scheduler may be found there: it is dialled, if dialling it is our part."""
        if node_id == self.node.node_id or self._is_stopping:
            return
        if "scheduler" in self.node.roles and node_id > self.node.node_id:
            return  # It dials us.
        if node_id not in self._hints and len(self._hints) >= HINTS_MAX:
            return
        self._hints[node_id] = tuple(addresses)
        self._start_dialer(node_id)
        self._wake[node_id].set()

    def add_twin(self, addresses: Sequence[str]) -> None:
        """Another store is announced with our own node id: meet it once, so that both know."""
        if not self._is_stopping and len(self._tasks) < HALF_OPEN_MAX:
            self._keep(self._meet(addresses))

    async def _meet(self, addresses: Sequence[str]) -> None:
        await self._dial_any(addresses)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def remove_hint(self, node_id: int) -> None:
        """It has said that it leaves: dial it no more until it is heard of again."""
        self._hints.pop(node_id, None)

    def _start_dialer(self, target: int | str) -> None:
        task = self._dialers.get(target)
        if task is None or task.done():
            self._wake[target] = asyncio.Event()
            self._dialers[target] = asyncio.get_running_loop().create_task(self._dial_for_ever(target))

    async def _dial_for_ever(self, target: int | str) -> None:
        wait_s = 0.0
        missed_since = monotonic()
        wake = self._wake[target]
        while isinstance(target, str) or target in self._hints:
            if wait_s:
                wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s * self._random.uniform(0.7, 1.3)):
                        await wake.wait()
            addresses = (target,) if isinstance(target, str) else self._hints.get(target, ())
            connection = self._open.get(target) if isinstance(target, int) else self._open_at(target)
            if connection is None and addresses:
                connection = await self._dial_any(addresses)
            if connection is not None:
                await connection.ended
                wait_s, missed_since = REDIAL_MIN_S, monotonic()
            else:
                often_s = REDIAL_OFTEN_MAX_S if monotonic() - missed_since < REDIAL_OFTEN_S else self._redial_max_s
                wait_s = min(max(wait_s * 2, REDIAL_MIN_S), often_s, self._redial_max_s)

    def _open_at(self, address: str) -> Connection | None:
        return next((connection for connection in self._open.values() if connection.address == address), None)

    async def _dial_any(self, addresses: Sequence[str]) -> Connection | None:
        """A connection to the first address that answers as a peer of ours, trying them a moment apart."""
        attempts: list[asyncio.Task[Connection | None]] = []
        try:
            for address in addresses:
                attempts.append(asyncio.get_running_loop().create_task(self._dial(address)))
                done, _ = await asyncio.wait(attempts, timeout=DIAL_STAGGER_S, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    if (connection := attempt.result()) is not None:
                        return connection
            for next_done in asyncio.as_completed(attempts):
                if (connection := await next_done) is not None:
                    return connection
            return None
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)

    async def _dial(self, address: str) -> Connection | None:
        loop = asyncio.get_running_loop()
        connection = Connection(self, self, is_dialled=True)
        try:
            host, port = split_address(address)
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                await loop.create_connection(lambda: connection, host, port)
        except (OSError, ValueError, OverflowError):  # Down, silent, or no address at all.
            return None
        connection.address = address
        self._half_open[connection] = None
        try:
            await connection.secure()
            await asyncio.wait({connection.ended, connection.greeted}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if connection.peer is None:
                connection.close("another address was quicker")
            raise
        return None if connection.ended.done() else connection

    # -- Accepting -----------------------------------------------------------------------------------------------------

    def _accept(self) -> Connection:
        connection = _Accepted(self, self, is_dialled=False)
        connection.on_made = self._on_accepted
        return connection

    def _on_accepted(self, connection: Connection) -> None:
        if self._is_stopping:
            connection.close("we are stopping")
            return
        accepted = [other for other in self._half_open if not other.is_dialled]
        if len(accepted) >= HALF_OPEN_MAX:
            # The host that has the most pays, with its oldest: a stranger pushes out its own, and keeps nobody away.
            ((busiest, _),) = Counter(other.host for other in accepted).most_common(1)
            oldest = next(other for other in accepted if other.host == busiest)
            oldest.close("holds too many connections without a hello", is_refusal=True)
        self._half_open[connection] = None
        self._keep(connection.secure())

    # -- Connections' word ---------------------------------------------------------------------------------------------

    def connection_open(self, connection: Connection) -> None:
        """A peer's hello was good: take it in, unless we have a living connection to it already."""
        self._half_open.pop(connection, None)
        node = connection.peer
        assert node is not None
        old = self._open.get(node.node_id)
        if old is not None and old.peer is not None:
            is_alive = monotonic() - old.heard_at < 2 * self.heartbeat_s
            if old.peer.store_id != node.store_id and is_alive:
                reason = f"node id {node.node_id} is taken by {old.peer.name}: start with another --node-id"
                connection.goodbye(reason, old.peer.name)
                self._log("error", "two nodes have the same id", node=node.node_id, one=old.peer.name, other=node.name)
                return
            if old.peer.boot == node.boot and is_alive:
                connection.goodbye("there is a connection already")
                return
            old.close("replaced by a newer connection")
        if node.node_id in self._known_boots:
            self.counters.reconnects += 1
        self._known_boots[node.node_id] = node.boot
        self._open[node.node_id] = connection
        self._on_event(PeerUp(node))

    def connection_received(self, connection: Connection, messages: list[msg.Message]) -> None:
        """Messages came: calls go their own way, the rest to the node."""
        assert connection.peer is not None
        node_id = connection.peer.node_id
        if self._open.get(node_id) is not connection:
            return
        events: list[msg.Message] = []
        for message in messages:
            if isinstance(message, _CALLS):
                self._on_call(node_id, message)
            else:
                events.append(message)
        if events:
            self._on_event(Received(node_id, events))

    def connection_lost(self, connection: Connection, reason: str, is_refusal: bool) -> None:
        """A connection is gone."""
        self._half_open.pop(connection, None)
        if is_refusal:
            self._note_refusal(connection, reason)
        node = connection.peer
        if node is not None and self._open.get(node.node_id) is connection:
            del self._open[node.node_id]
            is_orderly = connection.session is not None and connection.session.goodbye is not None
            self._on_event(PeerDown(node.node_id, reason, is_orderly))

        session = connection.session
        if session is not None and session.taken_by and not self._is_stopping:
            self._on_event(Collided(session.taken_by, connection.address))

    def _note_refusal(self, connection: Connection, reason: str) -> None:
        self.counters.refused += 1
        host, now = connection.host, monotonic()
        logged_at, count = self._refusals.get((host, reason), (-REFUSALS_LOGGED_S, 0))
        if now - logged_at < REFUSALS_LOGGED_S:
            self._refusals[host, reason] = (logged_at, count + 1)
            return
        if len(self._refusals) >= REFUSALS_KEPT:
            self._refusals.clear()
        self._refusals[host, reason] = (now, 0)
        self._log("warning", "peer refused", address=connection.address, reason=reason, before=count)


class _Accepted(Connection):
    """A connection that somebody else began."""

    on_made: Callable[[Connection], None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        is_first = not self._is_encrypted
        super().connection_made(transport)
        if is_first:
            self.on_made(self)


def _listener(host: str, port: int) -> socket.socket:
    """A listening socket; for all addresses one that takes both IPv6 and IPv4, where the machine has both."""
    if host in ALL_ADDRESSES and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server(("" if host in ALL_ADDRESSES else host, port), family=family, backlog=128)


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT, [IPv6]:PORT, or either without a port. Raises ValueError."""
    if address.startswith("["):
        host, _, port = address[1:].partition("]")
    elif address.count(":") == 1:
        host, _, port = address.partition(":")
    else:
        host, port = address, ""
    port = port.removeprefix(":")
    return host, int(port) if port else PORT_DEFAULT
