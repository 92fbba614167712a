"""The network: connections that deliver in order until they break, over ways that can be slow, or cut in one direction.

A plain end passes messages as they are, and its heartbeats are not played: who would hear nothing for the session's
time-out is told so at that time. That makes hours of peace cost nothing. wires.py has the ends that play every byte.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from taskd.protocol import messages as msg
from tests.sim.engine import Engine

if TYPE_CHECKING:
    from tests.sim.peers import Peers

HEARTBEAT_S = 0.5
SILENCE_S = 2.5
DIAL_TIMEOUT_S = 3.0
HELLO_TIMEOUT_S = 5.0
RETRANSMIT_S = 0.3  # At most, until what waited for a way to be mended arrives.


class Way:
    """One direction between two machines."""

    def __init__(self, engine: Engine, delay_s: float, jitter_s: float) -> None:
        self.delay_s = delay_s
        self.jitter_s = jitter_s
        self.cut_since: float | None = None
        self.cuts = 0  # faults that hold it cut; it is mended when the last of them is over
        self.stories = 0  # how often it was cut: a time-out belongs to one of these
        self.pipes: dict[Pipe, None] = {}
        self._engine = engine
        self._held: list[Pipe] = []

    @property
    def is_cut(self) -> bool:
        return self.cut_since is not None

    def draw_delay_s(self) -> float:
        return self.delay_s + self.jitter_s * self._engine.random.random()

    def cut(self) -> None:
        """Let nothing through. Who listens at its end gives up when the silence has lasted."""
        self.cuts += 1
        if self.cut_since is None:
            self.cut_since = self._engine.now
            self.stories += 1
            for pipe in self.pipes:
                pipe.receiver.expect_silence(self._is_silent, self.stories)

    def _is_silent(self, story: int) -> bool:
        return self.is_cut and self.stories == story

    def mend(self) -> None:
        """Take back one cut."""
        self.cuts = max(0, self.cuts - 1)
        if self.cuts or self.cut_since is None:
            return
        self.cut_since = None
        held, self._held = self._held, []
        for pipe in held:
            self._engine.after(RETRANSMIT_S * self._engine.random.random(), pipe.arrive)

    def hold(self, pipe: Pipe) -> None:
        """Something has come to the cut and waits there."""
        self._held.append(pipe)


class Pipe:
    """What is on its way in one direction of one connection."""

    def __init__(self, engine: Engine, way: Way, receiver: End) -> None:
        self.way = way
        self.receiver = receiver
        self._engine = engine
        self._packets: deque[tuple[float, Any]] = deque()
        self._last_at = 0.0
        self._is_ended = False  # nothing follows any more
        way.pipes[self] = None

    def write(self, payload: Any) -> None:
        """Send: it arrives after all that was sent before it."""
        if self._is_ended:
            return
        at = self._engine.now + self.way.draw_delay_s()
        at = self._last_at = max(at, self._last_at)
        self._packets.append((at, payload))
        if len(self._packets) == 1:
            self._engine.at(at, self.arrive)

    def arrive(self) -> None:
        """The first packet is there, unless the way is cut by now."""
        if not self._packets:
            return
        if self.way.is_cut:
            self.way.hold(self)
            return
        _, payload = self._packets.popleft()
        if self._packets:
            self._engine.at(max(self._packets[0][0], self._engine.now), self.arrive)
        if payload is None:
            self.discard()
        self.receiver.peers.host.hear(self.receiver.arrived, payload)

    def end(self, is_cut_short: bool) -> None:
        """Close: the receiver hears of it after what is on its way, or after a part of that."""
        if self._is_ended:
            return
        if is_cut_short and self._packets:
            for _ in range(self._engine.random.randint(0, len(self._packets) - 1)):
                self._packets.pop()
            at, last = self._packets[-1]
            self._packets[-1] = (at, self.receiver.torn(last))
        self.write(None)
        self._is_ended = True

    def discard(self) -> None:
        """Nothing will arrive any more."""
        self._is_ended = True
        self._packets.clear()
        self.way.pipes.pop(self, None)


class End:
    """One node's end of a connection. Plain: payloads are tuples of messages."""

    def __init__(self, engine: Engine, peers: Peers, is_dialled: bool) -> None:
        self.peers = peers
        self.is_dialled = is_dialled
        self.peer: msg.NodeInfo | None = None
        self.pipe: Pipe  # what we send
        self.other: End
        self.closed_since: float | None = None
        self.target: Any = None  # of whoever dialled
        self._engine = engine
        self._queue: list[msg.Message] = []

    @property
    def is_open(self) -> bool:
        return self.closed_since is None

    def begin(self) -> None:
        """The connection is made: say who we are."""
        self.pipe.write((msg.Hello(msg.PROTOCOL_VERSION, "sim", self.peers.host.info),))
        self._engine.after(HELLO_TIMEOUT_S, self._check_hello)

    def _check_hello(self) -> None:
        if self.peer is None and self.is_open:
            self.peers.host.hear(self.close, "no hello")

    # -- In ----------------------------------------------------------------------------------------------------------

    def arrived(self, payload: Any) -> None:
        """A packet, or None: the other side has closed."""
        if not self.is_open:
            return
        if payload is None:
            self.close("the connection was closed", tells_other=False)
            return
        received: tuple[msg.Message, ...] = payload
        first = received[0]
        if isinstance(first, msg.Hello):
            if first.node.store_id == self.peers.host.info.store_id or first.node.node_id == self.peers.host.node_id:
                self.close("has our node id")
                return
            self.peer = first.node
            self.peers.connection_open(self)
        elif isinstance(first, msg.Goodbye):
            self.close(first.reason, tells_other=False, is_orderly=True)
        elif self.peer is not None:
            self.peers.connection_received(self, received)

    @staticmethod
    def torn(payload: Any) -> Any:
        """What is left of a packet where its connection broke in the middle of it."""
        return payload

    def heard_ago_s(self) -> float:
        """How long ago the last heartbeat came, had they been played."""
        way, other = self.other.pipe.way, self.other
        since = (way.cut_since, other.closed_since, other.peers.host.silent_since)
        silent = min((time for time in since if time is not None), default=None)
        beat_s = HEARTBEAT_S * self._engine.random.random()
        return beat_s if silent is None else self._engine.now - silent + beat_s

    def expect_silence(self, is_silent: Any, *arguments: Any) -> None:
        """From now on nothing more may come: look when the time-out is over."""
        delay_s = SILENCE_S - HEARTBEAT_S * self._engine.random.random()
        self._engine.after(delay_s, self.peers.host.hear, self._give_up, is_silent, arguments)

    def _give_up(self, is_silent: Any, arguments: tuple[Any, ...]) -> None:
        if self.is_open and is_silent(*arguments):
            self.close("silent")

    # -- Out ---------------------------------------------------------------------------------------------------------

    def send(self, message: msg.Message) -> bool:
        """Send with everything else of this turn. True for the first of a turn."""
        self._queue.append(message)
        return len(self._queue) == 1

    def flush(self) -> None:
        """The turn is over."""
        if self._queue and self.is_open:
            self.pipe.write(tuple(self._queue))
        self._queue.clear()

    def goodbye(self, reason: str) -> None:
        """Tell the peer that we close, and do."""
        if self.is_open:
            self.flush()
            self.pipe.write((msg.Goodbye(reason),))
            self.close(reason)

    def close(self, reason: str, *, tells_other: bool = True, is_orderly: bool = False) -> None:
        """Close at once. The owner hears of it; the other side too, when it can be reached."""
        if self.closed_since is not None:
            return
        self.closed_since = self._engine.now
        self._queue.clear()
        if tells_other or self.other.is_open:
            self.pipe.end(is_cut_short=False)
        else:
            self.pipe.discard()
        self.peers.connection_lost(self, reason, is_orderly)

    def die(self, *, is_silent: bool) -> None:
        """The process is gone: the system closes for it, unless that is gone too."""
        if self.closed_since is not None:
            return
        self.closed_since = self._engine.now
        self._queue.clear()
        if is_silent:
            self.pipe.discard()
            if self.other.is_open:
                self.other.expect_silence(lambda: True)
        else:
            self.pipe.end(is_cut_short=True)
