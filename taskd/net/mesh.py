"""All connections of one node: who may come in, one connection a pair, and what they say.

Workers dial every scheduler they hear of; of two schedulers the one with the higher node id dials. What discovery says
is a hint of addresses; who is there, the certificate says. Strangers at the listening port are the matter of gate.py.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import Any

from msgspec import Struct

from taskd.core.events import Collided, PeerDown, PeerUp, Received
from taskd.errors import ConfigError
from taskd.net import gate
from taskd.net.acceptor import Acceptor, listener, reset
from taskd.net.connection import Connection, address_text, monotonic
from taskd.net.dialing import PORT_DEFAULT, Dialer, split_address
from taskd.net.gate import Gate, source_of
from taskd.net.hints import Hints
from taskd.net.keyring import Keys, Ring
from taskd.net.refusals import Refusals
from taskd.net.rotation import Rotation
from taskd.net.security import Key
from taskd.protocol import messages as msg

ALL_ADDRESSES = ("", "*", "::", "0.0.0.0")  # noqa: S104  # TLS with mutual certificates is the guard, not the address
PEERS_MAX = 4096  # Connected at once: whoever holds a worker key can be as many nodes as it likes.
PEERS_PER_HOST_MAX = 1536
BOOTS_KEPT = 8192  # Of nodes that were connected once, to count reconnects.
TWINS_MAX = 4  # Others with our node id that are met at the same time.

_CALLS = (msg.Request, msg.RequestPart, msg.Response, msg.ResponsePart, msg.Taken, msg.Abandon)
Log = Callable[..., None]


class PeerView(Struct, frozen=True):
    """A connected peer. Offsets: its clock less ours."""

    node: msg.NodeInfo
    address: str
    fingerprint: str  # of the cluster key that its connection was opened with
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


class Mesh:
    """The peers of one node. Events come synchronously, in order, on the event loop."""

    def __init__(
        self,
        *,
        node: msg.NodeInfo,
        cluster: str,
        key: Key | Keys,
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
        keys = key if isinstance(key, Keys) else Keys(key)
        self.rotation = Rotation(keys, node, self._connections, log)
        self.heartbeat_s = heartbeat_s
        self.peer_timeout_s = peer_timeout_s
        self.counters = Counters()
        self.port = 0
        self.hosts: tuple[str, ...] = ()  # addresses that we listen on; none: all
        self._listen = listen
        self._join = join
        self._on_event = on_event
        self._on_call = on_call
        self._log = log
        self.gate = Gate(monotonic())
        self.refusals = Refusals(log)
        self._hints = Hints()
        self._dialer = Dialer(self, self._hints, redial_max_s, random)
        self._acceptors: list[Acceptor] = []
        self._half_open: dict[Connection, None] = {}  # the oldest first
        self._open: dict[int, Connection] = {}
        self.peer_hosts: Counter[str] = Counter()  # of open connections
        self._known_boots: dict[int, int] = {}
        self._probes: dict[
            int, tuple[Connection, int]
        ] = {}  # which connection was asked whether it lives, by what ping
        self._tasks: set[asyncio.Task[None]] = set()
        self._twins = 0
        self._is_stopping = False

    # -- Life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, where we are a scheduler, and dial the addresses that were named. Raises ConfigError."""
        if "scheduler" in self.node.roles:
            self._start_listening()
        self.rotation.start()
        for address in self._join:
            self._dialer.start(address)

    def _start_listening(self) -> None:
        for address in self._listen or ("",):
            host, port = split_address(address) if address else ("", PORT_DEFAULT)
            host = "" if host in ALL_ADDRESSES else host
            try:
                listening = listener(host, port)
            except OSError as error:
                if address:
                    raise ConfigError(f"cannot listen on {address}: {error.strerror}", field="network.listen") from None
                listening = listener(host, 0)
            if host:
                self.hosts = (*self.hosts, host)
            self._acceptors.append(Acceptor(listening, self._admit, self._accept, self._note_trouble))
            self.port = self.port or listening.getsockname()[1]
            self._log("info", "listening", address=address_text(*listening.getsockname()[:2]))

    async def stop(self, reason: str) -> None:
        """Say goodbye to all peers and close everything."""
        self._is_stopping = True
        self.rotation.stop()
        for acceptor in self._acceptors:
            acceptor.close()
        for task in self._tasks:
            task.cancel()
        await self._dialer.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in (*self._half_open, *list(self._open.values())):
            connection.goodbye(reason)
        await asyncio.sleep(0)  # Let the transports write.

    @property
    def ring(self) -> Ring:
        """The keys that count now, and TLS with them."""
        return self.rotation.ring

    def _connections(self) -> list[Connection]:
        """Those that a key has opened, before their hello too."""
        return [connection for connection in (*self._open.values(), *self._half_open) if connection.fingerprint]

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
                    session.peer, connection.address, connection.fingerprint, session.round_trip_s,
                    session.clock_offset_s, connection.buffered_bytes,
                )
            )  # fmt: skip
        return views

    def silence_s(self) -> float:
        """Since when the most silent of the connected peers was not heard; 0 where there is none."""
        return max((monotonic() - connection.heard_at for connection in self._open.values()), default=0.0)

    # -- Dialling ------------------------------------------------------------------------------------------------------

    def add_hint(self, node_id: int, addresses: Sequence[str], name: str = "") -> None:
        """A scheduler may be found there, as an announcement of this name says: it is dialled, if that is our part."""
        if node_id == self.node.node_id or self._is_stopping:
            return
        if "scheduler" in self.node.roles and node_id > self.node.node_id:
            return  # It dials us.
        dropped = self._hints.add(node_id, name, addresses)
        if dropped is not None:
            self._dialer.drop(dropped)
        self._dialer.start(node_id)

    def remove_hint(self, node_id: int, name: str = "") -> None:
        """An announcement was taken back."""
        self._hints.remove(node_id, name)

    def add_twin(self, addresses: Sequence[str]) -> None:
        """Another store, or another process of ours, is announced with our own node id: meet it once, so that both
        know."""
        if not self._is_stopping and self._twins < TWINS_MAX:
            self._keep(self._meet(addresses))

    async def _meet(self, addresses: Sequence[str]) -> None:
        self._twins += 1
        try:
            await self._dialer.dial_any(addresses, None)
        finally:
            self._twins -= 1

    def new_connection(self) -> Connection:
        """One that is to be dialled."""
        return Connection(self, self, is_dialled=True)

    def begun(self, connection: Connection) -> None:
        """A connection that we dialled has begun its handshake."""
        self._half_open[connection] = None

    def open_to(self, target: int | str) -> Connection | None:
        """The open connection to a node, or to an address that was dialled."""
        if isinstance(target, int):
            return self._open.get(target)
        return next((connection for connection in self._open.values() if connection.address == target), None)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- Accepting -----------------------------------------------------------------------------------------------------

    def _admit(self, host: str, port: str) -> bool:
        now = monotonic()
        reason = self.gate.admit(host, now)
        if reason:
            self.refusals.note(source_of(host), f"{host}:{port}", reason, now)
        return not reason

    def _accept(self, end: socket.socket) -> None:
        if self._is_stopping:
            reset(end)
        else:
            self._keep(self._secure(end))

    async def _secure(self, end: socket.socket) -> None:
        connection = Connection(self, self, is_dialled=False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, end)
        except OSError:
            end.close()
            return
        except BaseException:
            end.close()
            raise
        self._make_room(connection.host)
        self._half_open[connection] = None
        await connection.secure()

    def _make_room(self, host: str) -> None:
        """For one more half-open connection: who has too many pays with its oldest, so that a stranger pushes out its
        own and keeps nobody away."""
        accepted = [other for other in self._half_open if not other.is_dialled]
        source = source_of(host)
        mine = [other for other in accepted if source_of(other.host) == source]
        if len(mine) >= gate.HALF_OPEN_PER_SOURCE_MAX:
            mine[0].close("holds too many connections without a hello", is_refusal=True)
        elif len(accepted) >= gate.HALF_OPEN_MAX:
            ((busiest, _),) = Counter(source_of(other.host) for other in accepted).most_common(1)
            oldest = next(other for other in accepted if source_of(other.host) == busiest)
            oldest.close("holds too many connections without a hello", is_refusal=True)

    def _note_trouble(self, error: OSError) -> None:
        """This process can accept nothing at the moment."""
        self.refusals.say("accept", monotonic(), "error", "no connection can be accepted", reason=error.strerror)

    # -- Connections' word ---------------------------------------------------------------------------------------------

    def connection_open(self, connection: Connection) -> None:
        """A peer's hello was good: take it in, unless we have a living connection to it already."""
        self._half_open.pop(connection, None)
        node, now = connection.peer, monotonic()
        assert node is not None
        if not connection.is_dialled:
            self.gate.greeted(connection.host, now)
        if not self._may_replace(connection, node, now):
            return
        if len(self._open) >= PEERS_MAX or self.peer_hosts[connection.host] >= PEERS_PER_HOST_MAX:
            connection.goodbye("too many nodes are connected")
            self.refusals.note(connection.source, connection.address, "too many nodes are connected", now)
            return
        if node.node_id in self._known_boots:
            self.counters.reconnects += 1
        self._known_boots[node.node_id] = node.boot
        if len(self._known_boots) > BOOTS_KEPT:
            del self._known_boots[next(iter(self._known_boots))]
        if connection.is_dialled:
            self._hints.met(node.node_id, node.store_id.hex(), connection.address, now)
        self._open[node.node_id] = connection
        self.peer_hosts[connection.host] += 1
        self._on_event(PeerUp(node))

    def _may_replace(self, connection: Connection, node: msg.NodeInfo, now: float) -> bool:
        """Whether this connection is the one to its node. Where there is another one, only a dead one is replaced: of
        one that lives, this is a second dialling, another node with the same id, or a copy of its disk."""
        old = self._open.get(node.node_id)
        if old is None or old.peer is None:
            return True
        if now - old.heard_at >= 2 * self.heartbeat_s:
            old.close("replaced by a newer connection")
            return True
        if old.peer.store_id != node.store_id:
            reason = f"node id {node.node_id} is taken by {old.peer.name}: start with another --node-id"
            connection.goodbye(reason, old.peer.name)
            self.refusals.say(
                f"twins of {node.node_id}", now, "error", "two nodes have the same id", node=node.node_id,
                one=old.peer.name, other=node.name,
            )  # fmt: skip
        elif old.peer.boot == node.boot:
            connection.goodbye("there is a connection already")
        else:
            self._tell_restart_from_copy(connection, node, old, now)
        return False

    def _tell_restart_from_copy(self, connection: Connection, node: msg.NodeInfo, old: Connection, now: float) -> None:
        """Another process of a node comes while the connection of one is open. A process that has restarted is dead
        there, whatever has still been on its way: so that one is asked, and this one comes again in a moment."""
        asked, number = self._probes.get(node.node_id, (None, 0))
        assert old.session is not None
        if asked is old and old.session.answered >= number:
            reason = f"a copy of the disk of node {node.node_id} runs at {old.host} already: stop one of the two"
            connection.goodbye(reason, old.peer.name if old.peer is not None else "", is_copy=True)
            self.refusals.say(
                f"copies of {node.node_id}", now, "error", "a copy of a node's disk runs as well", node=node.node_id,
                name=node.name, one=old.address, other=connection.address,
            )  # fmt: skip
            return
        if asked is not old:
            self._probes[node.node_id] = (old, old.probe())
        connection.goodbye("an earlier process of this node is connected: it is asked whether it lives")

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
            self.refusals.note(connection.source, connection.address, reason, monotonic())
        node = connection.peer
        if node is not None and self._open.get(node.node_id) is connection:
            del self._open[node.node_id]
            self._probes.pop(node.node_id, None)
            self.peer_hosts[connection.host] -= 1
            if not self.peer_hosts[connection.host]:
                del self.peer_hosts[connection.host]
            is_orderly = connection.session is not None and connection.session.goodbye is not None
            self._on_event(PeerDown(node.node_id, reason, is_orderly))

        session = connection.session
        # A scheduler's word alone: it may end a node that starts.
        is_believed = session is not None and "scheduler" in session.certified_roles
        if session is not None and session.taken_by and is_believed and not self._is_stopping:
            self._on_event(Collided(session.taken_by, connection.address, session.is_copy))
