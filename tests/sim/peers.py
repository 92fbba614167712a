"""The connections of one running daemon, as taskd.net.mesh keeps them: who dials, who may come in, one a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taskd.core import events as ev
from taskd.protocol import messages as msg
from tests.sim.network import DIAL_TIMEOUT_S, HEARTBEAT_S, End, Pipe
from tests.sim.wires import WireEnd

if TYPE_CHECKING:
    from tests.sim.host import Host
    from tests.sim.world import World

REDIAL_MIN_S = 0.05
REDIAL_MAX_S = 3.0
HANDSHAKE_TRIPS = 3  # Until the first hello: TCP, the banner, TLS.

CALLS = (msg.Request, msg.Response)


class Dialer:
    """One scheduler that is looked for."""

    __slots__ = ("is_dialling", "target", "turn", "wait_s")

    def __init__(self, target: Host) -> None:
        self.target = target
        self.wait_s = 0.0
        self.is_dialling = False
        self.turn = 0  # counts what was planned: an earlier plan is void


class Peers:
    """All connections of one process; gone with it."""

    def __init__(self, world: World, host: Host) -> None:
        self.world = world
        self.host = host
        self.open: dict[int, End] = {}
        self.ends: dict[End, None] = {}  # greeted or not
        self.is_over = False
        self.dialers: dict[int, Dialer] = {}
        self._boot = host.boot

    # -- Dialling ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Dial whom it is our part to dial; who dials us hears that we are here."""
        host = self.host
        for target in self.world.hosts:
            if not target.is_scheduler or target is host:
                continue
            if host.is_scheduler and target.node_id > host.node_id:
                continue
            dialer = self.dialers[target.index] = Dialer(target)
            self._plan(dialer, self._draw_s(0.05))
        if host.is_scheduler:
            for other in self.world.hosts:
                if other is not host and not self.world.way(host, other).is_cut:
                    self.world.engine.after(self._draw_s(0.05), self._announce, other)

    def _announce(self, other: Host) -> None:
        """A standing dialler of the other one hears of us by mDNS."""
        if self.is_over or not other.is_up:
            return
        dialer = other.peers.dialers.get(self.host.index)
        if dialer is not None and not dialer.is_dialling and self.host.node_id not in other.peers.open:
            other.hear(other.peers._plan, dialer, 0.0)

    def _draw_s(self, longest_s: float) -> float:
        return longest_s * (0.2 + 0.8 * self.world.engine.random.random())

    def _plan(self, dialer: Dialer, delay_s: float) -> None:
        dialer.turn += 1
        self.world.engine.after(delay_s, self.host.hear_as, self._boot, self._dial, dialer, dialer.turn)

    def _dial(self, dialer: Dialer, turn: int) -> None:
        if self.is_over or turn != dialer.turn or dialer.is_dialling or dialer.target.node_id in self.open:
            return
        target, world = dialer.target, self.world
        there, back = world.way(self.host, target), world.way(target, self.host)
        dialer.is_dialling = True
        if there.is_cut or back.is_cut or target.is_off:
            world.engine.after(DIAL_TIMEOUT_S, self.host.hear_as, self._boot, self._failed, dialer)
        elif not target.is_up:
            world.engine.after(there.draw_delay_s() + back.draw_delay_s(), self._refused, dialer)
        else:
            delay_s = sum(there.draw_delay_s() + back.draw_delay_s() for _ in range(HANDSHAKE_TRIPS))
            world.engine.after(delay_s, self._connected, dialer, target.boot)

    def _refused(self, dialer: Dialer) -> None:
        self.host.hear_as(self._boot, self._failed, dialer)

    def _connected(self, dialer: Dialer, boot: int) -> None:
        """The handshake is through, if nothing came between."""
        target, world = dialer.target, self.world
        there, back = world.way(self.host, target), world.way(target, self.host)
        if self.is_over or there.is_cut or back.is_cut or not target.is_up or target.boot != boot:
            self.host.hear_as(self._boot, self._failed, dialer)
            return
        self.connect_to(target).target = dialer

    def connect_to(self, target: Host) -> End:
        """A connection to a process that runs; both sides say hello."""
        world = self.world
        kind = WireEnd if world.plays_bytes else End
        ours, theirs = kind(world.engine, self, True), kind(world.engine, target.peers, False)
        ours.other, theirs.other = theirs, ours
        ours.pipe = Pipe(world.engine, world.way(self.host, target), theirs)
        theirs.pipe = Pipe(world.engine, world.way(target, self.host), ours)
        self.ends[ours] = None
        target.peers.ends[theirs] = None
        ours.begin()
        theirs.begin()
        return ours

    def _failed(self, dialer: Dialer) -> None:
        if self.is_over:
            return
        dialer.is_dialling = False
        dialer.wait_s = min(max(dialer.wait_s * 2, REDIAL_MIN_S), REDIAL_MAX_S)
        self._plan(dialer, dialer.wait_s * self.world.engine.random.uniform(0.7, 1.3))

    # -- Connections' word, as in taskd.net.mesh -----------------------------------------------------------------------

    def connection_open(self, end: End) -> None:
        """A peer's hello was good: take it in, unless we have a living connection to it already."""
        node = end.peer
        assert node is not None
        old = self.open.get(node.node_id)
        if old is not None and old.peer is not None:
            is_alive = old.heard_ago_s() < 2 * HEARTBEAT_S
            if old.peer.store_id != node.store_id and is_alive:
                end.goodbye(f"node id {node.node_id} is taken")
                return
            if old.peer.boot == node.boot and is_alive:
                end.goodbye("there is a connection already")
                return
            old.close("replaced by a newer connection")
        self.open[node.node_id] = end
        self.host.tell(ev.PeerUp(node))

    def connection_received(self, end: End, messages: tuple[msg.Message, ...]) -> None:
        """Messages came: calls go their own way, the rest to the node."""
        assert end.peer is not None
        node_id = end.peer.node_id
        if self.open.get(node_id) is not end:
            return
        told = [message for message in messages if not isinstance(message, CALLS)]
        for message in messages if len(told) < len(messages) else ():
            if isinstance(message, CALLS):
                self.host.relay.on_message(node_id, message)
        if told:
            for message in told:
                self.world.referee.on_delivered(self.host, node_id, message)
            self.host.tell(ev.Received(node_id, told))

    def connection_lost(self, end: End, reason: str, is_orderly: bool) -> None:
        """A connection is gone."""
        self.ends.pop(end, None)
        node = end.peer
        if node is not None and self.open.get(node.node_id) is end:
            del self.open[node.node_id]
            self.world.referee.on_peer_lost(self.host, node.node_id)
            self.host.tell(ev.PeerDown(node.node_id, reason, is_orderly))
            self.host.relay.on_peer_lost(node.node_id)
        if self.is_over:
            return
        for dialer in self.dialers.values():
            if dialer is end.target:
                dialer.is_dialling = False
                if node is not None:
                    dialer.wait_s = 0.0
                self._failed(dialer)
            elif node is not None and dialer.target.node_id == node.node_id and not dialer.is_dialling:
                self._failed(dialer)  # Another machine with the same node id, or a connection that came in between.

    # -- The process -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Say goodbye to all and close."""
        self.is_over = True
        for end in list(self.ends):
            end.goodbye("stopping")
        self.ends.clear()

    def die(self, *, is_silent: bool) -> None:
        """The process is gone."""
        self.is_over = True
        for end in list(self.ends):
            end.die(is_silent=is_silent)
        self.ends.clear()
        self.open.clear()
